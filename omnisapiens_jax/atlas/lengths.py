"""The length index: the size of every sample, measured once and kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from omnisapiens_jax.atlas.faults import BadSamples, FaultLog
from omnisapiens_jax.atlas.plan import Index
from omnisapiens_jax.atlas.recipe import Recipe
from omnisapiens_jax.atlas.schema import Sample, SampleError
from omnisapiens_jax.atlas.sources import Source
from omnisapiens_jax.processing.example import Bucket

_FORMAT = 2  # raise it when the meaning of a stored number changes, and old files are measured again
_FAULT_FIELDS = ("reason", "kind", "file", "row", "dataset", "field")

Policy = Literal["raise", "skip"]
Progress = Callable[[int, int], None]
Measured = tuple[tuple[str, str, str], tuple[int, ...], int]  # (signature, dataset, task), size, excess


def length_index(
    source: Source,
    recipe: Recipe,
    *,
    on_error: Policy,
    cache: Path | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> tuple[Index, FaultLog]:
    """Sizes of all samples of a source, and the rows that cannot be used.

    Args:
        source: the rows.
        recipe: how they become examples.
        on_error: `raise` stops with a list of all unusable rows; `skip` leaves them out of the index.
        cache: directory that keeps the result, found again by a digest of the rows and the recipe. Rows that were at fault are measured
            again every time, so a mended file is noticed; any other change of a media file is not: delete the directory then.
        threads: rows measured at once.
        progress: called with (rows done, rows in all).

    Raises:
        BadSamples: with `on_error="raise"`.
    """
    key = hashlib.sha256(f"{_FORMAT} {source.fingerprint()} {recipe.fingerprint()}".encode()).hexdigest()[:24]
    path = cache / f"lengths-{key}.json" if cache else None
    rows: list[Measured | SampleError | None] = _load(path) if path and path.exists() else [None] * len(source)
    unmeasured = [i for i, row in enumerate(rows) if not isinstance(row, tuple)]
    before = list(rows)
    with ThreadPoolExecutor(threads) as pool:
        for done, (i, row) in enumerate(zip(unmeasured, pool.map(lambda i: _measure(source, recipe, i), unmeasured), strict=True), start=1):
            rows[i] = row
            if progress:
                progress(len(rows) - len(unmeasured) + done, len(rows))
    if path and rows != before:
        _save(path, rows)
    faults = FaultLog(row for row in rows if isinstance(row, SampleError))
    if faults and on_error == "raise":
        raise BadSamples(f"{faults.report()}\nMend these rows, or set on_error='skip' to train without them")
    return _index(rows), faults


def shortened(index: Index) -> int:
    """How many samples of an index lose a part of their transcript."""
    return int((index.excess > 0).sum())


def _measure(source: Source, recipe: Recipe, i: int) -> Measured | SampleError:
    try:
        sample: Sample = source[i]
        size, excess = recipe.measure(sample)
    except SampleError as error:
        return error
    return (sample.modality_signature, sample.dataset, sample.task), dataclasses.astuple(size), excess


def _index(rows: Sequence[Measured | SampleError | None]) -> Index:
    good = [(i, row) for i, row in enumerate(rows) if isinstance(row, tuple)]
    kinds = [sorted(set(column)) for column in zip(*(kind for _, (kind, _, _) in good), strict=True)] or [[], [], []]
    codes = [[names.index(name) for names, name in zip(kinds, kind, strict=True)] for _, (kind, _, _) in good]
    signatures, datasets, tasks = np.array(codes, np.int32).reshape(-1, len(kinds)).T
    return Index(
        ids=np.array([i for i, _ in good], np.int64),
        signatures=signatures,
        names=tuple(kinds[0]),
        sizes=np.array([size for _, (_, size, _) in good], np.int32).reshape(-1, len(dataclasses.fields(Bucket))),
        excess=np.array([excess for _, (_, _, excess) in good], np.int32),
        datasets=datasets,
        tasks=tasks,
    )


def _save(path: Path, rows: Sequence[Measured | SampleError | None]) -> None:
    plain = [{f: getattr(row, f) for f in _FAULT_FIELDS} if isinstance(row, SampleError) else row for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.part")
    draft.write_text(json.dumps(plain))
    os.replace(draft, path)  # whoever looks, finds a whole file or none


def _load(path: Path) -> list[Measured | SampleError | None]:
    rows = json.loads(path.read_text())
    return [SampleError(**row) if isinstance(row, dict) else (tuple(row[0]), tuple(row[1]), row[2]) for row in rows]
