"""The two supervised stages at the smallest size: heads, then free-form answers on what the first has learnt; both are checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.atlas.faults import BadSamples
from omnisapiens_jax.atlas.labels import HBA, REAL_TEXT
from omnisapiens_jax.convert.huggingface import write_thinker
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.label_files import domains_of, write_companions
from omnisapiens_jax.convert.source import Source
from omnisapiens_jax.convert.unfinished import whole_or_nothing
from omnisapiens_jax.evaluation.answers import Answer, load_answers, save_answers
from omnisapiens_jax.parallel.mesh import on_mesh
from omnisapiens_jax.processing.tensors import ConversionError
from omnisapiens_jax.resources import resource
from omnisapiens_jax.training import jobs
from omnisapiens_jax.training.data import Atlas
from omnisapiens_jax.training.journal import Journal, read_metrics
from omnisapiens_jax.training.state import TrainState, create_state, open_weights, thinker_config
from tests import tiny
from tests.checkpoints import tiny_thinker
from tests.models import cases
from tests.training import world

LORA: dict[str, Any] = {"model__lora__rank": 2, "model__lora__alpha": 4.0, "model__lora__targets__decoder": ("q_proj", "down_proj")}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_thinker(tmp_path_factory.mktemp("theirs"))


def trained(folder: Path, job: str, **changes: Any) -> tuple[world.World, TrainState, list[Answer]]:
    """A job run in `folder`, without its page."""
    made = world.config(job, **changes)
    made[job].optim.update({"schedule": "constant", "warmup": 0, "lr": 1e-2})
    jobs.check(made, world.mesh_of((1, 1, 1)))
    jobs.claim(folder, made)
    here, lesson = world.world(made), jobs._LESSONS[job]
    with on_mesh(here.mesh):
        run = here.run(folder)
        state = run.fit(made[job], job, jax.tree.map(jnp.copy, here.state), lesson)
        return here, state, run.evaluate(job, state, run.held_out(lesson), lesson)


@pytest.fixture(scope="module")
def first(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, world.World, TrainState, list[Answer]]:
    """Stage 1: heads and LoRA on a thinker of Hugging Face."""
    folder = tmp_path_factory.mktemp("sft")
    return folder, *trained(folder, "sft", model__weights=str(theirs), sft__steps=6, **LORA)


@pytest.fixture(scope="module")
def second(first: tuple[Path, Any, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Stage 2 on stage 1."""
    folder = tmp_path_factory.mktemp("qa")
    yield folder, *trained(folder, "qa", model__weights=str(first[0] / "sft"), generation__max_tokens=4, **LORA)


def tensors(source: Source) -> dict[str, np.ndarray]:
    source.check()
    factors = source.lora.factors if source.lora else {}
    return {name: tensor.read() for name, tensor in {**source.tensors, **factors, **source.parts}.items()}


def test_heads_and_factors_learn_and_nothing_else(first: tuple[Path, world.World, TrainState, list[Answer]]) -> None:
    folder, here, state, _ = first
    rows = read_metrics(folder / "sft" / "metrics.jsonl")
    assert len(rows) == 6 and all(0 < row["samples"] <= 8 and np.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["validation_loss"] < rows[1]["validation_loss"]
    paths = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(state.trainable)}
    assert all("lora_" in path or path.startswith("heads/") for path in paths) and any(path.startswith("heads/") for path in paths)
    for name in ("kernel", "bias"):
        before, after = (np.asarray(nnx.to_pure_dict(s.trainable)["heads"]["affine"][name]) for s in (here.state, state))
        assert (before != after).any()


def test_every_sample_with_a_head_is_answered_with_a_label_of_its_domain(first: tuple[Path, Any, Any, list[Answer]]) -> None:
    folder, _, _, answers = first
    source = Atlas(world.config("sft"), tiny.TINY).source("test")
    assert [answer.id for answer in answers] == [i for i in range(len(source)) if source[i].kind == "cls"]
    for answer in answers:
        assert answer.prediction in HBA.domains[HBA.head(answer.dataset)].labels and answer.gold == source[answer.id].answer
    assert len(json.loads((folder / "evaluation-sft.json").read_text())) == len(answers)


