"""The length index: the size of every sample, measured once and kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from omnisapiens_jax.atlas.faults import BadSamples, FaultLog, Policy, Quarantine, as_record
from omnisapiens_jax.atlas.plan import Index
from omnisapiens_jax.atlas.recipe import Recipe
from omnisapiens_jax.atlas.schema import SampleError
from omnisapiens_jax.atlas.sources import Source
from omnisapiens_jax.atlas.workers import DEADLINE, MEMORY, Decoder, IsolatedDecoder, Kinds, open_decoder
from omnisapiens_jax.processing.example import Bucket

_KEPT = 2000  # rows after which what was measured is kept, so that a run which is killed does not begin anew
_FORMAT = 3  # raise it when the meaning of a stored number changes, and old files are measured again

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class _Measured:
    """One row. `kinds` are its signature, dataset and task; `replaced` the faults of media that silence or black stands in for.

    `stamp` is that of its files when it was measured.
    """

    kinds: Kinds
    size: tuple[int, ...]
    excess: int
    stamp: str
    replaced: tuple[SampleError, ...] = ()


_Row = _Measured | SampleError | None  # None: not measured


def length_index(
    source: Source,
    recipe: Recipe,
    *,
    on_error: Policy,
    cache: Path | None = None,
    leave_out: Collection[int] = (),
    quarantine: Quarantine | None = None,
    workers: int = 0,
    deadline: float = DEADLINE,
    memory: int = MEMORY,
    threads: int = 2,
    progress: Progress | None = None,
) -> tuple[Index, FaultLog]:
    """Sizes of all samples of a source, and the rows that are at fault.

    Args:
        source: the rows.
        recipe: how they become examples.
        on_error: `raise` stops with a list of all unusable rows; `skip` leaves them out of the index; `zero` leaves out only those whose
            fault is not in their media, and measures silence and black in the place of media that cannot be used.
        cache: directory that keeps the result, found again by a digest of the rows and the recipe. Rows that were at fault, and those
            whose files have gone or changed since, are measured again.
        leave_out: rows that are neither measured nor in the index.
        quarantine: the list that faults are written to.
        workers: processes that measure; 0 measures in threads of this one. `deadline` and `memory` bound each, see `open_decoder`.
        threads: rows measured at once when there are no workers.
        progress: called with (rows done, rows in all).

    Raises:
        BadSamples: with `on_error="raise"`.
    """
    key = hashlib.sha256(f"{_FORMAT} {source.fingerprint()} {recipe.fingerprint()}".encode()).hexdigest()[:24]
    path = cache / f"lengths-{key}.json" if cache else None
    stamps = [source.stamp(i) for i in range(len(source))] if path else [""] * len(source)
    rows: list[_Row] = (_load(path) if path else None) or [None] * len(source)
    rows = [None if isinstance(row, _Measured) and row.stamp != stamp else row for row, stamp in zip(rows, stamps, strict=True)]
    before, left_out = list(rows), frozenset(leave_out)
    unmeasured = [i for i, row in enumerate(rows) if not isinstance(row, _Measured) and i not in left_out]
    decoder = open_decoder(source, recipe, zero=on_error == "zero", workers=workers, deadline=deadline, memory=memory)
    with ThreadPoolExecutor(workers or threads) as pool:
        for done, (i, row) in enumerate(
            zip(unmeasured, pool.map(lambda i: _measure(decoder, i, stamps[i]), unmeasured), strict=True), start=1
        ):
            rows[i] = row
            if path and done % _KEPT == 0:
                _save(path, rows)
            if progress:
                progress(len(rows) - len(unmeasured) + done, len(rows))
    if path and rows != before:
        _save(path, rows)
    taken = [None if i in left_out else row for i, row in enumerate(rows)]
    faults = FaultLog((fault for row in taken for fault in _faults(row)), quarantine=quarantine)
    if faults and on_error == "raise":
        raise BadSamples(f"{faults.report()}\nMend these rows, or set on_error='skip' to train without them")
    return _index(taken), faults


def shortened(index: Index) -> int:
    """How many samples of an index lose a part of their transcript."""
    return int((index.excess > 0).sum())


def _measure(decoder: Decoder | IsolatedDecoder, i: int, stamp: str) -> _Measured | SampleError:
    try:
        kinds, size, excess, replaced = decoder.measure(i)
    except SampleError as error:
        return error
    return _Measured(kinds, dataclasses.astuple(size), excess, stamp, tuple(replaced))


def _faults(row: _Row) -> tuple[SampleError, ...]:
    return row.replaced if isinstance(row, _Measured) else () if row is None else (row,)


def _index(rows: Sequence[_Row]) -> Index:
    good = [(i, row) for i, row in enumerate(rows) if isinstance(row, _Measured)]
    kinds = [sorted(set(column)) for column in zip(*(row.kinds for _, row in good), strict=True)] or [[], [], []]
    codes = [[names.index(name) for names, name in zip(kinds, row.kinds, strict=True)] for _, row in good]
    signatures, datasets, tasks = np.array(codes, np.int32).reshape(-1, len(kinds)).T
    return Index(
        ids=np.array([i for i, _ in good], np.int64),
        signatures=signatures,
        names=tuple(kinds[0]),
        sizes=np.array([row.size for _, row in good], np.int32).reshape(-1, len(dataclasses.fields(Bucket))),
        excess=np.array([row.excess for _, row in good], np.int32),
        datasets=datasets,
        tasks=tasks,
        dataset_names=tuple(kinds[1]),
        task_names=tuple(kinds[2]),
    )


def _save(path: Path, rows: Sequence[_Row]) -> None:
    plain = []
    for row in rows:
        faults = _faults(row)  # also of a row that is fed with stand-ins: it is measured again, in case it was mended
        measured = (row.kinds, row.size, row.excess, row.stamp) if isinstance(row, _Measured) else None
        plain.append(as_record(faults[0]) if faults else measured)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.part")
    try:
        draft.write_text(json.dumps(plain))
        os.replace(draft, path)  # whoever looks, finds a whole file or none
    finally:
        draft.unlink(missing_ok=True)


def _load(path: Path) -> list[_Row] | None:
    """What was kept; None where there is nothing, or nothing that can be read, as a crash of the machine may leave it."""
    try:
        rows = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return [SampleError(**row) if isinstance(row, dict) else row and _Measured(tuple(row[0]), tuple(row[1]), *row[2:]) for row in rows]
