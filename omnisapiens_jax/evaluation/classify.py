"""What a classifier's heads say."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from omnisapiens_jax.atlas.labels import HBA, LabelScheme
from omnisapiens_jax.atlas.sources import Source
from omnisapiens_jax.evaluation.answers import Answer
from omnisapiens_jax.evaluation.evaluate import Ask
from omnisapiens_jax.parallel.mesh import all_rows

Predict = Callable[[nnx.State, dict[str, jax.Array]], jax.Array]


def by_heads(predict: Predict, source: Source, scheme: LabelScheme = HBA) -> Ask:
    """Answers with the likeliest label of each sample's domain; samples without one are left out.

    Args:
      predict: compiled: parameters and a batch, of one sample or several a row -> the probabilities of all classes, `[..., C]` in the shape
        of the batch's `domain` (`models.classifier.class_probabilities`).
      source: the rows that the `index` of a batch points into.
      scheme: what the classes are called.
    """

    def ask(params: nnx.State, batch: dict[str, jax.Array]) -> list[Answer]:
        index, found = all_rows((batch["index"], predict(params, batch)))
        answers = []
        for i, shares in zip(index.ravel().tolist(), found.reshape(-1, found.shape[-1]), strict=True):
            if i >= 0 and (sample := source[i]).kind == "cls":
                classes = scheme.head_classes(scheme.head(sample.dataset))
                own = shares[classes.start : classes.stop]
                label = scheme.classes[classes[int(np.argmax(own))]][1]
                answers.append(
                    Answer(
                        sample.id,
                        sample.dataset,
                        sample.answer,
                        label,
                        "",
                        signature=sample.modality_signature,
                        probabilities=tuple(float(share) for share in own),
                    )
                )
        return answers

    return ask
