"""Metrics against the reference's golden values and against scikit-learn."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from omnisapiens_jax.atlas.labels import HBA
from omnisapiens_jax.evaluation.metrics import (
    class_scores,
    classification_scores,
    confusion_matrix,
    dataset_metrics,
    emotion_scores,
    interval,
    mcnemar,
    paired_bootstrap,
    resampled,
    sentiment_scores,
    set_scores,
)

# (predictions, golds) on which the reference code was run.
SENTI = np.array([0, 3, 4, 6, 5, 1, 2, 3, 0, 11]), np.array([0, 2, 4, 5, 6, 1, 1, 3, 5, 0])
EMOTION = np.array([7, 11, 11, 13, 10, 14]), np.array([7, 10, 11, 13, 14, 7])
PTSD = np.array([15, 16, 16, 15]), np.array([15, 15, 16, 16])
UNDEFINED: Any = {"zero_division": 0}  # scikit-learn's stubs only know its string values
PER_CLASS: Any = {"average": None}
SARCASM = np.array([21, 22, 22]), np.array([21, 22, 21])


def set_metrics(golds: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """The scores of one set over the classes of its gold answers."""
    return {name: float(score) for name, score in set_scores(confusion_matrix(golds, predictions, np.unique(golds).tolist())).items()}


def sentiment_metrics(golds: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Of one set of sentiment positions 0 to 6."""
    return {name: float(score) for name, score in sentiment_scores(confusion_matrix(golds, predictions, range(7))).items()}


def emotion_accuracy(golds: np.ndarray, predictions: np.ndarray) -> dict[int, float]:
    """Of every class that occurs among the gold answers."""
    classes = np.unique(golds).tolist()
    return dict(zip(classes, emotion_scores(confusion_matrix(golds, predictions, classes)).tolist(), strict=True))


def close(measured, **expected):
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, abs=5e-7), name


def test_golden_sentiment():
    predictions, golds = SENTI
    close(set_metrics(golds, predictions), weighted_f1=0.4, micro_precision=0.444444, micro_f1=0.421053, macro_f1=0.404762)
    close(
        sentiment_metrics(golds, predictions),
        **{"ACC7": 0.4, "F1w7": 0.4, "ACC5": 0.5, "F1w5": 0.526667, "ACC3": 0.7, "F1w3": 0.742857, "ACC2": 0.666667, "F1w2": 0.751323},
    )


def test_golden_emotion():
    predictions, golds = EMOTION
    scores = emotion_accuracy(golds, predictions)
    assert scores == pytest.approx({7: 0.75, 10: 0.4, 11: 0.9, 13: 1.0, 14: 0.4})
    assert np.mean(list(scores.values())) == pytest.approx(0.69)
    close(set_metrics(golds, predictions), weighted_f1=0.5, macro_f1=0.466667)


def test_golden_binary_and_aggregate():
    close(set_metrics(PTSD[1], PTSD[0]), accuracy=0.5, weighted_f1=0.5, macro_f1=0.5, micro_f1=0.5, weighted_precision=0.5)
    close(set_metrics(SARCASM[1], SARCASM[0]), weighted_f1=0.666667, weighted_precision=0.833333)
    predictions, golds = (np.concatenate([pair[i] for pair in (SENTI, EMOTION, PTSD, SARCASM)]) for i in (0, 1))
    close(set_metrics(golds, predictions), weighted_f1=0.471014, macro_f1=0.458333, micro_f1=0.478261)


