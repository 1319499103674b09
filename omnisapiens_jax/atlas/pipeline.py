"""Batches of a plan, decoded by Grain. The plan is the source: workers execute it and decide nothing."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import grain
import numpy as np

from omnisapiens_jax.atlas.faults import FaultLog, Policy, count
from omnisapiens_jax.atlas.plan import MASKED, NO_AUDIO, NO_VIDEO, Planner, Step
from omnisapiens_jax.atlas.recipe import Recipe
from omnisapiens_jax.atlas.schema import SampleError
from omnisapiens_jax.atlas.sources import Source
from omnisapiens_jax.atlas.workers import DEADLINE, MEMORY, open_decoder
from omnisapiens_jax.processing.chat import WordDropout
from omnisapiens_jax.processing.example import Batch, Bucket, Example, collate, collate_packed


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How a plan is executed. None of it changes what a batch holds.

    Attributes:
        on_error: what an unusable row does: `raise`, or `skip`, which masks its slot and notes it in `Pipeline.faults`, or `zero`, which
            notes it too, but feeds the row with silence and black in the place of media that cannot be used.
        cache_bytes: bound of the built examples kept in memory, 0 for none. RL meets its prompts again. Of those that lose words the media
            are used again.
        workers: processes that decode; 0 decodes in threads of this one.
        deadline: seconds of processor time that a worker process may take for a row before it is ended, see `open_decoder`.
        memory: bytes that a worker process may allocate beyond what it begins with.
        threads: threads that decode when there are no workers; 0 decodes when the batch is asked for.
        ahead: batches decoded in advance.
    """

    on_error: Policy = "raise"
    cache_bytes: int = 0
    workers: int = 0
    deadline: float = DEADLINE
    memory: int = MEMORY
    threads: int = 1
    ahead: int = 2

    def __post_init__(self) -> None:
        if self.on_error not in get_args(Policy):
            raise ValueError(f"unknown on_error {self.on_error!r}; known: {', '.join(get_args(Policy))}")
        if self.workers < 0 or self.deadline <= 0 or self.memory <= 0:
            raise ValueError(f"{self.workers} workers of {self.memory} bytes and {self.deadline} s a row can decode nothing")


class Pipeline:
    """The batches of this host. Its state is one integer, the number of the next step."""

    def __init__(
        self, source: Source, recipe: Recipe, planner: Planner, config: PipelineConfig, *, host: int = 0, faults: FaultLog | None = None
    ) -> None:
        """Args:
        source: the rows that the plan's ids mean.
        recipe: how they become examples.
        planner: which of them make up each step.
        config: how the work is done.
        host: which row of the plan's ids is this process's.
        faults: the log that bad rows are added to (a new one).
        """
        if not 0 <= host < planner.config.hosts:
            raise ValueError(f"host {host} of {planner.config.hosts}")
        self.planner, self.host = planner, host
        self.faults = FaultLog() if faults is None else faults
        self.faults_of_step: list[SampleError] = []
        self._config = config
        self._load = _Load(source, recipe, planner, config)

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """(step, batch) for global steps `start` to `stop - 1`.

        A batch is what `collate` gives, for this host's rows, and `index` `[B]` int64: the sample of every row, -1 where it is masked.
        Of a packed plan it is what `collate_packed` gives, and `index` `[B, S]`: sample s of a row has the number s + 1 in `segment_ids`.

        Raises:
            SampleError: for the first unusable row, with `on_error="raise"`.
        """
        if stop <= start:
            return
        dataset = grain.MapDataset.source(_Steps(self.planner, self.host, start, stop)).map(self._load)
        # Two batches at a time keep workers busy where one of them ends.
        threads = 2 if self._config.workers else self._config.threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._config.ahead if threads else 0)
        loaded = dataset.to_iter_dataset(options)
        for step, (batch, faults) in enumerate(loaded, start=start):
            if faults and self._config.on_error == "raise":
                raise faults[0]
            self.faults.add(*faults)
            self.faults_of_step = faults
            yield step, batch

    def fault_metrics(self) -> dict[str, int]:
        """`faults/{dataset}/{kind}`: slots of this host, in the batch last given out, whose row was at fault."""
        return {f"faults/{dataset}/{kind}": number for (dataset, kind), number in sorted(count(self.faults_of_step).items())}


class _Steps:
    """Grain's source: this host's part of the steps from `start` to `stop`."""

    def __init__(self, planner: Planner, host: int, start: int, stop: int) -> None:
        self._planner, self._host, self._start, self._stop = planner, host, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Step:
        step = self._planner[self._start + index]
        return Step(step.bucket, step.ids[self._host], step.withheld[self._host], step.words[self._host])


class _Load:
    """A step of one host -> (batch, faults): the places of samples that cannot be used are masked."""

    def __init__(self, source: Source, recipe: Recipe, planner: Planner, config: PipelineConfig) -> None:
        self._model, self._index, self._odds = recipe.config, planner.index, planner.config.word_dropout
        self._decoder = open_decoder(
            source, recipe, zero=config.on_error == "zero", workers=config.workers, deadline=config.deadline, memory=config.memory
        )
        self._pool = ThreadPoolExecutor(config.workers, thread_name_prefix="asks workers") if config.workers else None
        self._cache = _Cache(config.cache_bytes)

    def __call__(self, step: Step) -> tuple[Batch, list[SampleError]]:
        slots = (array.ravel().tolist() for array in (step.ids, step.withheld, step.words))
        places = [*(self._pool.map if self._pool else map)(self._place, *slots)]
        return self._collate([example for example, _ in places], step), [fault for _, faults in places for fault in faults]

    def _collate(self, examples: list[Example | None], step: Step) -> Batch:
        if step.ids.ndim == 1:
            batch = collate(examples, step.bucket, self._model)
        else:
            segments = step.ids.shape[1]
            rows = [examples[first : first + segments] for first in range(0, len(examples), segments)]
            batch = collate_packed(rows, step.bucket, self._model)
        return {**batch, "index": np.where(batch["row_mask"], step.ids, MASKED)}

    def _place(self, i: int, withheld: int, seed: int) -> tuple[Example | None, list[SampleError]]:
        if i == MASKED:
            return None, []
        try:
            example, faults = self._example(i, WordDropout(self._odds, seed) if seed else None)
        except SampleError as fault:
            return None, [fault]
        return example.without(audio=bool(withheld & NO_AUDIO), video=bool(withheld & NO_VIDEO)) if withheld else example, faults

    def _example(self, i: int, words: WordDropout | None) -> tuple[Example, list[SampleError]]:
        kept = self._cache.get(i)
        if words is None and kept is not None:
            return kept, []
        place = np.searchsorted(self._index.ids, i)
        example, replaced = self._decoder.build(i, int(self._index.excess[place]), Bucket(*self._index.sizes[place].tolist()), words, kept)
        if not replaced:  # else it is counted again when it comes round
            self._cache.put(i, example)
        return example, replaced


class _Cache:
    """Built examples by sample id, the least recently used dropped first, at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._examples: OrderedDict[int, Example] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, i: int) -> Example | None:
        with self._lock:
            if i in self._examples:
                self._examples.move_to_end(i)
            return self._examples.get(i)

    def put(self, i: int, example: Example) -> None:
        with self._lock:
            if i not in self._examples and _bytes(example) <= self._limit:
                self._examples[i] = example
                self._used += _bytes(example)
            while self._used > self._limit:
                self._used -= _bytes(self._examples.popitem(last=False)[1])


def _bytes(example: Example) -> int:
    return sum(value.nbytes for value in vars(example).values() if isinstance(value, np.ndarray))
