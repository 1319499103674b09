"""Classification metrics as the benchmark counts them, and the paired bootstrap. Plain numpy over global class indices.

A prediction that is no class (index < 0) or is outside the gold answers of its set is simply wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from omnisapiens_jax.atlas.labels import LabelScheme

SENTIMENT, EMOTION = "sentiment_intensity", "emotion"
_COLLAPSED = {7: [0, 1, 2, 3, 4, 5, 6], 5: [0, 1, 1, 2, 3, 3, 4], 3: [0, 0, 0, 1, 2, 2, 2], 2: [0, 0, 0, -1, 1, 1, 1]}


def confusion_matrix(golds: np.ndarray, predictions: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Counts `[C, C + 1]`: row = gold class, column = predicted class, the last column for predictions outside `classes`.

    Raises ValueError for a gold answer outside `classes`.
    """
    golds, predictions = _paired(golds, predictions)
    place = {int(c): i for i, c in enumerate(classes)}
    strange = sorted({int(g) for g in golds} - set(place))
    if strange:
        raise ValueError(f"gold classes {strange} are not among {list(classes)}")
    counts = np.zeros((len(place), len(place) + 1), np.int64)
    np.add.at(counts, ([place[int(g)] for g in golds], [place.get(int(p), len(place)) for p in predictions]), 1)
    return counts


