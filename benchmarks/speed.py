"""The thinker against transformers on torch, side by side: `make bench`, or `python benchmarks/speed.py [--pairs 7] [--growth-pairs 3]
[--tasks heads]`.

Same random weights (float32, 98M parameters: 12 layers, hidden 768, 12/2 heads, ffn 2048, vocabulary 16,384), same tokens, two threads
each. Each side is one long-lived process a task; runs alternate A B A B, so that whatever else the machine does falls on both. A ratio
is of one pair of neighbouring runs (theirs / ours: above 1 we are faster); the median is given with the smallest and the greatest.
Both sides get huge pages for malloc (GLIBC_TUNABLES), which spares each of them page faults, and sleeping OpenMP threads. The answers
are compared before anything is timed: a side that computes something else has no speed.

`heads` is a step of the classifier of stage 1: LoRA under a head for each domain, on the pooled states before the last layer, and no LM
logits on either side. transformers runs the last layer, as every trainer on top of it does; ours leaves it out.

A Markdown table goes to stdout, the cases with a floor and then others that show how the cost grows. The peak is the resident memory of
the process while it runs the case, weights included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from speed_child import HEADS_RANK, LABELS, VOCAB, Case

from omnisapiens_jax.convert.huggingface import save_thinker
from omnisapiens_jax.convert.names import abstract_params
from omnisapiens_jax.models.config import AudioConfig, TextConfig, ThinkerConfig, TokenIds, VisionConfig

HERE = Path(__file__).resolve().parent
TASKS = ("prefill", "train", "heads", "decode")
FLOORS = {  # and the ratio that each must keep
    Case("prefill", 1, 512): 0.9,
    Case("train", 2, 256): 1.0,
    Case("heads", 2, 256): 1.2,
    Case("decode", 1, 256, 128): 1.3,
    Case("decode", 8, 256, 128): 1.0,
}
LEAN = ("heads",)  # tasks whose peak may not exceed theirs
GROWTH = (  # how the cost grows with length and batch
    *(Case("prefill", batch, length) for batch, length in ((1, 128), (1, 2048), (4, 512))),
    *(Case("train", batch, length) for batch, length in ((2, 128), (2, 512), (4, 256))),
    *(Case("heads", batch, length) for batch, length in ((2, 512), (8, 256))),
    *(Case("decode", batch, length, 32) for batch, length in ((1, 256), (1, 1024), (4, 256), (16, 256))),
)
# glibc's settings of the Makefile, for both sides: temporaries in huge pages, from a heap that is kept.
MALLOC = {"hugetlb": 1, "arena_max": 1, "mmap_max": 0, "trim_threshold": 2**34, "top_pad": 2**26}
CONFIG = ThinkerConfig(
    text=TextConfig(
        vocab_size=VOCAB,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=2048,
        mrope_section=(8, 12, 12),
    ),
    # The encoders are not run: as small as they can be.
    audio=AudioConfig(d_model=8, num_layers=1, num_heads=1, ffn_dim=8, output_dim=768),
    vision=VisionConfig(depth=1, hidden_size=16, num_heads=1, intermediate_size=8, out_hidden_size=768, fullatt_block_indexes=(0,)),
    tokens=TokenIds(pad=0, im_start=1, im_end=2, audio=3, audio_bos=4, audio_eos=5, vision_bos=6, vision_eos=7, image=8, video=9),
)


@dataclasses.dataclass
class Side:
    """One process and the pipe to it."""

    process: subprocess.Popen[str]
    folder: Path

    def ask(self, **command: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer.

        Raises RuntimeError when the process ended instead.
        """
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}; what it said stands above")
        return json.loads(line)

    def prepare(self, case: Case) -> np.ndarray:
        """Builds and runs a case once; gives its answer."""
        answer = self.folder / f"{self.process.pid}.npy"
        self.ask(case=dataclasses.asdict(case), answer=str(answer))
        return np.load(answer)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Pairs of runs of one case."""

    ours: list[dict[str, float]]
    theirs: list[dict[str, float]]

    def ratios(self, what: str) -> list[float]:
        """theirs / ours of every pair, ascending."""
        return sorted(b[what] / a[what] for a, b in zip(self.ours, self.theirs, strict=True))

    def median(self, side: list[dict[str, float]], what: str) -> float:
        """Median of one side."""
        return statistics.median(run[what] for run in side)

    def peak(self, side: list[dict[str, float]]) -> float:
        """The greatest resident memory of one side, in bytes."""
        return max(run["peak"] for run in side)


def main() -> int:
    """Runs the race; status 1 when a ratio is below what it must be, or a peak above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="runs of each side, each case of the bars (default: 7)")
    parser.add_argument(
        "--growth-pairs", type=int, default=3, help="the same of the cases that show growth; 0 leaves them out (default: 3)"
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, help="which of them (default: all)")
    options = parser.parse_args()
    oracle = os.environ.get("OMNISAPIENS_ORACLE_PYTHON") or str(HERE.parent / ".venv-oracle" / "bin" / "python")
    if not Path(oracle).exists():
        parser.error(f"no interpreter with torch and transformers at {oracle}: `make venvs` builds one")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="speed-") as scratch:
        folder = Path(scratch) / "model"
        write_weights(folder)
        print(HEADER, flush=True)
        for task in options.tasks:
            wanted = {case: options.pairs for case in FLOORS if case.task == task}
            wanted |= {case: options.growth_pairs for case in GROWTH if case.task == task and options.growth_pairs}
            for case, timing in race(oracle, folder, wanted):
                floor = FLOORS.get(case)
                failed += floor is not None and statistics.median(timing.ratios("wall")) < floor
                failed += floor is not None and case.task in LEAN and timing.peak(timing.ours) > timing.peak(timing.theirs)
                print(row(case, timing, "" if floor is None else f"{floor:.1f}"), flush=True)
    return 1 if failed else 0


