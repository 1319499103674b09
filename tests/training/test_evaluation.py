"""Evaluations that are killed and go on, and the job that evaluates a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from omnisapiens_jax.evaluation.answers import Answer, AnswerLog, load_answers
from omnisapiens_jax.generation.sampling import Generator
from omnisapiens_jax.parallel.mesh import on_mesh
from omnisapiens_jax.resources import resource
from omnisapiens_jax.training import jobs
from omnisapiens_jax.training.state import create_state
from tests import checkpoints
from tests.training import world


class Killed(BaseException):
    """Nothing in the package catches it."""


@pytest.fixture(scope="module")
def here() -> Iterator[world.World]:
    made = world.world(world.config(atlas__buckets=1))
    with on_mesh(made.mesh):
        yield made


def test_an_evaluation_killed_after_every_batch_asks_for_each_once(
    here: world.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = here.run(tmp_path)
    held_out = run.held_out()
    asked, answer, append = [], Generator.__call__, AnswerLog.append

    def counted(self: Generator, *arguments: Any) -> Any:
        asked.append(1)
        return answer(self, *arguments)

    def deadly(self: AnswerLog, answers: Sequence[Answer]) -> None:
        append(self, answers)
        with self.log.open("ab") as file:
            file.write(b'[{"id": 3, "data')  # the next line, which the kill cut off
        raise Killed

    monkeypatch.setattr(Generator, "__call__", counted)
    alone = run.evaluate("alone", here.state, held_out)
    steps = held_out.steps_per_epoch
    assert len(asked) == steps == 4 and [row.id for row in alone] == list(range(31))
    assert all(
        row.signature and 0 < (row.likelihood or 0) <= 1 and bool(row.question) == (row.dataset in ("siq2", "mimeqa")) for row in alone
    )

    monkeypatch.setattr(AnswerLog, "append", deadly)
    for batch in range(steps):
        with pytest.raises(Killed):
            run.evaluate("killed", here.state, held_out)
        assert len(asked) == steps + batch + 1
        if batch == 1:  # other weights would mix the answers of two models
            changed = here.state._replace(trainable=jax.tree.map(lambda leaf: leaf * 1.01, here.state.trainable))
            with pytest.raises(ValueError, match="holds 16 answers of another evaluation"):
                run.evaluate("killed", changed, held_out)
            with pytest.raises(ValueError, match="of another evaluation"):
                run.evaluate("killed", here.state, held_out, without="audio")
    monkeypatch.setattr(AnswerLog, "append", append)
    assert run.evaluate("killed", here.state, held_out) == alone and len(asked) == 2 * steps
    assert (tmp_path / "evaluation-killed.json").read_bytes() == (tmp_path / "evaluation-alone.json").read_bytes()
    assert run.evaluate("killed", here.state, held_out) == alone and len(asked) == 2 * steps  # it is only read


def test_an_evaluation_needs_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.model.weights is empty: name the checkpoint to evaluate"):
        jobs.run(world.config("evaluate", (8, 1, 1)), tmp_path / "run")


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_over_eight_devices_as_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    weights = checkpoints.tiny_thinker(tmp_path / "weights")
    changes = {"atlas__buckets": 1, "model__weights": str(weights), "blanked": ("text", "audio")}
    config = world.config("evaluate", (8, 1, 1), **changes)
    jobs.run(config, tmp_path / "eight")
    eight = load_answers(tmp_path / "eight" / "evaluation-checkpoint.json")
    plain = json.loads((tmp_path / "eight" / "comparison.json").read_text())
    assert list(plain["runs"]) == ["checkpoint", "checkpoint-without-audio", "checkpoint-without-text"] and plain["samples"] == 31
    assert (tmp_path / "eight" / "comparison.html").exists()
    without = load_answers(tmp_path / "eight" / "evaluation-checkpoint-without-text.json")
    assert [row.text for row in without] != [row.text for row in eight]

    single = jobs.of_checkpoint(world.config("evaluate", **changes))
    made = world.World(single, world.mesh_of((1, 1, 1)), *create_state(single.model, single.seed, world.mesh_of((1, 1, 1))))
    with on_mesh(made.mesh):
        one = made.run(tmp_path).evaluate("one", made.state, made.run(tmp_path).held_out())
    assert [(row.id, row.text) for row in one] == [(row.id, row.text) for row in eight]
    # Sums of a matrix product are taken in another order.
    assert [row.likelihood for row in one] == pytest.approx([row.likelihood for row in eight], rel=1e-4)

    monkeypatch.setattr(Generator, "__call__", lambda *_: pytest.fail("an answer was asked for again"))
    jobs.run(config, tmp_path / "eight")


def start(weights: Path, workdir: Path) -> subprocess.Popen[bytes]:
    """The real main on one device: eight batches."""
    settings = {"model.weights": weights, "atlas.path": resource("data/mini"), "mesh.data": 1, "atlas.buckets": 1, "eval_batch": 4}
    settings |= {"generation.max_tokens": 8, "generation.chunk": 4}
    command = [sys.executable, "-m", "omnisapiens_jax.main", "--config=evaluate", f"--workdir={workdir}"]
    with (workdir.parent / f"{workdir.name}.log").open("ab") as log:
        flags = [f"--config.{name}={value}" for name, value in settings.items()]
        return subprocess.Popen([*command, *flags], env={**os.environ, "XLA_FLAGS": ""}, stdout=log, stderr=log)


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_answers(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    weights = checkpoints.tiny_thinker(tmp_path / "weights")
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    log = killed / "evaluation-checkpoint.partial.jsonl"
    for batches in (1, 4):
        process = start(weights, killed)
        while not log.exists() or log.read_bytes().count(b"\n") < 1 + batches:
            assert process.poll() is None, (tmp_path / "killed.log").read_text()[-3000:]
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (killed / "evaluation-checkpoint.json").exists()
    for workdir in (killed, alone):
        assert start(weights, workdir).wait() == 0, (tmp_path / f"{workdir.name}.log").read_text()[-3000:]
        assert (workdir / "comparison.html").exists()
    wanted = (alone / "evaluation-checkpoint.json").read_bytes()
    assert (killed / "evaluation-checkpoint.json").read_bytes() == wanted and len(json.loads(wanted)) == 31
