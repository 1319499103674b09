"""What labels teach, as a table: `python -m benchmarks.supervised [--runs DIR] [--seeds 0 1 2] [--document README.md]`.

For every seed, on the miniature atlas with descriptors: heads and all below them trained on all labels (`sft`), and once more with no media
fed, as published (`text`); adapters for each dataset's descriptors on either (`bam-sft`, `bam-text`), whose answers with another sample's
descriptors are the control; and a dataset held out, learnt from scratch and from what the others have taught (`transfer`). All are held-out
accuracies, beside those of the commonest answer in training. Runs lie in DIR/JOB-SEED: one that is finished is only read, one that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from benchmarks.learning import pooled, write_between_markers
from omnisapiens_jax.atlas.sources import open_source
from omnisapiens_jax.evaluation.answers import Answer, load_answers
from omnisapiens_jax.evaluation.metrics import Difference
from omnisapiens_jax.resources import resource
from omnisapiens_jax.training import jobs
from omnisapiens_jax.training.data import Atlas
from omnisapiens_jax.training.state import thinker_config

MARKERS = ("<!-- supervised: written by benchmarks/supervised.py -->", "<!-- /supervised -->")
DESCRIBED = ("meld_emotion", "meld_senti", "cremad", "mmsd", "urfunny", "daicwoz")  # classified datasets that have descriptors
BASES = ("text", "sft")  # what adapters stand on
GIVEN = ("with", "shuffled")  # descriptors that adapters are given: a sample's own, and another's
HELD_OUT = "meld_emotion"  # of the transfer, and then learnt from a third of its rows: what others have taught is for sets that are small

Configure = Callable[[str, int, Path], ConfigDict]
Name = TypeVar("Name")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One seed: of each way of answering which held-out samples it answers rightly, by their ids."""

    right: dict[str, dict[int, bool]]
    datasets: dict[int, str]  # of the held-out samples


def config(job: str, seed: int, runs: Path) -> ConfigDict:
    """The settings of a run, all chosen by validation losses of seed 0."""
    name, _, base = job.partition("-")
    made = runpy.run_path(str(resource(f"configs/{'sft' if name == 'text' else name}.py")))["get_config"]()
    made.seed = seed
    made.atlas.descriptors = True  # the same atlas for all
    for stage in {"sft", "pretrain"} & {*made}:
        made[stage].steps = 250  # with 500 the validation loss is no lower
    if "text" in (name, base):
        made.compat.media_inputs = "text_only"
    if name == "bam":
        made.model.weights = str(runs / f"{base}-{seed}" / "sft")
        made.bam.update({"datasets": ",".join(DESCRIBED), "epochs": 12})
        # Rates of the published width overshoot in states so narrow, and most where media have told nearly all.
        made.bam.update({"alpha": 1.0, "adapter_lr": 2e-4} if base == "text" else {"alpha": 0.25, "adapter_lr": 1e-4, "lr": 1e-5})
    if name == "transfer":
        made.transfer.dataset = HELD_OUT
        made.finetune.update({"rows": "third", "steps": 150})
    return made


def outcome(runs: Path, seed: int, configure: Configure = config) -> Outcome:
    """Runs the jobs of a seed as far as they are not finished, and reads what they answered."""
    found = {base: _answers(runs, base, seed, configure, {base: "evaluation-sft.json"})[base] for base in BASES}
    controls = {(dataset, control): f"bam/{dataset}/evaluation-{control}.json" for dataset in DESCRIBED for control in GIVEN}
    for base in BASES:
        adapted = _answers(runs, f"bam-{base}", seed, configure, controls)
        for control in GIVEN:
            found[f"{base} {control}"] = [answer for dataset in DESCRIBED for answer in adapted[dataset, control]]
    cells = {cell: f"evaluation-{cell}.json" for each in jobs.CELLS for cell in (each, f"{each}-{jobs.DESCRIBED}")}
    found |= _answers(runs, "transfer", seed, configure, cells)
    right = {name: {answer.id: answer.correct for answer in given} for name, given in found.items()}
    commonest = _commonest(configure("sft", seed, runs))
    right["majority"] = {answer.id: commonest[answer.dataset] == answer.gold for answer in found["sft"]}
    return Outcome(right, {answer.id: answer.dataset for answer in found["sft"]})


def _answers(runs: Path, job: str, seed: int, configure: Configure, wanted: Mapping[Name, str]) -> dict[Name, list[Answer]]:
    workdir, settings = runs / f"{job}-{seed}", configure(job, seed, runs)
    jobs.claim(workdir, settings)
    if not all((workdir / file).exists() for file in wanted.values()):
        jobs.run(settings, workdir)
        jax.clear_caches()  # the next run compiles its own
    return {name: load_answers(workdir / file) for name, file in wanted.items()}


def _commonest(settings: ConfigDict) -> dict[str, str]:
    """Of each dataset the commonest answer of its training rows; the first in the alphabet of several."""
    source = open_source(Atlas(settings, thinker_config(settings.model)).root / settings.atlas.train)
    given: dict[str, list[str]] = {}
    for i in range(len(source)):
        given.setdefault(source[i].dataset, []).append(source[i].answer)
    return {dataset: max(sorted({*answers}), key=answers.count) for dataset, answers in given.items()}