HEADER = """\
| case | ours tok/s | torch tok/s | ratio, wall (range) | floor | ratio, CPU s | ours / torch CPU s | ours / torch peak GB |
|---|---|---|---|---|---|---|---|"""


def row(case: Case, timing: Timing, floor: str) -> str:
    """A line of the table."""
    wall, cpu = timing.ratios("wall"), timing.ratios("cpu")
    ours, theirs = timing.ours, timing.theirs
    cells = (
        case.title,
        f"{case.tokens / timing.median(ours, 'wall'):.0f}",
        f"{case.tokens / timing.median(theirs, 'wall'):.0f}",
        f"**{statistics.median(wall):.2f}** ({wall[0]:.2f} to {wall[-1]:.2f})",
        floor,
        f"{statistics.median(cpu):.2f}",
        f"{timing.median(ours, 'cpu'):.2f} / {timing.median(theirs, 'cpu'):.2f}",
        f"{timing.peak(ours) / 1e9:.2f} / {timing.peak(theirs) / 1e9:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def race(oracle: str, folder: Path, wanted: dict[Case, int]) -> Iterator[tuple[Case, Timing]]:
    """Both sides, in processes of their own, on some cases of one task, each as many times as `wanted` says."""
    with side(sys.executable, "speed_ours.py", folder) as ours, side(oracle, "speed_torch.py", folder) as theirs:
        for case, pairs in wanted.items():
            compare(case, ours.prepare(case), theirs.prepare(case))
            timing = Timing([], [])
            for _ in range(pairs):
                timing.ours.append(ours.ask())
                timing.theirs.append(theirs.ask())
            yield case, timing


def compare(case: Case, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Raises AssertionError when the sides do not compute the same."""
    if case.task == "decode":
        np.testing.assert_array_equal(ours, theirs, err_msg=case.title)
    else:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4, err_msg=case.title)


@contextmanager
def side(python: str, script: str, folder: Path) -> Iterator[Side]:
    """A process that serves cases; it ends when its pipe closes."""
    environment = os.environ | {
        "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items()),
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    cores = sorted(os.sched_getaffinity(0))[:2]  # XLA makes as many threads as it may use cores
    process = subprocess.Popen(
        [python, HERE / script, folder],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    try:
        yield Side(process, folder)
    finally:
        assert process.stdin
        process.stdin.close()
        process.wait()


def write_weights(folder: Path) -> None:
    """A Hugging Face directory with random weights, and LoRA's A factors and heads beside it."""
    random = np.random.default_rng(0)
    params: dict[str, Any] = {}
    for path, leaf in abstract_params(CONFIG).items():
        scale = 0.02 if path[-1] == "embed_tokens" else leaf.shape[-2] ** -0.5 if path[-1] == "kernel" else 0.1
        array = random.standard_normal(leaf.shape, np.float32) * np.float32(scale) + np.float32(path[-1] == "scale")
        place = params
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = array
    save_thinker(params, CONFIG, folder)
    text = CONFIG.text
    np.save(folder / "heads.npy", random.standard_normal((sum(LABELS), text.hidden_size), np.float32) * np.float32(text.hidden_size**-0.5))
    widths = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), text.hidden_size)
    widths |= {"o_proj": text.num_heads * text.head_dim, "down_proj": text.intermediate_size}
    shapes = {name: (text.num_layers, width, HEADS_RANK) for name, width in widths.items()}
    np.savez(
        folder / "lora.npz", **{name: random.uniform(-1, 1, shape).astype(np.float32) / shape[1] ** 0.5 for name, shape in shapes.items()}
    )


if __name__ == "__main__":
    sys.exit(main())
