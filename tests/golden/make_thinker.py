"""Writes `thinker_<config>.npz`: what transformers answers for the cases of `tests/models/cases.py`.

Run `python -m tests.golden.make_thinker`.

It needs the oracle's environment (`make venvs`). Left-padded cases are not stored: their values are those of the right-padded ones,
of which only transformers' greedy continuation is taken from the left-padded run.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.models import cases, references


def main() -> None:
    found = references.live()
    for config in cases.CONFIGS:
        arrays = {}
        for case in references.STORED:
            reference = found[config, case]
            left = found.get((config, case.replace("_right", "_left")), reference)
            reference = dataclasses.replace(reference, greedy=left.greedy, margin=left.margin)
            arrays |= {f"{case}/{name}": value for name, value in references.pack(reference).items()}
        path = references.GOLDEN / f"thinker_{config}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path}: {len(references.STORED)} cases, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
