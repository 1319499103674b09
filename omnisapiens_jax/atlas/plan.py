"""The plan as data: numpy decides what every step of an epoch holds, for every host, before anything is decoded.

A plan is a function of (index, buckets, `PlanConfig`, epoch) and of nothing else, so every host computes the same one, every host
meets the same shape at the same step, and a run resumes from one integer.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from typing import Any, Literal

import numpy as np

from omnisapiens_jax.processing.example import Bucket

MASKED = -1  # sample id of an empty slot


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """What planning needs to know of N samples.

    Attributes:
        ids: `[N]` int64 row numbers in the source, ascending.
        signatures: `[N]` int32 positions in `names`.
        names: the modality signatures, sorted.
        sizes: `[N, 6]` int32, the fields of `Bucket` in their order.
        excess: `[N]` int32 tokens that the transcript must lose for the sample to fit (already gone from `sizes`); mostly 0.
    """

    ids: np.ndarray
    signatures: np.ndarray
    names: tuple[str, ...]
    sizes: np.ndarray
    excess: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, keep: np.ndarray) -> Index:
        """The samples where `keep` `[N]` bool is true."""
        arrays = ("ids", "signatures", "sizes", "excess")
        return dataclasses.replace(self, **{name: getattr(self, name)[keep] for name in arrays})


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """How samples become batches.

    `batch_size` counts the slots of all hosts together. `homogeneous` batches hold one modality signature, one batch of each signature
    in turn; `mixed` ones are cut from one shuffled row of all samples. An incomplete batch is filled with masked slots, or dropped as
    the reference's training does. Evaluation sets `shuffle=False` and keeps every sample in order.
    """

    batch_size: int
    hosts: int = 1
    seed: int = 42
    mode: Literal["homogeneous", "mixed"] = "homogeneous"
    shuffle: bool = True
    incomplete: Literal["fill", "drop"] = "fill"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.hosts < 1 or self.batch_size % self.hosts:
            raise ValueError(f"batch_size {self.batch_size} must be a positive multiple of the {self.hosts} hosts")
        if self.mode not in ("homogeneous", "mixed") or self.incomplete not in ("fill", "drop"):
            raise ValueError(f"unknown mode {self.mode!r} (homogeneous, mixed) or incomplete {self.incomplete!r} (fill, drop)")


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One step for all hosts: its shape and the sample ids `[hosts, slots]`, `MASKED` where a slot is empty."""

    bucket: Bucket
    ids: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """One epoch of S steps: `bucket` `[S]` points into `buckets`, `ids` is `[S, hosts, slots]` int64."""

    buckets: tuple[Bucket, ...]
    bucket: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.bucket)

    def __getitem__(self, step: int) -> Step:
        return Step(self.buckets[self.bucket[step]], self.ids[step])


