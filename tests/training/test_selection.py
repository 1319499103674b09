"""What the best state of a stage is selected by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from omnisapiens_jax.evaluation.classify import by_heads
from omnisapiens_jax.evaluation.metrics import SET_SCORES, set_scores
from omnisapiens_jax.parallel.mesh import on_mesh, put_batch
from omnisapiens_jax.training import jobs, sft
from omnisapiens_jax.training.journal import read_metrics
from omnisapiens_jax.training.losses import confusion
from omnisapiens_jax.training.selection import BY_LOSS, CRITERIA, Selection
from omnisapiens_jax.training.state import parameters
from tests.training import world

CLASSES = 5
UNDEFINED: Any = {"zero_division": 0}  # scikit-learn's stubs only know its string values


def test_the_scores_have_these_names() -> None:
    assert {*set_scores(np.ones((2, 3)))} == {*SET_SCORES} and len({*CRITERIA}) == 11


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**20), known=st.floats(0.2, 1))
def test_metrics_equal_scikit_learns(seed: int, known: float) -> None:
    """Over batches together; samples without a class do not count."""
    random = np.random.default_rng(seed)
    labels = np.where(random.random((3, 8)) < known, random.integers(0, CLASSES, (3, 8)), -1)
    labels[0, 0] = 2
    logits = random.standard_normal((3, 8, CLASSES)).astype(np.float32)
    sums = [
        (jnp.float32(2), jnp.float32((own >= 0).sum()), confusion(jnp.asarray(z), jnp.asarray(own)))
        for z, own in zip(logits, labels, strict=True)
    ]
    classified = labels.ravel() >= 0
    gold, found = labels.ravel()[classified], logits.argmax(-1).ravel()[classified]
    present = np.unique(gold)  # the benchmark's classes are those of the gold answers
    score = {
        "accuracy": sk.accuracy_score(gold, found),
        "micro_f1": sk.f1_score(gold, found, labels=present, average="micro", **UNDEFINED),
        "macro_f1": sk.f1_score(gold, found, labels=present, average="macro", **UNDEFINED),
        "weighted_precision": sk.precision_score(gold, found, labels=present, average="weighted", **UNDEFINED),
    }
    for by, wanted in score.items():
        told = Selection(by).validate(iter(sums))
        assert told == {"validation_loss": pytest.approx(6 / len(gold)), f"validation_{by}": pytest.approx(wanted, abs=1e-12)}


def test_a_loss_falls_and_a_metric_rises() -> None:
    metric = Selection("macro_f1")
    assert BY_LOSS.better(1.0, BY_LOSS.worst) and BY_LOSS.better(0.5, 1.0) and not BY_LOSS.better(1.0, 0.5)
    assert metric.better(0.0, metric.worst) and metric.better(0.5, 0.25) and not metric.better(0.25, 0.25)
    assert not any(one.better(math.nan, best) for one in (BY_LOSS, metric) for best in (one.worst, 0.5))


@pytest.mark.slow
def test_the_state_of_the_highest_metric_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another has the least loss; and the metric is that of the answers that the heads give."""
    made = world.config("sft", sft__steps=6, sft__best="accuracy", sft__patience=2)
    jobs.check(made, world.mesh_of((1, 1, 1)))
    here, honest, seen = world.world(made), sft.validate, []
    worth = iter([(3.0, 0.2), (2.0, 0.9), (1.0, 0.1)])

    def scripted(sums_fn: Any, state: Any, *rest: Any) -> dict[str, float]:
        seen.append((jax.tree.map(np.asarray, state.trainable), honest(sums_fn, state, *rest)))
        loss, accuracy = next(worth)
        return {"validation_loss": loss, "validation_accuracy": accuracy}

    monkeypatch.setattr(sft, "validate", scripted)
    with on_mesh(here.mesh):
        run = here.run(tmp_path)
        state = run.fit(made.sft, "sft", jax.tree.map(jnp.copy, here.state), jobs.LABELS)
        rows = [row for row in read_metrics(tmp_path / "sft" / "metrics.jsonl") if "validation_accuracy" in row]
        assert [(row["step"], row["validation_accuracy"]) for row in rows] == [(1, 0.2), (3, 0.9), (5, 0.1)]
        jax.tree.map(np.testing.assert_array_equal, state.trainable, seen[1][0])

        split = run.atlas.split("validation", batch_size=8, target=None, shuffle=False, rows=jobs.LABELS.rows())
        ask, params = by_heads(run.predict, split.source), parameters(state)
        answers = [one for _, batch in split.batches(0, split.steps_per_epoch) for one in ask(params, put_batch(batch, here.mesh))]
    assert seen[1][1]["validation_accuracy"] == pytest.approx(np.mean([one.correct for one in answers])) and len(answers) == 9


@pytest.mark.parametrize("job", ["sft", "bam"])
def test_an_unknown_metric_is_told(job: str) -> None:
    changes: dict[str, Any] = {f"{job}__best": "F1w2"}
    made = world.config(job, **changes)
    with pytest.raises(ValueError, match=rf"unknown config.{job}.best 'F1w2'; known: loss, accuracy, micro_precision"):
        jobs.check(made, world.mesh_of((1, 1, 1)))
