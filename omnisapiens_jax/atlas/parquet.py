"""Rows in parquet files."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omnisapiens_jax.atlas.schema import MEDIA_FIELDS, Sample, SampleError, sample_from_row
from omnisapiens_jax.atlas.sources import checked

CACHED_BYTES = 2**30  # of row groups, in every process that reads: a quarter of what a worker may allocate


class ParquetSource:
    """Parquet shards whose media columns are `list<binary>`, read as one table in the order given.

    Row groups are read whole, and those last asked for are kept up to `cached_bytes` (always the last one): a row of a kept group costs
    nothing, any other its row group.
    """

    def __init__(self, paths: list[Path], *, cached_bytes: int = CACHED_BYTES) -> None:
        self.paths = list(paths)
        self._cached_bytes = cached_bytes
        digest, groups = hashlib.sha256(), []
        for number, path in enumerate(self.paths):
            try:
                metadata = pq.read_metadata(path)
                digest.update(f"{path.name} {path.stat().st_size} ".encode() + _footer(path, metadata.serialized_size))
            except (OSError, ValueError, pa.ArrowException) as error:
                raise ValueError(f"{path}: not a readable parquet file, perhaps cut off; copy it again ({error})") from error
            groups += [(number, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
        self._groups = groups
        self._starts = np.cumsum([0] + [rows for *_, rows in groups])
        self._digest = digest.hexdigest()
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        index = checked(index, len(self))
        group = self._group(index)
        offset = index - int(self._starts[group])
        try:
            with self._lock:
                table = self._rows_of(group)
            row = {name: table[name][offset].as_py() for name in table.column_names}
        except (OSError, ValueError, pa.ArrowException) as error:  # a page that is broken, text that is not UTF-8
            reason = f"cannot be read: {error}"
            raise SampleError(reason, kind="schema", file=self.file(index), row=index, dataset="?", field="(the row)") from error
        return sample_from_row(row, file=self.file(index), index=index, root=None)

    def datasets(self) -> list[str]:
        """The dataset of every row, "" where the row does not say."""
        names: list[str] = []
        for shard, group, count in self._groups:
            try:
                with pq.ParquetFile(self.paths[shard]) as file:
                    rows = file.read_row_group(group, columns=["dataset"]).to_pylist()
            except (OSError, ValueError, pa.ArrowException):
                rows = [{}] * count  # each row's own fault, told when it is read
            names += [name if isinstance(name := row.get("dataset"), str) else "" for row in rows]
        return names

    def fingerprint(self) -> str:
        """SHA-256 over the shards' names, sizes and footers."""
        return self._digest

    def stamp(self, index: int, fields: Sequence[str] = MEDIA_FIELDS) -> str:
        """Nothing: the files are inside."""
        return ""

    def file(self, index: int) -> str:
        """The row's shard."""
        return str(self.paths[self._groups[self._group(index)][0]])

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _rows_of(self, group: int) -> pa.Table:
        if group not in self._kept:
            shard, number, _ = self._groups[group]
            with pq.ParquetFile(self.paths[shard]) as file:
                self._kept[group] = file.read_row_group(number)
            while len(self._kept) > 1 and sum(table.nbytes for table in self._kept.values()) > self._cached_bytes:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]


def _footer(path: Path, size: int) -> bytes:
    """The bytes of a parquet file's footer. (Arrow's reading of all that it says can abort the process when it is broken.)"""
    with path.open("rb") as file:
        file.seek(-size - 8, os.SEEK_END)  # its length and a magic word follow it
        return file.read(size)
