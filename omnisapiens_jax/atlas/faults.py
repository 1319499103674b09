"""Rows that could not be used: collected once each, counted by dataset and kind, kept in a file, never lost silently."""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from omnisapiens_jax.atlas.schema import SampleError
from omnisapiens_jax.atlas.sources import Source

# What a row that cannot be used does: stop the run, be left out, or, if only its media are at fault, be fed with silence and black.
Policy = Literal["raise", "skip", "zero"]
FIELDS = ("file", "row", "dataset", "field", "kind", "reason")  # of a fault, in the order of the quarantine list
_FINGERPRINT = "fingerprint"  # stands before them there

_SHOWN = 20


class BadSamples(ValueError):
    """Rows of an atlas that cannot be used; the message counts them all and shows the first."""


class FaultLog:
    """The faults of a run: one entry a row, however often the row comes round."""

    def __init__(self, faults: Iterable[SampleError] = (), *, quarantine: Quarantine | None = None) -> None:
        """Args:
        faults: those there are from the start.
        quarantine: the list of bad rows that every new fault is written to as well.
        """
        self._faults: dict[tuple[str, int], SampleError] = {}
        self._quarantine = quarantine
        self.add(*faults)

    def __len__(self) -> int:
        return len(self._faults)

    def __iter__(self) -> Iterator[SampleError]:
        return iter(self._faults.values())

    def add(self, *faults: SampleError) -> None:
        """Notes faults; a row that is known already stays as it was first seen."""
        new: list[SampleError] = []
        for fault in faults:
            if self._faults.setdefault((fault.file, fault.row), fault) is fault:
                new.append(fault)
        if new and self._quarantine:
            self._quarantine.append(new)

    def counts(self) -> Counter[tuple[str, str]]:
        """Rows by (dataset, kind)."""
        return count(self)

    def report(self, *, zero: bool = False) -> str:
        """The counts, then the first faults in full. With `zero`, bad media were replaced and only other faults lose rows."""
        if not self:
            return "no sample was at fault"
        replaced = sum(fault.kind == "media" for fault in self) if zero else 0
        heads = [f"{len(self) - replaced} samples cannot be used"] if replaced < len(self) else []
        heads += [f"{replaced} samples have media that cannot be decoded: silence or black stands in"] if replaced else []
        counts = [f"  {dataset}: {number} {kind}" for (dataset, kind), number in sorted(self.counts().items())]
        shown = [f"  {fault}" for fault in list(self)[:_SHOWN]]
        more = [f"  ... and {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        listed = [f"  all of them are listed in {self._quarantine.path}"] if self._quarantine else []
        return "\n".join([", ".join(heads), *counts, *shown, *more, *listed])


def count(faults: Iterable[SampleError]) -> Counter[tuple[str, str]]:
    """Faults by (dataset, kind)."""
    return Counter((fault.dataset, fault.kind) for fault in faults)


def as_record(fault: SampleError) -> dict[str, Any]:
    """A fault as plain JSON; `SampleError(**record)` is the way back."""
    return {name: getattr(fault, name) for name in FIELDS}


def read_quarantine(path: Path) -> list[SampleError]:
    """The faults of a quarantine list: JSON lines of `fingerprint`, `file`, `row`, `dataset`, `field`, `kind` and `reason`.

    Raises:
        FileNotFoundError: there is no such list.
        ValueError: a line is not one of such a list. (A last line without its end was cut off by a kill, and is passed over.)
    """
    return [fault for _, fault in _read(path)]


def quarantined_rows(path: Path, source: Source) -> frozenset[int]:
    """Rows of a source that stand in a quarantine list: lines of its fingerprint, wherever its file lay then.

    Raises:
        FileNotFoundError: there is no such list.
        ValueError: a line is not one of such a list, or is of other rows that the source's file held before.
    """
    rows, fingerprint = set(), source.fingerprint()
    files = {Path(file).resolve() for file in {source.file(row) for row in range(len(source))}}
    for number, (made_for, fault) in enumerate(_read(path), start=1):
        if made_for == fingerprint:
            rows.add(fault.row)
        elif Path(fault.file).resolve() in files:
            raise ValueError(
                f"{path}, line {number}: {fault.file} has changed since this list was written, so row {fault.row} may be another one now; "
                "remove the lines of that file, or the list, and a run with on_error='skip' lists anew what is bad"
            )
    return frozenset(rows)


def _read(path: Path) -> list[tuple[str, SampleError]]:
    *lines, _ = path.read_bytes().split(b"\n")
    return _parsed(path, lines)


def _parsed(path: Path, lines: Iterable[bytes]) -> list[tuple[str, SampleError]]:
    """Fingerprint and fault of every line."""
    faults = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            faults.append((record[_FINGERPRINT], SampleError(**{name: record[name] for name in FIELDS})))
        except (ValueError, KeyError, TypeError) as reason:
            known = ", ".join((_FINGERPRINT, *FIELDS))
            raise ValueError(f"{path}, line {number}: not a line of a quarantine list, which has {known} ({reason})") from None
    return faults


class Quarantine:
    """A list of bad rows that is written to; other processes and hosts may do the same at the same time."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """`fingerprint` is that of the source whose rows are listed from now on; its rows under another one are other rows."""
        self.path, self._fingerprint = path, fingerprint
        self._read, self._known = 0, set[tuple[str, str, int]]()  # bytes that were looked at, and the rows that stand there

    def append(self, faults: list[SampleError]) -> None:
        """Writes what the list lacks. Only what it has got since the last time is read: a run meets its faults one by one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            end = file.seek(0, os.SEEK_END)
            if end < self._read:  # it was begun anew
                self._read, self._known = 0, set()
            file.seek(self._read)
            *lines, cut = file.read().split(b"\n")
            if cut:  # a kill or a full disk cut it off
                end = file.truncate(end - len(cut))
            self._known |= {(made_for, fault.file, fault.row) for made_for, fault in _parsed(self.path, lines)}
            new = {key: fault for fault in faults if (key := (self._fingerprint, fault.file, fault.row)) not in self._known}
            records = [{_FINGERPRINT: self._fingerprint, **as_record(fault)} for fault in new.values()]
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
            file.write(text)
            self._known |= new.keys()
            self._read = end + len(text)
