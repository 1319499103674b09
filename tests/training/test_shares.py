"""Soft labels: what the raters of a text said, from the row to the loss."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest

from omnisapiens_jax.atlas.labels import REAL_TEXT
from omnisapiens_jax.atlas.real_text import Text
from omnisapiens_jax.atlas.sources import JsonlSource
from omnisapiens_jax.models.classifier import Classifier
from omnisapiens_jax.training.data import Split
from omnisapiens_jax.training.jobs import check
from omnisapiens_jax.training.losses import class_loss, share_loss
from tests.training import world

FAR = np.finfo(np.float32).min / 2  # what heads say of labels of other domains
RATERS = ({"negative": 0.2, "neutral": 0.5, "positive": 0.3}, {})
LOGITS = np.array([[0.3, -1.0, 2.0, FAR, FAR], [FAR, FAR, FAR, 0.5, -0.5], [FAR] * 5], np.float32)
LABELS = np.array([1, 4, -1])


@pytest.fixture
def source(tmp_path: Path) -> JsonlSource:
    """A rated tweet and a text of which only the writer's word is known."""
    texts = [Text("vader_tweets", "0", "one", "neutral", RATERS[0]), Text("isarcasm", "1", "two", "sarcasm", RATERS[1])]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(text.row()) + "\n" for text in texts))
    return JsonlSource(tmp_path / "train.jsonl")


def batches(source: JsonlSource, index: np.ndarray) -> dict[str, Any]:
    pipeline: Any = SimpleNamespace(batches=lambda start, stop: iter([(start, {"index": index})]))
    plain = Split("train", source, pipeline, zero=False, identity="")
    assert [*next(plain.batches(0, 1))[1]] == ["index"]
    step, batch = next(dataclasses.replace(plain, rated=REAL_TEXT).batches(3, 4))
    assert step == 3
    return batch


def classifier(batch: Any) -> Any:
    """Stands in for a model."""
    return jnp.asarray(LOGITS)


@pytest.mark.parametrize("index", [np.array([1, -1, 0]), np.array([[1, -1], [0, -1]])])
def test_a_batch_has_the_shares_of_its_samples_and_none_where_it_is_masked(source: JsonlSource, index: np.ndarray) -> None:
    shares = batches(source, index)["shares"]
    assert shares.shape == (*index.shape, 5) and shares.dtype == np.float32
    np.testing.assert_allclose(shares[index == 0], [[0.2, 0.5, 0.3, 0, 0]])
    np.testing.assert_allclose(shares[index == 1], [[0, 0, 0, 0, 1]])
    assert not shares[index < 0].any()


def test_the_loss_is_the_cross_entropy_with_the_shares() -> None:
    shares = np.array([[0.2, 0.5, 0.3, 0, 0], [0, 0, 0, 0, 1], [0] * 5], np.float32)
    loss, count = share_loss(cast(Classifier, classifier), {"label": jnp.asarray(LABELS), "shares": jnp.asarray(shares)})
    own = [LOGITS[0, :3].astype(float), LOGITS[1, 3:].astype(float)]
    logs = [logits - np.log(np.exp(logits).sum()) for logits in own]
    assert count == 2
    assert float(loss) == pytest.approx(-(np.array([0.2, 0.5, 0.3]) @ logs[0] + logs[1][1]), rel=1e-6)  # float32 against float64


def test_on_answers_alone_it_is_the_loss_of_classes() -> None:
    shares = np.where(LABELS[:, None] == np.arange(5), 1.0, 0.0).astype(np.float32)
    batch = {"label": jnp.asarray(LABELS), "shares": jnp.asarray(shares)}
    np.testing.assert_allclose(
        share_loss(cast(Classifier, classifier), batch), class_loss(cast(Classifier, classifier), batch), rtol=1e-6
    )  # two ways to sum in float32


def test_a_run_has_the_heads_of_its_scheme_and_labels_that_there_are() -> None:
    made, mesh = world.config("text"), world.mesh_of((1, 1, 1))
    check(made, mesh)
    assert tuple(made.model.heads) == tuple(len(domain.labels) for domain in REAL_TEXT.domains)
    for change, told in (
        ({"sft__labels": "crowd"}, "unknown config.sft.labels 'crowd'; known: answers, raters"),
        ({"atlas__scheme": "hba"}, r"config.model.heads \(3, 2\) must be \(7, 8, 2, 2, 2, 2, 2\)"),
        ({"atlas__scheme": "mine"}, "unknown config.atlas.scheme 'mine'; known: hba, real_text"),
    ):
        with pytest.raises(ValueError, match=told):
            check(world.config("text", (1, 1, 1), **change), mesh)
