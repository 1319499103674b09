"""What a classifier's heads say of a whole split."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
from flax import nnx
from jax.sharding import Mesh

from omnisapiens_jax.atlas.labels import HBA, LabelScheme
from omnisapiens_jax.atlas.sources import Source
from omnisapiens_jax.evaluation.evaluate import Answer
from omnisapiens_jax.parallel.mesh import all_rows, put_batch
from omnisapiens_jax.processing.example import Batch

Predict = Callable[[nnx.State, dict[str, jax.Array]], jax.Array]


def classify_all(
    predict: Predict, params: nnx.State, batches: Iterable[Batch], source: Source, mesh: Mesh, scheme: LabelScheme = HBA
) -> list[Answer]:
    """The label of every sample that has a domain, in the order of their ids; every process returns all of them.

    Args:
      predict: compiled: parameters and a batch -> the class of each sample among those of all domains, -1 where it has none, in the
        shape of the batch's `domain` (`models.classifier.best_class`).
      params: of the classifier.
      batches: this process's prompts, one or several a row, whose `index` points into `source`.
      source: the rows.
      mesh: everything lies on it.
      scheme: what the classes are called.
    """
    answers = []
    for batch in batches:
        on_device = put_batch(batch, mesh)
        index, found = (array.ravel().tolist() for array in all_rows((on_device["index"], predict(params, on_device))))
        for i, label in zip(index, found, strict=True):
            if i >= 0 and label >= 0:
                sample, name = source[i], scheme.classes[label][1]
                answers.append(Answer(sample.id, sample.dataset, sample.answer, name, name))
    return sorted(answers, key=lambda answer: answer.id)
