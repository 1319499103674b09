"""The page a run ends with: a small fabricated run over the committed clips."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from omnisapiens_jax.atlas.sources import Source, open_source
from omnisapiens_jax.evaluation.answers import Answer, save_answers
from omnisapiens_jax.evaluation.report import write_report
from omnisapiens_jax.pages.charts import Line, line_chart, smoothed, ticks
from omnisapiens_jax.pages.embedded import LARGEST_MEDIUM
from omnisapiens_jax.resources import resource
from omnisapiens_jax.rl.replay import Rollout, save_rollout

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)>"
RL_LINE = {"reward": 0.8, "accuracy": 0.4, "format": 0.9, "response_length": 17.0, "entropy": 0.6, "groups_without_signal": 0.1}


class Page(HTMLParser):
    """Elements of a page as (tag, attributes), its text, and whether every element is closed in order."""

    VOID = {"meta", "link", "img", "br", "line", "circle", "polyline", "path", "input"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """The words a reader sees, single-spaced."""
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        """Attributes of every element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def test_rows() -> Source:
    return open_source(resource("data/mini") / "test")


@pytest.fixture(scope="module")
def train_rows() -> Source:
    return open_source(resource("data/mini") / "train")


def answers(source: Source, right: set[int], text: str = r"<think>hm</think>\boxed{x}") -> list[Answer]:
    """One answer a row, right for the rows named."""
    rows = [source[i] for i in range(len(source))]
    return [Answer(r.id, r.dataset, r.answer, r.answer.lower() if r.id in right else "nonsense", text) for r in rows]


