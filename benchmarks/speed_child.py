"""What both sides of `speed.py` share: the cases, the tokens they are run on, and the loop that answers commands over a pipe.

Imported in the core environment and in the oracle's, so it needs numpy alone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

VOCAB = 16_384
FIRST_WORD = 10  # below lie the tokens that carry structure
LORA_RANK, LORA_ALPHA = 16, 32.0
HEADS_RANK, HEADS_ALPHA = 32, 64.0  # LoRA's below classification heads
LABELS = (7, 8, 2, 2, 2, 2, 2)  # of each head
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.01, 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that is timed: `task` on `batch` rows of `length` tokens, with `new` tokens decoded behind each."""

    task: str  # prefill, train, heads or decode
    batch: int
    length: int
    new: int = 0

    @property
    def tokens(self) -> int:
        """What a rate counts: tokens read, or tokens written where decoding is timed."""
        return self.batch * (self.new or self.length)

    @property
    def title(self) -> str:
        """As tables show it."""
        return f"{self.task} {self.batch} x {self.length}" + (f" + {self.new}" if self.new else "")

    def ids(self) -> np.ndarray:
        """The rows `[batch, length]`, the same on both sides."""
        return np.random.RandomState(self.length + self.batch).randint(FIRST_WORD, VOCAB, (self.batch, self.length)).astype(np.int32)

    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Domain of each row and its class among those of all heads, `[batch]` each."""
        domains = np.arange(self.batch, dtype=np.int32) % len(LABELS)
        return domains, (np.cumsum((0, *LABELS))[domains] + 1).astype(np.int32)


Prepare = Callable[[Case], Callable[[], np.ndarray]]


def serve(prepare: Prepare) -> None:
    """Answers commands from stdin, one JSON object a line, until it closes.

    `{"case": {...}, "answer": FILE}` drops the case before, prepares this one and saves the result of a first run. `{}` runs it once more
    and answers wall seconds, CPU seconds of all threads, and the greatest resident memory in bytes since the case was prepared.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes elsewhere
    run = None
    for line in sys.stdin:
        command = json.loads(line)
        if "case" in command:
            run = None
            gc.collect()
            run = prepare(Case(**command["case"]))
            np.save(command["answer"], run())
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # loading and compiling are not what a peak is about
            Path("/proc/self/clear_refs").write_text("5")
            answers.write(json.dumps({"ready": True}) + "\n")
            continue
        assert run is not None
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        answers.write(json.dumps(seconds | {"peak": int(status["VmHWM"].split()[0]) * 1024}) + "\n")


def factors(folder: Path, rank: int) -> dict[str, np.ndarray]:
    """LoRA's A factors `[layers, in, rank]` by projection; B begins at zero."""
    with np.load(folder / "lora.npz") as file:
        return {name: array[..., :rank] for name, array in file.items()}


def heads(folder: Path) -> np.ndarray:
    """The weights `[labels, D]` of all heads, one after the other; biases begin at zero."""
    return np.load(folder / "heads.npy")
