"""What is learnt, as a table: `python benchmarks/learning.py [--runs DIR] [--seeds 0 1 2] [--readme README.md]`.

For every seed: the warm start (it sees the answers of a third of the training split), the policy after GRPO (which sees the rest through
rewards alone), supervised training on all of the split as a ceiling, and the policy with one modality blanked; all on the held-out split,
greedily decoded. Runs lie in DIR/rl-SEED and DIR/generative-SEED: one that is finished is only read, one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from omnisapiens_jax.evaluation.answers import Answer, load_answers
from omnisapiens_jax.evaluation.evaluate import MODALITIES
from omnisapiens_jax.evaluation.metrics import Difference, paired_bootstrap
from omnisapiens_jax.resources import resource
from omnisapiens_jax.training import jobs
from omnisapiens_jax.training.journal import read_metrics

BEGIN, END = "<!-- learning: written by benchmarks/learning.py -->", "<!-- /learning -->"
_WANTED = {"rl": ("before", "after", *(f"after-without-{m}" for m in MODALITIES)), "generative": ("generative",)}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One seed: which held-out samples are answered rightly `[N]`, by evaluation, and the minutes in steps of warm start and RL."""

    right: dict[str, np.ndarray]
    minutes: float


def config(job: str, seed: int) -> ConfigDict:
    """`configs/JOB.py` with that seed; every modality is blanked after RL."""
    made = runpy.run_path(str(resource(f"configs/{job}.py")))["get_config"]()
    made.seed = seed
    if job == "rl":
        made.blanked = MODALITIES
    return made


def outcome(runs: Path, seed: int, configure: Callable[[str, int], ConfigDict] = config) -> Outcome:
    """Runs both jobs of a seed as far as they are not finished, and reads what they measured."""
    answers: dict[str, list[Answer]] = {}
    for job, wanted in _WANTED.items():
        workdir, settings = runs / f"{job}-{seed}", configure(job, seed)
        files = {name: workdir / f"evaluation-{name}.json" for name in wanted}
        jobs.claim(workdir, settings)
        if not all(path.exists() for path in files.values()):
            jobs.run(settings, workdir)
            jax.clear_caches()  # the next run compiles its own
        answers |= {name: load_answers(path) for name, path in files.items()}
    steps = [row for stage in ("warm_start", "rl") for row in read_metrics(runs / f"rl-{seed}" / stage / "metrics.jsonl")]
    right = {name: np.array([answer.correct for answer in given]) for name, given in answers.items()}
    return Outcome(right, sum(row["time/seconds"] for row in steps) / 60)


def pooled(before: Sequence[np.ndarray], after: Sequence[np.ndarray], *, resamples: int = 10_000) -> Difference:
    """Difference of mean accuracies over seeds `[N]` each, with its 95 % interval: samples are drawn, each with all of its seeds."""
    gains = np.mean(after, axis=0) - np.mean(before, axis=0)
    values, counts = np.unique(gains, return_counts=True)
    draws = np.random.default_rng(0).multinomial(len(gains), counts / len(gains), size=resamples) @ values / len(gains)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Difference(float(gains.mean()), float(low), float(high))


def table(outcomes: dict[int, Outcome]) -> str:
    """The Markdown table: a column for each seed, and one for all of them."""

    def shares(name: str) -> list[str]:
        own = [100 * o.right[name].mean() for o in outcomes.values()]
        return [f"{share:.1f}" for share in (*own, np.mean(own))]

    def change(name: str, to: str) -> list[str]:
        before, after = ([o.right[key] for o in outcomes.values()] for key in (name, to))
        each = [paired_bootstrap(b, a) for b, a in zip(before, after, strict=True)]
        return [f"{100 * d.mean:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]" for d in (*each, pooled(before, after))]

    minutes = [o.minutes for o in outcomes.values()]
    rows = [
        ("warm start", shares("before")),
        ("after RL", shares("after")),
        ("**gain by RL**", change("before", "after")),
        ("SFT on all answers (ceiling)", shares("generative")),
        *((f"after RL, without {m}: change", change("after", f"after-without-{m}")) for m in MODALITIES),
        ("minutes in training steps", [f"{value:.1f}" for value in (*minutes, np.mean(minutes))]),
    ]
    head = ["held-out accuracy, %", *(f"seed {seed}" for seed in outcomes), "all"]
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows)]
    count = len(next(iter(outcomes.values())).right["after"])
    note = f"{count} held-out samples, greedy decoding; in brackets the 95 % interval of the paired bootstrap, in points."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n"


def write_between_markers(path: Path, text: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Replaces what stands between the markers of a Markdown file. Raises ValueError if it has none."""
    content = path.read_text(encoding="utf-8")
    head, begin, rest = content.partition(markers[0])
    _, end, tail = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(f"{path} has no place for the table: add the lines {markers[0]!r} and {markers[1]!r}")
    path.write_text(f"{head}{begin}\n{text}{end}{tail}", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="where the runs lie (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--readme", type=Path, help="a Markdown file to write the table into, between its markers")
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # grain reads a flag
    logging.set_verbosity(logging.WARNING)
    text = table({seed: outcome(arguments.runs, seed) for seed in arguments.seeds})
    print(text)
    if arguments.readme:
        write_between_markers(arguments.readme, f"\n## What is learnt\n\n{text}\n")


if __name__ == "__main__":
    main()
