"""The plan as data: numpy decides what every step of an epoch holds, for every host, before anything is decoded.

A plan is a function of (index, buckets, `PlanConfig`, epoch) and of nothing else, so every host computes the same one, every host
meets the same shape at the same step, and a run resumes from one integer.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from typing import Any, Literal, get_args

import numpy as np

from omnisapiens_jax.atlas.mixture import draw
from omnisapiens_jax.atlas.packing import pack
from omnisapiens_jax.processing.example import Bucket

MASKED = -1  # sample id of an empty slot
NO_AUDIO, NO_VIDEO = 1, 2  # what dropout withholds, see `Step`

DROPOUTS = ("audio_dropout", "video_dropout", "word_dropout")

_ARRAYS = ("ids", "signatures", "sizes", "excess", "datasets", "tasks")  # of an index

Mode = Literal["homogeneous", "mixed", "packed"]
Balance = Literal["dataset", "task"]


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """What planning needs to know of N samples.

    Attributes:
        ids: `[N]` int64 row numbers in the source, ascending.
        signatures: `[N]` int32 positions in `names`.
        names: the modality signatures, sorted.
        sizes: `[N, 7]` int32, the fields of `Bucket` in their order.
        excess: `[N]` int32 tokens that the transcript must lose for the sample to fit (already gone from `sizes`); mostly 0.
        datasets: `[N]` int32 number of each sample's dataset, in the order of their sorted names.
        tasks: `[N]` int32 number of its task, likewise.
        dataset_names: those sorted names.
        task_names: likewise.
    """

    ids: np.ndarray
    signatures: np.ndarray
    names: tuple[str, ...]
    sizes: np.ndarray
    excess: np.ndarray
    datasets: np.ndarray
    tasks: np.ndarray
    dataset_names: tuple[str, ...]
    task_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, keep: np.ndarray) -> Index:
        """The samples where `keep` `[N]` bool is true."""
        return dataclasses.replace(self, **{name: getattr(self, name)[keep] for name in _ARRAYS})

    def content(self) -> bytes:
        """All of it; indices with the same content give the same plans."""
        return b"".join([repr(self.names).encode(), *(getattr(self, name).tobytes() for name in _ARRAYS)])


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """How samples become batches.

    `homogeneous` batches hold one modality signature, one batch of each signature in turn; `mixed` ones are cut from one shuffled row of
    all samples; `packed` ones have several samples in each row. An incomplete batch is filled with masked rows, or dropped as the
    reference's training does. Evaluation sets `shuffle=False` and keeps every sample in order (packed: nearly).

    An epoch holds every sample once. With a `temperature` above 1 it is a mixture instead, of as many draws as there are samples: the
    datasets (or tasks: `balance`) get shares in proportion to `size ** (1 / temperature)`, so that small ones come several times an epoch
    and large ones need several epochs to come round (`mixture.draw`).

    Attributes:
        batch_size: rows of a batch, all hosts together; a packed row holds several samples.
        hosts: processes that share a batch.
        seed: of all that is shuffled, drawn and dropped.
        mode: what a batch holds.
        shuffle: a new order every epoch, or the index's.
        incomplete: what becomes of the last batch.
        temperature: of the mixture; 1 = every sample once.
        balance: what the mixture weighs.
        audio_dropout: probability with which a sample's sound is turned to silence. It is drawn anew every epoch, for each sample by
            itself. Places, sizes and text stay, so that a row is never without anything.
        video_dropout: probability with which its pictures are turned to even grey, likewise.
        word_dropout: probability with which each word of its transcript is left out, likewise; one word stays, and so do question and
            options. It only shortens, so that the sample fits where it was planned.
    """

    batch_size: int
    hosts: int = 1
    seed: int = 42
    mode: Mode = "homogeneous"
    shuffle: bool = True
    incomplete: Literal["fill", "drop"] = "fill"
    temperature: float = 1.0
    balance: Balance = "dataset"
    audio_dropout: float = 0.0
    video_dropout: float = 0.0
    word_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.hosts < 1 or self.batch_size % self.hosts:
            raise ValueError(f"batch_size {self.batch_size} must be a positive multiple of the {self.hosts} hosts")
        for name, kinds in (("mode", get_args(Mode)), ("incomplete", ("fill", "drop")), ("balance", get_args(Balance))):
            if (value := getattr(self, name)) not in kinds:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(kinds)}")
        if not self.temperature >= 1:
            raise ValueError(f"temperature {self.temperature} must be at least 1 (every sample once)")
        for name in DROPOUTS:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is a probability, from 0 to 1")
        if not self.shuffle and (self.temperature > 1 or any(getattr(self, name) for name in DROPOUTS)):
            raise ValueError("a mixture and dropout are for training: with shuffle=False every sample comes once, as it is")


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One step for all hosts.

    Attributes:
        bucket: its shape.
        ids: `[hosts, rows]` (packed: `[hosts, rows, segments]`) int64 sample ids, `MASKED` where there is none.
        withheld: what dropout takes from each of them, as uint8: `NO_AUDIO`, `NO_VIDEO`, both added up, or 0.
        words: the seed by which each of them loses words (`chat.WordDropout`), as uint32, or 0: it loses none.
    """

    bucket: Bucket
    ids: np.ndarray
    withheld: np.ndarray
    words: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """One epoch of S steps: `bucket` `[S]` points into `buckets`; `ids`, `withheld` and `words` are those of `Step`, as `[S, ...]`."""

    buckets: tuple[Bucket, ...]
    bucket: np.ndarray
    ids: np.ndarray
    withheld: np.ndarray
    words: np.ndarray

    def __len__(self) -> int:
        return len(self.bucket)

    def __getitem__(self, step: int) -> Step:
        return Step(self.buckets[self.bucket[step]], self.ids[step], self.withheld[step], self.words[step])


