"""Real texts: how each source is read, split and kept apart, and what is said when they cannot be had. The texts here are made up."""

from __future__ import annotations

import collections
import csv
import dataclasses
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnisapiens_jax.atlas import real_text
from omnisapiens_jax.atlas.labels import REAL_TEXT, SCHEMES
from omnisapiens_jax.atlas.real_text import Text, clean, distinct, read_sarcasm, read_tweets
from omnisapiens_jax.atlas.schema import SampleError
from omnisapiens_jax.atlas.sources import SPLITS, open_splits
from omnisapiens_jax.resources import resource
from tests.registry import pip

TRUTH = "1\t2.5\tFine day &amp; fine  tea\n2\t0.1\tA table\x85 here\n3\t-3.0\tNo\ttabs\n"
RATINGS = "1\t2.5\t1.0\t[2, 3, -1, 4]\n2\t0.1\t0.5\t[0, 0, 1, 1]\n3\t-3.0\t0.1\t[-3, -3]\n"
SARCASM = 'text,sarcastic\n"Two\nlines, quoted",0\nSo glad,1\n'


def test_a_tweet_has_the_label_of_its_mean_rating_and_the_share_of_each_sign() -> None:
    good, table = read_tweets(*(text.rsplit("\n", 2)[0] for text in (TRUTH, RATINGS)))
    assert (good.id, good.text, good.label) == ("1", "Fine day & fine tea", "positive")
    assert good.raters == {"negative": 0.25, "neutral": 0.0, "positive": 0.75}
    assert (table.text, table.label) == ("A table here", "neutral")  # on the edge; a line ends at a newline alone


@pytest.mark.parametrize(
    ("ratings", "label"), [([0, -1], "neutral"), ([-1, -1, 0], "negative"), ([1, 1, 0], "positive"), ([4, -4], "neutral")]
)
def test_a_mean_within_half_a_point_of_zero_is_neutral(ratings: list[int], label: str) -> None:
    (text,) = read_tweets("7\t9.9\tx", f"7\t9.9\t0\t{ratings}")  # whatever mean is printed
    assert text.label == label


