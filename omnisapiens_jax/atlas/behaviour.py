"""The descriptors of a source's samples, read once and kept on disk: a clip's landmarks are megabytes, and pooling them is not free."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from omnisapiens_jax.atlas.faults import BadSamples, FaultLog, Policy
from omnisapiens_jax.atlas.records import read_descriptor
from omnisapiens_jax.atlas.schema import FEATURE_FIELDS, SampleError
from omnisapiens_jax.atlas.sources import Source
from omnisapiens_jax.atlas.store import Arrays, Field, Store
from omnisapiens_jax.processing.descriptors.batch import DescriptorConfig, collate_descriptors, describe
from omnisapiens_jax.processing.descriptors.read import AUDIO_WIDTH, VIDEO_WIDTH, Descriptor, DescriptorError
from omnisapiens_jax.processing.example import Batch

_FORMAT = 1  # raise it when a kept array would mean something else
_ROUNDING = 1e-6  # of a mean: what a spread of constant values may come to


class Behaviour:
    """What the samples of a source have by way of descriptors."""

    def __init__(self, store: Store, config: DescriptorConfig) -> None:
        """`store` as `read_behaviour` fills it."""
        self.store, self.config = store, config

    def batch(self, ids: np.ndarray) -> Batch:
        """`collate_descriptors` of the samples `ids [B]`, -1 for a masked row."""
        return collate_descriptors([None if sample < 0 else self.store[sample] for sample in ids.tolist()], self.config)

    def present(self, ids: np.ndarray) -> dict[str, int]:
        """How many of these samples have a descriptor, by modality."""
        rows = [self.store[sample] for sample in ids.tolist()]
        return {modality: sum(bool(row[f"{modality}_present"]) for row in rows) for modality in ("video", "audio")}

    def statistics(self, ids: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Mean and population standard deviation `[d]`, float32, of every feature over all frames of these samples, by sequence.

        Of a sequence that none of them has, zeros and ones.
        """
        found = {}
        for name, (_, width) in self.config.sequences.items():
            count, total, squares = 0, np.zeros(width), np.zeros(width)
            for sample in ids.tolist():
                frames = self.store[sample][name].astype(np.float64)
                count, total, squares = count + len(frames), total + frames.sum(0), squares + (frames**2).sum(0)
            mean = total / max(count, 1)
            spread = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0.0))
            spread[spread <= _ROUNDING * np.abs(mean)] = 0.0
            found[name] = (mean.astype(np.float32), (spread if count else np.ones(width)).astype(np.float32))
        return found


def read_behaviour(
    source: Source,
    ids: Sequence[int],
    config: DescriptorConfig,
    *,
    cache: Path,
    on_error: Policy,
    faults: FaultLog,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> Behaviour:
    """Reads the descriptors of samples, as far as an earlier call has not.

    A sample that names no descriptor, or one that was never made, is without it; so is one whose file is broken, which is a fault of kind
    `descriptor`: with `on_error="raise"` all such stop the run, else they are counted.

    Args:
        source: the rows.
        ids: the samples.
        config: what is taken.
        cache: directory below which it is kept; all processes of a run must see the same.
        on_error: what a broken file does.
        faults: where broken files are noted. They are read, and noted, again in every run.
        threads: files read at once.
        progress: called with (samples done, samples in all).
        share: (number of this process, processes that share the work).
        wait: returns when all processes have called it.

    Raises:
        BadSamples: with `on_error="raise"`.
    """
    key = hashlib.sha256(f"{_FORMAT} {source.fingerprint()} {config}".encode()).hexdigest()[:24]
    folder, fields = cache / key, _fields(config)
    stamps = {int(sample): source.stamp(int(sample), FEATURE_FIELDS) for sample in ids}
    missing = Store(folder, fields).missing(stamps)
    wait()  # before anyone adds to it: all must find the same to be missing
    mine = missing[share[0] :: share[1]]
    broken: list[SampleError] = []
    if mine:
        with Store(folder, fields).adding() as add, ThreadPoolExecutor(threads) as pool:
            for done, (sample, (arrays, wrong)) in enumerate(
                zip(mine, pool.map(lambda sample: _read(source, sample, config), mine), strict=True), start=1
            ):
                broken += wrong
                # A broken file gets a stamp that nothing has, so that it is read, and told, again.
                add(sample, f"broken {stamps[sample]}" if wrong else stamps[sample], arrays)
                if progress:
                    progress(done, len(mine))
    wait()
    faults.add(*broken)
    if broken and on_error == "raise":
        raise BadSamples(f"{FaultLog(broken).report()}\nMend these descriptors, or set on_error='skip' to go on as if they were missing")
    return Behaviour(Store(folder, fields), config)


def _fields(config: DescriptorConfig) -> dict[str, Field]:
    present = Field((), np.dtype(bool))
    fields = {"video_descriptor": Field((VIDEO_WIDTH,)), "video_present": present}
    fields |= {"audio_descriptor": Field((AUDIO_WIDTH,)), "audio_present": present}
    for name, (_, width) in config.sequences.items():
        fields |= {name: Field((None, width)), f"{name}_times": Field((None,))}
    return fields


def _read(source: Source, sample: int, config: DescriptorConfig) -> tuple[Arrays, list[SampleError]]:
    row, found, broken = source[sample], list[Descriptor | None](), list[SampleError]()
    for field in FEATURE_FIELDS:
        try:
            found.append(read_descriptor(row, field, compat_trailing_pad=config.trailing_pad))
        except DescriptorError as reason:
            broken.append(row.error(str(reason), kind="descriptor", field=field))
            found.append(None)
    video, audio = found
    return describe(video, audio, config), broken
