"""A conversion that SIGKILL stops goes on with the same command, and what it makes is what an undisturbed one makes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import pytest

from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.unfinished import JOURNAL, Journal
from tests.convert.test_command_line import content, without_times
from tests.convert.test_huggingface import store, tensors
from tests.convert.test_peft import exported, random_lora
from tests.models import cases
from tools.convert_weights import main

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO / "tools" / "convert_weights.py"
# The tool, killed by its own hand in the middle: when so many things are done, the last of them not yet in the journal.
KILLED = """
import os, signal, sys
from omnisapiens_jax.convert.unfinished import Journal
from tools.convert_weights import main
add, most = Journal.add, int(sys.argv[1])
def stop(self, key, record):
    if len(self.done) == most:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, key, record)
Journal.add = stop
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root") / "thinker"
    return store(folder, tensors("uneven", ml_dtypes.bfloat16), cases.CONFIGS["uneven"].to_hf(), shards=3)


def killed(command: list[str], after: int) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(after), *command], cwd=REPO, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def test_a_killed_import_goes_on_to_the_same_checkpoint(thinker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice, and with LoRA factors, which make a second tree."""
    adapter = exported(dataclasses.replace(open_source(thinker), lora=random_lora("uneven")), tmp_path / "adapter")
    command = ["import", str(adapter), str(tmp_path / "ours"), "--base", str(thinker)]
    for after in (7, 150):
        killed(command, after)
        assert not (tmp_path / "ours").exists()
        left = tmp_path / ".ours.unfinished"
        assert len((left / JOURNAL).read_text().splitlines()) == 1 + after and not (left / "manifest.json").exists()
    assert main(command) == 0
    assert "going on where it stopped: 150 tensors are there" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "wanted"), *command[3:]]) == 0
    assert without_times(tmp_path / "ours") == without_times(tmp_path / "wanted") and not left.exists()


def test_a_killed_export_goes_on_to_the_same_files(thinker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file that was being written is begun anew."""
    command = ["export", str(thinker), str(tmp_path / "back"), "--shard-size", "0.0001"]
    killed(command, 2)
    assert not (tmp_path / "back").exists() and len(list((tmp_path / ".back.unfinished").glob("*.safetensors"))) == 3
    assert main(command) == 0
    assert "going on where it stopped: 2 files are there" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "wanted"), *command[3:]]) == 0
    assert content(tmp_path / "back") == content(tmp_path / "wanted")


def test_a_source_that_changed_meanwhile_is_begun_anew(thinker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else half of each would make a checkpoint that never was."""
    folder = tmp_path / "changing"
    stored = tensors("uneven", ml_dtypes.bfloat16)
    store(folder, stored, cases.CONFIGS["uneven"].to_hf())
    command = ["import", str(folder), str(tmp_path / "ours")]
    killed(command, 100)
    (folder / "model.safetensors").unlink()
    other = {name: (2 * value).astype(value.dtype) for name, value in stored.items()}
    store(tmp_path / "other", other, cases.CONFIGS["uneven"].to_hf())
    (tmp_path / "other" / "model.safetensors").rename(folder / "model.safetensors")
    assert main(command) == 0
    assert "going on" not in capsys.readouterr().err
    for name, tensor in open_source(tmp_path / "ours").tensors.items():
        assert tensor.read().tobytes() == other[name].tobytes()


def interrupted(command: list[str], after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops as a kill would, but in this process."""
    add = Journal.add

    def stop(self: Journal, key: str, record: Any) -> None:
        if len(self.done) == after:
            raise KeyboardInterrupt
        add(self, key, record)

    monkeypatch.setattr(Journal, "add", stop)
    assert main(command) == 1
    monkeypatch.setattr(Journal, "add", add)


def louder(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 600}))


def touched(file: Path) -> None:
    os.utime(file, (1, 1))


def test_a_merge_whose_adapter_changed_meanwhile_is_begun_anew(
    thinker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever of it is read, or by another version of the program; else half of each would make a checkpoint that never was."""
    adapter = exported(dataclasses.replace(open_source(thinker), lora=random_lora("uneven")), tmp_path / "adapter")
    command = ["merge", str(adapter), str(tmp_path / "ours"), "--base", str(thinker)]
    changes: list[Callable[[], None]] = [
        lambda: touched(adapter / "adapter_model.safetensors"),
        lambda: touched(thinker / "config.json"),
        lambda: touched(thinker / "model.safetensors.index.json"),
        lambda: monkeypatch.setattr("tools.convert_weights.version", lambda _: "another"),
        lambda: louder(adapter / "adapter_config.json"),
    ]
    interrupted(command, 60, monkeypatch)
    interrupted(command, 70, monkeypatch)
    assert "going on where it stopped: 60 tensors are there" in capsys.readouterr().err  # with nothing changed
    for change in changes:
        change()
        interrupted(command, 60, monkeypatch)
        assert "going on" not in capsys.readouterr().err
    louder(adapter / "adapter_config.json")
    assert main(command) == 0
    wanted = open_source(adapter, base=thinker).merged()
    for name, tensor in open_source(tmp_path / "ours").tensors.items():
        whole = wanted.tensors[name]
        assert tensor.read().tobytes() == whole.read().astype(whole.dtype).tobytes(), name


@pytest.mark.slow
def test_a_kill_from_outside_at_any_moment_does_no_harm(tmp_path: Path, thinker: Path) -> None:
    """Again and again, wherever it happens to be, until the command is through."""
    command = [sys.executable, str(TOOL), "import", str(thinker), str(tmp_path / "ours")]
    kills, reached = 0, 0
    while not (tmp_path / "ours").exists():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and lines(tmp_path / ".ours.unfinished" / JOURNAL) < reached + 15:
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        reached = lines(tmp_path / ".ours.unfinished" / JOURNAL)
    assert kills >= 3
    assert main(["import", str(thinker), str(tmp_path / "wanted")]) == 0
    assert without_times(tmp_path / "ours") == without_times(tmp_path / "wanted")


def lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0