class Planner:
    """Plans of every epoch, and the arithmetic between a run's global step and (epoch, step in the epoch)."""

    def __init__(self, index: Index, buckets: tuple[Bucket, ...], config: PlanConfig) -> None:
        """Args:
            index: the samples.
            buckets: the allowed shapes, cheapest first (`bucketing.choose_buckets` orders them so).
            config: how to batch.

        Raises:
            ValueError: when a sample fits no bucket, or no step is left.
        """
        self.index, self.buckets, self.config = index, buckets, config
        self._shapes = np.array([dataclasses.astuple(b) for b in buckets], np.int64).reshape(len(buckets), -1)
        self._plans: dict[int, Plan] = {}
        self._lock = threading.Lock()
        homeless = np.flatnonzero(self._smallest(index.sizes) < 0)
        if len(homeless):
            first = homeless[0]
            raise ValueError(
                f"{len(homeless)} of {len(index)} samples fit no bucket; the first is row {index.ids[first]} of size "
                f"{Bucket(*index.sizes[first].tolist())}, the largest bucket is {buckets[-1] if buckets else None}"
            )
        self.steps_per_epoch = len(self.epoch(0))
        if not self.steps_per_epoch:
            raise ValueError(f"{len(index)} samples make no batch of {config.batch_size} with incomplete={config.incomplete!r}")

    def locate(self, step: int) -> tuple[int, int]:
        """Global step -> (epoch, step in that epoch)."""
        return divmod(step, self.steps_per_epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "buckets": self.buckets, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __getitem__(self, step: int) -> Step:
        epoch, position = self.locate(step)
        return self.epoch(epoch)[position]

    def epoch(self, epoch: int) -> Plan:
        """The plan of an epoch, counted from 0. The two last asked for are kept."""
        with self._lock:
            if epoch not in self._plans:
                self._plans = {**dict(list(self._plans.items())[-1:]), epoch: self._plan(epoch)}
            return self._plans[epoch]

    def _smallest(self, sizes: np.ndarray) -> np.ndarray:
        """The first bucket that holds each size, -1 where none does: `[M, 6]` -> `[M]`."""
        holds = (self._shapes[None] >= sizes[:, None]).all(-1)
        return np.where(holds.any(axis=-1), holds.argmax(1), -1) if len(self.buckets) else np.full(len(sizes), -1)

    def _plan(self, epoch: int) -> Plan:
        rng = np.random.default_rng((self.config.seed, epoch))
        batches = self._homogeneous(rng) if self.config.mode == "homogeneous" else self._mixed(rng)
        rows = np.array([row for _, row in batches], np.int64).reshape(len(batches), self.config.batch_size)
        ids = np.where(rows < 0, MASKED, self.index.ids[rows])
        shape = (len(batches), self.config.hosts, self.config.batch_size // self.config.hosts)
        return Plan(self.buckets, np.array([b for b, _ in batches], np.int32), ids.reshape(shape))

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        """Rows `[M]` -> batches `[batch_size]`, the last one filled with -1 or dropped."""
        size = self.config.batch_size
        if self.config.incomplete == "drop":
            rows = rows[: len(rows) // size * size]
        padded = np.concatenate([rows, np.full(-len(rows) % size, -1, rows.dtype)])
        return list(padded.reshape(-1, size))

    def _mixed(self, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
        rows = np.arange(len(self.index))
        batches = self._cut(rng.permutation(rows) if self.config.shuffle else rows)
        if not batches:
            return []
        sizes = np.stack([self.index.sizes[batch[batch >= 0]].max(0) for batch in batches])
        buckets = self._smallest(sizes)
        if (buckets < 0).any():
            raise ValueError(
                f"no bucket holds the mixed batch of size {Bucket(*sizes[np.argmin(buckets)].tolist())}; add their joint maximum"
            )
        return list(zip(buckets.tolist(), batches, strict=True))

    def _homogeneous(self, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
        bucket_of = self._smallest(self.index.sizes)
        queues: list[deque[tuple[int, np.ndarray]]] = []
        for signature in range(len(self.index.names)):
            batches: list[tuple[int, np.ndarray]] = []
            for bucket in range(len(self.buckets)):
                rows = np.flatnonzero((self.index.signatures == signature) & (bucket_of == bucket))
                batches += [(bucket, batch) for batch in self._cut(rng.permutation(rows) if self.config.shuffle else rows)]
            order = rng.permutation(len(batches)) if self.config.shuffle else range(len(batches))
            if batches:
                queues.append(deque(batches[i] for i in order))
        return _round_robin(queues, rng if self.config.shuffle else None)


def _round_robin(queues: list[deque[tuple[int, np.ndarray]]], rng: np.random.Generator | None) -> list[tuple[int, np.ndarray]]:
    """One batch of each queue in turn, a random rotation of the queues every pass (or as they stand), until all are empty."""
    merged = []
    while queues:
        turn = 0 if rng is None else int(rng.integers(len(queues)))
        merged += [queue.popleft() for queue in queues[turn:] + queues[:turn]]
        queues = [queue for queue in queues if queue]
    return merged
