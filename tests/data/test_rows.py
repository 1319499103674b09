"""What the miniature atlas promises about its rows, before any media exist."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from omnisapiens_jax import defaults
from omnisapiens_jax.atlas.labels import HBA
from omnisapiens_jax.atlas.miniature import words
from omnisapiens_jax.atlas.miniature.generate import SAMPLES, SEED
from omnisapiens_jax.atlas.miniature.script import CARRIES, DATASETS, Row, split_sizes, write_script
from omnisapiens_jax.processing import chat
from omnisapiens_jax.processing.tokenizers import MiniTokenizer
from omnisapiens_jax.resources import resource

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def script() -> dict[str, list[Row]]:
    return write_script(SAMPLES, SEED)


def test_default_size_leaves_five_hundred_rows_to_test_on(script: dict[str, list[Row]]) -> None:
    assert (defaults.base("mini").atlas.samples, defaults.base("mini").atlas.seed) == (SAMPLES, SEED)
    assert {split: len(rows) for split, rows in script.items()} == {"train": 3150, "validation": 375, "test": 975}
    assert sum(split_sizes(1234).values()) == 1234


def test_same_seed_same_rows_other_seed_other_rows(script: dict[str, list[Row]]) -> None:
    assert write_script(SAMPLES, SEED) == script
    assert write_script(SAMPLES, SEED + 1)["train"] != script["train"]


def test_too_few_rows_are_refused_with_the_least_number() -> None:
    with pytest.raises(ValueError, match="at least 108"):
        write_script(107, 0)


@pytest.mark.parametrize("what", ["voice", "template", "content"])
def test_splits_share_nothing_but_closed_classes(script: dict[str, list[Row]], what: str) -> None:
    def used(rows: list[Row]) -> set[str]:
        if what == "voice":
            return {words.SPEAKERS[row.split][row.speaker].name for row in rows}
        if what == "template":
            return {row.template for row in rows if row.transcript}
        return {word.lower() for row in rows for word in row.content}

    found = {split: used(rows) for split, rows in script.items()}
    assert min(len(names) for names in found.values()) >= 4
    for one, other in itertools.combinations(SPLITS, 2):
        assert not found[one] & found[other]
    closed = {piece for pool in words.INTERJECTIONS.values() for piece in pool} | {w for pool in words.FREQUENCIES.values() for w in pool}
    if what == "content":
        assert not closed & set.union(*found.values())


def test_no_sentence_is_in_two_splits(script: dict[str, list[Row]]) -> None:
    said = [{row.transcript for row in rows if row.transcript} for rows in script.values()]
    assert not said[0] & said[1] and not said[0] & said[2] and not said[1] & said[2]


def test_answers_are_even_and_of_the_label_scheme(script: dict[str, list[Row]]) -> None:
    for rows in script.values():
        for name, dataset in DATASETS.items():
            counts = Counter(row.answer for row in rows if row.dataset == name)
            assert set(counts) == set(dataset.answers)
            assert max(counts.values()) - min(counts.values()) <= 1
            if HBA.dataset(name).kind == "cls":
                assert all(HBA.index(name, answer) >= 0 for answer in dataset.answers)
            assert HBA.dataset(name).kind == dataset.task.rsplit("_", 1)[-1]


def test_each_modality_carries_the_label_as_often_as_stated(script: dict[str, list[Row]]) -> None:
    rows = [row for row in script["train"] if row.dataset == "meld_emotion" and row.answer != "neutral"]
    shown = {modality: [getattr(row, modality) == row.answer for row in rows] for modality in ("voice", "face", "words")}
    for modality, right in shown.items():
        assert abs(sum(right) / len(right) - CARRIES) < 0.05, modality
    assert all(getattr(row, modality) in (row.answer, "neutral") for row in rows for modality in shown)
    both_lost = sum(not a and not b for a, b in zip(shown["voice"], shown["face"], strict=True)) / len(rows)
    assert both_lost < 0.1  # independent draws: about 0.0625, not 0.25


def test_sarcasm_is_told_by_the_relation_of_words_and_delivery_alone(script: dict[str, list[Row]]) -> None:
    for rows in script.values():
        rows = [row for row in rows if row.dataset == "mmsd"]
        cells = Counter((row.answer, row.words) for row in rows)
        assert max(cells.values()) - min(cells.values()) <= 1  # the words alone tell nothing
        for row in rows:
            for delivery in {row.voice, row.face} - {"neutral"}:
                agree = (row.words == "happy") == (delivery == "happy")
                assert agree == (row.answer == "not sarcasm")
    rows = [row for row in script["train"] if row.dataset == "mmsd"]
    for modality in ("voice", "face"):
        seen = {answer: Counter(getattr(row, modality) for row in rows if row.answer == answer) for answer in ("sarcasm", "not sarcasm")}
        for style in ("happy", "flat", "neutral"):
            assert abs(seen["sarcasm"][style] - seen["not sarcasm"][style]) <= 0.12 * len(rows) / 2, (modality, style)


def test_humour_is_told_by_when_the_laugh_comes(script: dict[str, list[Row]]) -> None:
    rows = [row for split in script.values() for row in split if row.dataset == "urfunny"]
    assert {(row.answer, row.laugh) for row in rows} == {("humour", "after"), ("not humour", "before")}
    assert {row.words for row in rows} == {"joke"}


def test_hidden_feelings_are_told_by_voice_and_face_together(script: dict[str, list[Row]]) -> None:
    rows = [row for row in script["train"] if row.dataset == "siq2"]
    for row in rows:
        feeling, how = row.answer.split(", ")
        assert row.voice == feeling
        assert row.face == ("happy" if how == "hidden" else feeling)
    voices = Counter((row.voice, row.answer.split(", ")[1]) for row in rows)
    assert max(voices.values()) - min(voices.values()) <= 1


def test_a_mime_says_nothing_and_shows_all(script: dict[str, list[Row]]) -> None:
    rows = [row for split in script.values() for row in split if row.dataset == "mimeqa"]
    assert {(row.transcript, row.voice, row.words) for row in rows} == {("", "", "")}
    assert all(row.face == row.answer and row.rationale == f"face: {row.answer}." for row in rows)


def test_problem_has_the_benchmarks_shape(script: dict[str, list[Row]]) -> None:
    for row in script["test"]:
        dataset = DATASETS[row.dataset]
        lines = row.problem.split("\n")
        assert lines[0] == dataset.opener
        assert [line for line in lines if line.startswith("Transcript")] == [f"Transcript: {row.transcript}"] * bool(row.transcript)
        assert all(row.problem.count(tag) == (row.tagged and kind in dataset.signature) for kind, tag in chat.TAGS.items())
        if dataset.task.endswith("_cls"):
            assert lines[-1].endswith(f"Choose one: {', '.join(dataset.answers)}.")
    assert 0.2 < sum(not row.tagged for row in script["test"]) / len(script["test"]) < 0.4


def test_prompts_are_short_in_the_small_vocabulary(script: dict[str, list[Row]]) -> None:
    tokenizer = MiniTokenizer(resource("data/mini/tokenizer.model"))
    assert tokenizer.vocab_size == 1024
    for row in itertools.chain.from_iterable(script.values()):
        counts = {kind: int(kind in DATASETS[row.dataset].signature) for kind in chat.TAGS}
        messages = chat.build_messages(row.problem, counts, modalities=tuple(chat.TAGS), format_prompt=chat.FORMAT_PROMPTS["think"])
        prompt = chat.render(messages)
        ids = tokenizer.encode(prompt)
        assert len(ids) <= 90
        assert tokenizer.decode(ids, skip_special=False) == prompt
        response = f"<think>{row.rationale}</think>\\boxed{{{row.answer}}}"
        assert len(tokenizer.encode(response)) <= 24
        assert tokenizer.decode(tokenizer.encode(response)) == response
