"""Random access to the rows of an atlas: JSONL beside its media or their tars, parquet with the media inside, or a prepared ArrayRecord."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from omnisapiens_jax.atlas import records
from omnisapiens_jax.atlas.schema import FEATURE_FIELDS, MEDIA_FIELDS, Feature, Sample, SampleError, sample_from_row
from omnisapiens_jax.atlas.tars import TarFiles

if TYPE_CHECKING:
    from omnisapiens_jax.atlas.parquet import ParquetSource

SPLITS = ("train", "validation", "test")
# What the tar release calls its splits.
RELEASED = {
    "train": "final_v8_train_cleaned_2.jsonl",
    "validation": "final_v8_val_cleaned.jsonl",
    "test": "final_v8_test_cleaned.jsonl",
}

_NUMBERED = re.compile(r"-(\d+)-of-(\d+)")  # what follows the split in the name of a shard


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

    def file(self, index: int) -> str:
        """The file that a row is in, as samples and errors say it. Reads nothing."""
        ...


def open_source(path: str | Path) -> JsonlSource | ParquetSource | ArrayRecordSource:
    """The source at a path: a `.jsonl` or `.parquet` file, or a split without the ending.

    `DIR/train` means the split of a prepared atlas in DIR, `DIR/train.jsonl`, the tar release's `DIR/final_v8_train_cleaned_2.jsonl`,
    `DIR/train.parquet` or the shards `DIR/train-*.parquet`, the first that there is.

    Raises:
        NoSuchSplit: there is none of these.
        FileNotFoundError: shards are missing.
        ValueError: a tar beside the JSONL, or the prepared atlas, is broken; or the shards are of several sets.
    """
    path = Path(path)
    if (path.parent / records.RECEIPT).is_file():
        return ArrayRecordSource(path.parent, path.name)
    for lines in (path, path.with_name(f"{path.name}.jsonl"), path.with_name(RELEASED.get(path.name, path.name))):
        if lines.is_file() and lines.suffix == ".jsonl":
            return JsonlSource(lines)
    for shards in ([path], [path.with_name(f"{path.name}.parquet")], _shards(path)):
        if shards and all(shard.is_file() and shard.suffix == ".parquet" for shard in shards):
            from omnisapiens_jax.atlas.parquet import ParquetSource  # Arrow takes 25 MB of every process, also where there is no parquet

            return ParquetSource(shards)
    if path.is_dir():
        raise records.NoSuchSplit(f"{path} is a folder: name a split in it, such as {path / SPLITS[0]}")
    released = f", {RELEASED[path.name]}" if path.name in RELEASED else ""
    raise records.NoSuchSplit(
        f"no atlas at {path}: expected a .jsonl or .parquet file, or a split's name such as {path.with_name(path.stem)}, which stands for "
        f"the file {path.stem}.jsonl{released}, {path.stem}.parquet or shards {path.stem}-*.parquet, or a split of a prepared atlas"
    )


def open_splits(folder: str | Path) -> dict[str, JsonlSource | ParquetSource | ArrayRecordSource]:
    """Those of train, validation and test that a folder has, in this order.

    Raises:
        FileNotFoundError: it has none, or a part of one is missing.
        ValueError: as `open_source`.
    """
    found = {}
    for split in SPLITS:
        with contextlib.suppress(records.NoSuchSplit):
            found[split] = open_source(Path(folder) / split)
    if not found:
        raise records.NoSuchSplit(
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
        sample = sample_from_row(self._row(checked(index, len(self))), file=str(self.path), index=index, root=self.path.parent)
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
            row = self._row(checked(index, len(self)))
        except SampleError:
            return ""
        named = [row.get(field) for field in fields]
        paths = [self.path.parent / name for names in named if isinstance(names, list) for name in names if isinstance(name, str)]
        return " ".join([*map(_file_stamp, paths), self._tars.stamp]).strip()

    def file(self, index: int) -> str:
        """The same for all rows."""
        return str(self.path)

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


class ArrayRecordSource:
    """A split of an atlas that `atlas.prepare` made, read through TFDS without tensorflow. Needs the extra `tfds`.

    A random row costs one read. Media are bytes, descriptors are read already.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        """Args:
            folder: where `dataset_info.json` lies, such as `DIR/human_behavior_atlas/all/1.0.0`.
            split: one of its splits.

        Raises:
            NoSuchSplit: there is no such split.
            FileNotFoundError: shards of it are missing.
            ImportError: the extra `tfds` is not installed.
        """
        self.folder, self.split = Path(folder), split
        self._receipt = records.Receipt.load(self.folder)
        self._receipt.check(self.folder, split)
        self._records = records.open_records(self.folder, split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        index, file = checked(index, len(self)), self.file(index)
        try:
            record = self._records[index]
        except (RuntimeError, ValueError) as error:  # what ArrayRecord says of bytes that have changed
            reason = f"is damaged, prepare again, which mends it ({error})"
            raise SampleError(reason, kind="schema", file=file, row=index, dataset="?", field="(the record)") from error
        return records.decode(record, file=file, index=index)

    def datasets(self) -> list[str]:
        """The dataset of every row."""
        return self._receipt.datasets(self.split)

    def fingerprint(self) -> str:
        """SHA-256 over the checksums of the shards."""
        return self._receipt.fingerprint(self.split)

    def stamp(self, index: int, fields: Sequence[str] = MEDIA_FIELDS) -> str:
        """Nothing: the files are inside."""
        return ""

    def file(self, index: int) -> str:
        """The split, which is in several files."""
        return str(self.folder / self.split)


def _shards(path: Path) -> list[Path]:
    """The parquet shards of a split in order. Where their names say how many there are (`-00000-of-00293`), all of them must be there."""
    found = sorted(path.parent.glob(f"{glob.escape(path.name)}-*.parquet"))
    numbers = [(shard, [int(n) for n in match.groups()]) for shard in found if (match := _NUMBERED.match(shard.name[len(path.name) :]))]
    if not numbers:
        return found
    there, of = {number for _, (number, _) in numbers}, {of for _, (_, of) in numbers}
    if len(of) > 1 or len(there) < len(numbers):
        raise ValueError(f"{path}: its shards are of more than one set, from {numbers[0][0].name} to {numbers[-1][0].name}; keep one")
    if (missing := max(of) - len(there)) > 0:
        first = f"{path.name}-{min({*range(max(of))} - there):05d}-of-{max(of):05d}.parquet"
        raise FileNotFoundError(f"{path}: {missing} of its {max(of)} shards are missing, such as {first}; fetch them again")
    return [shard for shard, _ in numbers]


def checked(index: int, length: int) -> int:
    """The index of a row. Raises IndexError where there is none."""
    if not 0 <= index < length:
        raise IndexError(f"row {index} of a source of {length} rows")
    return int(index)


def _file_stamp(path: Path) -> str:
    try:
        found = path.stat()
    except (OSError, ValueError):  # a name with a null byte
        return "-"
    return f"{found.st_size}:{found.st_mtime_ns}"