def prediction_sets(golds: range, predictions: range, most: int = 15) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Golds and predictions `[N]` of a random size, N >= 1."""
    return st.integers(1, most).flatmap(
        lambda n: st.tuples(*(st.lists(st.sampled_from(kinds), min_size=n, max_size=n).map(np.array) for kinds in (golds, predictions)))
    )


thousands = pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.slow)])


def holds(law: Callable[[tuple[np.ndarray, np.ndarray]], None], sets: st.SearchStrategy[tuple[np.ndarray, np.ndarray]], examples: int):
    """Tries a law on so many random prediction sets."""
    settings(deadline=None, max_examples=examples)(given(sets)(lambda pair: law(pair)))()


@thousands
def test_averages_equal_scikit_learn_over_the_gold_classes(examples):
    def law(pair):
        golds, predictions = pair
        ours, labels = set_metrics(golds, predictions), np.unique(golds)
        for average in ("macro", "weighted", "micro"):
            theirs = sk.precision_recall_fscore_support(golds, predictions, labels=labels, average=average, **UNDEFINED)
            close(ours, **{f"{average}_{name}": value for name, value in zip(("precision", "recall", "f1"), theirs, strict=False)})
        assert ours["accuracy"] == pytest.approx(np.mean(golds == predictions))
        matrix = sk.confusion_matrix(golds, np.where(predictions > 4, -1, predictions), labels=[0, 1, 2, 3, 4, -1])
        np.testing.assert_array_equal(confusion_matrix(golds, predictions, range(5)), matrix[:5])
        each = np.array(sk.precision_recall_fscore_support(golds, predictions, labels=labels, **PER_CLASS, **UNDEFINED))
        np.testing.assert_allclose(class_scores(confusion_matrix(golds, predictions, labels.tolist())), each)

    holds(law, prediction_sets(range(5), range(-1, 7)), examples)


@thousands
def test_sentiments_equal_scikit_learn_on_what_they_collapse_to(examples):
    def law(pair):
        golds, predictions = pair
        ours = sentiment_metrics(golds, predictions)
        bounds: dict[int, list[float]] = {7: [0.5, 1.5, 2.5, 3.5, 4.5, 5.5], 5: [0.5, 2.5, 3.5, 5.5], 3: [2.5, 3.5], 2: [3.0]}
        for count, cuts in bounds.items():
            rows = golds != 3 if count == 2 else np.ones(len(golds), bool)
            invalid = (predictions < 0) | (predictions > 6) | ((predictions == 3) & (count == 2))
            if not rows.any():
                assert np.isnan(ours["ACC2"]) and np.isnan(ours["F1w2"])
                continue
            gold, said = np.digitize(golds, cuts)[rows], np.where(invalid, -1, np.digitize(predictions, cuts))[rows]
            f1: Any = sk.f1_score(gold, said, labels=np.unique(gold), average="weighted", **UNDEFINED)
            close(ours, **{f"ACC{count}": sk.accuracy_score(gold, said), f"F1w{count}": f1})

    holds(law, prediction_sets(range(7), range(-1, 12)), examples)


@thousands
def test_emotion_accuracy_equals_scikit_learns_balanced_accuracy_of_each_class(examples):
    def law(pair):
        golds, predictions = pair
        ours = emotion_accuracy(golds, predictions)
        assert list(ours) == np.unique(golds).tolist()
        for c, score in ours.items():
            if (golds == c).all():
                theirs: Any = 0.5 * np.mean(predictions == c)
            else:
                theirs = sk.balanced_accuracy_score(golds == c, predictions == c)
            assert score == pytest.approx(theirs)

    holds(law, prediction_sets(range(7, 15), range(-1, 17)), examples)


@settings(deadline=None, max_examples=60)
@given(prediction_sets(range(7), range(-1, 9), most=15), st.integers(0, 2**32))
@pytest.mark.parametrize(("dataset", "first"), [("mosei_senti", 0), ("meld_emotion", 7), ("ptsd_in_the_wild", 15)])
def test_a_resample_is_measured_as_if_its_rows_stood_there(dataset, first, pair, seed):
    """Rows drawn twice count twice, and a class that a resample lacks counts in none of its averages."""
    golds, predictions = (column + first for column in pair)
    weights = np.random.default_rng(seed).multinomial(len(golds), np.full(len(golds), 1 / len(golds)), size=2)
    together = classification_scores(HBA, dataset, golds, predictions, weights)
    for r, own in enumerate(weights):
        alone = classification_scores(HBA, dataset, np.repeat(golds, own), np.repeat(predictions, own), np.ones((1, len(golds)), int))
        for name, score in together.items():
            assert score[r] == pytest.approx(alone[name][0] if name in alone else np.nan, nan_ok=True), name


def test_answers_as_text_are_scored_by_dataset():
    names = ["mosei_senti"] * 10 + ["meld_emotion"] * 6 + ["cremad"] * 2 + ["siq2"] * 2
    predictions, golds = ([HBA.classes[i][1] for pair in (SENTI, EMOTION) for i in pair[k]] for k in (0, 1))
    predictions[9] = "surprise"  # the golden run had the emotion "neutral" here; as text it would be this dataset's own neutral
    predictions += ["Sad ", "nonsense", "he is shy", "no idea"]
    golds += ["sad", "neutral", "He is shy", "he is bored"]
    scores = dataset_metrics(HBA, names, golds, predictions)
    close(scores["mosei_senti"], weighted_f1=0.4, F1w2=0.751323)
    close(scores["meld_emotion"], emotion_weighted_accuracy_mean=0.69, weighted_f1=0.5)
    assert scores["siq2"] == {"accuracy": 0.5}
    assert scores["cremad"]["accuracy"] == 0.5 and scores["cremad"]["sad/class_f1"] == 1.0
    close(scores["cremad"], emotion_weighted_accuracy_mean=0.5 * (1.0 + 0.5))  # sad: 1 and 1; neutral: 0 and 1


def test_a_sentiment_set_of_neutral_golds_has_no_two_way_score():
    scores = sentiment_metrics(np.array([3, 3]), np.array([3, 0]))
    assert scores["ACC7"] == 0.5 and np.isnan(scores["ACC2"]) and np.isnan(scores["F1w2"])


def test_the_bootstrap_equals_resampling_the_pairs_one_by_one():
    rng = np.random.default_rng(0)
    before = rng.random(500) < 0.4
    after = before ^ (rng.random(500) < np.where(before, 0.1, 0.2))
    ours = paired_bootstrap(before, after, seed=1)
    picks = rng.integers(500, size=(10_000, 500))
    direct = after[picks].mean(1) - before[picks].mean(1)
    assert ours.mean == pytest.approx(after.mean() - before.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(direct, [0.025, 0.975])), abs=0.004)
    assert ours == paired_bootstrap(before, after, seed=1)


def test_the_interval_says_when_a_difference_is_noise():
    rng = np.random.default_rng(0)
    before, same = rng.random((2, 400)) < 0.5
    assert not paired_bootstrap(before, same).significant
    assert paired_bootstrap(before, before | (rng.random(400) < 0.2)).significant
    assert paired_bootstrap(before, before).low == 0


def test_the_interval_of_any_metric_equals_resampling_the_rows_one_by_one():
    rng = np.random.default_rng(0)
    golds = rng.integers(7, 10, 300)
    predictions = np.where(rng.random(300) < 0.6, golds, rng.integers(7, 15, 300))
    (cells, counts), runs = np.unique([golds, predictions], axis=1, return_counts=True), 4000
    draws = classification_scores(HBA, "meld_emotion", cells[0], cells[1], resampled(counts, resamples=runs, seed=1))
    picks = rng.integers(300, size=(runs, 300))
    direct = [sk.f1_score(golds[own], predictions[own], average="macro", labels=[7, 8, 9], **UNDEFINED) for own in picks[:1000]]
    assert draws["macro_f1"][0] == pytest.approx(set_metrics(golds, predictions)["macro_f1"])
    # 1,000 and 4,000 draws leave the ends of an interval uncertain by about a tenth of its width.
    low, high = interval(draws["macro_f1"][1:])
    assert (low, high) == pytest.approx(tuple(np.quantile(direct, [0.025, 0.975])), abs=0.1 * (high - low))


@pytest.mark.parametrize(("better", "worse"), [(9, 2), (3, 3), (0, 6), (0, 0), (30, 12)])
def test_mcnemars_test_is_the_exact_binomial_one(better, worse):
    before = np.array([0] * better + [1] * worse + [1, 0, 1])
    after = np.array([1] * better + [0] * worse + [1, 0, 1])
    count, tail = better + worse, max(better, worse)
    upper = sum(math.comb(count, k) for k in range(tail, count + 1)) / 2**count
    assert mcnemar(before, after) == pytest.approx(min(2 * upper, 1.0) if count else 1.0)
    assert mcnemar(before, after) == mcnemar(after, before)


def test_the_published_collision_of_neutral_can_be_reproduced():
    """With all domains' labels in one table, a neutral sentiment is an emotion: its rows leave the sentiment metrics."""
    golds, said = ["neutral", "neutral", "positive", "negative"], ["neutral", "positive", "neutral", "negative"]
    ours = dataset_metrics(HBA, ["mosei_senti"] * 4, golds, said)["mosei_senti"]
    theirs = dataset_metrics(HBA, ["mosei_senti"] * 4, golds, said, any_domain=True)["mosei_senti"]
    assert ours["ACC7"] == ours["accuracy"] == theirs["accuracy"] == 0.5
    assert theirs["ACC7"] == theirs["ACC3"] == 0.5  # of the last two rows alone; by the others it would be a half as well
    assert ours["F1w7"] == pytest.approx((0.5 * 2 + 0 + 1) / 4) and theirs["F1w7"] == pytest.approx((0 + 1) / 2)
    assert ours["F1w2"] == theirs["F1w2"]  # neutral golds are left out anyway, and a neutral prediction is wrong
    assert dataset_metrics(HBA, ["mosei_senti"] * 2, golds[:2], said[:2], any_domain=True)["mosei_senti"]["ACC7"] != ours["ACC7"]


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        set_metrics(np.zeros(2, int), np.zeros(3, int))
    with pytest.raises(ValueError, match="non-empty"):
        paired_bootstrap(np.zeros(0, bool), np.zeros(0, bool))
    with pytest.raises(ValueError, match=r"gold classes \[9\]"):
        confusion_matrix(np.array([9]), np.array([1]), [1, 2])
