"""Padding of every planner on the benchmark's length distribution: `python benchmarks/padding.py [--samples N]`.

Prints a table: of the slots of text, audio chunks, audio tokens and patches, the share that is padding; the number of shapes that are
compiled; the seconds of one core that choosing the shapes and planning an epoch take.

Patches count from what the pictures have: a 16:9 frame fills 720 of the 960 slots of its own windows, so that a quarter is lost before any
batching. Choosing shapes hardly grows with the samples, for only distinct sizes count; planning grows in proportion to them.

Reported of the distribution: the number of samples of each modality signature (87.1 % text_video_audio, 10.4 % text_audio, 2.5 % text) and
dataset, sound cut at 10 s (250 tokens), four frames of 147,456 pixels (360 tokens at 16:9).
Assumed, because it is not reported for the benchmark (`DATASETS`): how long the clips are (log-normal, around means such as the datasets
are known for), how much is said in a second, how long instructions and answers are, and which shapes the pictures have. The real length
index tells all of it; these tables only say what planners do with lengths like these.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from omnisapiens_jax.atlas.bucketing import SlotCost, choose_buckets, choose_row, padding_share, planned
from omnisapiens_jax.atlas.plan import Index, Mode, Plan, PlanConfig, Planner
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.audio import audio_token_count
from omnisapiens_jax.processing.options import REFERENCE
from omnisapiens_jax.processing.vision import grid_of, window_slots

CONFIG = ThinkerConfig.preset("7b")
SIGNATURES = {"text": 2_550, "text_audio": 10_431, "text_video_audio": 87_318}  # rows of the release
MAX_TOKENS = 4096
KINDS = ("text", "audio chunks", "audio tokens", "patches")

WIDE, NARROW, TALL, CINEMA = (1280, 720), (640, 480), (360, 640), (1280, 544)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is taken for the lengths of a dataset: everything but `rows` and `signature` is assumed."""

    rows: int
    signature: str
    seconds: float = 0.0  # mean length of a clip
    spread: float = 0.6  # of its logarithm
    instruction: float = 140.0  # tokens around the transcript, system message included; a fifth of it more or less
    spoken: float = 3.5  # transcript tokens a second
    words: float = 0.0  # of a text without sound: median of its tokens
    shapes: tuple[tuple[tuple[int, int], float], ...] = ((WIDE, 0.85), (NARROW, 0.15))


def tav(rows: int, seconds: float, spread: float = 0.6, **more) -> Dataset:
    """A dataset of films."""
    return Dataset(rows, "text_video_audio", seconds, spread, **more)


DATASETS = {
    "mosei_senti": tav(22_740, 7.3, 0.7),
    "mosei_emotion": tav(8_598, 7.3, 0.7),
    "meld_emotion": tav(13_706, 3.6, shapes=((WIDE, 1.0),)),
    "meld_senti": tav(13_705, 3.6, shapes=((WIDE, 1.0),)),
    "chsimsv2": tav(4_403, 3.7, 0.5, shapes=((WIDE, 0.8), (CINEMA, 0.2))),
    "intentqa": tav(16_297, 44, 0.5, instruction=110, spoken=0, shapes=((WIDE, 0.7), (NARROW, 0.2), (TALL, 0.1))),
    "siq2": tav(6_437, 60, 0.1, instruction=110, spoken=0),
    "urfunny": tav(2_125, 14),
    "mmsd": tav(690, 5.2),
    "mimeqa": tav(806, 120, instruction=110, spoken=0),
    "ptsd_in_the_wild": tav(634, 120, 0.8),
    "cremad": Dataset(7_442, "text_audio", 2.5, 0.2, spoken=0),
    "tess": Dataset(2_800, "text_audio", 2.05, 0.15, spoken=0),
    "daicwoz": Dataset(189, "text_audio", 900, 0.3),
    "mmpsy_depression": Dataset(1_275, "text", words=500),
    "mmpsy_anxiety": Dataset(1_275, "text", words=500),
}