@dataclasses.dataclass(frozen=True)
class Table:
    """All seeds together: accuracies are means over them, and a resample draws samples, each with all of its seeds."""

    outcomes: dict[int, Outcome]

    def right(self, name: str, datasets: Sequence[str]) -> list[np.ndarray]:
        """Of each seed whether the samples `[N]` of some datasets are answered rightly, in the order of their ids."""
        return [
            np.array([o.right[name][i] for i in sorted(o.right[name]) if o.datasets[i] in datasets], bool) for o in self.outcomes.values()
        ]

    def gain(self, before: str, after: str, datasets: Sequence[str]) -> Difference:
        """Accuracy of one way of answering minus that of another, and its 95 % interval."""
        return pooled(self.right(before, datasets), self.right(after, datasets))

    def markdown(self) -> str:
        """Both tables and what they are to show."""
        first = next(iter(self.outcomes.values()))
        known = [name for name in dict.fromkeys(first.datasets[i] for i in sorted(first.datasets)) if name not in DESCRIBED]
        added = [f"{told} {_MINUS} {base}" for base in ("text", "SFT") for told in ("BAM", "another's")]
        head = ["dataset", "n", "commonest", "text alone", *added[:2], "SFT", f"SFT {_MINUS} text", *added[2:]]
        body = []
        for name, own in (
            *((f"`{name}`", (name,)) for name in (*DESCRIBED, *known)),
            ("**with descriptors**", DESCRIBED),
            ("**all**", (*DESCRIBED, *known)),
        ):
            commonest, text, sft = (f"{100 * np.mean(self.right(way, own)):.1f}" for way in ("majority", *BASES))
            gains = [
                _told(self.gain(base, f"{base} {control}", own)) if {*own} <= {*DESCRIBED} else "" for base in BASES for control in GIVEN
            ]
            count = len(self.right("sft", own)[0])
            body.append([name, count, commonest, text, *gains[:2], sft, _told(self.gain("text", "sft", own)), *gains[2:]])
        cells = ["", f"a third of `{HELD_OUT}`, scratch", "transfer", f"transfer {_MINUS} scratch"]
        rows = []
        for told, ending in (("heads", ""), ("with descriptors", f"-{jobs.DESCRIBED}")):
            scratch, transfer = (f"{cell}{ending}" for cell in jobs.CELLS)
            shares = [f"{100 * np.mean(self.right(name, (HELD_OUT,))):.1f}" for name in (scratch, transfer)]
            rows.append([told, *shares, _told(self.gain(scratch, transfer, (HELD_OUT,)))])
        claims = [f"- {'holds' if holds else '**fails**'}: {claim}" for claim, holds in self.claims()]
        note = (
            f"Held-out accuracy in percent, means over the seeds {', '.join(map(str, self.outcomes))}; in brackets the 95 % interval of "
            "the paired bootstrap, in points."
        )
        return "\n\n".join([_lines(head, body), _lines(cells, rows), note, "\n".join(claims)]) + "\n"

    def claims(self) -> list[tuple[str, bool]]:
        """What is to be shown, and whether it is."""
        datasets = sorted({*next(iter(self.outcomes.values())).datasets.values()})
        harmed = {base: [name for name in DESCRIBED if self.gain(base, f"{base} with", (name,)).high < 0] for base in BASES}
        endings = {"": "", ", descriptors at hand": f"-{jobs.DESCRIBED}"}
        return [
            ("SFT beats the commonest answer", self.gain("majority", "sft", datasets).low > 0),
            ("SFT beats text alone", self.gain("text", "sft", datasets).low > 0),
            ("descriptors add where no media are fed, as published", self.gain("text", "text with", DESCRIBED).low > 0),
            ("descriptors add to SFT, which media are fed to", self.gain("sft", "sft with", DESCRIBED).low > 0),
            ("those of another sample add nothing", all(self.gain(base, f"{base} shuffled", DESCRIBED).low <= 0 for base in BASES)),
            *(
                (f"no dataset is harmed by its descriptors {where}" + "".join(f", but {name}" for name in harmed[base]), not harmed[base])
                for base, where in (("text", "where no media are fed"), ("sft", "beside media"))
            ),
            *(
                (
                    f"what the others have taught beats scratch on {HELD_OUT}{told}",
                    self.gain(f"scratch{ending}", f"transfer{ending}", (HELD_OUT,)).low > 0,
                )
                for told, ending in endings.items()
            ),
        ]


_MINUS = "\N{MINUS SIGN}"


def _told(gain: Difference) -> str:
    return f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def _lines(head: Sequence[object], body: Sequence[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *body))


def main() -> None:
    """Command line; an exit status other than 0 says that something is not shown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/supervised"), help="where the runs lie (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--document", type=Path, help="a Markdown file to write the table into, between its markers")
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # grain reads a flag
    logging.set_verbosity(logging.WARNING)
    table = Table({seed: outcome(arguments.runs, seed) for seed in arguments.seeds})
    print(table.markdown())
    if arguments.document:
        write_between_markers(arguments.document, f"\n{table.markdown()}\n", MARKERS)
    if failed := [claim for claim, holds in table.claims() if not holds]:
        raise SystemExit(f"not shown: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
