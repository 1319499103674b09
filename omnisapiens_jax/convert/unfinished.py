"""Results that are whole or not there, and work that goes on where a killed run stopped."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omnisapiens_jax.processing.tensors import ConversionError

JOURNAL = "journal.jsonl"


class Journal:
    """What of a conversion is done and on disk: a record for each key. It lies in the unfinished directory and dies with it."""

    def __init__(self, path: Path, facts: Any):
        """Reads what work of the same `facts` (JSON-able) has left; `fresh` says that there is nothing to go on with."""
        begun, self._path, self._facts = _records(path), path, json.loads(json.dumps(facts))
        self.fresh = begun[:1] != [self._facts]
        self.done: dict[str, Any] = {} if self.fresh else {line["key"]: line["record"] for line in begun[1:]}

    def begin(self) -> None:
        """Makes the file of a fresh journal."""
        self._append(self._facts)

    def add(self, key: str, record: Any) -> None:
        """Says that `key` is done; what it names must be on disk already."""
        self.done[key] = record
        self._append({"key": key, "record": record})

    def _append(self, line: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _records(path: Path) -> list[Any]:
    """The lines of a journal; one that a killed writer left unfinished is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        records = [json.loads(line) for line in whole.splitlines()]
    except ValueError:  # no kill does this, but a machine that stops may
        return []
    os.truncate(path, len(whole))
    return records


@contextmanager
def whole_or_nothing(target: str | Path, facts: Any) -> Iterator[tuple[Path, Journal]]:
    """A directory to write into that becomes `target`, with all that is in it on disk, when the block ends well.

    A block that ends with ConversionError leaves nothing: its source is not what it should be. A block that is killed, interrupted or
    finds the disk full leaves `.NAME.unfinished`; the same work (the same `facts`, JSON-able) begun again finds its journal and goes on,
    any other begins anew. Work that nobody can begin again (`facts` None: what it writes is in memory) leaves nothing in either case.

    Raises:
      FileExistsError: `target` is there already.
      ConversionError: another process is writing it.
    """
    target = Path(target).resolve()
    folder = target.with_name(f".{target.name}.unfinished")
    refuse_existing(target)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, target):
        refuse_existing(target)  # another process may just have finished it
        try:
            journal = Journal(folder / JOURNAL, facts)
            if journal.fresh or facts is None:
                _empty(folder)
                journal.begin()
            yield folder, journal
            (folder / JOURNAL).unlink()
            _flush_tree(folder)
            folder.rename(target)
            flush(target.parent)
        except BaseException as reason:
            if facts is None or isinstance(reason, ConversionError):
                shutil.rmtree(folder)
            else:
                reason.add_note(f"What is done is kept in {folder}: the same command goes on from there, another begins anew")
            raise


def refuse_existing(target: Path) -> None:
    """Raises FileExistsError if something is there."""
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or name another directory")


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


def _empty(folder: Path) -> None:
    """Removes what other work left; its journal first, so that no later work takes the rest of it for its own."""
    for old in sorted(folder.iterdir(), key=lambda old: old.name != JOURNAL):
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def _flush_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            flush(Path(place) / name)
        flush(Path(place))


def flush(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