def set_metrics(golds: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Accuracy, macro-, weighted and micro-averaged precision, recall and F1 of one set `[N]`, N >= 1.

    The classes are those of the gold answers, so `micro_precision` can exceed `micro_recall`: a prediction outside them is nobody's
    false positive. `weighted_f1` and `macro_recall` over the gold classes equal scikit-learn's.
    """
    precision, recall, f1, support = _class_scores(golds, predictions)
    correct = float((recall * support).sum())
    claimed = float(np.isin(predictions, np.unique(golds)).sum())
    micro_precision, micro_recall = correct / claimed if claimed else 0.0, correct / float(support.sum())
    both = micro_precision + micro_recall
    weights = support / support.sum()
    return {
        "accuracy": micro_recall,
        "micro_precision": micro_precision,
        "micro_recall": micro_recall,
        "micro_f1": 2 * micro_precision * micro_recall / both if both else 0.0,
        **{f"macro_{name}": float(score.mean()) for name, score in (("precision", precision), ("recall", recall), ("f1", f1))},
        **{f"weighted_{name}": float(score @ weights) for name, score in (("precision", precision), ("recall", recall), ("f1", f1))},
    }


def class_f1(golds: np.ndarray, predictions: np.ndarray) -> dict[int, float]:
    """F1 of every class that occurs among the gold answers."""
    _, _, f1, _ = _class_scores(golds, predictions)
    return {int(c): float(score) for c, score in zip(np.unique(golds), f1, strict=True)}


def sentiment_metrics(golds: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """`ACC7`, `F1w7` and the same for 5, 3 and 2 classes, from sentiment positions 0 (highly negative) to 6 `[N]`.

    For two classes the rows whose gold is neutral are left out and a neutral prediction is wrong; their metrics are nan if none is left.
    """
    golds, predictions = _paired(golds, predictions)
    scores = {}
    for count, table in _COLLAPSED.items():
        lookup = np.array([*table, -1])
        gold, predicted = lookup[golds], lookup[np.where((predictions >= 0) & (predictions < 7), predictions, 7)]
        kept = gold >= 0
        metrics = set_metrics(gold[kept], predicted[kept]) if kept.any() else {"accuracy": np.nan, "weighted_f1": np.nan}
        scores |= {f"ACC{count}": metrics["accuracy"], f"F1w{count}": metrics["weighted_f1"]}
    return scores


def emotion_accuracy(golds: np.ndarray, predictions: np.ndarray) -> dict[int, float]:
    """The benchmark's weighted accuracy of every gold class: the mean of its recall and of the recall of "not this class"."""
    golds, predictions = _paired(golds, predictions)
    scores = {}
    for c in np.unique(golds).tolist():
        gold, predicted = golds == c, predictions == c
        others = float((~predicted[~gold]).mean()) if not gold.all() else 0.0
        scores[c] = 0.5 * (float(predicted[gold].mean()) + others)
    return scores


def dataset_metrics(
    scheme: LabelScheme, datasets: Sequence[str], golds: Sequence[str], predictions: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Metrics of each dataset, from answers as text `[N]`, compared without regard to case and surrounding white space.

    A classification dataset gets `set_metrics`, with `sentiment_metrics` or `emotion_weighted_accuracy_mean` where its domain has them,
    and `class_f1` as `{label}/class_f1`; a free-form one only `accuracy` of exact answers (the benchmark asks a judge instead).
    """
    results = {}
    for name in sorted(set(datasets)):
        rows = [i for i, dataset in enumerate(datasets) if dataset == name]
        pairs = [(golds[i], predictions[i]) for i in rows]
        domain = scheme.dataset(name).domain
        if domain is None:
            results[name] = {"accuracy": float(np.mean([gold.strip().lower() == text.strip().lower() for gold, text in pairs]))}
            continue
        gold = np.array([scheme.index(name, text) for text, _ in pairs])
        predicted = np.array([scheme.prediction(name, text) for _, text in pairs])
        results[name] = set_metrics(gold, predicted)
        if domain == SENTIMENT:
            start = scheme.head_classes(scheme.head(name)).start
            results[name] |= sentiment_metrics(gold - start, np.where(predicted >= 0, predicted - start, -1))
        if domain == EMOTION:
            results[name]["emotion_weighted_accuracy_mean"] = float(np.mean(list(emotion_accuracy(gold, predicted).values())))
        results[name] |= {f"{scheme.classes[c][1]}/class_f1": score for c, score in class_f1(gold, predicted).items()}
    return results


def benchmark_scores(scheme: LabelScheme, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Score of every benchmark task that has datasets in `metrics` (from `dataset_metrics`): the unweighted mean of their metric.

    The metric is the dataset's own (`Dataset.metric`), but exact accuracy for free-form answers, which the benchmark has judged.
    """
    scores: dict[str, list[float]] = {}
    for name, values in metrics.items():
        dataset = scheme.dataset(name)
        scores.setdefault(dataset.benchmark, []).append(values["accuracy" if dataset.kind == "qa" else dataset.metric])
    return {task: float(np.mean(values)) for task, values in sorted(scores.items())}


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of two accuracies on the same samples, with its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    before: np.ndarray, after: np.ndarray, *, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> Difference:
    """Accuracy of `after` minus `before`, both `[N]` bool over the same samples, with the percentile interval of the paired bootstrap."""
    before, after = _paired(before, after)
    # A resample of N pairs only matters by how many got better and how many got worse, and those counts are multinomial.
    better, worse, count = int((after & ~before).sum()), int((before & ~after).sum()), len(before)
    shares = np.array([better, worse, count - better - worse]) / count
    draws = np.random.default_rng(seed).multinomial(count, shares, size=resamples)
    differences = (draws[:, 0] - draws[:, 1]) / count
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return Difference((better - worse) / count, float(low), float(high))


def _class_scores(golds: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F1 and support `[C]` of the gold classes in ascending order; what is undefined is 0."""
    counts = confusion_matrix(golds, predictions, np.unique(golds).tolist())
    hits, support, claimed = np.diag(counts[:, :-1]), counts.sum(axis=1), counts[:, :-1].sum(axis=0)
    precision, recall = hits / np.maximum(claimed, 1), hits / support
    return precision, recall, 2 * hits / (claimed + support), support


def _paired(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"expected two equally long, non-empty rows, got shapes {first.shape} and {second.shape}")
    return first, second
