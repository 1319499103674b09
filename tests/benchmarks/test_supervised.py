"""The table of what labels teach: finished runs are read, unfinished ones are run, and the numbers are those of the answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from benchmarks import supervised
from benchmarks.supervised import DESCRIBED, HELD_OUT, Outcome, Table
from omnisapiens_jax.resources import resource
from omnisapiens_jax.training import jobs
from tests.training import world

COUNT = 40  # held-out samples of each dataset
DATASETS = (*DESCRIBED, "mmpsy_anxiety")


def right(share: float, datasets: tuple[str, ...] = DATASETS) -> dict[int, bool]:
    """That share of each dataset's samples, the first of them."""
    return {100 * DATASETS.index(name) + i: i < share * COUNT for name in datasets for i in range(COUNT)}


def outcome(**shares: float) -> Outcome:
    given = {"majority": 0.25, "text": 0.5, "sft": 0.7, "with": 0.9, "shuffled": 0.6, "scratch": 0.4, "transfer": 0.8}
    given |= {"scratch-descriptors": 0.5, "transfer-descriptors": 0.9} | {name.replace("_", "-"): share for name, share in shares.items()}
    of = {"with": DESCRIBED, "shuffled": DESCRIBED} | {name: (HELD_OUT,) for name in given if name.startswith(("scratch", "transfer"))}
    return Outcome(
        {name: right(share, of.get(name, DATASETS)) for name, share in given.items()},
        {100 * place + i: name for place, name in enumerate(DATASETS) for i in range(COUNT)},
    )


def test_the_table_has_means_over_seeds_and_paired_intervals() -> None:
    text = Table({0: outcome(), 1: outcome(sft=0.8)}).markdown()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    rows = {name: cells for name, *cells in lines}
    assert rows["`mmsd`"][:4] == ["40", "25.0", "50.0", "75.0"] and rows["**all**"][0] == "280" and rows["**with descriptors**"][0] == "240"
    assert rows["`mmpsy_anxiety`"][5:] == ["", ""] and rows["**all**"][5:] == ["", ""]
    assert rows["`mmsd`"][4].startswith("+25.0 [") and rows["`mmsd`"][5].startswith("+15.0 [") and rows["`mmsd`"][6].startswith("-15.0 [")
    assert rows["heads"][:2] == ["40.0", "80.0"] and rows["with descriptors"][2].startswith("+40.0 [")
    assert text.count("holds: ") == 6 and "fails" not in text and "2 seeds" in text


@pytest.mark.parametrize(
    ("shares", "claim"),
    [
        ({"majority": 0.7}, "SFT beats the commonest answer"),
        ({"text": 0.7}, "SFT beats text alone"),
        ({"with": 0.7}, "descriptors add to SFT"),
        ({"shuffled": 0.9}, "those of another sample add nothing"),
        ({"transfer_descriptors": 0.5}, f"what the others have taught beats scratch on {HELD_OUT}"),
    ],
)
def test_what_is_not_shown_is_told(shares: dict[str, float], claim: str) -> None:
    assert [told for told, holds in Table({0: outcome(**shares)}).claims() if not holds] == [claim]


def test_a_dataset_that_is_harmed_is_named() -> None:
    made = outcome()
    made.right["with"] |= right(0.3, ("mmsd",))
    harmed = [told for told, holds in Table({0: made, 1: made}).claims() if not holds]
    assert harmed == ["no dataset is harmed by its descriptors, but mmsd"]


def small(job: str, seed: int, runs: Path) -> ConfigDict:
    """Runs of seconds on the committed clips."""
    made = supervised.config(job, seed, runs)
    changes = {"eval_batch": 8, "model.preset": "tiny", "atlas.path": str(resource("data/mini")), "mesh.data": 8}
    for stage in jobs.STAGES:
        if stage in made:
            changes |= {f"{stage}.{name}": value for name, value in (("batch_size", 8), ("steps", 2), ("eval_every", 2))}
    if "bam" in made:
        changes |= {"bam.batch_size": 8, "bam.epochs": 1, "bam.hidden.video": 4, "bam.hidden.audio": 4}
    made.update_from_flattened_dict(changes)
    return made


@pytest.mark.slow
def test_runs_that_are_finished_are_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.PRESETS["tiny"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = supervised.outcome(tmp_path, 0, small)
    monkeypatch.setattr(jobs, "run", lambda *_: pytest.fail("a finished run was run again"))
    assert supervised.outcome(tmp_path, 0, small) == first
    assert {*first.right} == {*outcome().right} and {*first.datasets.values()} == {*DATASETS}
    assert {i for i in first.right["with"]} == {i for i, name in first.datasets.items() if name in DESCRIBED}
    assert {first.datasets[i] for i in first.right["transfer-descriptors"]} == {HELD_OUT}
    assert Table({0: first}).markdown()
    media = json.loads((tmp_path / "text-0" / "config.json").read_text())["compat"]["media_inputs"]
    assert media == "text_only"
