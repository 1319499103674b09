"""tools/convert_weights.py as a user meets it: what it makes, what it says before it works, and what it says when it cannot."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omnisapiens_jax.convert import verify
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.parts import HEADS
from omnisapiens_jax.processing.tensors import StoredTensor
from omnisapiens_jax.processing.torch_files import write_torch_file
from tests import pickles
from tests.convert.test_huggingface import store, tensors
from tests.convert.test_peft import exported, random_lora
from tests.models import cases
from tests.oracle import oracle_python
from tools.convert_weights import main

CONFIG = cases.CONFIGS["uneven"]
COMPANIONS = {"tokenizer.model": b"\0not text", "generation_config.json": b"{}", "preprocessor_config.json": b"{}"}


@dataclasses.dataclass(frozen=True)
class World:
    """A thinker in three files with all that belongs beside it, an adapter on it, and heads for it."""

    thinker: Path
    adapter: Path
    released: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    thinker = store(root / "thinker", tensors("uneven", ml_dtypes.bfloat16), CONFIG.to_hf(), shards=3)
    for name, content in COMPANIONS.items():
        (thinker / name).write_bytes(content)
    adapter = exported(dataclasses.replace(open_source(thinker), lora=random_lora("uneven")), root / "adapter")
    released = root / "released"
    shutil.copytree(thinker, released)
    (released / "label_scheme.json").write_text('{"emotion": ["happy", "sad"]}')
    parts = {"heads.0.weight": np.ones((2, CONFIG.text.hidden_size), np.float32), "heads.0.bias": np.array([0.5, -2.0], np.float32)}
    write_torch_file(released / HEADS, parts)
    return World(thinker, adapter, released)


@dataclasses.dataclass(frozen=True)
class Told:
    """Exit status, and what was written to both streams."""

    status: int
    out: str
    err: str


Run = Callable[..., Told]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def ran(*arguments: str | Path) -> Told:
        status = main(list(map(str, arguments)))
        told = capsys.readouterr()
        return Told(status, told.out, told.err)

    return ran


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_times(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint of ours, but for those in which Orbax notes when it was made."""
    return {name: value for name, value in content(folder).items() if Path(name).name not in ("_CHECKPOINT_METADATA", "commit_success.txt")}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: value for name, value in content(folder).items() if name.endswith(".safetensors")}


def test_in_and_out_again_gives_the_files_it_came_from(world: World, run: Run, tmp_path: Path) -> None:
    told = run("import", world.released, tmp_path / "ours")
    assert told.status == 0 and "heads: 2 tensors" in told.err
    assert re.search(r"ours: [\d,]+ parameters in bfloat16; beside them tokenizer\.model, ", told.err)
    told = run("export", tmp_path / "ours", tmp_path / "back")
    assert told.status == 0 and "back: a thinker; beside them heads.bin, " in told.err
    assert weights(tmp_path / "back") == weights(world.released) and len(weights(world.released)) == 3
    for name in (*COMPANIONS, "label_scheme.json"):
        assert (tmp_path / "back" / name).read_bytes() == (world.released / name).read_bytes()
    receipt = json.loads((tmp_path / "back" / "conversion_manifest.json").read_text())
    assert {record["name"] for record in receipt["tensors"]} == tensors("uneven").keys() | {"heads.0.weight", "heads.0.bias"}
    assert receipt["source"] == str(tmp_path / "ours") and receipt["skipped"] == []
    bias = next(record for record in receipt["tensors"] if record["name"] == "heads.0.bias")
    assert bias["file"] == HEADS and bias["sha256"] == hashlib.sha256(np.array([0.5, -2.0], np.float32).tobytes()).hexdigest()


def test_files_can_be_divided_anew(world: World, run: Run, tmp_path: Path) -> None:
    assert run("export", world.thinker, tmp_path / "back", "--shard-size", "0.0001").status == 0
    assert max(map(len, weights(tmp_path / "back").values())) < 110_000 and len(weights(tmp_path / "back")) > 3


