"""Random access to the rows of an atlas: JSONL beside its media or their tars, parquet with the media inside, or a prepared ArrayRecord."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omnisapiens_jax.atlas import records
from omnisapiens_jax.atlas.schema import FEATURE_FIELDS, MEDIA_FIELDS, Feature, Sample, SampleError, sample_from_row
from omnisapiens_jax.atlas.tars import TarFiles

SPLITS = ("train", "validation", "test")
# What the tar release calls its splits.
RELEASED = {
    "train": "final_v8_train_cleaned_2.jsonl",
    "validation": "final_v8_val_cleaned.jsonl",
    "test": "final_v8_test_cleaned.jsonl",
}


class Source(Protocol):
    """Rows by number. `source[i].id == i`; a bad row raises `SampleError` when it is read, never earlier."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def fingerprint(self) -> str:
        """A digest that changes with the rows: what a cache computed from them is keyed by."""
        ...

    def stamp(self, index: int, fields: Sequence[str] = MEDIA_FIELDS) -> str:
        """Changes when a file that the row names in one of these fields does; "" where the fingerprint says it all."""
        ...


def open_source(path: str | Path) -> JsonlSource | ParquetSource | ArrayRecordSource:
    """The source at a path: a `.jsonl` or `.parquet` file, or a split without the ending.

    `DIR/train` means the split of a prepared atlas in DIR, `DIR/train.jsonl`, the tar release's `DIR/final_v8_train_cleaned_2.jsonl`,
    `DIR/train.parquet` or the shards `DIR/train-*.parquet`, the first that there is.

    Raises:
        FileNotFoundError: there is none of these.
        ValueError: a tar beside the JSONL, or the prepared atlas, is broken.
    """
    path = Path(path)
    if (path.parent / records.RECEIPT).is_file():
        return ArrayRecordSource(path.parent, path.name)
    for lines in (path, path.with_name(f"{path.name}.jsonl"), path.with_name(RELEASED.get(path.name, path.name))):
        if lines.is_file() and lines.suffix == ".jsonl":
            return JsonlSource(lines)
    for shards in ([path], [path.with_name(f"{path.name}.parquet")], sorted(path.parent.glob(f"{path.name}-*.parquet"))):
        if shards and all(shard.is_file() and shard.suffix == ".parquet" for shard in shards):
            return ParquetSource(shards)
    released = f", {RELEASED[path.name]}" if path.name in RELEASED else ""
    raise FileNotFoundError(
        f"no atlas at {path}: expected a .jsonl or .parquet file, or a split's name such as {path.with_name(path.stem)}, which stands for "
        f"the file {path.stem}.jsonl{released}, {path.stem}.parquet or shards {path.stem}-*.parquet, or a split of a prepared atlas"
    )


def open_splits(folder: str | Path) -> dict[str, JsonlSource | ParquetSource | ArrayRecordSource]:
    """Those of train, validation and test that a folder has, in this order.

    Raises:
        FileNotFoundError: it has none.
    """
    found = {}
    for split in SPLITS:
        with contextlib.suppress(FileNotFoundError):
            found[split] = open_source(Path(folder) / split)
    if not found:
        raise FileNotFoundError(
            f"no atlas in {folder}: expected splits named {', '.join(SPLITS)} as .jsonl, .parquet or parquet shards, the tar release's "
            f"{', '.join(RELEASED.values())}, or a prepared atlas"
        )
    return found


