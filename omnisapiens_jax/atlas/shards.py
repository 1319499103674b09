"""One file of a prepared atlas: which rows go into it, how it is made, and how to tell that it is finished.

Its rows are read by the processes of a `WorkerPool`. What ends one of them, a crash, a hang or a flood of memory in a library, costs the
row that it had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omnisapiens_jax.atlas import records
from omnisapiens_jax.atlas.labels import HBA
from omnisapiens_jax.atlas.records import Encoded, Shard
from omnisapiens_jax.atlas.schema import FEATURE_FIELDS, MEDIA_FIELDS, Sample, SampleError
from omnisapiens_jax.atlas.sources import Source, open_source
from omnisapiens_jax.atlas.workers import WorkerPool, read_row, shared_pool, within_memory


@dataclasses.dataclass(frozen=True)
class Job:
    """One file to make: rows of a split, and where the file and its receipt go."""

    source: str
    fingerprint: str
    split: str
    number: int
    of: int
    rows: tuple[int, ...]
    folder: str
    receipts: str
    descriptors: str | None

    @property
    def file(self) -> str:
        """Name of the file, as TFDS expects it."""
        return f"{records.NAME}-{self.split}.array_record-{self.number:05d}-of-{self.of:05d}"

    @property
    def receipt(self) -> Path:
        """Where it says that the file is finished."""
        return Path(self.receipts) / f"{self.file}.json"

    def finished(self) -> Shard | None:
        """What is known of the file, None where it is still to be made."""
        if (receipt := self._receipt()) is None:
            return None
        shard, _ = receipt
        path = Path(self.folder) / shard.file
        return shard if path.is_file() and path.stat().st_size == shard.size else None

    def stale(self) -> bool:
        """Whether the finished file was made of media or descriptors that are not what lies there now."""
        receipt = self._receipt()
        return receipt is not None and receipt[1] != self.stamp()

    def stamp(self) -> str:
        """SHA-256 over the stamps of all that the rows name."""
        source = _opened(self.source, self.descriptors)[0].source
        fields = (*MEDIA_FIELDS, *FEATURE_FIELDS)
        return hashlib.sha256("\n".join(source.stamp(row, fields) for row in self.rows).encode()).hexdigest()

    def note(self, shard: Shard, stamp: str) -> None:
        """Writes the receipt."""
        with drafted(self.receipt) as draft:
            draft.write_text(json.dumps({"stamp": stamp, "shard": shard.to_json()}))

    def _receipt(self) -> tuple[Shard, str] | None:
        try:
            plain = json.loads(self.receipt.read_text())
            return Shard.from_json(plain["shard"]), plain["stamp"]
        except (FileNotFoundError, ValueError, KeyError):  # none, or what a crash of the machine left of one, or of an earlier version
            return None


@dataclasses.dataclass(frozen=True)
class RowEncoder:
    """Makes records of the rows of a source, in the process that calls it.

    `descriptors` is a folder whose descriptors take the place of the source's, see `prepare`.
    """

    source: Source
    descriptors: Path | None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        records.load_serializer()  # takes seconds, which a worker must not count to its first row

    def encode(self, row: int, told: Callable[[Sample], None] | None = None) -> tuple[str, Encoded]:
        """Dataset and record of a row. `told` is called with the sample before any of its files is opened.

        Raises:
            SampleError: the row cannot be used.
        """
        sample = read_row(self.source, row, told)
        return sample.dataset, within_memory(sample, lambda: self._encoded(sample))

    def _encoded(self, sample: Sample) -> Encoded:
        _check_dataset(sample)
        return records.encode(sample if self.descriptors is None else _described(sample, self.descriptors))


def make_shard(job: Job, pool: WorkerPool | None = None) -> None:
    """Writes one file, then its receipt. Each appears whole; doing it again gives the same bytes.

    Args:
        job: what to make.
        pool: whose processes read the rows; None reads them in this one.
    """
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without types

    encoder, payload = _opened(job.source, job.descriptors)
    source = encoder.source
    if source.fingerprint() != job.fingerprint:
        raise ValueError(f"{job.source} changed while it was prepared: remove {job.folder} and {job.receipts} and start again")
    stamp = job.stamp()  # before anything is read: what changes from here on is noticed by the next call
    datasets, described, faults = [], [], []
    with drafted(Path(job.folder) / job.file) as draft:
        writer = array_record_module.ArrayRecordWriter(str(draft), "group_size:1")  # one record can be read alone
        for row in job.rows:
            try:
                dataset, encoded = encoder.encode(row) if pool is None else pool.run(payload, source.file(row), "encode", row)
            except SampleError as error:
                faults.append(error)
                continue
            writer.write(encoded.record)
            datasets.append(dataset)
            described.append(encoded.descriptors)
            faults += encoded.faults
        try:
            writer.close()
        except RuntimeError as reason:
            raise OSError(f"{job.file} cannot be written ({reason})") from reason
        counts = sum(video for video, _ in described), sum(audio for _, audio in described)
        shard = Shard(job.file, draft.stat().st_size, sha256(draft), tuple(datasets), counts, tuple(faults))
    job.note(shard, stamp)


def make_shard_elsewhere(job: Job, deadline: float, memory: int) -> None:
    """`make_shard` in a process that others started and that makes many, in one thread or several: its pool grows with them and stays."""
    make_shard(job, shared_pool(os.cpu_count() or 1, deadline, memory))


def forget_sources() -> None:
    """Opens sources anew from now on: they may have changed."""
    _open_once.cache_clear()


def _opened(source: str, descriptors: str | None) -> tuple[RowEncoder, bytes]:
    with _opening:  # a pool knows what it has sent to a worker by its bytes, and compares them quickly only if they are the same object
        return _open_once(source, descriptors)


_opening = threading.Lock()


@functools.lru_cache(maxsize=4)
def _open_once(source: str, descriptors: str | None) -> tuple[RowEncoder, bytes]:
    encoder = RowEncoder(open_source(source), None if descriptors is None else Path(descriptors))
    return encoder, pickle.dumps(encoder)


def _check_dataset(sample: Sample) -> None:
    """Raises a `SampleError` for a row of no known dataset: it is in no configuration."""
    try:
        HBA.dataset(sample.dataset)
    except KeyError as reason:
        raise sample.error(reason.args[0], kind="label", field="dataset") from None


def _described(sample: Sample, descriptors: Path) -> Sample:
    """The sample with the descriptors of its first video and first sound (or the video's own) that the folder has."""
    videos = sample.names[len(sample.images) :][: len(sample.videos)]
    audios = sample.names[len(sample.images) + len(sample.videos) :]
    found = {}
    for field, kind, names in (("ext_video_feats", "pose", videos), ("ext_audio_feats", "opensmile", audios or videos)):
        if names and (path := descriptors / kind / f"{names[0]}.npz").is_file():
            found[field] = (path,)
    return dataclasses.replace(sample, **found)


@contextlib.contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A new file that takes the place of `path` when the block ends well. Its name is its own also among several machines."""
    handle, name = tempfile.mkstemp(prefix=".", suffix=".draft", dir=path.parent)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        draft.chmod(0o644)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