def test_a_stage_of_heads_is_a_checkpoint(first: tuple[Path, Any, TrainState, Any], theirs: Path, tmp_path: Path) -> None:
    """The thinker it began with, the factors, and heads by their released names; as such it is exported."""
    folder, _, state, _ = first
    source, learnt = open_source(folder / "sft"), nnx.to_pure_dict(state.trainable)
    assert source.kind.endswith("of a run of ours on a thinker of Hugging Face") and source.part_shapes.heads == (7, 8, 2, 2, 2, 2, 2)
    begin = 0
    for number, count in enumerate(source.part_shapes.heads):
        for what, axis in (("weight", "kernel"), ("bias", "bias")):
            wanted = np.asarray(learnt["heads"]["affine"][axis])[..., begin : begin + count].T
            np.testing.assert_array_equal(source.parts[f"heads.{number}.{what}"].read(), wanted, strict=True)
        begin += count
    assert source.lora and {name: t.read().tobytes() for name, t in source.tensors.items()} == {
        name: t.read().tobytes() for name, t in open_source(theirs).tensors.items()
    }
    factors = np.asarray(learnt["thinker"]["decoder"]["layers"]["block"]["self_attn"]["q_proj"]["lora_b"])
    for layer, wanted in enumerate(factors):
        found = source.lora.factors[f"model.layers.{layer}.self_attn.q_proj.lora_B.weight"].read()
        np.testing.assert_array_equal(found, wanted.T, strict=True)
    assert factors[0].any() and not factors[1].any()  # nothing reads the last of the two layers

    (tmp_path / "began").mkdir()
    (tmp_path / "began" / "label_scheme.json").write_text(json.dumps(REAL_TEXT.released()))  # of heads that are no more
    with whole_or_nothing(tmp_path / "released", None) as (target, journal):
        write_thinker(source.merged(), target, journal)
        write_companions(dataclasses.replace(source.merged(), companions=tmp_path / "began"), target)
    released = open_source(tmp_path / "released")
    assert domains_of(source) == domains_of(released) == HBA.domains
    assert json.loads((tmp_path / "released" / "label_scheme.json").read_text()) == HBA.released()
    assert (tmp_path / "released" / "heads.bin").is_file() and released.parts.keys() == source.parts.keys()
    for name, tensor in source.parts.items():
        np.testing.assert_array_equal(released.parts[name].read(), tensor.read(), strict=True)


def test_heads_of_other_classes_are_refused(theirs: Path, tmp_path: Path) -> None:
    """As many in each head, but in another order."""
    shutil.copytree(theirs, tmp_path / "other")
    turned = dataclasses.replace(HBA, domains=(HBA.domains[0], *HBA.domains[:0:-1]))
    made = world.config("sft", model__weights=str(tmp_path / "other"), **LORA)
    for scheme, content in ((HBA, HBA.released()), (None, {"emotion": []}), (turned, turned.released())):
        (tmp_path / "other" / "label_scheme.json").write_text(json.dumps(content))
        assert domains_of(open_source(tmp_path / "other")) == (scheme and scheme.domains)
        open_weights.cache_clear()
        if scheme is turned:
            with pytest.raises(ValueError, match=r"other are for other classes, or in another order, .* hba: they are for sentiment_inten"):
                jobs.check(made, world.mesh_of((1, 1, 1)))
        else:
            jobs.check(made, world.mesh_of((1, 1, 1)))


def test_heads_go_on_from_those_of_the_weights(first: tuple[Path, Any, TrainState, Any]) -> None:
    made = world.config("sft", model__weights=str(first[0] / "sft"), **LORA)
    state = create_state(made.model, 1, world.mesh_of((1, 1, 1)))[1]
    jax.tree.map(np.testing.assert_array_equal, state.trainable, first[2].trainable)
    made.model.heads = (2, 3)
    with pytest.raises(ValueError, match=r"has heads of \(7, 8, 2, 2, 2, 2, 2\) labels, the run wants \(2, 3\)"):
        create_state(made.model, 1, world.mesh_of((1, 1, 1)))


def test_a_finished_stage_is_not_run_again(first: tuple[Path, world.World, TrainState, Any]) -> None:
    folder, here, state, _ = first
    before = (folder / "sft" / "metrics.jsonl").read_bytes()
    with on_mesh(here.mesh):
        again = here.run(folder).fit(here.config.sft, "sft", jax.tree.map(jnp.copy, here.state), jobs.LABELS)
    assert (folder / "sft" / "metrics.jsonl").read_bytes() == before
    jax.tree.map(np.testing.assert_array_equal, again.trainable, state.trainable)


class Killed(BaseException):
    """Nothing in the package catches it."""