class Planner:
    """Plans of every epoch, and the arithmetic between a run's global step and (epoch, step in the epoch)."""

    def __init__(self, index: Index, buckets: tuple[Bucket, ...], config: PlanConfig) -> None:
        """Args:
            index: the samples.
            buckets: the allowed shapes, cheapest first (`bucketing.choose_buckets` orders them so); of a packed plan one, the row's
                (`bucketing.choose_row`).
            config: how to batch.

        Raises:
            ValueError: when a sample fits no bucket, or no step is left.
        """
        self.index, self.buckets, self.config = index, buckets, config
        self._shapes = np.array([dataclasses.astuple(b) for b in buckets], np.int64).reshape(len(buckets), -1)
        self._plans: dict[int, Plan] = {}
        self._lengths: dict[int, int] = {}
        self._lock = threading.Lock()
        if config.mode == "packed" and len(buckets) != 1:
            raise ValueError(f"a packed plan has one shape of row, not {len(buckets)} buckets")
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
        """Global step -> (epoch, step in that epoch).

        Shuffled packed epochs, and homogeneous ones of a mixture, differ in length by a few steps (`steps_per_epoch` is that of the
        first): there, the epochs before this one are planned to count them.
        """
        mode = self.config.mode
        if mode == "mixed" or not self.config.shuffle or (mode == "homogeneous" and self.config.temperature == 1):
            return divmod(step, self.steps_per_epoch)
        epoch = 0
        while step >= (length := self._length(epoch)):
            epoch, step = epoch + 1, step - length
        return epoch, step

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
                self._lengths[epoch] = len(self._plans[epoch])
            return self._plans[epoch]

    def _length(self, epoch: int) -> int:
        if epoch not in self._lengths:
            self.epoch(epoch)
        return self._lengths[epoch]

    def _smallest(self, sizes: np.ndarray) -> np.ndarray:
        """The first bucket that holds each size, -1 where none does: `[M, 7]` -> `[M]`."""
        holds = (self._shapes[None] >= sizes[:, None]).all(-1)
        return np.where(holds.any(axis=-1), holds.argmax(1), -1) if len(self.buckets) else np.full(len(sizes), -1)

    def _plan(self, epoch: int) -> Plan:
        config, rng = self.config, np.random.default_rng((self.config.seed, epoch))
        drawn = np.arange(len(self.index))
        if config.temperature > 1:
            drawn = draw(getattr(self.index, f"{config.balance}s"), config.temperature, config.seed, epoch)
        make = {"homogeneous": self._homogeneous, "mixed": self._mixed, "packed": self._packed}[config.mode]
        batches = make(drawn, rng)
        shape = (len(batches), config.hosts, config.batch_size // config.hosts, *self._segments())
        rows = np.array([row for _, row in batches], np.int64).reshape(shape)
        ids = np.where(rows < 0, MASKED, self.index.ids[rows])
        withheld = np.where(rows < 0, 0, self._withheld(epoch)[rows]).astype(np.uint8)
        words = np.where(rows < 0, 0, self._words(epoch)[rows]).astype(np.uint32)
        return Plan(self.buckets, np.array([b for b, _ in batches], np.int32), ids, withheld, words)

    def _segments(self) -> tuple[int, ...]:
        """The axis that a packed plan has more."""
        return (self.buckets[0].segments,) if self.config.mode == "packed" else ()

    def _withheld(self, epoch: int) -> np.ndarray:
        """What dropout takes from each sample `[N]`, in this epoch: it depends on the sample's id, not on what else there is."""
        ids, odds = self.index.ids, np.array([self.config.audio_dropout, self.config.video_dropout])
        if not odds.any():
            return np.zeros(len(ids), np.uint8)
        luck = np.random.default_rng((self.config.seed, epoch, 1)).random((int(ids.max()) + 1, 2))[ids]
        return (luck < odds) @ np.array([NO_AUDIO, NO_VIDEO], np.uint8)

    def _words(self, epoch: int) -> np.ndarray:
        """The seeds `[N]` of the words that each sample loses in this epoch, likewise."""
        ids = self.index.ids
        if not self.config.word_dropout:
            return np.zeros(len(ids), np.uint32)
        return np.random.default_rng((self.config.seed, epoch, 2)).integers(1, 2**32, int(ids.max()) + 1, np.uint32)[ids]

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        """Rows `[M, ...]` -> batches `[batch_size, ...]`, the last one filled with -1 or dropped."""
        size = self.config.batch_size
        if self.config.incomplete == "drop":
            rows = rows[: len(rows) // size * size]
        padded = np.concatenate([rows, np.full((-len(rows) % size, *rows.shape[1:]), -1, rows.dtype)])
        return list(padded.reshape(-1, size, *rows.shape[1:]))

    def _packed(self, drawn: np.ndarray, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
        order = rng.permutation(drawn) if self.config.shuffle else drawn
        packed = pack(self.index.sizes[order], self._shapes[0])
        rows = np.full((len(packed), *self._segments()), -1)
        for row, places in zip(rows, packed, strict=True):
            row[: len(places)] = order[places]
        if self.config.shuffle:  # the rows packed last are the emptiest
            rows = rng.permutation(rows)
        return [(0, batch) for batch in self._cut(rows)]

    def _mixed(self, drawn: np.ndarray, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
        batches = self._cut(rng.permutation(drawn) if self.config.shuffle else drawn)
        if not batches:
            return []
        sizes = np.stack([self.index.sizes[batch[batch >= 0]].max(0) for batch in batches])
        buckets = self._smallest(sizes)
        if (buckets < 0).any():
            raise ValueError(
                f"no bucket holds the mixed batch of size {Bucket(*sizes[np.argmin(buckets)].tolist())}; add their joint maximum"
            )
        return list(zip(buckets.tolist(), batches, strict=True))

    def _homogeneous(self, drawn: np.ndarray, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
        signature_of, bucket_of = self.index.signatures[drawn], self._smallest(self.index.sizes[drawn])
        queues: list[deque[tuple[int, np.ndarray]]] = []
        for signature in range(len(self.index.names)):
            batches: list[tuple[int, np.ndarray]] = []
            for bucket in range(len(self.buckets)):
                rows = drawn[(signature_of == signature) & (bucket_of == bucket)]
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
