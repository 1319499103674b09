"""Writes positions.npz: transformers' positions of 40 random rows. Run from the repository root: python -m tests.golden.make_positions"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from tests.oracle import run_oracle
from tests.processing.test_positions import IDS, random_row

if __name__ == "__main__":
    rng = np.random.default_rng(11)
    rows = [random_row(rng, sound=bool(i % 2)) for i in range(40)]
    answer = run_oracle("rope_index", rows=rows, ids=dataclasses.asdict(IDS), seconds_per_chunk=2.0)
    kept = {name: value.astype(np.int32) for name, value in answer.items()}
    np.savez_compressed(Path(__file__).with_name("positions.npz"), rows=np.array(json.dumps(rows)), **kept)
