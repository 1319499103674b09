"""A run killed at any moment and started again ends with the very numbers of one that was left alone. The real main, the real clips."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omnisapiens_jax.resources import resource
from omnisapiens_jax.training.journal import read_metrics

SETTINGS = {
    "mesh.data": 1,
    "atlas.path": str(resource("data/mini")),
    "atlas.buckets": 1,
    "eval_batch": 16,
    "generation.max_tokens": 8,
    "warm_start.rows": "third",
    "warm_start.batch_size": 8,
    "warm_start.steps": 4,
    "warm_start.eval_every": 2,
    "rl.prompts": 8,
    "rl.rollouts": 2,
    "rl.steps": 6,
    "rl.save_every": 2,
    "rl.record_every": 2,
}


def start(workdir: Path, **changes: object) -> subprocess.Popen[bytes]:
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    command = [sys.executable, "-m", "omnisapiens_jax.main", "--config=rl", f"--workdir={workdir}"]
    # One device, as a user has: conftest's eight are for the tests of sharding.
    environment = {**os.environ, "XLA_FLAGS": ""}
    with (workdir.parent / f"{workdir.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, *(f"--config.{name}={value}" for name, value in settings.items())], env=environment, stdout=log, stderr=log
        )


def finish(workdir: Path, **changes: object) -> None:
    done = start(workdir, **changes).wait()
    assert done == 0, (workdir.parent / f"{workdir.name}.log").read_text()[-3000:]


def kill_after(workdir: Path, stage: str, step: int, **changes: object) -> None:
    """SIGKILL as soon as the stage has written the metrics of `step`."""
    process, path = start(workdir, **changes), workdir / stage / "metrics.jsonl"
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert process.poll() is None, (workdir.parent / f"{workdir.name}.log").read_text()[-3000:]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def metrics(workdir: Path, stage: str) -> list[dict[str, float]]:
    """Every metric but the wall-clock facts, as the file spells them: equal means equal bits."""
    rows = read_metrics(workdir / stage / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def check(found: Path, wanted: Path) -> None:
    for stage, steps in (("warm_start", SETTINGS["warm_start.steps"]), ("rl", SETTINGS["rl.steps"])):
        assert metrics(found, stage) == metrics(wanted, stage)
        assert [row["step"] for row in metrics(found, stage)] == list(range(int(steps)))
    for name in ("evaluation-before.json", "evaluation-after.json"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes()
    # The policy moved, so equal numbers are not those of a run that stood still.
    rows = metrics(wanted, "rl")
    assert any(row["grad_norm"] > 0 for row in rows) and len({row["reward"] for row in rows}) > 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """With the embedder in the reward: what it remembers is lost in the kill, and embedded again in other company."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    finish(alone)
    kill_after(killed, "warm_start", 2)  # after the first checkpoint of the warm start
    kill_after(killed, "rl", 2)  # between two checkpoints of RL: step 2 is made again
    with (killed / "rl" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward": 0.')  # a line that the kill cut off
    finish(killed)
    check(killed, alone)
