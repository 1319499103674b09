"""Batches of a plan, decoded by Grain. The plan is the source: workers execute it and decide nothing."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Iterator

import absl.flags
import grain
import numpy as np

from omnisapiens_jax.atlas.faults import FaultLog
from omnisapiens_jax.atlas.lengths import Policy
from omnisapiens_jax.atlas.plan import MASKED, NO_AUDIO, NO_VIDEO, Index, Planner, Step
from omnisapiens_jax.atlas.recipe import Recipe
from omnisapiens_jax.atlas.schema import SampleError
from omnisapiens_jax.atlas.sources import Source
from omnisapiens_jax.processing.example import Batch, Bucket, Example, collate, collate_packed


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How a plan is executed. None of it changes what a batch holds.

    Attributes:
        on_error: what an unusable row does: `raise`, or `skip`, which masks its slot and notes it in `Pipeline.faults`.
        cache_bytes: bound of the built examples kept in memory (by each worker process), 0 for none. RL meets its prompts again.
        workers: processes that decode; 0 decodes in threads of this one.
        threads: threads that decode when there are no workers; 0 decodes when the batch is asked for.
        ahead: batches decoded in advance by the threads.
    """

    on_error: Policy = "raise"
    cache_bytes: int = 0
    workers: int = 0
    threads: int = 1
    ahead: int = 2


class Pipeline:
    """The batches of this host. Its state is one integer, the number of the next step."""

    def __init__(self, source: Source, recipe: Recipe, planner: Planner, config: PipelineConfig, *, host: int = 0) -> None:
        """Args:
        source: the rows that the plan's ids mean.
        recipe: how they become examples.
        planner: which of them make up each step.
        config: how the work is done.
        host: which row of the plan's ids is this process's.
        """
        if not 0 <= host < planner.config.hosts:
            raise ValueError(f"host {host} of {planner.config.hosts}")
        self.planner, self.host = planner, host
        self.faults = FaultLog()
        self._config, self._recipe = config, recipe
        self._load = _Load(source, recipe, planner.index, config.cache_bytes)

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
        if self._config.workers:
            if not absl.flags.FLAGS.is_parsed():  # grain's processes read a flag, which outside absl.app.run is an error
                absl.flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._config.workers)
            loaded = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).mp_prefetch(options)
        else:
            ahead = self._config.ahead if self._config.threads else 0
            loaded = dataset.to_iter_dataset(grain.ReadOptions(num_threads=self._config.threads, prefetch_buffer_size=ahead))
        for step, (batch, faults) in enumerate(loaded, start=start):
            for fault in faults:  # workers report, this process decides
                if self._config.on_error == "raise":
                    raise fault
                self.faults.add(fault)
            yield step, batch

    def blank(self, bucket: Bucket) -> Batch:
        """A batch of that shape with every slot masked: one for each of `planner.buckets` compiles all that a run will need."""
        shape = self.planner.epoch(0).ids.shape[2:]
        return self._load.blank(shape, bucket)


class _Steps:
    """Grain's source: this host's part of the steps from `start` to `stop`."""

    def __init__(self, planner: Planner, host: int, start: int, stop: int) -> None:
        self._planner, self._host, self._start, self._stop = planner, host, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Step:
        step = self._planner[self._start + index]
        return Step(step.bucket, step.ids[self._host], step.withheld[self._host])


class _Load:
    """A step of one host -> (batch, faults): the places of unusable samples are masked."""

    def __init__(self, source: Source, recipe: Recipe, index: Index, cache_bytes: int) -> None:
        self._source, self._recipe, self._index = source, recipe, index
        self._cache = _Cache(cache_bytes)

    def __call__(self, step: Step) -> tuple[Batch, list[SampleError]]:
        examples: list[Example | None] = []
        faults: list[SampleError] = []
        for i, withheld in zip(step.ids.ravel().tolist(), step.withheld.ravel().tolist(), strict=True):
            try:
                example = None if i == MASKED else self._example(i)
            except SampleError as error:
                faults.append(error)
                example = None
            if example is not None and withheld:
                example = example.without(audio=bool(withheld & NO_AUDIO), video=bool(withheld & NO_VIDEO))
            examples.append(example)
        return self._collate(examples, step), faults

    def blank(self, shape: tuple[int, ...], bucket: Bucket) -> Batch:
        step = Step(bucket, np.full(shape, MASKED), np.zeros(shape, np.uint8))
        return self._collate([None] * step.ids.size, step)

    def _collate(self, examples: list[Example | None], step: Step) -> Batch:
        if step.ids.ndim == 1:
            batch = collate(examples, step.bucket, self._recipe.config)
        else:
            segments = step.ids.shape[1]
            rows = [examples[first : first + segments] for first in range(0, len(examples), segments)]
            batch = collate_packed(rows, step.bucket, self._recipe.config)
        return {**batch, "index": np.where(batch["row_mask"], step.ids, MASKED)}

    def _example(self, i: int) -> Example:
        example = self._cache.get(i)
        if example is None:
            place = np.searchsorted(self._index.ids, i)
            sample, measured = self._source[i], Bucket(*self._index.sizes[place].tolist())
            example = self._recipe.build(sample, int(self._index.excess[place]))
            if not measured.holds(example.size()):
                reason = f"now gives {example.size()}, not the {measured} planned with: the file changed since it was measured"
                raise sample.error(f"{reason}; delete the length cache", kind="media", field="media")
            self._cache.put(i, example)
        return example


class _Cache:
    """Built examples by sample id, the least recently used dropped first, at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.__setstate__(limit)

    def __getstate__(self) -> int:
        return self._limit

    def __setstate__(self, limit: int) -> None:
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
