"""Results that are whole or not there, and work that goes on where a killed run stopped."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omnisapiens_jax.convert.tensors import ConversionError

_JOURNAL = "journal.jsonl"


class Journal:
    """What of a conversion is done and safely on disk: a record for each key. It lies in the unfinished directory and dies with it."""

    def __init__(self, path: Path, facts: Mapping[str, Any]):
        """Opens the journal that a conversion of the same `facts` left there, or begins a new one; `fresh` says which."""
        self.done: dict[str, Any] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]  # a killed writer leaves half a line
        self.fresh = not records or records[0] != json.loads(json.dumps(facts))
        if not self.fresh:
            self.done = {record["key"]: record["record"] for record in records[1:]}
        self._path = path
        path.write_text("".join(f"{json.dumps(line)}\n" for line in ([facts] if self.fresh else records)))

    def add(self, key: str, record: Any) -> None:
        """Says that `key` is done; what it names must be on disk already."""
        self.done[key] = record
        with self._path.open("a") as file:
            file.write(json.dumps({"key": key, "record": record}) + "\n")


@contextmanager
def whole_or_nothing(target: str | Path, facts: Mapping[str, Any] | None) -> Iterator[tuple[Path, Journal]]:
    """A directory to write into that becomes `target` when the block ends well.

    A block that ends with ConversionError leaves nothing: its source is not what it should be. A block that is killed, interrupted or
    finds the disk full leaves `.NAME.unfinished`; the same work (the same `facts`, JSON-able) begun again finds its journal and goes on,
    any other begins anew. Work that nobody can begin again (`facts` None: what it writes is in memory) leaves nothing in either case.

    Raises:
      FileExistsError: `target` is there already.
      ConversionError: another process is writing it.
    """
    target = Path(target).resolve()
    folder = target.with_name(f".{target.name}.unfinished")
    _refuse_existing(target)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, target):
        _refuse_existing(target)  # another process may just have finished it
        try:
            journal = Journal(folder / _JOURNAL, {} if facts is None else facts)
            if journal.fresh or facts is None:
                journal.done.clear()
                for old in folder.iterdir():
                    if old.name != _JOURNAL:
                        shutil.rmtree(old) if old.is_dir() else old.unlink()
            yield folder, journal
            (folder / _JOURNAL).unlink()
            flush(folder)
            folder.rename(target)
            flush(target.parent)
        except BaseException as reason:
            if facts is None or isinstance(reason, ConversionError):
                shutil.rmtree(folder)
            raise


@contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """Keeps others from writing into a directory, until this process ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as reason:
            raise ConversionError(f"{target} is being written by another process") from reason
        yield
    finally:
        os.close(handle)


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or name another directory")


def flush(directory: Path) -> None:
    """Waits until the names in a directory are on disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
