"""Prepares an atlas once, as a TFDS dataset of ArrayRecord files that any number of runs then read at random.

python -m omnisapiens_jax.atlas.prepare SRC DST [--dataset NAME | --exclude NAME,NAME] [--workers N | --beam "OPTIONS"]

The work is a list of jobs, one for each file, and a job is a function of the source alone. So it does not matter who does which in what
order, processes of this machine or the workers of any Beam runner, and what was finished before a kill is not done again. TFDS' own
writers, with or without Beam, throw away what an interrupted run has made, and Beam's holds whole files in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omnisapiens_jax.atlas import records
from omnisapiens_jax.atlas.faults import BadSamples, FaultLog
from omnisapiens_jax.atlas.labels import HBA
from omnisapiens_jax.atlas.parquet import ParquetSource
from omnisapiens_jax.atlas.records import Receipt, Shard
from omnisapiens_jax.atlas.shards import Job, drafted, forget_sources, make_shard, make_shard_elsewhere, sha256
from omnisapiens_jax.atlas.sources import open_splits
from omnisapiens_jax.atlas.workers import DEADLINE, MEMORY, WorkerPool

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports] - an extra

SHARD_ROWS = 256  # a file of the released parquet has as many
_FORMAT = 1  # of what is written: raise it when the same source gives other bytes

Progress = Callable[[int, int], None]  # rows done, rows in all


@dataclasses.dataclass(frozen=True)
class Config:
    """Which datasets a prepared atlas holds, and the name of its folder: `all`, a dataset, or `without_` those left out."""

    name: str
    datasets: tuple[str, ...]

    @classmethod
    def of(cls, dataset: str | None = None, exclude: Sequence[str] = ()) -> Config:
        """One dataset alone, or all but some (for transfer studies).

        Raises:
            ValueError: an unknown dataset, or both a dataset and exclusions.
        """
        known = [known.name for known in HBA.datasets]
        if strange := sorted({*exclude, *([dataset] if dataset else [])} - {*known}):
            raise ValueError(f"unknown dataset {', '.join(strange)}; the atlas has {', '.join(known)}")
        if dataset and exclude:
            raise ValueError("name one dataset, or those to exclude, not both")
        if dataset:
            return cls(dataset, (dataset,))
        left_out = [name for name in known if name in exclude]
        return cls("_".join(["without", *left_out]) if left_out else "all", tuple(name for name in known if name not in exclude))

    def folder(self, target: str | Path) -> Path:
        """Where its files lie below `target`, as TFDS expects it."""
        return Path(target) / records.NAME / self.name / records.VERSION


def prepare(
    source: str | Path,
    target: str | Path,
    config: Config | None = None,
    *,
    descriptors: str | Path | None = None,
    workers: int | None = None,
    beam: Sequence[str] | PipelineOptions | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    shard_rows: int = SHARD_ROWS,
    deadline: float = DEADLINE,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Path:
    """Writes the splits of an atlas below `target` and returns their folder; `open_source(folder / "train")` and TFDS read it.

    Rows keep the order of the source. The folder appears when it is whole; a call that was killed goes on where it was, and makes again
    the files of which media or descriptors have changed since. On a folder that is whole already, every checksum is verified and a file
    that is damaged or missing is made again. The same source and arguments give the same bytes, whoever does the work.

    Args:
        source: a folder with train, validation and test in any form that `open_splits` knows.
        target: the data directory; every machine that does a part of the work must see it, and the source, under the same path.
        config: which datasets (all).
        descriptors: what `omnisapiens_jax.processing.descriptors` made of the release's media, `pose/NAME.npz` and `opensmile/NAME.npz`.
            They take the place of the release's, whose sounds have no low-level descriptors. Not for parquet, which names no media.
        workers: processes of this machine that read rows (one a core); 0 reads them in this one, which a broken file may end.
        beam: options of a Beam pipeline that does the work instead, as `PipelineOptions` or such as `["--runner=FlinkRunner", ...]`. Needs
            the extra `beam`.
        on_error: `raise` finishes what can be and then fails with all unusable rows, and the next call tries their files again; `skip`
            leaves these rows out, and broken descriptors out of rows. A row that took too long or too much memory before a kill is tried
            again by both.
        shard_rows: rows a file.
        deadline: seconds of processor time that a process may take for a row, see `open_decoder`.
        memory: bytes that it may allocate for one.
        progress: called with (rows done, rows in all).

    Raises:
        BadSamples: there are unusable rows, with `on_error="raise"`.
        FileNotFoundError: the source is no atlas.
        ValueError: the folder, or one half made, is of another source or other arguments.
    """
    forget_sources()
    config = config or Config.of()
    folder = config.folder(target)
    plan, rows = _plan(Path(source), config, shard_rows, descriptors)
    whole = folder.is_dir()
    half, receipts = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.receipts")
    if whole:
        _same_plan(Receipt.load(folder).plan, plan, folder)
    else:
        half.mkdir(parents=True, exist_ok=True)
        receipts.mkdir(exist_ok=True)
        _note_plan(receipts / "plan.json", plan, half)
    jobs = _jobs(Path(source), plan, rows, folder if whole else half, receipts, descriptors)
    if whole:
        return _mended(folder, jobs, lambda damaged: _run_here(damaged, workers, deadline, memory), progress)
    unfinished = [job for job in jobs if (shard := job.finished()) is None or job.stale() or _to_be_tried_again(shard, on_error)]
    for job in unfinished:
        job.receipt.unlink(missing_ok=True)
    with _watched(jobs, progress):
        if beam is None:
            _run_here(unfinished, workers, deadline, memory)
        else:
            _run_beam(unfinished, beam, deadline, memory)
    receipt = _collected(plan, jobs)
    faults = FaultLog(fault for shards in receipt.splits.values() for shard in shards for fault in shard.faults)
    if faults and on_error == "raise":
        raise BadSamples(f"{faults.report()}\nMend these rows and run this again, or leave them out: on_error='skip' (--on-error=skip)")
    _publish(receipt, half, folder)
    shutil.rmtree(receipts)
    return folder


def _to_be_tried_again(shard: Shard, on_error: str) -> bool:
    """Whether a finished file lacks rows that it should have, or may get: time and memory can have been short for a while only."""
    return any(on_error == "raise" or fault.kind in ("timeout", "memory") for fault in shard.faults)


def damaged(folder: str | Path, progress: Progress | None = None) -> list[str]:
    """The files of a prepared atlas that are missing or have another checksum than its receipt says."""
    folder = Path(folder)
    shards = [shard for shards in Receipt.load(folder).splits.values() for shard in shards]

    def right(shard: Shard) -> bool:
        path = folder / shard.file
        return path.is_file() and path.stat().st_size == shard.size and sha256(path) == shard.sha256

    wrong, done, total = [], 0, sum(len(shard.datasets) for shard in shards)
    with ThreadPoolExecutor(2) as pool:
        for shard, fine in zip(shards, pool.map(right, shards), strict=True):
            done += len(shard.datasets)
            if progress:
                progress(done, total)
            if not fine:
                wrong.append(shard.file)
    return wrong


def summary(folder: str | Path) -> str:
    """What a prepared atlas holds, a line for each split."""
    lines = []
    for split, shards in Receipt.load(Path(folder)).splits.items():
        counts = Counter(name for shard in shards for name in shard.datasets)
        video, audio = (sum(shard.descriptors[i] for shard in shards) for i in (0, 1))
        faults = FaultLog(fault for shard in shards for fault in shard.faults)
        lines.append(
            f"{split}: {counts.total():,} rows of {len(counts)} datasets in {len(shards)} files of {sum(s.size for s in shards):,} bytes; "
            f"descriptors: {video:,} video, {audio:,} audio; {len(faults)} rows at fault"
        )
    return "\n".join(lines)


def _plan(source: Path, config: Config, shard_rows: int, descriptors: str | Path | None) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """What decides every byte, as plain data, and the rows of each split that take part. Rows of no known dataset do: they are told of."""
    if shard_rows < 1:
        raise ValueError(f"{shard_rows} rows a file")
    splits = open_splits(source)
    left_out = {dataset.name for dataset in HBA.datasets} - {*config.datasets}
    rows = {split: [i for i, name in enumerate(opened.datasets()) if name not in left_out] for split, opened in splits.items()}
    rows = {split: kept for split, kept in rows.items() if kept}
    if not rows:
        raise ValueError(f"{source} has no row of {', '.join(config.datasets)}")
    fingerprints = {split: splits[split].fingerprint() for split in rows}
    plan = {"format": _FORMAT, "config": dataclasses.asdict(config), "shard_rows": shard_rows, "splits": fingerprints}
    if descriptors is not None:
        if any(isinstance(splits[split], ParquetSource) for split in rows):
            raise ValueError(f"{source} is parquet, which does not name its media: descriptors of their own need the release with tars")
        plan["descriptors"] = _listing(Path(descriptors))
    return plan, rows


def _listing(descriptors: Path) -> str:
    """SHA-256 over the names and sizes of the descriptors in a folder."""
    files = sorted(path for kind in ("pose", "opensmile") for path in (descriptors / kind).rglob("*.npz"))
    if not files:
        raise FileNotFoundError(f"no descriptors in {descriptors}: expected pose/NAME.npz and opensmile/NAME.npz")
    return hashlib.sha256("".join(f"{path.relative_to(descriptors)} {path.stat().st_size}\n" for path in files).encode()).hexdigest()


def _note_plan(path: Path, plan: Mapping[str, Any], half: Path) -> None:
    if path.exists():
        _same_plan(json.loads(path.read_text()), plan, half)
        return
    with drafted(path) as draft:
        draft.write_text(json.dumps(plan))


def _same_plan(found: Mapping[str, Any], plan: Mapping[str, Any], folder: Path) -> None:
    plan = json.loads(json.dumps(plan))
    if found != plan:
        changed = ", ".join(sorted(key for key in {**plan, **found} if found.get(key) != plan.get(key)))
        raise ValueError(f"{folder} is of another source or other arguments (different: {changed}): remove it, or choose another target")


def _jobs(
    source: Path, plan: Mapping[str, Any], rows: Mapping[str, list[int]], folder: Path, receipts: Path, descriptors: str | Path | None
) -> list[Job]:
    jobs, described = [], None if descriptors is None else str(descriptors)
    for split, kept in rows.items():
        cuts = [tuple(kept[i : i + plan["shard_rows"]]) for i in range(0, len(kept), plan["shard_rows"])]
        jobs += [
            Job(str(source / split), plan["splits"][split], split, number, len(cuts), cut, str(folder), str(receipts), described)
            for number, cut in enumerate(cuts)
        ]
    return jobs


def _mended(folder: Path, jobs: Sequence[Job], make: Callable[[Sequence[Job]], None], progress: Progress | None) -> Path:
    """Verifies a whole atlas and makes again what is damaged."""
    for left in folder.glob(".*.draft"):  # by a call that was killed
        left.unlink()
    receipt = Receipt.load(folder)
    try:
        for split in receipt.splits:
            records.open_records(folder, split)
    except ValueError:
        _write_metadata(receipt, folder)
    wrong = {*damaged(folder, progress)}
    if wrong:
        Path(jobs[0].receipts).mkdir(exist_ok=True)
        make([job for job in jobs if job.file in wrong])
        if wrong := damaged(folder):
            raise ValueError(f"{folder}: {', '.join(wrong)} made again is not what it was: media files or libraries changed; start afresh")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(jobs[0].receipts)
    return folder


def _run_here(jobs: Sequence[Job], workers: int | None, deadline: float, memory: int) -> None:
    if workers == 0:
        for job in jobs:
            make_shard(job)
    elif jobs:
        count = min(len(jobs), workers or os.cpu_count() or 1)
        # A thread writes a file; its rows are read in a process. What interrupts this closes the pool first, and the threads end.
        with ThreadPoolExecutor(count) as threads, contextlib.closing(WorkerPool(count, deadline=deadline, memory=memory)) as pool:
            for _ in threads.map(lambda job: make_shard(job, pool), jobs):
                pass


def _run_beam(jobs: Sequence[Job], options: Sequence[str] | PipelineOptions, deadline: float, memory: int) -> None:
    try:
        import apache_beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
    except ImportError as reason:
        raise ImportError(f"Beam is in the extra `beam`: pip install 'omnisapiens-jax[beam]' ({reason})") from reason
    if jobs:
        options = options if isinstance(options, PipelineOptions) else PipelineOptions(list(options))
        with apache_beam.Pipeline(options=options) as pipeline:
            # Reshuffle, or a runner fuses the steps and one worker does it all.
            make = apache_beam.Map(make_shard_elsewhere, deadline, memory)
            _ = pipeline | apache_beam.Create(list(jobs)) | apache_beam.Reshuffle() | make


@contextlib.contextmanager
def _watched(jobs: Sequence[Job], progress: Progress | None) -> Iterator[None]:
    """Reports the rows of finished files every second: whoever makes them, the receipts appear here."""
    if progress is None:
        yield
        return
    total, over = sum(len(job.rows) for job in jobs), threading.Event()

    def report() -> None:
        progress(sum(len(job.rows) for job in jobs if job.receipt.exists()), total)

    def watch() -> None:
        while not over.wait(1):
            report()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    report()


def _collected(plan: Mapping[str, Any], jobs: Sequence[Job]) -> Receipt:
    splits: dict[str, tuple[Shard, ...]] = {}
    for job in jobs:
        if (shard := job.finished()) is None:
            raise RuntimeError(f"{job.file} was not made, though its job ended")
        splits[job.split] = (*splits.get(job.split, ()), shard)
    return Receipt(plan, splits)


def _publish(receipt: Receipt, half: Path, folder: Path) -> None:
    """Adds what TFDS and we read, clears away the drafts of killed workers, and puts the folder in its place."""
    _write_metadata(receipt, half)
    (half / records.RECEIPT).write_text(receipt.text())
    wanted = {shard.file for shards in receipt.splits.values() for shard in shards} | {
        "dataset_info.json",
        "features.json",
        records.RECEIPT,
    }
    for path in half.iterdir():
        if path.name not in wanted:
            path.unlink()
    half.rename(folder)


def _write_metadata(receipt: Receipt, folder: Path) -> None:
    """What TFDS reads beside the files."""
    tfds = records.tfds()
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=records.features(),
        split_infos=[
            tfds.core.SplitInfo(split, [len(shard.datasets) for shard in shards], sum(shard.size for shard in shards))
            for split, shards in receipt.splits.items()
        ],
        version=records.VERSION,
        description=records.DESCRIPTION,
        homepage=records.HOMEPAGE,
        check_data=False,  # would need tensorflow
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m omnisapiens_jax.atlas.prepare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the release (parquet, JSONL, or JSONL and tars), or a prepared one to verify")
    parser.add_argument("target", type=Path, nargs="?", help=f"data directory; the atlas comes into {records.NAME}/CONFIG/ there")
    parser.add_argument("--dataset", help="prepare this one alone")
    parser.add_argument("--exclude", default="", help="leave these out, a comma between them")
    parser.add_argument(
        "--descriptors", type=Path, help="what omnisapiens_jax.processing.descriptors made of the media; instead of the release's"
    )
    parser.add_argument("--workers", type=int, help="processes (one a core; 0: this one)")
    parser.add_argument("--beam", help='let Beam do it, with these options: --beam="--runner=FlinkRunner --flink_master=HOST:PORT"')
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="what rows that cannot be used do")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds of processor time for a row (%(default)g)")
    parser.add_argument("--shard-rows", type=int, default=SHARD_ROWS, help="rows a file (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.target is None:
            folder = arguments.source
            if wrong := damaged(folder, _tell):
                raise ValueError(f"{folder}: damaged or missing: {', '.join(wrong)}; prepare again to mend it")
            open_splits(folder)  # what TFDS needs beside the files
        else:
            folder = prepare(
                arguments.source,
                arguments.target,
                Config.of(arguments.dataset, [name.strip() for name in arguments.exclude.split(",") if name.strip()]),
                descriptors=arguments.descriptors,
                workers=arguments.workers,
                beam=None if arguments.beam is None else shlex.split(arguments.beam),
                on_error=arguments.on_error,
                shard_rows=arguments.shard_rows,
                deadline=arguments.deadline,
                progress=_tell,
            )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on where this one stopped")
    print(f"{folder}\n{summary(folder)}")


def _tell(done: int, total: int) -> None:
    print(f"\r{done:,} of {total:,} rows", end="" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    from omnisapiens_jax.atlas import prepare as importable  # what is sent to workers must not be of `__main__`

    importable.main()
