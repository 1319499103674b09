"""What there is to see of an atlas: its datasets as a table, a sample as a page, its lengths and what padding wastes."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Column, Table

from omnisapiens_jax.atlas.bucketing import SlotCost, choose_buckets, padding_share, planned
from omnisapiens_jax.atlas.labels import HBA, LabelScheme
from omnisapiens_jax.atlas.plan import Index, Plan, PlanConfig, Planner
from omnisapiens_jax.atlas.schema import Media, Sample
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.pages.charts import histogram
from omnisapiens_jax.pages.embedded import data_url, embedded
from omnisapiens_jax.pages.templates import templates
from omnisapiens_jax.processing import chat
from omnisapiens_jax.processing.audio import SAMPLE_RATE, log_mel
from omnisapiens_jax.processing.example import Bucket
from omnisapiens_jax.processing.media import MediaError, decode_audio, decode_image, decode_video
from omnisapiens_jax.processing.options import ProcessingConfig

TASKS = {
    "EMO": "emotion recognition",
    "HUM": "humour detection",
    "INT": "intent recognition",
    "PTSD": "PTSD screening",
    "ANX": "anxiety screening",
    "DEP": "depression screening",
    "SEN": "sentiment polarity",
    "SAR": "sarcasm detection",
    "SOC": "social reasoning",
    "NVC": "non-verbal communication",
}
SLOTS = {"tokens": "tokens", "audio_tokens": "audio tokens", "patches": "patches"}  # kinds of slots that padding fills

_COLUMNS = 600  # of a waveform's picture
_BAR = 40  # characters of the longest bar in a terminal


def dataset_table(scheme: LabelScheme = HBA) -> Table:
    """One line a dataset: task, domain, labels, modalities and metric."""
    names = Column("dataset", no_wrap=True), "task", "domain", "labels", "modalities", Column("metric", no_wrap=True)
    table = Table(*names, title="Human Behavior Atlas")
    for dataset in scheme.datasets:
        labels = ", ".join(dataset.labels) or "free text"
        task = f"{dataset.benchmark} {TASKS.get(dataset.benchmark, '')}"
        table.add_row(dataset.name, task, dataset.domain or "", labels, dataset.signature.replace("_", " + "), dataset.metric)
    return table


def sample_page(sample: Sample, options: ProcessingConfig) -> str:
    """A sample as an HTML page: what it says, its media as they are and as the model gets them, or why they cannot be decoded."""
    counts = {"image": len(sample.images), "video": len(sample.videos), "audio": len(sample.audios)}
    try:
        prompt = chat.render(
            chat.build_messages(sample.problem, counts, modalities=options.modalities, format_prompt=options.format_prompt)
        )
    except ValueError as reason:
        prompt = f"There is no prompt: {reason}"
    facts = {
        "dataset": sample.dataset,
        "task": sample.task,
        "modalities": sample.modality_signature.replace("_", " + "),
        "answer": sample.answer,
        "rationale": sample.rationale,
        "file": f"{sample.file}, row {sample.id}",
    }
    return (
        templates(Path(__file__).parent)
        .get_template("sample.html.jinja")
        .render(
            title=f"{sample.dataset}, row {sample.id}",
            facts={name: fact for name, fact in facts.items() if fact},
            prompt=prompt,
            audios=[_audio(item, options) for item in sample.audios],
            pictures=[_pictures(item, "video", options) for item in sample.videos]
            + [_pictures(item, "image", options) for item in sample.images],
        )
    )


def _audio(item: Media, options: ProcessingConfig) -> dict[str, Any]:
    shown: dict[str, Any] = {"medium": embedded(item)}
    try:
        waveform = decode_audio(item, seconds=options.audio_seconds)
    except MediaError as reason:
        return shown | {"fault": str(reason)}
    mel = log_mel(waveform).T[::-1]  # low notes at the bottom
    grey = np.clip(255 * (mel - mel.min()) / max(float(np.ptp(mel)), 1e-6), 0, 255).astype(np.uint8)
    return shown | {
        "seconds": len(waveform) / SAMPLE_RATE,
        "envelope": _envelope(waveform),
        "mel": _picture(grey, "PNG"),
        "columns": _COLUMNS,
    }


def _envelope(waveform: np.ndarray) -> str:
    """Points of an SVG polygon, `_COLUMNS` wide and from -1 to 1: the highest and then the lowest samples of every column."""
    parts = np.array_split(waveform, min(_COLUMNS, len(waveform)))
    scale = max(float(np.abs(waveform).max()), 1e-6)
    high = [(x, -float(part.max()) / scale) for x, part in enumerate(parts)]
    low = [(x, -float(part.min()) / scale) for x, part in enumerate(parts)]
    return " ".join(f"{x},{y:.3f}" for x, y in (*high, *reversed(low)))


def _pictures(item: Media, kind: str, options: ProcessingConfig) -> dict[str, Any]:
    shown: dict[str, Any] = {"kind": kind, "medium": embedded(item)}
    try:
        frames = decode_video(item, frames=options.video_frames) if kind == "video" else decode_image(item)
    except MediaError as reason:
        return shown | {"fault": str(reason)}
    return shown | {"size": f"{frames.shape[2]} x {frames.shape[1]}", "frames": [_picture(frame, "JPEG") for frame in frames]}


def _picture(pixels: np.ndarray, form: str) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return data_url(f"image/{form.lower()}", file.getvalue())


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The sizes of an atlas' samples, the buckets chosen for them, and one epoch in these buckets."""

    index: Index
    plan: Plan
    padding: float  # share of an epoch's cost

    @classmethod
    def of(cls, index: Index, model: ThinkerConfig, plan: PlanConfig, *, count: int) -> Lengths:
        """Chooses at most `count` buckets, as a run does, and plans the first epoch."""
        cost = SlotCost.of(model)
        epoch = Planner(index, choose_buckets(index, plan, cost.raised(index.sizes), count=count), plan).epoch(0)
        return cls(index, epoch, padding_share(epoch, index, cost))

    def waste(self) -> dict[str, float]:
        """Share of an epoch's slots of each kind that hold nothing."""
        taken = self.index.sizes[planned(self.plan, self.index)]
        held = _slots(np.array([dataclasses.astuple(bucket) for bucket in self.plan.buckets])[self.plan.bucket])
        a_batch = int(self.plan.ids[0].size)
        return {
            kind: 1 - float(used.sum()) / (a_batch * float(held[kind].sum())) if held[kind].any() else 0.0
            for kind, used in _slots(taken).items()
        }

    def shown(self) -> list[Table | str]:
        """What a terminal shows."""
        told = ", ".join(f"{100 * share:.1f} % of {SLOTS[kind]}" for kind, share in self.waste().items())
        parts: list[Table | str] = [*self._histograms(), self._buckets()]
        return [*parts, f"Padding: {told}; {100 * self.padding:.1f} % of an epoch's cost, masked slots included"]

    def page(self, name: str) -> str:
        """The same as an HTML page; red lines are the buckets' lengths."""
        buckets = _slots(np.array([dataclasses.astuple(bucket) for bucket in self.plan.buckets]))
        charts = {SLOTS[k]: histogram(SLOTS[k], v, edges=sorted({*buckets[k].tolist()})) for k, v in _slots(self.index.sizes).items()}
        return (
            templates(Path(__file__).parent)
            .get_template("lengths.html.jinja")
            .render(
                name=name,
                samples=len(self.index),
                charts=charts,
                waste={SLOTS[kind]: share for kind, share in self.waste().items()},
                padding=self.padding,
                header=_BUCKET_COLUMNS,
                rows=self._rows(),
            )
        )

    def _rows(self) -> list[list[str]]:
        rows = []
        for number, bucket in enumerate(self.plan.buckets):
            ids = self.plan.ids[self.plan.bucket == number]
            rows.append([*map(str, dataclasses.astuple(bucket)), str(len(ids)), str(int((ids >= 0).sum()))])
        return rows

    def _buckets(self) -> Table:
        table = Table(*_BUCKET_COLUMNS, title="Buckets of an epoch")
        for row in self._rows():
            table.add_row(*row)
        return table

    def _histograms(self) -> list[Table]:
        tables = []
        for kind, values in _slots(self.index.sizes).items():
            if not values.any():
                continue
            counts, edges = np.histogram(values, bins=12)
            table = Table("up to", "samples", "", title=f"{SLOTS[kind].capitalize()} of a sample")
            for count, edge in zip(counts, edges[1:], strict=True):
                table.add_row(f"{edge:.0f}", str(count), "█" * round(_BAR * int(count) / int(counts.max())))
            tables.append(table)
        return tables


_BUCKET_COLUMNS = (*(field.name.replace("_", " ") for field in dataclasses.fields(Bucket)), "batches", "samples")


def _slots(sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Sizes `[N, fields of Bucket]` as slots of each kind `[N]`."""
    size = dict(zip((field.name for field in dataclasses.fields(Bucket)), sizes.astype(np.int64).T, strict=False))
    patches = size["frames"] * size["windows"] * size["window_patches"]
    return {"tokens": size["tokens"], "audio_tokens": size["audio_tokens"], "patches": patches}
