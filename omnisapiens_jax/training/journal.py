"""What a run says while it goes on: metrics to JSONL and TensorBoard, a progress bar with the time left, and a count of compilations."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
import tensorboardX
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from omnisapiens_jax.resources import give_back_memory

Item = TypeVar("Item")

console = Console()


class Journal:
    """Metrics of one stage, one line a step. Keys under `time/` are wall-clock facts; all others are the same in every rerun.

    Of several processes only the first writes.
    """

    def __init__(self, directory: Path, *, start: int):
        """Opens `directory/metrics.jsonl`; lines of steps from `start` on (written by a run that was killed) are taken back."""
        self._last = time.perf_counter()
        self._compilations = 0  # when memory was last given back
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        kept = [row for row in read_metrics(self._path) if row["step"] < start]
        draft = self._path.with_suffix(".part")
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept))
        draft.replace(self._path)
        self._file = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(str(directory / "tensorboard"), purge_step=start, flush_secs=30)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writes:
            self._file.close()
            self._board.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Writes one line; device scalars are fetched here, in one transfer. Gives back what a program took to be compiled."""
        now = time.perf_counter()
        values = {name: np.asarray(value).item() for name, value in jax.device_get(dict(metrics)).items()}
        values |= {"time/seconds": now - self._last, "time/compilations": Compilations.count}
        self._last = now
        if Compilations.count != self._compilations:  # compiling and a first run leave holes that no later temporary fits into
            self._compilations = Compilations.count
            give_back_memory()
        if self._writes:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        return values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Compilations:
    """Counts the programs XLA has compiled (or fetched from its cache) in this process."""

    count = 0

    @classmethod
    def watch(cls) -> None:
        """Starts counting, once."""
        if not cls._watching:
            jax.monitoring.register_event_duration_secs_listener(cls._on_event)
            cls._watching = True

    _watching = False

    @classmethod
    def _on_event(cls, event: str, duration_secs: float, **facts: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            cls.count += 1


class Bar:
    """A progress bar whose right end shows the numbers of the moment."""

    def __init__(self, title: str, *, total: int, start: int = 0, at_once: bool = True):
        """`total` steps, of which `start` are done. Unless `at_once`, nothing is shown before a step is reached."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[facts]}"), console=console)
        self._at_once = at_once
        self._task = self._progress.add_task(title, total=total, completed=start, facts="")

    def __enter__(self) -> Bar:
        if self._at_once:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress.live.is_started:  # stopping what was never shown would print an empty line
            self._progress.stop()

    def advance(self, **facts: float) -> None:
        """One step further; `facts` are shown with three digits."""
        shown = "  ".join(f"{name} {value:.3g}" for name, value in facts.items())
        self._progress.update(self._task, advance=1, facts=shown)

    def reach(self, done: int) -> None:
        """`done` steps are done."""
        self._progress.start()
        self._progress.update(self._task, completed=done)


def progress(items: Iterable[Item], title: str, *, total: int) -> Iterator[Item]:
    """Yields `items` behind a progress bar."""
    with Bar(title, total=total) as bar:
        for item in items:
            yield item
            bar.advance()