def distribution(samples: int, seed: int = 0) -> tuple[Index, np.ndarray]:
    """An index of about so many samples, and the patches `[N]` that each of them has (its layout has more slots)."""
    rng, parts = np.random.default_rng(seed), []
    names = sorted(SIGNATURES)
    for number, dataset in enumerate(DATASETS[name] for name in sorted(DATASETS)):
        group = sum(other.rows for other in DATASETS.values() if other.signature == dataset.signature)
        count = max(round(samples * SIGNATURES[dataset.signature] / sum(SIGNATURES.values()) * dataset.rows / group), 1)
        part = np.zeros((count, 7), np.int64)
        part[:, -1] = 1
        patches = np.zeros(count, np.int64)
        tokens = dataset.instruction * np.clip(rng.normal(1, 0.2, count), 0.6, 2) + rng.integers(6, 40, count)
        if dataset.words:
            tokens += rng.lognormal(np.log(dataset.words), 0.5, count)
        if dataset.seconds:
            seconds = rng.lognormal(np.log(dataset.seconds) - dataset.spread**2 / 2, dataset.spread, count).clip(0.4, 1200)
            tokens += dataset.spoken * seconds * rng.uniform(0.7, 1.2, count)
            frames = np.ceil(np.minimum(seconds, REFERENCE.audio_seconds) * 100).astype(int)
            part[:, 1], part[:, 2] = -(-frames // CONFIG.audio.chunk_frames), [audio_token_count(f) for f in frames.tolist()]
        if dataset.signature == "text_video_audio":
            layouts = np.array([_layout(*shape) for shape, _ in dataset.shapes])
            chosen = layouts[rng.choice(len(layouts), count, p=[share for _, share in dataset.shapes])]
            part[:, 3:6], patches = chosen[:, :3], chosen[:, 3]
        media = part[:, 2] + patches // CONFIG.vision.cell_patches
        part[:, 0] = np.minimum(np.minimum(tokens, MAX_TOKENS - media).astype(int) + media, MAX_TOKENS)
        parts.append((part, patches, np.full(count, number), np.full(count, names.index(dataset.signature))))
    order = rng.permutation(sum(len(part[0]) for part in parts))
    sizes, patches, datasets, signatures = (np.concatenate(column)[order] for column in zip(*parts, strict=True))
    zeros = np.zeros(len(sizes), np.int32)
    sources = (tuple(sorted(DATASETS)), ("any_cls",))
    return Index(np.arange(len(sizes)), signatures, tuple(names), sizes.astype(np.int32), zeros, datasets, zeros, *sources), patches


def _layout(width: int, height: int) -> tuple[int, int, int, int]:
    """Frames, windows, patches of a window, and patches in all, of a clip of four such frames."""
    steps, rows, columns = grid_of(
        REFERENCE.video_frames,
        height,
        width,
        CONFIG.vision,
        min_pixels=REFERENCE.video_min_pixels,
        max_pixels=REFERENCE.video_max_pixels,
    )
    merge = CONFIG.vision.spatial_merge_size
    _, windows, cells = window_slots(rows // merge, columns // merge, CONFIG.vision.window_cells)
    return steps, windows, cells * CONFIG.vision.cell_patches, steps * rows * columns


def waste(plan: Plan, index: Index, patches: np.ndarray) -> np.ndarray:
    """Share `[4]` of the slots of each of `KINDS` that an epoch leaves empty."""
    shapes = np.array([dataclasses.astuple(bucket) for bucket in plan.buckets], np.int64)[plan.bucket]
    there = np.concatenate([shapes[:, :3], shapes[:, 3:6].prod(1, keepdims=True)], axis=1).sum(0) * np.prod(plan.ids.shape[1:3])
    samples = planned(plan, index)
    return 1 - np.array([*index.sizes[samples, :3].sum(0), patches[samples].sum()]) / there


def planners(index: Index, batch: int) -> list[tuple[str, Planner, float, float]]:
    """Name, planner, seconds to choose its shapes and to plan an epoch."""
    cost, made = SlotCost.of(CONFIG), []
    ways: tuple[tuple[str, Mode, SlotCost], ...] = (
        ("one bucket", "homogeneous", cost),
        ("homogeneous, by compute alone", "homogeneous", cost),
        ("homogeneous", "homogeneous", cost.raised(index.sizes)),
        ("mixed", "mixed", cost.raised(index.sizes)),
        ("packed", "packed", cost.raised(index.sizes)),
    )
    for name, mode, price in ways:
        plan = PlanConfig(batch // 8 if mode == "packed" else batch, mode=mode)
        begun = time.process_time()
        if mode == "packed":
            buckets = (choose_row(index, price, tokens=MAX_TOKENS),)
        else:
            buckets = choose_buckets(index, plan, price, count=1 if name == "one bucket" else 8)
        chosen = time.process_time()
        planner = Planner(index, buckets, plan)
        made.append((name, planner, chosen - begun, time.process_time() - chosen))
    return made


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=sum(SIGNATURES.values()))
    parser.add_argument("--batch", type=int, default=64, help="rows of a batch; of packed ones an eighth, each holds several samples")
    arguments = parser.parse_args()
    console = Console(width=150)
    for samples in (arguments.samples // 4, arguments.samples):  # how the time grows
        index, patches = distribution(samples)
        table = Table(
            "planner",
            *KINDS,
            "compute",
            "shapes",
            "rows",
            "choosing, CPU s",
            "an epoch, CPU s",
            title=f"Share of padding, {len(index):,} samples",
        )
        for name, planner, choosing, planning in planners(index, arguments.batch):
            plan = planner.epoch(0)
            shares = [*waste(plan, index, patches), padding_share(plan, index, SlotCost.of(CONFIG))]
            rows = int(np.prod(plan.ids.shape[:3]))
            cells = [*(f"{share:.1%}" for share in shares), str(len(plan.buckets)), f"{rows:,}", f"{choosing:.2f}", f"{planning:.2f}"]
            table.add_row(name, *cells)
        console.print(table)


if __name__ == "__main__":
    main()
