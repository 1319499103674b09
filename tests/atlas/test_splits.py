"""The split report counts what is there and finds what was put into two splits."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from omnisapiens_jax.atlas.sources import open_splits
from omnisapiens_jax.atlas.splits import FREE_TEXT, main, speaker, split_report
from tests.atlas.release import script, torch_saved, write_release

ROWS = 192


class Rows(list):
    """A source in memory."""

    def fingerprint(self):
        return ""

    def stamp(self, index: int, fields: Sequence[str] = ()) -> str:
        return ""

    def file(self, index: int) -> str:
        return ""


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    return folder, write_release(folder, ROWS, "tar")


@pytest.fixture(scope="module")
def splits(release):
    return {split: Rows(source[i] for i in range(len(source))) for split, source in open_splits(release[0]).items()}


def test_every_dataset_and_class_is_counted_in_every_split(release, splits):
    report = split_report(splits)
    for split, rows in release[1].items():
        wanted = Counter((row["dataset"], row["answer"] if row["task"].endswith("_cls") else FREE_TEXT) for row in rows)
        assert {key: n for key, by_split in report.counts.items() if (n := by_split.get(split))} == wanted
    assert report.rows == {split: len(rows) for split, rows in release[1].items()}
    assert not report.leaks and not report.faults
    text = report.text()
    cremad = Counter(split for split, rows in release[1].items() for row in rows if row["dataset"] == "cremad")
    assert [*map(str, cremad.values()), str(cremad.total()), "7,442"] == next(x for x in text.splitlines() if "EMO   cremad" in x).split()[
        3:
    ]
    assert "nothing was found in more than one split" in text


def find(splits, split, dataset):
    return next(i for i, sample in enumerate(splits[split]) if sample.dataset == dataset)


def test_a_file_in_two_splits_is_found_also_under_another_dataset_and_name(splits):
    a, b = find(splits, "train", "meld_emotion"), find(splits, "test", "meld_senti")
    leaky = {**splits, "test": Rows(splits["test"])}
    leaky["test"][b] = dataclasses.replace(splits["test"][b], videos=splits["train"][a].videos)
    (leak,) = split_report(leaky).leaks
    assert leak.kind == "media" and {*leak.rows} == {("train", a, "meld_emotion"), ("test", b, "meld_senti")}


def asked(splits, *prompts) -> Any:
    """The splits with prompts of MMPsy: (split, dataset, what it asks)."""
    leaky = {split: Rows(rows) for split, rows in splits.items()}
    for split, dataset, problem in prompts:
        row = find(leaky, split, dataset)
        leaky[split][row] = dataclasses.replace(leaky[split][row], problem=problem)
    return leaky


def test_a_prompt_in_two_splits_is_found_where_there_is_nothing_else(splits):
    problem = "Transcript: I do not sleep well.\nIs the writer anxious?"
    leaky = asked(splits, ("validation", "mmpsy_anxiety", problem), ("test", "mmpsy_anxiety", problem))
    (leak,) = split_report(leaky).leaks
    assert leak.kind == "prompt" and [split for split, _, _ in leak.rows] == ["validation", "test"]


def test_an_interview_in_two_splits_is_found_whatever_is_asked_of_it(splits):
    """MMPsy has each of them twice, for anxiety and for depression; a patient must not be taught by one and tested by the other."""
    words = " ".join(f"said{i}" for i in range(30))
    anxious, depressed = f"Transcript: {words}\nIs the writer anxious?", f"Transcript: {words} \nIs the writer depressed?"
    leaky = asked(splits, ("train", "mmpsy_anxiety", anxious), ("test", "mmpsy_depression", depressed))
    (leak,) = split_report(leaky).leaks
    assert leak.kind == "transcript"
    assert [(split, dataset) for split, _, dataset in leak.rows] == [("train", "mmpsy_anxiety"), ("test", "mmpsy_depression")]
    assert "leak, transcript: 1 shared by 2 rows" in split_report(leaky).text()
    same_split = asked(splits, ("test", "mmpsy_anxiety", anxious), ("test", "mmpsy_depression", depressed))
    greeting = asked(splits, ("train", "mmpsy_anxiety", "Transcript: Hello.\nA?"), ("test", "mmpsy_depression", "Transcript: Hello.\nB?"))
    assert not split_report(same_split).leaks and not split_report(greeting).leaks


@pytest.mark.parametrize(
    ("dataset", "name", "who"),
    [
        ("cremad", "audios/cremad/1076_MTI_SAD_XX.wav", "cremad actor 1076"),
        ("tess", "TESS/OAF_angry/OAF_back_angry.wav", "tess talker OAF"),
        ("meld_emotion", "videos/meld/train/dia12_utt3.mp4", "meld dialogue meld/train/dia12"),
        ("meld_senti", "audios/meld/train/dia12_utt9.wav", "meld dialogue meld/train/dia12"),
        ("meld_senti", "audios/meld/test/dia12_utt9.wav", "meld dialogue meld/test/dia12"),
        ("daicwoz", "audios/daicwoz/302_P/302_AUDIO.wav", "daicwoz participant 302"),
        ("mimeqa", "videos/1076_MTI_SAD_XX.mp4", None),
        ("cremad", "audios/clip7.wav", None),
    ],
)
def test_who_speaks(dataset, name, who):
    assert speaker(dataset, name) == who


def test_a_speaker_in_two_splits_is_found_by_the_names(splits):
    a, b = find(splits, "train", "cremad"), find(splits, "validation", "cremad")
    leaky = {**splits, "validation": Rows(splits["validation"])}
    leaky["validation"][b] = dataclasses.replace(splits["validation"][b], names=("audios/x/" + splits["train"][a].names[0].split("/")[-1],))
    (leak,) = split_report(leaky).leaks
    assert leak.kind == "speaker" and {("train", a, "cremad"), ("validation", b, "cremad")} <= {*leak.rows}


def test_rows_whose_file_names_tell_nobody_are_not_counted_as_looked_at(splits):
    """Media under names of the release's own must not read as if no speaker leaked."""
    sample = splits["train"][find(splits, "train", "cremad")]
    renamed: dict[str, Any] = {"train": Rows([sample, dataclasses.replace(sample, names=("audios/cremad/000017.wav",))])}
    assert "tell them of 1 of 2 rows of cremad," in split_report(renamed).text()


