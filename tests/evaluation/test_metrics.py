"""Metrics against the reference's golden values and against scikit-learn."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from omnisapiens_jax.atlas.labels import HBA
from omnisapiens_jax.evaluation.metrics import (
    benchmark_scores,
    class_f1,
    confusion_matrix,
    dataset_metrics,
    emotion_accuracy,
    paired_bootstrap,
    sentiment_metrics,
    set_metrics,
)

# (predictions, golds) on which the reference code was run.
SENTI = np.array([0, 3, 4, 6, 5, 1, 2, 3, 0, 11]), np.array([0, 2, 4, 5, 6, 1, 1, 3, 5, 0])
EMOTION = np.array([7, 11, 11, 13, 10, 14]), np.array([7, 10, 11, 13, 14, 7])
PTSD = np.array([15, 16, 16, 15]), np.array([15, 15, 16, 16])
UNDEFINED: Any = {"zero_division": 0}  # scikit-learn's stubs only know its string values
PER_CLASS: Any = {"average": None}
SARCASM = np.array([21, 22, 22]), np.array([21, 22, 21])


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


rows = st.integers(1, 60).flatmap(
    lambda n: st.tuples(st.lists(st.integers(0, 4), min_size=n, max_size=n), st.lists(st.integers(-1, 6), min_size=n, max_size=n))
)


@settings(deadline=None)
@given(rows)
def test_averages_equal_scikit_learn_over_the_gold_classes(pair):
    golds, predictions = map(np.array, pair)
    ours, labels = set_metrics(golds, predictions), np.unique(golds)
    for average in ("macro", "weighted", "micro"):
        theirs = sk.precision_recall_fscore_support(golds, predictions, labels=labels, average=average, **UNDEFINED)
        close(ours, **{f"{average}_{name}": value for name, value in zip(("precision", "recall", "f1"), theirs, strict=False)})
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(golds, predictions))
    assert list(class_f1(golds, predictions).values()) == pytest.approx(
        sk.f1_score(golds, predictions, labels=labels, **UNDEFINED, **PER_CLASS)
    )
    matrix = sk.confusion_matrix(golds, np.where(predictions > 4, -1, predictions), labels=[0, 1, 2, 3, 4, -1])
    np.testing.assert_array_equal(confusion_matrix(golds, predictions, range(5)), matrix[:5])


def test_answers_as_text_are_scored_by_dataset_and_task():
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
    cremad = 0.5 * (1.0 + 0.5)  # sad: 1 and 1; neutral: 0 and 1
    assert benchmark_scores(HBA, scores) == pytest.approx({"EMO": (0.69 + cremad) / 2, "SEN": 0.751323, "SOC": 0.5}, abs=1e-6)


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


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        set_metrics(np.zeros(2, int), np.zeros(3, int))
    with pytest.raises(ValueError, match="non-empty"):
        paired_bootstrap(np.zeros(0, bool), np.zeros(0, bool))
    with pytest.raises(ValueError, match=r"gold classes \[9\]"):
        confusion_matrix(np.array([9]), np.array([1]), [1, 2])