class JsonlSource:
    """One JSON object a line; media paths are relative to the file's directory. Lines are read when asked for.

    Media and descriptors that the tars in that directory hold come as bytes, all others as paths.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._tars = TarFiles(self.path.parent)
        offsets, digest, position = [], hashlib.sha256(), 0
        with self.path.open("rb") as file:
            for line in file:
                digest.update(line)
                if line.strip():
                    offsets.append(position)
                position += len(line)
        self._offsets = np.asarray(offsets, np.int64)
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Sample:
        sample = sample_from_row(self._row(_checked(index, len(self))), file=str(self.path), index=index, root=self.path.parent)
        if not len(self._tars):
            return sample
        return dataclasses.replace(sample, **{field: self._fetched(sample, field) for field in (*MEDIA_FIELDS, *FEATURE_FIELDS)})

    def datasets(self) -> list[str]:
        """The dataset of every row, "" where the row does not say."""
        names = []
        for index in range(len(self)):
            try:
                name = self._row(index).get("dataset")
            except SampleError:
                name = None
            names.append(name if isinstance(name, str) else "")
        return names

    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return self._digest

    def stamp(self, index: int, fields: Sequence[str] = MEDIA_FIELDS) -> str:
        """Size and time of every file that the row names in these fields, "-" for one that is not there; and the stamp of the tars."""
        try:
            row = self._row(_checked(index, len(self)))
        except SampleError:
            return ""
        named = [row.get(field) for field in fields]
        paths = [self.path.parent / name for names in named if isinstance(names, list) for name in names if isinstance(name, str)]
        return " ".join([*map(_file_stamp, paths), self._tars.stamp]).strip()

    def _row(self, index: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            row = json.loads(line)
            problem = None if isinstance(row, dict) else f"is a JSON {type(row).__name__}, not an object"
        except (ValueError, RecursionError) as error:
            row, problem = {}, f"is not JSON: {error}"
        if problem:
            raise SampleError(problem, kind="schema", file=str(self.path), row=index, dataset="?", field="(the line)")
        return row

    def _fetched(self, sample: Sample, field: str) -> tuple[Feature, ...]:
        """The items of a field, as bytes where a tar has them."""
        items: list[Feature] = []
        for item in getattr(sample, field):
            try:
                content = self._tars.read(os.path.relpath(item, self.path.parent)) if isinstance(item, Path) else None
            except OSError as reason:
                raise sample.error(str(reason), kind="media", field=field) from reason
            items.append(item if content is None else content)
        return tuple(items)


class ParquetSource:
    """Parquet shards whose media columns are `list<binary>`, read as one table in the order given.

    Text columns of a shard stay in memory once touched. Media columns are read a row group at a time and the last `cached_groups` are
    kept: rows that are near each other in a shard are cheap, a random row costs its row group.
    """

    def __init__(self, paths: list[Path], *, cached_groups: int = 4) -> None:
        self.paths = list(paths)
        self._cached_groups = cached_groups
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
        self._light: dict[int, Any] = {}
        self._heavy: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_light", "_heavy")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        index = _checked(index, len(self))
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard, _, _ = self._groups[group]
        offset = index - int(self._starts[group])
        try:
            with self._lock:
                light, heavy = self._light_columns(group), self._media_columns(group)
            row = {name: table[name][offset].as_py() for table in (light, heavy) for name in table.column_names}
        except (OSError, ValueError, pa.ArrowException) as error:  # a page that is broken, text that is not UTF-8
            reason, file = f"cannot be read: {error}", str(self.paths[shard])
            raise SampleError(reason, kind="schema", file=file, row=index, dataset="?", field="(the row)") from error
        return sample_from_row(row, file=str(self.paths[shard]), index=index, root=None)

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

    def _light_columns(self, group: int) -> Any:
        if group not in self._light:
            self._light[group] = self._read(group, media=False)
        return self._light[group]

    def _media_columns(self, group: int) -> Any:
        if group not in self._heavy:
            self._heavy[group] = self._read(group, media=True)
            while len(self._heavy) > self._cached_groups:
                self._heavy.popitem(last=False)
        self._heavy.move_to_end(group)
        return self._heavy[group]

    def _read(self, group: int, *, media: bool) -> Any:
        shard, number, _ = self._groups[group]
        with pq.ParquetFile(self.paths[shard]) as file:
            heavy = {*MEDIA_FIELDS, *FEATURE_FIELDS}
            names = [name for name in file.schema_arrow.names if (name in heavy) == media]
            return file.read_row_group(number, columns=names)


class ArrayRecordSource:
    """A split of an atlas that `atlas.prepare` made, read through TFDS without tensorflow. Needs the extra `tfds`.

    A random row costs one read. Media are bytes, descriptors are read already.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        """Args:
            folder: where `dataset_info.json` lies, such as `DIR/human_behavior_atlas/all/1.0.0`.
            split: one of its splits.

        Raises:
            FileNotFoundError: there is no such split, or shards of it are missing.
            ImportError: the extra `tfds` is not installed.
        """
        self.folder, self.split = Path(folder), split
        self._receipt = records.Receipt.load(self.folder)
        self._receipt.check(self.folder, split)
        self._records = records.open_records(self.folder, split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        index = _checked(index, len(self))
        return records.decode(self._records[index], file=str(self.folder / self.split), index=index)

    def datasets(self) -> list[str]:
        """The dataset of every row."""
        return self._receipt.datasets(self.split)

    def fingerprint(self) -> str:
        """SHA-256 over the checksums of the shards."""
        return self._receipt.fingerprint(self.split)

    def stamp(self, index: int, fields: Sequence[str] = MEDIA_FIELDS) -> str:
        """Nothing: the files are inside."""
        return ""


def _footer(path: Path, size: int) -> bytes:
    """The bytes of a parquet file's footer. (Arrow's reading of all that it says can abort the process when it is broken.)"""
    with path.open("rb") as file:
        file.seek(-size - 8, os.SEEK_END)  # its length and a magic word follow it
        return file.read(size)


def _checked(index: int, length: int) -> int:
    if not 0 <= index < length:
        raise IndexError(f"row {index} of a source of {length} rows")
    return int(index)


def _file_stamp(path: Path) -> str:
    try:
        found = path.stat()
    except (OSError, ValueError):  # a name with a null byte
        return "-"
    return f"{found.st_size}:{found.st_mtime_ns}"
