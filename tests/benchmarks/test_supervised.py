"""The table of what labels teach: finished runs are read, unfinished ones are run, and the numbers are those of the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from benchmarks import supervised
from benchmarks.supervised import BASES, DESCRIBED, HELD_OUT, Outcome, Table
from omnisapiens_jax.resources import resource
from omnisapiens_jax.training import jobs
from tests.training import world

COUNT = 40  # held-out samples of each dataset
DATASETS = (*DESCRIBED, "mmpsy_anxiety")


def right(share: float, datasets: Sequence[str] = DATASETS) -> dict[int, bool]:
    """That share of each dataset's samples, the first of them."""
    return {100 * DATASETS.index(name) + i: i < share * COUNT for name in datasets for i in range(COUNT)}


def outcome(**shares: float) -> Outcome:
    given = {"majority": 0.25, "text": 0.5, "text with": 0.9, "text shuffled": 0.4, "sft": 0.7, "sft with": 0.85, "sft shuffled": 0.6}
    given |= {"scratch": 0.4, "transfer": 0.8, "scratch-descriptors": 0.5, "transfer-descriptors": 0.9} | shares
    of = {name: DESCRIBED if " " in name else (HELD_OUT,) for name in given if name not in ("majority", *BASES)}
    return Outcome(
        {name: right(share, of.get(name, DATASETS)) for name, share in given.items()},
        {100 * place + i: name for place, name in enumerate(DATASETS) for i in range(COUNT)},
    )


def test_the_table_has_means_over_seeds_and_paired_intervals() -> None:
    text = Table({0: outcome(), 1: outcome(sft=0.8)}).markdown()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    rows = {name: cells for name, *cells in lines}
    assert rows["`mmsd`"][:3] == ["40", "25.0", "50.0"] and rows["**all**"][0] == "280" and rows["**with descriptors**"][0] == "240"
    for empty in ("`mmpsy_anxiety`", "**all**"):
        assert [place for place, cell in enumerate(rows[empty]) if not cell] == [3, 4, 7, 8]
    assert rows["`mmsd`"][5] == "75.0"
    for place, gain in ((3, "+40.0"), (4, "-10.0"), (6, "+25.0"), (7, "+10.0"), (8, "-15.0")):
        assert rows["`mmsd`"][place].startswith(f"{gain} [")
    assert rows["heads"][:2] == ["40.0", "80.0"] and rows["with descriptors"][2].startswith("+40.0 [")
    assert text.count("holds: ") == 9 and "fails" not in text and "the seeds 0, 1;" in text


@pytest.mark.parametrize(
    ("shares", "claim"),
    [
        ({"majority": 0.7}, "SFT beats the commonest answer"),
        ({"text": 0.7}, "SFT beats text alone"),
        ({"text with": 0.5}, "descriptors add where no media are fed, as published"),
        ({"sft with": 0.7}, "descriptors add to SFT, which media are fed to"),
        ({"sft shuffled": 0.9}, "those of another sample add nothing"),
        ({"transfer": 0.4}, f"what the others have taught beats scratch on {HELD_OUT}"),
        ({"transfer-descriptors": 0.5}, f"what the others have taught beats scratch on {HELD_OUT}, descriptors at hand"),
    ],
)
def test_what_is_not_shown_is_told(shares: dict[str, float], claim: str) -> None:
    assert [told for told, holds in Table({0: outcome(**shares)}).claims() if not holds] == [claim]


def test_a_dataset_that_is_harmed_is_named() -> None:
    made = outcome()
    made.right["text with"] |= right(0.3, ("mmsd",))
    harmed = [told for told, holds in Table({0: made, 1: made}).claims() if not holds]
    assert harmed == ["no dataset is harmed by its descriptors where no media are fed, but mmsd"]


def small(job: str, seed: int, runs: Path) -> ConfigDict:
    """Runs of seconds on the committed clips."""
    made = supervised.config(job, seed, runs)
    changes = {"eval_batch": 8, "model.preset": "tiny", "atlas.path": str(resource("data/mini"))}
    for stage in jobs.STAGES:
        if stage in made:
            changes |= {f"{stage}.{name}": value for name, value in (("batch_size", 8), ("steps", 2), ("eval_every", 2))}
    if "bam" in made:
        changes |= {"bam.batch_size": 8, "bam.epochs": 1, "bam.hidden.video": 4, "bam.hidden.audio": 4}
    made.update_from_flattened_dict(changes)
    return made


@pytest.mark.slow
def test_runs_that_are_finished_are_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jobs, "make_mesh", lambda **_: world.mesh_of((1, 1, 1)))
    monkeypatch.setattr(supervised, "DESCRIBED", described := ("mmsd", HELD_OUT))
    first = supervised.outcome(tmp_path, 0, small)
    monkeypatch.setattr(jobs, "run", lambda *_: pytest.fail("a finished run was run again"))
    assert supervised.outcome(tmp_path, 0, small) == first
    assert {*first.right} == {*outcome().right} and {*first.datasets.values()} == {*DATASETS}
    assert {i for i in first.right["text with"]} == {i for i, name in first.datasets.items() if name in described}
    assert {first.datasets[i] for i in first.right["transfer-descriptors"]} == {HELD_OUT}
    assert Table({0: first}).markdown()
    fed = {path.name: json.loads((path / "config.json").read_text())["compat"]["media_inputs"] for path in tmp_path.glob("*-0")}
    assert fed == {"text-0": "text_only", "bam-text-0": "text_only", "sft-0": "fed", "bam-sft-0": "fed", "transfer-0": "fed"}
