"""Two processes of four devices each train like one process of eight."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from omnisapiens_jax.parallel.mesh import start
from omnisapiens_jax.rl.replay import load_rollout
from omnisapiens_jax.training.journal import read_metrics


def launch(processes: str, stage: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.parallel.two_processes", processes, stage, str(folder)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*running: subprocess.Popen[str]) -> None:
    for process in running:
        said, _ = process.communicate(timeout=1500)
        assert process.returncode == 0, said[-4000:]


def run_both_ways(stage: str, folder: Path) -> tuple[Path, Path]:
    """Folders of one process of eight devices, and of two of four."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    alone, together = folder / "alone", folder / "together"
    for each in (alone, together):
        each.mkdir()
    finish(launch("", stage, alone))
    finish(*(launch(f"{address},2,{i}", stage, together) for i in range(2)))
    return alone, together


def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    alone, together = run_both_ways("sft", tmp_path)
    with np.load(alone / "sft.npz") as wanted, np.load(together / "sft.npz") as found:
        assert set(wanted.files) == set(found.files) and len(wanted.files) > 50
        for name in wanted.files:
            assert np.abs(found[name] - wanted[name]).max() <= 1e-5 * np.abs(wanted[name]).max(), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_grpo_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    alone, together = run_both_ways("grpo", tmp_path)
    ours, theirs = (read_metrics(folder / "rl" / "metrics.jsonl") for folder in (together, alone))
    assert [row["step"] for row in ours] == [0, 1]
    for name in set(theirs[0]) - {"time/seconds", "time/compilations"}:  # the first rollout and its update, before Adam
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-4, abs=1e-6), name
    assert theirs[0]["grad_norm"] > 0
    for field in ("tokens", "rewards", "sample_ids"):  # each process recorded its own prompts
        parts = [getattr(load_rollout(together / "rl" / "rollouts" / f"000000-{i}.npz"), field) for i in range(2)]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(load_rollout(alone / "rl" / "rollouts" / "000000.npz"), field))
    answers = json.loads((together / "evaluation-after.json").read_text())
    assert [answer["id"] for answer in answers] == list(range(31))
    assert (together / "rl" / "state" / "2").is_dir()


@pytest.mark.parametrize("wrong", ["localhost:1234", "localhost:1234,2", "localhost:1234,2,x", "2,0"])
def test_a_wrong_address_is_named(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"processes '{wrong}' must be empty, 'auto' or 'HOST:PORT,N,I'"):
        start(wrong)
