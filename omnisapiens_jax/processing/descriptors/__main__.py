"""Extracts behavioural descriptors of every video and sound under SRC into DST: landmarks and openSMILE functionals.

The descriptor of SRC/clips/a.mp4 becomes DST/pose/clips/a.mp4.npz (MediaPipe: 33 points of the body, 478 of the face and 21 of each hand,
frame by frame), that of its sound DST/opensmile/clips/a.mp4.npz (ComParE 2016: 6373 functionals, and 65 low-level descriptors window by
window). The packages run in an environment of their own, which `make descriptors-env` builds. What is there already is kept, so a run
that was stopped goes on. Files that cannot be used are counted and listed in DST/failed.jsonl, and tried again by the next run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from omnisapiens_jax.processing.descriptors import extract as extraction

VARIABLE = "OMNISAPIENS_DESCRIPTORS_PYTHON"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 when nothing could be done, 2 when some files could not be described."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    try:
        return _run(options, console)
    except (extraction.ExtractionError, OSError, KeyboardInterrupt) as reason:
        console.print(Text.assemble(("Not done: ", "red"), str(reason) or "interrupted; the same command goes on where this one stopped"))
        return 1


def _run(options: argparse.Namespace, console: Console) -> int:
    there = extraction.packages(options.python)
    kinds = options.only or [kind for kind, package in extraction.PACKAGES.items() if there[package]]
    for kind, package in extraction.PACKAGES.items():
        if kind not in kinds and options.only is None:
            console.print(f"{options.python} has no {package}, so there will be no {extraction.FOLDERS[kind]}/")
    if not kinds:
        raise extraction.ExtractionError(f"{options.python} has neither package; `make descriptors-env` installs both")
    if "audio" in kinds:
        console.print(extraction.OPENSMILE_LICENCE)
    jobs = extraction.find_jobs(options.source, options.target, kinds)
    columns = (TextColumn("descriptors"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("descriptors", total=len(jobs))
        report = extraction.extract(
            jobs,
            options.target,
            python=options.python,
            workers=options.workers,
            seconds=options.deadline,
            memory=int(options.memory * (1 << 30)),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    parts = [f"{report.written:,} written", f"{report.present:,} there already", f"{report.nothing:,} videos without sound"]
    console.print(f"{options.target}: {', '.join(parts)}, {len(report.failures):,} not described")
    for fault, count in report.faults.most_common():
        console.print(f"  {fault}: {count:,}, in {options.target / extraction.FAILURES}")
    return 2 if report.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m omnisapiens_jax.processing.descriptors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of media, searched with its subfolders")
    parser.add_argument("target", type=Path, metavar="DST", help="folder of descriptors, made if it is not there")
    parser.add_argument("--only", choices=list(extraction.FOLDERS), action="append", help="landmarks (video) or functionals (audio) alone")
    parser.add_argument("--workers", type=int, help="processes at once (default: one a core)")
    parser.add_argument("--deadline", type=float, default=extraction.SECONDS, metavar="S", help="seconds for a file (default: %(default)g)")
    parser.add_argument(
        "--memory", type=float, default=extraction.MEMORY / (1 << 30), metavar="GiB", help="of data in each process (default: %(default)g)"
    )
    parser.add_argument(
        "--python",
        type=Path,
        default=Path(os.environ.get(VARIABLE, ".venv-descriptors/bin/python")),
        help=f"interpreter of the descriptors' environment (default: ${VARIABLE}, here %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