def test_without_names_the_descriptor_tells_what_file_it_is_of(splits):
    def parquet(split, path):
        sample = splits[split][find(splits, split, "daicwoz")]
        return dataclasses.replace(sample, names=(), ext_audio_feats=(torch_saved({"file_path": path}),))

    rows: dict[str, Any] = {
        "train": Rows([parquet("train", "/data/301_AUDIO.wav")]),
        "test": Rows([parquet("test", "/elsewhere/301_P/301_AUDIO.wav")]),
    }
    (leak,) = split_report(rows).leaks
    assert leak.what == "daicwoz participant 301"


def test_rows_that_cannot_be_read_are_told(splits, tmp_path):
    i = find(splits, "train", "urfunny")
    broken: dict[str, Any] = {"train": Rows(splits["train"])}
    broken["train"][i] = dataclasses.replace(splits["train"][i], answer="hilarious", audios=(tmp_path / "gone.wav",))
    report = split_report(broken)
    assert report.counts["urfunny", "hilarious"] == {"train": 1}
    assert len(report.faults) == 1 and "hilarious" in report.text()


def test_the_command_line_prints_and_writes(release, tmp_path, capsys):
    main([str(release[0]), "--json", str(tmp_path / "report.json")])
    assert "ptsd_in_the_wild" in capsys.readouterr().out
    plain = json.loads((tmp_path / "report.json").read_text())
    assert sum(row.get(split, 0) for row in plain["counts"] for split in plain["splits"]) == ROWS
    with pytest.raises(SystemExit, match="no atlas in"):
        main([str(tmp_path)])


def test_the_synthetic_release_has_every_dataset_in_every_split():
    for rows in script(ROWS).values():
        assert len({row["dataset"] for row in rows}) == 16