def test_a_stage_that_goes_on_drops_what_it_would_have_dropped(
    first: tuple[Path, world.World, TrainState, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA dropout is on, and the run is killed behind a checkpoint: the same losses and factors, bit for bit."""
    folder, here, state, _ = first
    assert here.config.model.lora.dropout > 0
    write = Journal.write

    def deadly(self: Journal, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        if step == 3:
            raise Killed
        return write(self, step, metrics)

    def fit() -> TrainState:
        with on_mesh(here.mesh):
            return here.run(tmp_path).fit(here.config.sft, "sft", jax.tree.map(jnp.copy, here.state), jobs.LABELS)

    monkeypatch.setattr(Journal, "write", deadly)
    with pytest.raises(Killed):
        fit()
    monkeypatch.setattr(Journal, "write", write)
    again, losses = fit(), ([row["loss"] for row in read_metrics(where / "sft" / "metrics.jsonl")] for where in (folder, tmp_path))
    assert len({tuple(rows) for rows in losses}) == 1
    jax.tree.map(np.testing.assert_array_equal, again.trainable, state.trainable)


def test_free_form_answers_train_the_lm_head_alone(first: Any, second: tuple[Path, world.World, TrainState, list[Answer]]) -> None:
    folder, _, state, answers = second
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(state.trainable)]
    assert paths == ["lm_head/kernel/value"] and {answer.dataset for answer in answers} == {"siq2", "mimeqa"}
    assert all(row["tokens"] > 0 for row in read_metrics(folder / "qa" / "metrics.jsonl"))
    before, after = open_source(first[0] / "sft"), open_source(folder / "qa")
    assert after.kind.count("of a run of ours on") == 2 and after.part_shapes == before.part_shapes
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    assert [name for name in old if (old[name] != new[name]).any()] == ["lm_head.weight"]


def test_a_tied_lm_head_is_untied_to_be_trained(tmp_path: Path) -> None:
    """In float32, whatever the rest is stored in; it begins as the table of token embeddings."""
    cases.write_checkpoint(dataclasses.replace(tiny.TINY, tie_head=True), tmp_path)
    shutil.copy(resource("data/mini/tokenizer.model"), tmp_path)
    made = world.config("qa", model__weights=str(tmp_path), model__param_dtype="bfloat16")
    assert open_source(tmp_path).config.tie_head and not thinker_config(made.model).tie_head
    state = nnx.to_pure_dict(world.world(made).state.trainable)["lm_head"]["kernel"]
    assert state.dtype == jnp.float32
    table = open_source(tmp_path).tensors["model.embed_tokens.weight"].read()
    np.testing.assert_array_equal(state, table.T)


def test_an_lm_head_on_weights_that_were_not_kept_is_told(second: tuple[Path, Any, Any, Any], tmp_path: Path) -> None:
    shutil.copytree(second[0], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"] |= {"weights": "", "preset": "tiny"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="the run trained an LM head on random weights, which it did not keep"):
        open_source(tmp_path / "run" / "qa")


def test_rows_that_no_head_can_learn_are_counted_or_stop_the_run(tmp_path: Path) -> None:
    """A label outside the domain, a free-form dataset and an unknown one that claim to be classified."""
    row = {"problem": "Is the writer anxious?", "modality_signature": "text", "task": "anxiety_cls", "dataset": "mmpsy_anxiety"}
    rows = [row | {"answer": answer} for answer in ("anxiety", "No Anxiety", "sarcasm")]
    rows += [row | {"answer": "anxiety", "dataset": dataset} for dataset in ("siq2", "diary")]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = world.config("sft", atlas__path=str(tmp_path), atlas__on_error="skip")
    split = Atlas(made, tiny.TINY).split("train", batch_size=2, target=None, shuffle=False, rows=jobs.LABELS.rows())
    assert split.pipeline.faults.counts() == {("mmpsy_anxiety", "label"): 1, ("siq2", "label"): 1, ("diary", "label"): 1}
    _, batch = next(split.pipeline.batches(0, 1))
    assert batch["label"].tolist() == [20, 19] and batch["domain"].tolist() == [4, 4]
    made.atlas.on_error = "raise"
    told = r"3 samples cannot be used(.|\n)*unknown label 'sarcasm' of dataset 'mmpsy_anxiety'; its labels are: no anxiety, anxiety"
    with pytest.raises(BadSamples, match=told):
        Atlas(made, tiny.TINY).split("train", batch_size=2, target=None, shuffle=False)


def test_a_checkpoint_with_heads_is_evaluated_by_them_and_its_language_model(second: Any, first: Any, tmp_path: Path) -> None:
    """Labels as stage 1 found them itself, free-form answers as stage 2 gave them, in one file."""
    changes = {"model__weights": str(second[0] / "qa"), "generation__max_tokens": 4, "blanked": ("text",)}
    config = jobs.of_checkpoint(world.config("evaluate", **changes))
    assert config.model.heads == (7, 8, 2, 2, 2, 2, 2) and config.model.lora.rank == 2 and config.processing.format_prompt == "none"
    here = world.world(config)
    jobs.check(config, here.mesh)
    with on_mesh(here.mesh):
        jobs._evaluate(here.run(tmp_path), here.state)
    found = load_answers(tmp_path / "evaluation-checkpoint.json")
    wanted = sorted([*first[-1], *second[-1]], key=lambda answer: answer.id)
    assert [(row.id, row.prediction, row.text) for row in found] == [(row.id, row.prediction, row.text) for row in wanted]
    plain = json.loads((tmp_path / "comparison.json").read_text())
    assert list(plain["runs"]) == ["checkpoint", "checkpoint-without-text"] and plain["samples"] == len(wanted)
    without = load_answers(tmp_path / "evaluation-checkpoint-without-text.json")
    assert [row.probabilities for row in without] != [row.probabilities for row in found]

    # Judged in place, and then run again.
    judged = [dataclasses.replace(row, explanation="seen") for row in found]
    save_answers(tmp_path / "evaluation-checkpoint.json", judged)
    with on_mesh(here.mesh):
        jobs._evaluate(here.run(tmp_path), here.state)
    assert load_answers(tmp_path / "evaluation-checkpoint.json") == judged
