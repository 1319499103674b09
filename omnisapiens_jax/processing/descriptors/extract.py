"""Extracts descriptors from raw media through child processes, in the environment of the packages that describe (`child.py`).

The descriptor of `clips/a.mp4` goes to `pose/clips/a.mp4.npz` and that of its sound to `opensmile/clips/a.mp4.npz`, the release's layout.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VIDEO_SUFFIXES = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm".split())
AUDIO_SUFFIXES = frozenset(".aac .flac .m4a .mp3 .oga .ogg .opus .wav".split())
FOLDERS = {"video": "pose", "audio": "opensmile"}
PACKAGES = {"video": "mediapipe", "audio": "opensmile"}
SECONDS = 3600.0  # for one file: half an hour of video at 30 frames a second takes most of it
MEMORY = 4 << 30  # bytes of data of one child; MediaPipe needs 0.6 GiB of it whatever the clip

FAILURES = "failed.jsonl"
_CHILD = Path(__file__).with_name("child.py")
_LOCK, _DRAFTS = ".lock", ".drafts-"
_LONGEST_COMPLAINT, _LAST_LINES = 500, 3  # characters and lines of what a child said last

OPENSMILE_LICENCE = (
    "openSMILE is not free software: audEERING's research licence allows non-commercial use, and research under its terms; "
    "read it in the package before you use its descriptors."
)

Progress = Callable[[int, int], None]  # of how many files how many are done


class ExtractionError(RuntimeError):
    """Nothing can be extracted, and what to do about it; a single bad file is no such thing."""


@dataclass(frozen=True)
class Job:
    """One descriptor to extract: `kind` is `video` (landmarks) or `audio` (functionals of a sound, or of a video's sound track)."""

    kind: str
    source: Path
    target: Path


@dataclass(frozen=True)
class Failure:
    """A file that has no descriptor: `fault` is `media` (it cannot be used), `crash` or `deadline` (what was done with it)."""

    job: Job
    fault: str
    why: str


@dataclass
class Report:
    """What became of the files: descriptors written now and before, videos without sound, and failures."""

    written: int = 0
    present: int = 0
    nothing: int = 0
    failures: list[Failure] = field(default_factory=list)

    @property
    def faults(self) -> Counter[str]:
        """Failures by fault and kind, such as `media, video`."""
        return Counter(f"{failure.fault}, {failure.job.kind}" for failure in self.failures)


def find_jobs(source: Path, target: Path, kinds: Iterable[str] = tuple(FOLDERS)) -> list[Job]:
    """The descriptors of all media files under a folder, told by their suffixes, in the order of their names.

    Raises:
      ExtractionError: there is no such folder, or no media in it.
    """
    if not source.is_dir():
        raise ExtractionError(f"{source} is not a folder; name the one that holds the media")
    jobs = []
    for file in sorted(file for file in source.rglob("*") if file.is_file()):
        suffix = file.suffix.lower()
        for kind in kinds:
            if suffix in VIDEO_SUFFIXES or (suffix in AUDIO_SUFFIXES and kind == "audio"):
                jobs.append(Job(kind, file, target / FOLDERS[kind] / f"{file.relative_to(source)}.npz"))
    if not jobs:
        raise ExtractionError(f"{source} holds no media: no file ends in {' '.join(sorted(VIDEO_SUFFIXES | AUDIO_SUFFIXES))}")
    return jobs


def packages(python: Path) -> dict[str, str | None]:
    """Versions of `mediapipe` and `opensmile` in an environment; None where one is missing.

    Raises:
      ExtractionError: there is no such interpreter, or it cannot run the child.
    """
    with _Child(python, MEMORY) as child:
        return child.packages


def extract(
    jobs: Sequence[Job],
    target: Path,
    *,
    python: Path,
    workers: int | None = None,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Report:
    """Extracts what is not there yet. Each file appears whole or not at all, so a killed run goes on where it stopped.

    A file that cannot be used, or ends its child, or takes too long, is counted; those of this run are listed in `target/failed.jsonl`. It
    is tried again by the next run.

    Args:
      jobs: what to extract, from `find_jobs`.
      target: the folder of all targets; drafts are made there.
      python: interpreter of the descriptors' environment.
      workers: processes at once; one a core when None. Each holds one file at a time.
      seconds: that one file may take.
      memory: bytes of data that one process may have.
      progress: told after every file.

    Raises:
      ExtractionError: no interpreter, a package that is missing there, or another run at work in `target`.
    """
    report = Report()
    missing = [job for job in jobs if not job.target.exists()]
    report.present = len(jobs) - len(missing)
    if progress is not None:
        progress(report.present, len(jobs))
    with _only_run(target) as drafts, (target / FAILURES).open("w") as failures:
        if not missing:
            return report
        needed = sorted({PACKAGES[job.kind] for job in missing})
        settling, stopped = threading.Lock(), threading.Event()

        def settle(job: Job, answer: dict[str, Any], draft: Path) -> None:
            with settling:
                if stopped.is_set():
                    return
                if "frames" in answer:
                    job.target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(draft, job.target)
                    report.written += 1
                elif "nothing" in answer:
                    report.nothing += 1
                else:
                    failure = Failure(job, answer.get("fault", "media"), answer["error"])
                    report.failures.append(failure)
                    line = {"source": str(job.source), "kind": job.kind, "fault": failure.fault, "why": failure.why}
                    print(json.dumps(line), file=failures, flush=True)
                if progress is not None:
                    progress(report.present + report.written + report.nothing + len(report.failures), len(jobs))

        left: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in missing:
            left.put(job)

        def work(number: int) -> None:
            draft = drafts / f"{number}.npz"
            with _Child(python, memory) as child, contextlib.suppress(queue.Empty):
                children.append(child)
                if lacking := [package for package in needed if child.packages[package] is None]:
                    raise ExtractionError(f"{python} has no {' and no '.join(lacking)}; `make descriptors-env` installs both")
                while not stopped.is_set():
                    job = left.get_nowait()
                    settle(job, child.describe(job, draft, seconds), draft)

        children: list[_Child] = []
        count = min(workers or os.cpu_count() or 1, len(missing))
        with ThreadPoolExecutor(count) as pool:
            try:
                done, _ = wait([pool.submit(work, number) for number in range(count)], return_when=FIRST_EXCEPTION)
            finally:  # an interrupt, or a worker that cannot go on: the others wait for their children
                stopped.set()
                for child in children:
                    child.kill()
        for future in done:  # not those that only failed because they were stopped
            future.result()
    return report


@contextlib.contextmanager
def _only_run(target: Path) -> Iterator[Path]:
    """A folder for drafts on the targets' file system, and the right to be alone there."""
    target.mkdir(parents=True, exist_ok=True)
    with (target / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as reason:
            raise ExtractionError(f"another run is writing to {target}; wait for it, or choose another folder") from reason
        for left in target.glob(f"{_DRAFTS}*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        drafts = Path(tempfile.mkdtemp(prefix=_DRAFTS, dir=target))  # a new name: a child of that run may still be at work
        try:
            yield drafts
        finally:
            shutil.rmtree(drafts, ignore_errors=True)


class _Child:
    """A child process, started again when a file ended it."""

    def __init__(self, python: Path, memory: int):
        self._python, self._memory = python, memory
        self._complaints = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._living = threading.Lock()  # so that none is started after it was ended for good
        self._killed = False
        self.packages = self._start()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._complaints.close()

    def describe(self, job: Job, draft: Path, seconds: float) -> dict[str, Any]:
        """The child's answer to a job, or one that says how the job ended the child."""
        if self._process.poll() is not None:
            self._start()
        self._complaints.seek(0)  # the child writes at the same place
        self._complaints.truncate()
        asked = {"kind": job.kind, "source": str(job.source), "target": str(draft), "seconds": seconds}
        answer = self._answer(asked) or self._obituary(seconds)
        if "stop" in answer:
            raise ExtractionError(f"{job.target} cannot be written ({answer['stop']})")
        return answer

    def kill(self) -> None:
        """Ends it for good."""
        with self._living:
            self._killed = True
            self._process.kill()
            self._process.wait()

    def _start(self) -> dict[str, str | None]:
        # PYTHONPATH would mix the environments. A file of media that names others is not followed out of the machine.
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        added = {"GLOG_minloglevel": "2", "TF_CPP_MIN_LOG_LEVEL": "2", "OPENCV_FFMPEG_CAPTURE_OPTIONS": "protocol_whitelist;file"}
        try:
            with self._living:
                if self._killed:
                    raise ExtractionError("the extraction was stopped")
                self._process = subprocess.Popen(
                    [self._python, _CHILD, str(self._memory)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._complaints,
                    text=True,
                    bufsize=1,
                    env=kept | added,
                    start_new_session=True,  # an interrupt of ours is not one of theirs
                )
        except OSError as reason:
            why = f"{self._python} cannot be run ({reason.strerror}); `make descriptors-env` builds the environment"
            raise ExtractionError(why) from reason
        answer = self._answer(None)
        if answer is None:
            raise ExtractionError(f"{self._python} cannot run {_CHILD.name}: {self._last_words()}")
        return answer

    def _answer(self, asked: dict[str, Any] | None) -> dict[str, Any] | None:
        """What it says to a question; None when it is dead."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            if asked is not None:
                self._process.stdin.write(json.dumps(asked) + "\n")
            if (line := self._process.stdout.readline()).endswith("\n"):
                return json.loads(line)
        return None

    def _obituary(self, seconds: float) -> dict[str, Any]:
        status = self._process.wait()
        if status == -signal.SIGALRM:
            return {"fault": "deadline", "error": f"it took more than {seconds:g} s"}
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return {"fault": "crash", "error": f"the process that described it {how}: {self._last_words()}"}

    def _last_words(self) -> str:
        self._complaints.seek(0, os.SEEK_END)
        self._complaints.seek(max(self._complaints.tell() - _LONGEST_COMPLAINT, 0))
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return " ".join(lines[-_LAST_LINES:]) or "it said nothing"
