"""The tables of real texts: scores are scikit-learn's, intervals those of the bootstrap, settings are chosen without the test split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from benchmarks import real_text as bench
from omnisapiens_jax.atlas.real_text import Text
from omnisapiens_jax.atlas.sources import SPLITS

NUMBERS = st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=3, max_size=40).filter(lambda rows: {row[0] for row in rows} == {0, 1, 2})


@settings(max_examples=50)
@given(NUMBERS)
def test_scores_are_scikit_learns_and_their_mean_over_seeds(rows: list[tuple[int, int, int]]) -> None:
    golds, *seeds = np.array(rows).T
    found = bench.resampled(golds, seeds, resamples=2)
    f1 = [f1_score(golds, seed, average="macro", labels=[0, 1, 2]) for seed in seeds]
    np.testing.assert_allclose(found.value, [np.mean(f1), np.mean([accuracy_score(golds, seed) for seed in seeds])])


def test_intervals_are_those_of_drawing_rows_and_pairs_stay_together() -> None:
    rng = np.random.default_rng(1)
    golds = rng.integers(0, 3, 120)
    good, bad = (np.where(rng.random(120) < share, golds, rng.integers(0, 3, 120)) for share in (0.7, 0.3))
    ours, theirs = bench.resampled(golds, [good]), bench.resampled(golds, [bad])
    draws = rng.integers(0, 120, (4000, 120))

    def score(found: np.ndarray, rows: np.ndarray) -> float:
        return float(f1_score(golds[rows], found[rows], average="macro"))

    apart = np.array([score(good, rows) - score(bad, rows) for rows in draws[:1000]])
    low, high = ours.interval(theirs)
    # Two bootstraps of 10,000 and of 1,000 draws: a quantile of the second has a standard error of about 0.006.
    np.testing.assert_allclose([low[0], high[0]], np.quantile(apart, [0.025, 0.975]), atol=0.02)
    right = (golds == good)[draws].mean(axis=1)
    np.testing.assert_allclose(ours.interval()[:, 1], np.quantile(right, [0.025, 0.975]), atol=0.01)
    assert not ours.interval(ours).any()


def test_a_setting_is_chosen_on_the_validation_split_alone() -> None:
    """Features that tell the label in train and validation win over such that tell it in train and test."""
    rng = np.random.default_rng(0)
    data = {split: bench.Texts((), rng.integers(0, 2, 60)) for split in SPLITS}
    told = {split: data[split].labels[:, None] + 0.01 * rng.standard_normal((60, 1)) for split in SPLITS}
    noise = {split: rng.standard_normal((60, 1)) for split in SPLITS}
    cheat = told | {"validation": noise["validation"]}
    honest = told | {"test": np.ones((60, 1))}
    assert bench.logistic([cheat, honest], data).all()
    assert (bench.logistic([cheat], data) == data["test"].labels).mean() > 0.9


def test_texts_are_read_out_of_the_problems(tmp_path: Path) -> None:
    for split in SPLITS:
        texts = [Text("vader_tweets", "0", f"good: {split}", "positive", {}), Text("isarcasm", "1", "sure", "sarcasm", {})]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(text.row()) + "\n" for text in texts))
    tweets, sarcasm = (bench.load(tmp_path, dataset) for dataset in (bench.TWEETS, bench.SARCASM))
    assert {split: own.texts for split, own in tweets.items()} == {split: (f"good: {split}",) for split in SPLITS}
    assert tweets["test"].labels.tolist() == [2] and sarcasm["test"].labels.tolist() == [1]


def test_a_table_has_a_line_for_each_model() -> None:
    golds = np.array([0, 1, 2, 2] * 10)
    found = {"commonest class": [np.full(40, 2)], "TF-IDF + logistic regression": [golds], "ours, labels": [golds, np.full(40, 2)]}
    lines = bench.table("vader_tweets", golds, found).splitlines()
    assert lines[0] == "`vader_tweets`, 40 test rows (10 negative, 10 neutral, 20 positive):"
    assert lines[2].startswith("| model | seeds | macro-F1 |") and len(lines) == 7
    name, seeds, f1, accuracy, above, of = (cell.strip() for cell in lines[6].strip("|").split("|"))
    assert (name, seeds, of) == ("ours, labels", "2", "0.61")
    assert f1.startswith("0.611 [") and accuracy.startswith("0.750 [") and above.startswith("+0.389 [")
    assert lines[4].split("|")[5].strip() == "+0.000 [+0.000, +0.000]"


def test_the_commonest_class_is_that_of_the_training_split() -> None:
    data = {split: bench.Texts((), np.array(labels)) for split, labels in zip(SPLITS, ([1, 1, 0], [0], [0, 0]), strict=True)}
    assert bench.commonest(data).tolist() == [1, 1]
