"""Arrays by sample, computed once and kept on disk: what is frozen in a run, or slow to read.

A folder of files that only grow, one for each time that a process wrote; of several records of a sample the newest counts. A record is a
header and the bytes of its arrays. It carries a checksum, so that a record which a kill cut off or a disk has damaged is as good as none,
and a stamp, which says for what it was made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import mmap
import os
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

_HEADER = struct.Struct("<4sqQ8sI")  # magic, sample, bytes of the payload, stamp, checksum of payload, sample and stamp
_MAGIC = b"OMNS"
_SUFFIX = ".records"
_COUNT = np.dtype("<u4")

Arrays = dict[str, np.ndarray]
Add = Callable[[int, str, Mapping[str, np.ndarray]], None]  # sample, stamp, arrays


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a record; its first axis is None where every sample has another length."""

    shape: tuple[int | None, ...]
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))


class Store:
    """The whole records of a folder, by sample. Arrays that it gives are views of the files, and read-only.

    Several processes may add to one folder at the same time; each sees the others' records when it opens the folder anew.
    """

    def __init__(self, folder: Path, fields: Mapping[str, Field]) -> None:
        """Opens a folder that need not exist yet, and reads all of it to check it.

        Args:
          folder: its name must tell apart all that the arrays depend on and that the stamps do not.
          fields: of every record.
        """
        self.folder, self.fields = folder, dict(fields)
        self.damaged = 0  # records that are not what was written; a file is read no further than a header that is none
        self._records: dict[int, tuple[bytes, memoryview]] = {}
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            self._read(path)

    def __len__(self) -> int:
        return len(self._records)

    def missing(self, stamps: Mapping[int, str]) -> list[int]:
        """Of the samples with these stamps those without a record that was made for them."""
        return [sample for sample, stamp in stamps.items() if sample not in self._records or self._records[sample][0] != _digest(stamp)]

    def __getitem__(self, sample: int) -> Arrays:
        """The arrays of a sample. Raises KeyError: it has no whole record."""
        payload = self._records[sample][1]
        sequences = [name for name, field in self.fields.items() if field.shape[:1] == (None,)]
        counts = dict(zip(sequences, np.frombuffer(payload, _COUNT, len(sequences)).tolist(), strict=True))
        offset, arrays = _COUNT.itemsize * len(sequences), {}
        for name, field in self.fields.items():
            shape = tuple(counts[name] if size is None else size for size in field.shape)
            number = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(payload, field.dtype, number, offset).reshape(shape)
            offset += number * field.dtype.itemsize
        return arrays

    @contextlib.contextmanager
    def adding(self) -> Iterator[Add]:
        """Within, a function that adds a record: it lies in the file when the call is over. Open the folder anew to read it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex}{_SUFFIX}").open("wb", buffering=0) as file:

            def add(sample: int, stamp: str, arrays: Mapping[str, np.ndarray]) -> None:
                payload = self._packed(arrays)
                record = _HEADER.pack(_MAGIC, sample, len(payload), _digest(stamp), _checksum(payload, sample, _digest(stamp))) + payload
                if file.write(record) != len(record):
                    raise OSError(f"{file.name}: the disk is full")

            yield add
            os.fsync(file.fileno())

    def _packed(self, arrays: Mapping[str, np.ndarray]) -> bytes:
        counts, parts = [], []
        for name, field in self.fields.items():
            array = np.asarray(arrays[name])
            if array.ndim != len(field.shape) or any(
                size not in (None, found) for size, found in zip(field.shape, array.shape, strict=True)
            ):
                raise ValueError(f"{name} is {array.shape}, not {field.shape}")
            counts += [array.shape[0]] if field.shape[:1] == (None,) else []
            parts.append(np.ascontiguousarray(array, field.dtype).tobytes())
        return np.asarray(counts, _COUNT).tobytes() + b"".join(parts)

    def _read(self, path: Path) -> None:
        if not path.stat().st_size:
            return
        with path.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        begin = 0
        while begin < len(content):
            header = content[begin : begin + _HEADER.size]
            if len(header) < _HEADER.size or header[:4] != _MAGIC:
                self.damaged += 1
                return
            _, sample, size, stamp, checksum = _HEADER.unpack(header)
            if size < 0:
                self.damaged += 1
                return
            payload = content[begin + _HEADER.size : begin + _HEADER.size + size]
            if len(payload) == size and _checksum(payload, sample, stamp) == checksum:
                self._records[sample] = (stamp, payload)
            else:
                self.damaged += 1
            begin += _HEADER.size + size


def _digest(stamp: str) -> bytes:
    return hashlib.sha256(stamp.encode()).digest()[:8]


def _checksum(payload: bytes | memoryview, sample: int, stamp: bytes) -> int:
    return zlib.crc32(stamp, zlib.crc32(sample.to_bytes(8, "little", signed=True), zlib.crc32(payload)))