def rollout(train: Source) -> Rollout:
    """Two responses to each of the first two rows of train."""
    samples = [train[0], train[1]]
    texts = tuple((rf"<think>a</think>\boxed{{{sample.answer}}}", f"no{HOSTILE}") for sample in samples)
    return Rollout(
        batch={"tokens": np.zeros((2, 3), np.int32)},
        sample_ids=np.array([0, 1]),
        tokens=np.zeros((2, 2, 4), np.int32),
        mask=np.ones((2, 2, 4), bool),
        log_probs=np.zeros((2, 2, 4), np.float32),
        rewards=np.array([[1.7, 0.31]] * 2, np.float32),
        advantages=np.array([[0.71, -0.71]] * 2, np.float32),
        row_mask=np.ones((2, 2), bool),
        texts=texts,
        golds=tuple(sample.answer for sample in samples),
        tasks=tuple(sample.task for sample in samples),
        step=50,
        temperature=1.0,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A workdir with a config alone."""
    (tmp_path / "config.json").write_text(json.dumps({"job": "rl", "model": {"preset": "mini"}, "note": HOSTILE}))
    return tmp_path


@pytest.fixture
def page(folder: Path, test_rows: Source, train_rows: Source) -> Page:
    """The page of a whole RL run: 10 of 31 right before, 16 after, 2 of them lost."""
    save_answers(folder / "evaluation-before.json", answers(test_rows, set(range(10))))
    save_answers(folder / "evaluation-after.json", answers(test_rows, set(range(2, 18)), f"after{HOSTILE}"))
    save_answers(folder / "evaluation-after-without-audio.json", answers(test_rows, set(range(2, 10))))
    save_rollout(folder / "rl" / "rollouts" / "000050.npz", rollout(train_rows))
    curves = {
        "warm_start": [
            {"step": 0, "loss": 3.0, "time/seconds": 90.0},
            {"step": 1, "loss": 0.5, "validation_loss": 0.25, "time/seconds": 90.0},
        ],
        "sft": [],
        "rl": [{"step": i, **RL_LINE, "time/seconds": 2.0} for i in range(3)],
    }
    return Page(write_report(folder, curves, test=test_rows, train=train_rows))


def test_the_page_names_the_numbers(page: Page) -> None:
    text = page.text
    assert "32.3 → 51.6 % of 31 samples" in text  # 10 and 16 of 31
    assert re.search(r"\+19\.4 [−+]\d+\.\d to \+\d+\.\d points, 95 % interval", text)
    assert "Warm start: 2 steps, 3.0 min" in text and "GRPO: 3 steps, 6 s" in text
    assert "0.2500 after 2 steps" in text
    assert "Wrong before, right after 8 held-out samples, 6 shown" in text
    assert "Right before, wrong after 2 held-out samples, 2 shown" in text
    assert "audio −25.8" in text  # 8 right of 31 without it, 16 with it
    assert "reward 1.70 advantage +0.71" in text and "reward 0.31 advantage −0.71" in text
    assert "Rollouts of step 50" in text
    assert "model.preset" in text


def test_datasets_are_measured_one_by_one(page: Page, test_rows: Source) -> None:
    names = [test_rows[i].dataset for i in range(len(test_rows))]
    own = [i for i, name in enumerate(names) if name == "cremad"]
    before, after = (100 * sum(i in right for i in own) / len(own) for right in (range(10), range(2, 18)))
    assert f"cremad {len(own)} {before:.1f} → {after:.1f}" in page.text
    assert "free text" in page.text  # siq2 has no labels, so no weighted F1


def test_media_are_inside_the_file_whole(page: Page, train_rows: Source) -> None:
    urls = [e["src"] for tag in ("video", "audio", "img") for e in page.all(tag)]
    assert page.all("video") and page.all("audio")
    assert all(video["poster"].startswith("data:image/jpeg;base64,") for video in page.all("video"))
    assert all(url.startswith(("data:video/mp4;base64,", "data:audio/wav;base64,")) for url in urls)
    wanted = {Path(str(item)).read_bytes() for i in (0, 1) for item in (*train_rows[i].videos, *train_rows[i].audios)}
    assert wanted and wanted <= {base64.b64decode(url.split(",")[1]) for url in urls}


def test_nothing_is_fetched_and_no_text_becomes_markup(page: Page) -> None:
    assert not page.all("script") and not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href", "srcset")]
    assert links and all(link.startswith("data:") for link in links)
    assert not re.search(r"url\(|@import|https?://", page.source)
    assert page.text.count("<script>alert(1)</script>") >= 3  # config, answers and responses show it as text


def test_a_reader_without_eyes_is_told_what_the_charts_show(page: Page) -> None:
    charts = page.all("svg")
    assert len(charts) == 7 and all(chart["role"] == "img" for chart in charts)
    assert any("reward" in chart["aria-label"].lower() and "to 0.8" in chart["aria-label"] for chart in charts)
    assert all(media.get("aria-label") for tag in ("video", "audio") for media in page.all(tag))
    assert page.all("html") == [{"lang": "en"}] and page.all("title")


def test_what_a_run_does_not_have_is_left_out(folder: Path, test_rows: Source, train_rows: Source) -> None:
    empty = Page(write_report(folder, {}, test=test_rows, train=train_rows))
    assert "not been evaluated" in empty.text and not empty.all("svg") and "Rollouts" not in empty.text
    save_answers(folder / "evaluation-sft.json", answers(test_rows, {0, 1}))
    curves = {"sft": [{"step": 0, "loss": math.nan, "time/seconds": 1.0}]}
    supervised = Page(write_report(folder, curves, test=test_rows, train=train_rows))
    assert "6.5 % of 31 samples" in supervised.text and "→" not in supervised.text
    assert "Right 2 held-out samples" in supervised.text and "Wrong 29 held-out samples, 6 shown" in supervised.text


def test_a_label_that_a_head_chose_is_shown(folder: Path, test_rows: Source, train_rows: Source) -> None:
    save_answers(folder / "evaluation-sft.json", answers(test_rows, {0}, text=""))
    curves = {"sft": [{"step": 0, "loss": 1.0, "time/seconds": 1.0}]}
    text = Page(write_report(folder, curves, test=test_rows, train=train_rows)).text
    assert "✗ answer nonsense" in text and "(empty)" not in text and "nats a sample" in text


def test_media_that_cannot_be_embedded_are_named(folder: Path, test_rows: Source, train_rows: Source) -> None:
    class Changed:
        def __len__(self) -> int:
            return len(test_rows)

        def __getitem__(self, index: int):
            media = (Path("/nowhere/lost.wav"), b"RIFF" + bytes(LARGEST_MEDIUM), b"what is this", b"\0\0\0\0ftypbroken")
            return dataclasses.replace(test_rows[index], audios=media, videos=(), images=())

        def fingerprint(self) -> str:
            return ""

        def stamp(self, index: int, fields: Sequence[str] = ()) -> str:
            return ""

        def file(self, index: int) -> str:
            return ""

    save_answers(folder / "evaluation-sft.json", answers(test_rows, {0}))
    text = Page(write_report(folder, {}, test=Changed(), train=train_rows)).text
    assert "lost.wav is missing" in text
    assert "a medium is not embedded: 1.0 MiB" in text and "a medium is not embedded: an unknown kind of file" in text


def test_only_samples_that_both_evaluations_answered_are_compared(folder: Path, test_rows: Source, train_rows: Source) -> None:
    every = answers(test_rows, {0})
    save_answers(folder / "evaluation-before.json", every[1:])
    save_answers(folder / "evaluation-after.json", every[:-1])
    save_answers(folder / "evaluation-after-without-text.json", every[2:])
    assert f"% of {len(every) - 2} samples" in Page(write_report(folder, {}, test=test_rows, train=train_rows)).text
    save_answers(folder / "evaluation-before.json", every[-1:])
    with pytest.raises(ValueError, match="no sample in common"):
        write_report(folder, {}, test=test_rows, train=train_rows)


def test_a_loss_that_is_not_finite_is_never_the_best(folder: Path, test_rows: Source, train_rows: Source) -> None:
    row = {"loss": 1.0, "time/seconds": 1.0}
    losses = [{**row, "step": 49, "validation_loss": math.nan}, {**row, "step": 99, "validation_loss": 2.0}]
    save_answers(folder / "evaluation-sft.json", answers(test_rows, {0}))
    text = Page(write_report(folder, {"sft": losses}, test=test_rows, train=train_rows)).text
    assert "The lowest validation loss, 2.0000 after 100 steps" in text
    kept = [{**row, "validation_micro_f1": score} for row, score in zip(losses, (0.5, 0.25), strict=True)]
    text = Page(write_report(folder, {"sft": kept}, test=test_rows, train=train_rows)).text
    assert "The highest validation micro f1, 0.5000 after 50 steps" in text


def test_smoothing_is_unbiased_and_passes_over_what_is_not_finite() -> None:
    assert smoothed([3.0, 3.0, math.nan, 3.0], 5) == pytest.approx([3.0] * 4)
    assert smoothed([1.0, 2.0, 4.0], 1) == pytest.approx([1.0, 2.0, 4.0])
    assert 0 < smoothed([0.0, 1.0], 9)[1] < 1


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 4, [-2, 0, 2, 4]), (95, 310, [100, 150, 200, 250, 300])]
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_chart_draws_every_point_inside_its_frame() -> None:
    drawn = line_chart("Loss", [Line("loss", range(4), [8.0, 0.5, 0.05, 0.02], "raw")], log=True)
    points = [tuple(map(float, pair.split(","))) for pair in re.findall(r'points="([^"]*)"', drawn)[0].split()]
    assert len(points) == 4 and all(0 < x < 360 and 0 < y < 200 for x, y in points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # a falling loss falls
    assert "no numbers" in line_chart("Loss", [Line("loss", [0], [math.nan], "raw")])
