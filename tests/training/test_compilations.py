"""After every bucket has been met once, nothing is compiled any more: not in SFT, not in GRPO, not in an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omnisapiens_jax.atlas.recipe import target_text
from omnisapiens_jax.evaluation.evaluate import answer_all
from omnisapiens_jax.parallel.mesh import on_mesh
from omnisapiens_jax.training import rl, sft
from omnisapiens_jax.training.data import Split
from omnisapiens_jax.training.journal import Compilations, read_metrics
from omnisapiens_jax.training.state import parameters
from tests.training import world

STEPS = 16


@pytest.fixture(scope="module")
def at() -> Iterator[world.World]:
    Compilations.watch()
    stages: dict[str, Any] = {"rl__steps": STEPS, "rl__save_every": 6, "warm_start__steps": STEPS, "warm_start__eval_every": 4}
    here = world.world(world.config(atlas__batches="homogeneous", atlas__buckets=2, **stages))
    with on_mesh(here.mesh):
        yield here


def warm_step(split: Split) -> int:
    """The step in which the last of the buckets is met for the first time; all of them must come again."""
    met = [split.pipeline.planner[step].bucket for step in range(STEPS)]
    buckets = split.pipeline.planner.buckets
    assert len(buckets) == 2
    first = max(met.index(bucket) for bucket in buckets)
    assert set(met[first + 1 :]) == set(buckets)
    return first


def check(workdir: Path, since: int) -> None:
    counts = [row["time/compilations"] for row in read_metrics(workdir / "metrics.jsonl")]
    assert len(counts) == STEPS
    assert counts[0] < counts[since], "nothing was counted"
    assert set(counts[since:]) == {counts[since]}, counts


def test_sft_and_its_validation(at: world.World, tmp_path: Path) -> None:
    run, stage = at.run(tmp_path), at.config.warm_start
    train = run.atlas.split(at.config.atlas.train, batch_size=stage.batch_size, target=target_text, shuffle=True)
    validation = run.atlas.split(at.config.atlas.validation, batch_size=8, target=target_text, shuffle=False)
    sft.fit(stage, tmp_path, at.graph, at.state, train, validation, at.mesh)
    check(tmp_path, max(warm_step(train), stage.eval_every - 1))


def test_grpo(at: world.World, tmp_path: Path) -> None:
    run, stage = at.run(tmp_path), at.config.rl
    prompts = run.atlas.split(at.config.atlas.train, batch_size=stage.prompts, target=None, shuffle=True)
    generator = run.generator(stage.rollouts, stage.temperature)
    state = world.world(at.config).state  # updates are made in place
    rl.improve(stage, 0, tmp_path, at.graph, state, generator, prompts, run.atlas.tokenizer, None, at.mesh)
    check(tmp_path, warm_step(prompts))


def test_evaluation(at: world.World, tmp_path: Path) -> None:
    run = at.run(tmp_path)
    split = run.atlas.split(at.config.atlas.test, batch_size=8, target=None, shuffle=False)
    generator = run.generator(1, 0.0)
    view, counts = generator.view(parameters(world.world(at.config).state)), []
    for _ in range(2):
        batches = (batch for _, batch in split.pipeline.batches(0, split.steps_per_epoch))
        answers = answer_all(generator, view, batches, split.source, run.atlas.tokenizer, at.mesh)
        counts.append(Compilations.count)
    assert [answer.id for answer in answers] == list(range(31))
    assert counts[0] == counts[1]