def test_factors_are_kept_merged_or_taken_out(world: World, run: Run, tmp_path: Path) -> None:
    """`merge` is `import --merge`; what is kept goes out as it came in, and merged as PEFT's adapter would be."""
    adapter = (world.adapter, "--base", world.thinker)
    assert "LoRA of rank" in run("import", adapter[0], tmp_path / "kept", *adapter[1:]).err
    assert run("merge", adapter[0], tmp_path / "merged", *adapter[1:]).status == 0
    assert run("import", adapter[0], tmp_path / "also", "--merge", *adapter[1:]).status == 0
    assert without_times(tmp_path / "merged") == without_times(tmp_path / "also")

    assert run("export", tmp_path / "kept", tmp_path / "adapter", "--peft").status == 0
    assert weights(tmp_path / "adapter") == weights(world.adapter)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == random_lora("uneven").config.rank
    for source, name, options in (("merged", "one", ()), ("kept", "other", ("--merge",))):
        assert run("export", tmp_path / source, tmp_path / name, "--shard-size", 5, *options).status == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "other")


def test_a_dtype_can_be_chosen(world: World, run: Run, tmp_path: Path) -> None:
    assert "parameters in float32" in run("import", world.thinker, tmp_path / "ours", "--dtype", "float32").err
    assert run("export", tmp_path / "ours", tmp_path / "back", "--shard-size", 5).status == 0
    found, wanted = load_file(tmp_path / "back" / "model.safetensors"), tensors("uneven", ml_dtypes.bfloat16)
    assert {name: value.tobytes() for name, value in found.items()} == {
        name: value.astype(np.float32).tobytes() for name, value in wanted.items()
    }


PLANS = {
    "import": ("import", "thinker", "DST"),
    "merge": ("merge", "adapter", "DST", "--base", "thinker"),
    "export": ("export", "thinker", "DST"),
    "export --peft": ("export", "adapter", "DST", "--base", "thinker", "--peft"),
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_names_every_row_and_writes_nothing(world: World, run: Run, tmp_path: Path, plan: str) -> None:
    told = run(*filled(PLANS[plan], world, tmp_path), "--dry-run")
    assert told.status == 0 and "this is the plan; nothing is written" in told.err
    lines = [line for line in told.out.splitlines() if "model.layers.{}.self_attn.q_proj" in line]
    assert lines and all("decoder.layers.block.self_attn.q_proj" in line for line in lines)
    assert any(".lora_A.weight" in line for line in lines) == ("--peft" in plan)
    assert list(tmp_path.iterdir()) == []


def filled(arguments: tuple[str, ...], world: World, here: Path) -> list[str]:
    """With paths for the words that stand for them."""
    places = {"DST": here / "dst", "NOWHERE": here / "nowhere"} | dataclasses.asdict(world)
    return [str(places.get(argument, argument)) for argument in arguments]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("import", "thinker", "thinker"), r"thinker exists; remove it or name another directory"),
        (("import", "NOWHERE", "DST"), r"nowhere is not a directory; name the one that holds the checkpoint's files"),
        (("import", "adapter", "DST"), r"adapter holds LoRA factors only; name the model they belong to .*--base DIR"),
        (("import", "thinker", "DST", "--merge"), r"thinker has no LoRA factors to merge"),
        (("merge", "thinker", "DST"), r"thinker has no LoRA factors to merge"),
        (("export", "thinker", "DST", "--peft"), r"thinker has no LoRA factors"),
        (("export", "adapter", "DST", "--base", "thinker"), r"has LoRA factors beside its weights: export them alone with --peft, or all"),
        (("import", "adapter", "DST", "--base", "thinker", "--lora-alpha", "7"), r"says that alpha is 6; leave out the 7 that was given"),
        (("export", "adapter", "DST", "--base", "thinker", "--peft", "--shard-size", "5"), r"goes with neither --omni nor --shard-size"),
        (("export", "thinker", "DST", "--omni", "thinker"), r"thinker is no full Omni model: no tensor's name begins with thinker\."),
        (("verify", "thinker"), r"thinker is no checkpoint of ours \(no manifest\.json\); tools/convert_weights\.py import .* makes one"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(
    world: World, run: Run, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    told = run(*filled(arguments, world, tmp_path))
    assert told.status == 1 and re.search(rf"Not done: .*{said}", told.err), told.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("import",), ("import", "a"), ("frobnicate", "a"), ("export", "a", "b", "--shard-size", "0")])
