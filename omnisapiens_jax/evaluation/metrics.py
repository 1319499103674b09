"""Classification metrics as the benchmark counts them, and the bootstrap. Plain numpy over global class indices.

A prediction that is no class (index < 0) or is outside the gold answers of its set is simply wrong.

Every metric is a function of counts `[..., C, C + 1]` (row = gold class, column = predicted class, the last one for anything else), so
that one call measures a set and all its resamples: a resample of N rows matters only by how often it holds each kind of row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from omnisapiens_jax.atlas.labels import LabelScheme

SENTIMENT, EMOTION = "sentiment_intensity", "emotion"
SET_SCORES = ("accuracy", *(f"{mean}_{score}" for mean in ("micro", "macro", "weighted") for score in ("precision", "recall", "f1")))
NO_LABEL = -1  # index of a predicted text that is no label of its dataset's domain
_COLLAPSED = {7: [0, 1, 2, 3, 4, 5, 6], 5: [0, 1, 1, 2, 3, 3, 4], 3: [0, 0, 0, 1, 2, 2, 2], 2: [0, 0, 0, -1, 1, 1, 1]}


def confusion_matrix(golds: np.ndarray, predictions: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Counts `[C, C + 1]`: row = gold class, column = predicted class, the last column for predictions outside `classes`.

    Raises ValueError for a gold answer outside `classes`.
    """
    golds, predictions = _paired(golds, predictions)
    return weighted_counts(golds, predictions, classes, np.ones((1, len(golds)), np.int64))[0]


def weighted_counts(golds: np.ndarray, predictions: np.ndarray, classes: Sequence[int], weights: np.ndarray) -> np.ndarray:
    """Confusion matrices `[R, C, C + 1]` of the rows `[U]`, taken `weights [R, U]` times each; as `confusion_matrix` otherwise."""
    place = {int(c): i for i, c in enumerate(classes)}
    strange = sorted({int(g) for g in golds} - set(place))
    if strange:
        raise ValueError(f"gold classes {strange} are not among {list(classes)}")
    size = len(place)
    cells = np.array([place[int(g)] * (size + 1) + place.get(int(p), size) for g, p in zip(golds, predictions, strict=True)])
    used, which = np.unique(cells, return_inverse=True)
    counts = np.zeros((len(weights), size * (size + 1)), weights.dtype)
    for column, cell in enumerate(used):
        counts[:, cell] = weights[:, which == column].sum(axis=1)
    return counts.reshape(-1, size, size + 1)


def set_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """`SET_SCORES` `[...]` of counts `[..., C, C + 1]`: accuracy, macro-, weighted and micro-averaged precision, recall and F1.

    Nan where all counts are 0.

    The classes are those that occur among the gold answers, so `micro_precision` can exceed `micro_recall`: a prediction outside them is
    nobody's false positive.
    """
    precision, recall, f1, support = class_scores(counts)
    total, present = support.sum(-1), support > 0
    hits = np.diagonal(counts, axis1=-2, axis2=-1).sum(-1)
    claimed = (counts[..., :-1].sum(-2) * present).sum(-1)
    micro_precision, micro_recall = _ratio(hits, claimed), np.where(total > 0, _ratio(hits, total), np.nan)
    scores = {
        "accuracy": micro_recall,
        "micro_precision": micro_precision,
        "micro_recall": micro_recall,
        "micro_f1": _ratio(2 * micro_precision * micro_recall, micro_precision + micro_recall),
    }
    for name, score in (("precision", precision), ("recall", recall), ("f1", f1)):
        scores[f"macro_{name}"] = _ratio((score * present).sum(-1), present.sum(-1))
        scores[f"weighted_{name}"] = _ratio((score * support).sum(-1), total)
    return {name: np.where(total > 0, score, np.nan) for name, score in scores.items()}


