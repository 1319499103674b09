"""Writes descriptors/: what we extract of short clips, and what the packages themselves say of them.

Run from the repository root, in the environment of the tests, after `make descriptors-env`: python -m tests.golden.make_descriptors
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from omnisapiens_jax.processing.descriptors.extract import extract, find_jobs
from tests.oracle import run_oracle
from tests.processing.descriptors.clips import descriptors_python, write_clips

if __name__ == "__main__":
    folder = Path(__file__).with_name("descriptors")
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        clips = Path(work) / "clips"
        write_clips(clips, seconds=1.0)
        jobs = find_jobs(clips, folder)
        extract(jobs, folder, python=descriptors_python())
        video, audio = ([str(job.source) for job in jobs if job.kind == kind and job.target.exists()] for kind in ("video", "audio"))
        np.savez_compressed(folder / "packages.npz", **run_oracle("described", python=descriptors_python(), video=video, audio=audio))
    for file in (folder / ".lock", folder / "failed.jsonl"):
        file.unlink()