def test_what_is_no_command_ends_with_the_usage(run: Run, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2 and "usage: convert_weights.py" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["import", "export", "merge", "inspect", "verify"])
def test_every_command_has_a_help_text(run: Run, capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(command, "--help")
    assert ended.value.code == 0 and "OWNER/NAME" in capsys.readouterr().out


def test_a_file_that_would_run_something_is_refused(world: World, run: Run, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(world.thinker, hostile)
    payload = pickles.Call(pickles.Name("os", "mkdir"), (str(tmp_path / "executed"),))
    pickles.archive(hostile / HEADS, {"heads.0.weight": payload})
    told = run("import", hostile, tmp_path / "ours")
    assert told.status == 1 and re.search(r"heads\.bin is refused: it names 'os\.mkdir'.* Nothing was executed", told.err)
    assert [path.name for path in tmp_path.iterdir()] == ["hostile"]


def test_an_inspection_lists_all_and_tells_what_does_not_fit(world: World, run: Run, tmp_path: Path) -> None:
    told = run("inspect", world.released)
    assert told.status == 0 and "released is a thinker of Hugging Face: " in told.err
    for name in ("audio_tower.conv1.weight", "lm_head.weight", "heads.0.bias"):
        assert re.search(rf"{re.escape(name)} .*(bfloat16|float32)", told.out)
    stored = tensors("uneven")
    stored["model.norm.weihgt"] = stored.pop("model.norm.weight")
    told = run("inspect", store(tmp_path / "odd", stored, CONFIG.to_hf()))
    assert told.status == 1 and "model.norm.weihgt" in told.out
    assert re.search(r"1 unknown: model\.norm\.weihgt in model\.safetensors\n *1 missing: model\.norm\.weight", told.err)


@pytest.fixture(scope="module")
def ours(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The thinker as a checkpoint of ours."""
    folder = tmp_path_factory.mktemp("imported") / "ours"
    assert main(["import", str(world.thinker), str(folder)]) == 0
    return folder


def rows(told: Told) -> list[list[str]]:
    """The lines of a printed table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.out.splitlines() if line.startswith("│")]


def test_a_checkpoint_is_verified_by_its_receipt_and_by_what_it_came_from(world: World, run: Run, ours: Path) -> None:
    count = str(len(tensors("uneven")))
    told = run("verify", ours, world.adapter)  # no model by itself, and there is nothing to name another with
    assert told.status == 1 and "adapter has no config.json" in told.err and "--base" not in told.err
    told = run("verify", ours, world.thinker)
    assert told.status == 0
    assert [row[:2] for row in rows(told)] == [
        ["tensors as the receipt says", f"{count} of {count}"],
        ["shapes of the reference", f"{count} of {count}"],
        ["values of the reference", f"{count} of {count}"],
        ["run beside transformers", "not done: it is not installed here; name its interpreter with --python"],
    ]


def test_a_bit_that_flipped_is_found_by_name(run: Run, ours: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(ours, bad)
    chunk = bad / "params" / "decoder.layers.block.mlp.up_proj.kernel" / "1.0.0"
    bits = bytearray(chunk.read_bytes())
    bits[100] ^= 1
    chunk.write_bytes(bits)
    told = run("verify", bad)
    assert told.status == 1 and rows(told)[0][-1] == "WRONG"
    assert rows(told)[0][1].endswith("; other: model.layers.1.mlp.up_proj.weight")


def test_a_checkpoint_of_other_weights_is_told_from_a_cast_one(world: World, run: Run, tmp_path: Path) -> None:
    assert run("import", world.thinker, tmp_path / "cast", "--dtype", "float16").status == 0
    told = run("verify", tmp_path / "cast", world.thinker)
    assert told.status == 0 and rows(told)[2][0] == "values of the reference, cast from bfloat16 to float16"
    assert run("merge", world.adapter, tmp_path / "merged", "--base", world.thinker).status == 0
    told = run("verify", tmp_path / "merged", world.thinker)
    assert told.status == 1 and [row[-1] for row in rows(told)[:3]] == ["", "", "WRONG"]


@pytest.mark.oracle
def test_transformers_answers_the_same_at_every_stage(world: World, ours: Path, run: Run) -> None:
    told = run("verify", ours, world.thinker, "--python", oracle_python())
    assert told.status == 0, told.out + told.err
    found = {row[0].removesuffix(": largest difference"): (float(row[1]), float(row[2])) for row in rows(told)[3:]}
    assert tuple(found) == verify.STAGES
    for difference, bound in found.values():
        assert difference <= 0.1 * bound  # the bound leaves room for the depth of a real model; here 1e-5 of the largest value is enough


def test_a_disk_that_fails_while_it_is_read_is_told_and_the_work_goes_on(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done is no fault of the checkpoint's, so it is kept."""
    read, reads = StoredTensor._read, itertools.count()

    def fails_once(self: StoredTensor, *where: Any) -> np.ndarray:
        return read(dataclasses.replace(self, file=tmp_path) if next(reads) == 100 else self, *where)

    monkeypatch.setattr(StoredTensor, "_read", fails_once)
    told = run("import", world.thinker, tmp_path / "ours")
    assert told.status == 1 and re.search(r"Not done: .*: (model|audio_tower|visual)\.\S+ cannot be read \(Is a directory\)", told.err)
    assert "What is done is kept in" in told.err
    told = run("import", world.thinker, tmp_path / "ours")
    assert told.status == 0 and re.search(r"going on where it stopped: \d+ tensors are there", told.err)


def test_a_receipt_of_a_merge_says_what_went_into_every_weight(world: World, run: Run, tmp_path: Path) -> None:
    assert run("merge", world.adapter, tmp_path / "ours", "--base", world.thinker).status == 0
    assert run("export", world.adapter, tmp_path / "theirs", "--base", world.thinker, "--merge").status == 0
    lora, name = random_lora("uneven").config, "model.layers.0.self_attn.q_proj"
    factors = [f"base_model.model.{name}.lora_{factor}.weight in {world.adapter / 'adapter_model.safetensors'}" for factor in "AB"]
    for receipt in (tmp_path / "ours" / "manifest.json", tmp_path / "theirs" / "conversion_manifest.json"):
        said = json.loads(receipt.read_text())
        assert (said["source"], said["base"]) == (str(world.adapter), str(world.thinker))
        assert (said["merged"]["rank"], said["merged"]["alpha"], said["merged"]["scale"]) == (lora.rank, lora.alpha, lora.scale)
        of = {record["name"]: record for record in said["tensors"]}
        assert of[f"{name}.weight"]["with"] == factors and of[f"{name}.bias"]["with"] == []


def test_what_an_adapter_has_no_place_for_is_said_to_stay_behind(world: World, run: Run, tmp_path: Path) -> None:
    """Heads on the way out, and on the way in factors of the talker, by their own name."""
    talker = "base_model.model.talker.model.layers.0.self_attn.q_proj.lora_A.weight"
    shutil.copytree(world.adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {talker: np.ones((3, 4), np.float32)}, file)
    told = run("export", tmp_path / "adapter", tmp_path / "out", "--base", world.released, "--peft")
    assert told.status == 0 and f"left behind: 1 tensors (the speech side of a full Omni model): {talker}" in told.err
    assert "left behind: 2 tensors (an adapter of PEFT holds LoRA factors alone): heads.0." in told.err
    skipped = json.loads((tmp_path / "out" / "conversion_manifest.json").read_text())["skipped"]
    assert {record["name"] for record in skipped} == {talker, "heads.0.weight", "heads.0.bias"}


def planned(told: Told) -> dict[str, list[str]]:
    return {first: rest for first, *rest in rows(told)}


def test_a_plan_says_what_becomes_of_everything(world: World, run: Run, tmp_path: Path) -> None:
    """Dtypes as they will be, heads, what stays behind, files and companions."""
    omni = {f"thinker.{name}": value for name, value in tensors("uneven").items()}
    omni |= {f"talker.layers.{layer}.x": np.ones(2, np.float32) for layer in range(3)}
    folder = store(tmp_path / "omni", omni, {"thinker_config": CONFIG.to_hf()})
    shutil.copy(world.released / HEADS, folder)
    found = planned(run("import", folder, tmp_path / "dst", "--dtype", "float16", "--dry-run"))
    assert found["model.norm.weight"][-1] == "float16"
    assert found["heads.0.bias"] == ["parts.safetensors", "2", "float32"]
    assert found["talker.layers.{}.x"][:2] == ["left behind: the speech side of a full Omni model", "3 tensors"]
    assert found["parts.safetensors"] == ["2 tensors"] and found["params/"][0].endswith(" arrays")

    found = planned(run("export", world.released, tmp_path / "dst", "--shard-size", "0.0001", "--dry-run"))
    assert found["model.norm.weight"][-1] == "bfloat16" and found["heads.0.weight"][0] == HEADS
    assert found[HEADS] == ["2 tensors"] and found["tokenizer.model"] == [f"copied from {world.released}"]
    assert run("export", world.released, tmp_path / "dst", "--shard-size", "0.0001").status == 0
    assert {name for name in found if name.endswith(".safetensors")} == weights(tmp_path / "dst").keys()


def test_a_plan_fails_where_the_work_would(world: World, run: Run, tmp_path: Path) -> None:
    stored = tensors("uneven", ml_dtypes.bfloat16)
    stored["model.layers.1.mlp.up_proj.weight"] = stored["model.layers.1.mlp.up_proj.weight"].astype(np.float32)
    mixed = store(tmp_path / "mixed", stored, CONFIG.to_hf())
    for arguments in (("import", mixed, tmp_path / "dst"), ("export", world.thinker, tmp_path / "dst", "--omni", world.thinker)):
        plan, work = run(*arguments, "--dry-run"), run(*arguments)
        assert (plan.status, work.status) == (1, 1) and plan.err == work.err


def test_what_names_would_do_to_a_terminal_is_not_done(run: Run, tmp_path: Path) -> None:
    name = "evil\x1b[31m\x1b]0;title\x07"
    told = run("inspect", store(tmp_path / "odd", tensors("uneven") | {name: np.ones(1, np.float32)}, CONFIG.to_hf()))
    assert told.status == 1 and "\x1b[31m" not in told.out + told.err and "\x07" not in told.out + told.err
    assert r"evil\x1b[31m\x1b]0;title\x07" in told.out and r"evil\x1b[31m\x1b]0;title\x07" in told.err


@pytest.mark.parametrize("number", ["0", "-1", "nan", "inf", "x"])
def test_a_size_that_is_none_is_told(run: Run, capsys: pytest.CaptureFixture[str], number: str) -> None:
    with pytest.raises(SystemExit):
        run("export", "a", "b", f"--shard-size={number}")
    assert f"argument --shard-size: '{number}' is no number above 0" in capsys.readouterr().err