def class_scores(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F1 and support `[..., C]` of each class; what is undefined is 0."""
    hits, support, claimed = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts[..., :-1].sum(-2)
    return _ratio(hits, claimed), _ratio(hits, support), _ratio(2 * hits, claimed + support), support


def sentiment_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """`ACC7`, `F1w7` and the same for 5, 3 and 2 classes `[...]`, from counts `[..., 7, 8]` in the order of the sentiments.

    For two classes the rows whose gold is neutral are left out and a neutral prediction is wrong; nan where no row is left.
    """
    scores = {}
    for count, table in _COLLAPSED.items():
        to = np.eye(count + 1, dtype=counts.dtype)[[*table, -1]]  # [8, count + 1]; what has no class goes to the last place
        collapsed = np.einsum("...gp,gh,pq->...hq", counts, to[:-1], to)[..., :-1, :]
        metrics = set_scores(collapsed)
        scores |= {f"ACC{count}": metrics["accuracy"], f"F1w{count}": metrics["weighted_f1"]}
    return scores


def emotion_scores(counts: np.ndarray) -> np.ndarray:
    """The benchmark's weighted accuracy of every class `[..., C]`: the mean of its recall and of the recall of "not this class".

    Nan for a class without gold answers; the second recall is 0 where there are no other classes.
    """
    _, recall, _, support = class_scores(counts)
    hits, claimed = np.diagonal(counts, axis1=-2, axis2=-1), counts[..., :-1].sum(-2)
    others = support.sum(-1, keepdims=True) - support
    rejected = others - (claimed - hits)
    return np.where(support > 0, 0.5 * (recall + _ratio(rejected, others)), np.nan)


def gold_index(scheme: LabelScheme, dataset: str, text: str, *, any_domain: bool = False) -> int:
    """Global class index of a gold answer.

    `any_domain` looks it up as the published evaluation of generated answers did: among the labels of all domains, where the last one
    wins. "neutral" is then always the emotion, and such rows of a sentiment dataset count in none of the sentiment metrics.
    """
    index = scheme.index(dataset, text)  # whichever way, it has to be a label of its dataset
    return scheme.index_any_domain(text) if any_domain else index


def predicted_index(scheme: LabelScheme, dataset: str, text: str, *, any_domain: bool = False) -> int:
    """Global class index of a predicted text, or `NO_LABEL`; `any_domain` as in `gold_index`."""
    return scheme.index_any_domain(text) if any_domain else scheme.prediction(dataset, text)


def classification_scores(
    scheme: LabelScheme, dataset: str, golds: np.ndarray, predictions: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Every metric `[R]` of one classification dataset.

    Args:
        scheme: its labels.
        dataset: its name.
        golds: `[U]` global class indices.
        predictions: `[U]` likewise, anything else for no label.
        weights: `[R, U]` how often each row counts.

    Returns:
        Those of `set_scores`; `ACC7` ... `F1w2` of a sentiment dataset; `emotion_weighted_accuracy_mean` and
        `{label}/emotion_weighted_accuracy` of an emotion dataset; `{label}/class_f1` of every gold label. Where a resample lacks a label,
        what is that label's own is nan, and averages are over the others.
    """
    classes = np.unique(golds).tolist()
    counts = weighted_counts(golds, predictions, classes, weights)
    scores = set_scores(counts)
    labels = [scheme.classes[c][1] for c in classes]
    domain = scheme.dataset(dataset).domain
    if domain == SENTIMENT:
        own = scheme.head_classes(scheme.head(dataset))
        rows = np.isin(golds, own)
        scores |= sentiment_scores(weighted_counts(golds[rows], predictions[rows], own, weights[:, rows]))
    if domain == EMOTION:
        each = emotion_scores(counts)
        present = ~np.isnan(each)
        scores["emotion_weighted_accuracy_mean"] = np.where(present, each, 0).sum(-1) / present.sum(-1)
        scores |= {f"{label}/emotion_weighted_accuracy": each[:, i] for i, label in enumerate(labels)}
    _, _, f1, support = class_scores(counts)
    return scores | {f"{label}/class_f1": np.where(support[:, i] > 0, f1[:, i], np.nan) for i, label in enumerate(labels)}


def dataset_metrics(
    scheme: LabelScheme, datasets: Sequence[str], golds: Sequence[str], predictions: Sequence[str], *, any_domain: bool = False
) -> dict[str, dict[str, float]]:
    """Metrics of each dataset, from answers as text `[N]`, compared without regard to case and surrounding white space.

    A classification dataset gets `classification_scores`; a free-form one only `accuracy` of exact answers (the benchmark asks a judge
    instead). `any_domain` as in `gold_index`.
    """
    results = {}
    for name in sorted(set(datasets)):
        pairs = [(golds[i], predictions[i]) for i, dataset in enumerate(datasets) if dataset == name]
        if scheme.dataset(name).domain is None:
            results[name] = {"accuracy": float(np.mean([gold.strip().lower() == text.strip().lower() for gold, text in pairs]))}
            continue
        gold = np.array([gold_index(scheme, name, text, any_domain=any_domain) for text, _ in pairs])
        predicted = np.array([predicted_index(scheme, name, text, any_domain=any_domain) for _, text in pairs])
        scores = classification_scores(scheme, name, gold, predicted, np.ones((1, len(pairs)), np.int64))
        results[name] = {metric: float(score[0]) for metric, score in scores.items()}
    return results


def headline(scheme: LabelScheme, dataset: str, *, judged: bool) -> str:
    """The metric that a dataset is scored by: the benchmark's own, or for free-form answers that no judge has seen, exact `accuracy`."""
    metric = scheme.dataset(dataset).metric
    return "accuracy" if metric == "judge_accuracy" and not judged else metric


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of two scores on the same samples, with its confidence interval."""

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
    low, high = interval((draws[:, 0] - draws[:, 1]) / count, confidence)
    return Difference((better - worse) / count, low, high)


def resampled(counts: np.ndarray, *, resamples: int, seed: int | Sequence[int]) -> np.ndarray:
    """How often each kind of row counts, `[1 + R, U]`: first as it is, `counts [U]`, then in R bootstrap resamples of all the rows."""
    total = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(total, counts / total, size=resamples)
    return np.concatenate([counts[None].astype(np.int64), draws])


def interval(draws: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval of draws `[R]`, those that are nan left out; nan if none is left."""
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return float("nan"), float("nan")
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """Two-sided p-value of McNemar's exact test that `after` is right as often as `before`, both `[N]` over the same samples.

    Of graded verdicts it is the sign test: how many got better against how many got worse. 1 when none changed.
    """
    before, after = _paired(before, after)
    better, worse = int((after > before).sum()), int((after < before).sum())
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _ratio(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """The quotient, 0 where the divisor is."""
    return np.divide(upper, lower, out=np.zeros(np.broadcast(upper, lower).shape), where=np.asarray(lower) != 0)


def _paired(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"expected two equally long, non-empty rows, got shapes {first.shape} and {second.shape}")
    return first, second
