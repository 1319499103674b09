"""Pieces that the pages of this room share: confusion matrices, samples with their media, and how numbers are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np

from omnisapiens_jax.atlas.labels import LabelScheme
from omnisapiens_jax.atlas.schema import Sample
from omnisapiens_jax.evaluation.answers import Answer
from omnisapiens_jax.evaluation.metrics import confusion_matrix
from omnisapiens_jax.pages.embedded import embedded
from omnisapiens_jax.pages.templates import templates

Item = TypeVar("Item")

SHOWN = 6  # samples of a gallery
MINUS = "\N{MINUS SIGN}"


def environment() -> jinja2.Environment:
    """Templates of this room, with filters for numbers."""
    made = templates(Path(__file__).parent)
    made.filters["percent"] = lambda share: f"{100 * share:.1f}"
    made.filters["points"] = lambda share: f"{100 * share:+.1f}".replace("-", MINUS)
    made.filters["signed"] = lambda number: f"{number:+.2f}".replace("-", MINUS)
    made.filters["score"] = lambda number: f"{number:.3f}"
    made.filters["duration"] = lambda seconds: f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
    return made


def confusions(scheme: LabelScheme, sets: Sequence[tuple[str, Sequence[Answer]]]) -> list[dict[str, Any]]:
    """For each domain: its labels that occur, and under the title of each set its counts `[C, C + 1]` with their row shares.

    The sets answer the same samples in the same order.
    """
    tables, rows = [], sets[0][1] if sets else ()
    for head, domain in enumerate(scheme.domains):
        own = [i for i, answer in enumerate(rows) if scheme.dataset(answer.dataset).domain == domain.name]
        if not own:
            continue
        golds = np.array([scheme.index(rows[i].dataset, rows[i].gold) for i in own])
        classes = [c for c in scheme.head_classes(head) if c in golds]
        matrices = []
        for title, answers in sets:
            predicted = np.array([scheme.prediction(answers[i].dataset, answers[i].prediction) for i in own])
            counts = confusion_matrix(golds, predicted, classes)
            matrices.append((title, counts.tolist(), (counts / counts.sum(axis=1, keepdims=True)).tolist()))
        labels = [scheme.classes[c][1] for c in classes]
        tables.append({"name": domain.name.replace("_", " "), "labels": labels, "matrices": matrices, "count": len(own)})
    return tables


def varied(items: Sequence[Item], kinds: Iterable[str]) -> list[Item]:
    """The first `SHOWN` items, taking the kinds in turn."""
    turns: dict[str, int] = {}
    order = []
    for place, kind in enumerate(kinds):
        turns[kind] = turns.get(kind, 0) + 1
        order.append((turns[kind], place))
    return [items[place] for _, place in sorted(order)[:SHOWN]]


def shown(sample: Sample) -> dict[str, Any]:
    """A sample with its media inside."""
    media = [embedded(item) for item in (*sample.videos, *sample.images, *sample.audios)]
    return {**dataclasses.asdict(dataclasses.replace(sample, videos=(), images=(), audios=())), "media": media}
