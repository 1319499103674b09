"""Names on the hub: found in its cache without a connection, and a clear word where there is neither. Nothing here leaves the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from omnisapiens_jax.convert import hub
from omnisapiens_jax.convert.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DEAD = "http://127.0.0.1:9"  # nobody listens
ASK = "import sys; from omnisapiens_jax.convert.hub import resolve; print(resolve(sys.argv[1]))"


def asked(cache: Path, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`resolve` in a process of its own: the hub's package reads the environment once."""
    of_hub = {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": DEAD} | environment
    return subprocess.run([sys.executable, "-c", ASK, name], env=os.environ | of_hub, capture_output=True, text=True, check=False)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The hub's cache as its package leaves it: one repository, `main` and a tag pointing at one commit."""
    kept = tmp_path / "cache" / "models--owner--name"
    (kept / "snapshots" / COMMIT).mkdir(parents=True)
    (kept / "snapshots" / COMMIT / "config.json").write_text("{}")
    (kept / "refs").mkdir()
    for name in ("main", "v1"):
        (kept / "refs" / name).write_text(COMMIT)
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["owner/name", "owner/name@v1", f"owner/name@{COMMIT}"])
def test_what_was_fetched_once_is_found_without_a_connection(cache: Path, name: str) -> None:
    done = asked(cache, name, HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == str(cache / "models--owner--name" / "snapshots" / COMMIT), done.stderr


@pytest.mark.parametrize(("name", "command"), [("owner/other", "owner/other"), ("owner/name@v2", "owner/name --revision v2")])
@pytest.mark.parametrize("offline", ["1", "0"], ids=["told to stay offline", "out of reach"])
def test_without_a_connection_and_a_copy_it_is_said_what_to_do(cache: Path, name: str, command: str, offline: str) -> None:
    done = asked(cache, name, HF_HUB_OFFLINE=offline)
    said = (
        f"ConversionError: {name} is no directory here, and the Hugging Face hub is out of reach and has left no whole copy in its cache. "
        f"Where there is a connection, `hf download {command} --local-dir DIR` makes a directory to name instead"
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith(said)


@pytest.mark.parametrize("name", ["a", "a/b/c", "/nowhere/at all", "../owner/name", ""])
def test_what_can_be_no_name_on_the_hub_is_a_path(name: str) -> None:
    assert resolve(name) == Path(name)


def test_a_directory_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")


LAYOUTS = {
    "a full Omni model": (
        "config.json generation_config.json model-00001-of-00005.safetensors model.safetensors.index.json preprocessor_config.json "
        "merges.txt vocab.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.json "
        "chat_template.jinja spk_dict.pt",
        "README.md LICENSE .gitattributes",
    ),
    "a released model": (
        "config.json model-00001-of-00004.safetensors heads.bin adapters.bin label_scheme.json training_meta.json tokenizer.model",
        "README.md",
    ),
    "a PEFT adapter": ("adapter_config.json adapter_model.safetensors adapter_model.bin tokenizer.json", "optimizer.pt training_args.bin"),
    "a step of the trainers": (
        "pytorch_model_fsdp.bin pytorch_model_fsdp_1.bin pytorch_model_fsdp_2.bin meta.json",
        "optimizer.bin optimizer_1.bin scheduler.bin random_states_0.pkl",
    ),
    "shards of verl": (
        "actor/model_world_size_2_rank_0.pt actor/huggingface/config.json actor/lora_adapter/adapter_config.json",
        "actor/optim_world_size_2_rank_0.pt actor/extra_state_world_size_2_rank_0.pt data.pt",
    ),
    "a checkpoint of ours": ("manifest.json config.json parts.safetensors params/_METADATA params/lm_head.kernel/0.0 lora/a.b/.zarray", ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_every_layout_what_is_read_is_fetched_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    wanted, unwanted = (names.split() for names in LAYOUTS[layout])

    def fetch(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repository, revision) == ("owner/name", None)
        assert list(filter_repo_objects([*wanted, *unwanted], allow_patterns=allow_patterns)) == wanted
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert resolve("owner/name") == tmp_path