@pytest.mark.parametrize(
    ("truth", "ratings", "told"),
    [
        (TRUTH, RATINGS, "3\\\\t-3.0\\\\tNo\\\\ttabs"),
        ("4\t0\tx", "1\t0\t0\t[1]", "without ratings"),
        ("1\t0\tx", "1\t0\t0\t__import__('os')", "ratings from -4 to 4"),
        ("1\t0\tx", "1\t0\t[1]", "ratings from -4 to 4"),
        ("1\t0\tx", "1\t0\t0\t[]", "ratings from -4 to 4"),
    ],
)
def test_a_line_of_another_form_is_told(truth: str, ratings: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        list(read_tweets(truth, ratings))


def test_sarcasm_is_read_from_a_csv_with_lines_in_quotes() -> None:
    plain, sarcastic = read_sarcasm(SARCASM)
    assert (plain.id, plain.text, plain.label) == ("0", "Two lines, quoted", "not sarcasm")
    assert (sarcastic.id, sarcastic.label, sarcastic.raters) == ("1", "sarcasm", {})


@pytest.mark.parametrize("table", ["text,sarcastic\nx,2\n", "tweet,sarcastic\nx,1\n", "text,sarcastic\nx,1,more\n", "text,sarcastic\nx\n"])
def test_another_table_is_refused(table: str) -> None:
    with pytest.raises(ValueError, match="row 0: expected a text and sarcastic 0 or 1"):
        list(read_sarcasm(table))


def text(words: str, dataset: str = "isarcasm") -> Text:
    return Text(dataset, "0", clean(words), "sarcasm", {})


@given(st.lists(st.text(alphabet="aAbB \n\u2028&", max_size=6)))
def test_no_two_splits_share_a_text_and_none_is_lost(words: list[str]) -> None:
    kept = distinct(map(text, words))
    assert {t.text.casefold() for t in kept} == {clean(w).casefold() for w in words} - {""}
    assert len(kept) == len({t.text.casefold() for t in kept})
    assert all("\n" not in t.text and len(t.text.splitlines()) == 1 for t in kept)


def test_the_split_is_the_hash_modulo_ten_and_nothing_else() -> None:
    for words in map(str, range(200)):
        digit = int(hashlib.sha256(words.encode()).hexdigest(), 16) % 10
        expected = {8: "validation", 9: "test"}.get(digit, "train")
        assert text(words).split == text(words, "vader_tweets").split == expected


def test_the_index_that_travels_here_has_no_hash_in_two_splits_and_no_text() -> None:
    rows = list(csv.DictReader(io.StringIO(resource(real_text.INDEX).read_text())))
    assert set(rows[0]) == {"dataset", "id", "sha256", "split"} and all(len(row["sha256"]) == 16 for row in rows)
    assert len({row["sha256"] for row in rows}) == len(rows)
    counts = collections.Counter((row["dataset"], row["split"]) for row in rows)
    assert [counts["vader_tweets", split] for split in SPLITS] == [3335, 422, 383]
    assert [counts["isarcasm", split] for split in SPLITS] == [1129, 128, 137]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Small archives of the same layout, pinned in place of the real ones, and an index of what is in them."""
    study, outer, wheel = (io.BytesIO() for _ in range(3))
    inside = {"tweets_GroundTruth.txt": TRUTH.rsplit("\n", 2)[0] + "\n", "tweets_anonDataRatings.txt": RATINGS, "other.txt": "not kept"}
    with tarfile.open(fileobj=study, mode="w:gz") as archive:
        for name, content in inside.items():
            _add(archive, f"hutto_ICWSM_2014/{name}", ("\ufeff" + content).encode())
    with tarfile.open(fileobj=outer, mode="w:gz") as archive:
        _add(archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", study.getvalue())
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tonereader/data/task_A_En_test.csv", SARCASM)
    files, sources = [], []
    for source, content in zip(real_text.SOURCES, (outer, wheel), strict=True):
        files.append(tmp_path / source.package.file)
        files[-1].write_bytes(content.getvalue())
        pinned = dataclasses.replace(source.package, sha256=hashlib.sha256(content.getvalue()).hexdigest())
        sources.append(dataclasses.replace(source, package=pinned))
    monkeypatch.setattr(real_text, "SOURCES", tuple(sources))
    (tmp_path / "index.csv").write_text(real_text.index([*read_tweets(inside["tweets_GroundTruth.txt"], RATINGS), *read_sarcasm(SARCASM)]))
    monkeypatch.setattr(real_text.resources, "resource", lambda path: tmp_path / path)
    monkeypatch.setattr(real_text, "INDEX", "index.csv")
    return files


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_an_atlas_is_made_once_and_read_as_any_other(packages: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip(monkeypatch, *packages)
    folder = real_text.atlas(tmp_path / "cache")
    assert real_text.atlas(tmp_path / "cache") == folder and len(calls) == 2
    assert "--no-binary=vaderSentiment" in calls[0][0] and "--only-binary=:all:" in calls[1][0]
    samples = [source[i] for source in open_splits(folder).values() for i in range(len(source))]
    assert {sample.dataset: sample.modality_signature for sample in samples} == {d.name: "text" for d in REAL_TEXT.datasets}
    for sample in samples:
        REAL_TEXT.check(sample)
        assert REAL_TEXT.shares(sample).sum() == pytest.approx(1)
    (tea,) = (sample for sample in samples if "fine tea" in sample.problem)
    np.testing.assert_allclose(REAL_TEXT.shares(tea), [0.25, 0, 0.75, 0, 0])  # the first three classes are the tweets'
    lines = "".join((folder / f"{split}.jsonl").read_text() for split in SPLITS if (folder / f"{split}.jsonl").exists())
    assert "not kept" not in lines and len(lines.splitlines()) == 4


def test_offline_says_what_to_do_and_leaves_nothing(packages: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, packages[0])
    with pytest.raises(RuntimeError, match="could not download tonereader==0.1.3.*Offline?") as caught:
        real_text.atlas(tmp_path / "cache")
    assert str(tmp_path / "cache" / packages[1].name) in str(caught.value) and "config.atlas.scheme hba" in str(caught.value)
    assert [path.name[:6] for path in (tmp_path / "cache").iterdir()] == ["texts-"]  # of the package that was there


def test_another_archive_and_other_texts_are_refused(packages: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, *packages)
    content = packages[1].read_bytes()
    packages[1].write_bytes(content + b"!")
    with pytest.raises(RuntimeError, match="has SHA-256 .* expected .*: it is damaged or another file"):
        real_text.atlas(tmp_path / "cache")
    packages[1].write_bytes(content)
    (tmp_path / "index.csv").write_text("dataset,id,sha256,split\n")
    with pytest.raises(ValueError, match="are not those of index.csv"):
        real_text.atlas(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("real-text-*"))


def test_shares_of_labels_that_a_dataset_has_not_are_refused(tmp_path: Path) -> None:
    row = Text("vader_tweets", "1", "x", "neutral", {"neutral": 0.5, "sad": 0.5}).row()
    for split, raters in (("train", {"neutral": 0.5, "sad": 0.5}), ("test", {"neutral": 0.5}), ("validation", [1])):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row | {"raters": raters}))
    splits = open_splits(tmp_path)
    with pytest.raises(SampleError, match="'raters'.*\\['sad'\\], which the dataset has not"):
        REAL_TEXT.check(splits["train"][0])
    with pytest.raises(SampleError, match="add up to 0.5, not to 1"):
        splits["test"][0]
    with pytest.raises(SampleError, match="a share of at least 0"):
        splits["validation"][0]


def test_no_dataset_is_in_two_schemes() -> None:
    names = [dataset.name for scheme in SCHEMES.values() for dataset in scheme.datasets]
    assert len(names) == len({*names})
