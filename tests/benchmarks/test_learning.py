"""The learning table: finished runs are read, unfinished ones are run, and the numbers are those of the answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import learning
from omnisapiens_jax.evaluation.evaluate import MODALITIES, Answer, save_answers
from omnisapiens_jax.evaluation.metrics import paired_bootstrap
from omnisapiens_jax.training import jobs
from tests.training import world


def answered(path: Path, right: int, count: int = 40) -> None:
    """Answers of which the first `right` are right."""
    save_answers(path, [Answer(i, "mmsd", "sarcasm", "sarcasm" if i < right else "no", "") for i in range(count)])


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Finished runs of seeds 0 and 1."""
    for seed, (before, after) in enumerate(((10, 20), (12, 30))):
        rl, generative = tmp_path / f"rl-{seed}", tmp_path / f"generative-{seed}"
        (rl / "rl").mkdir(parents=True)
        (rl / "rl" / "metrics.jsonl").write_text('{"step": 0, "time/seconds": 90}\n{"step": 1, "time/seconds": 30}\n')
        answered(rl / "evaluation-before.json", before)
        answered(rl / "evaluation-after.json", after)
        generative.mkdir()
        answered(generative / "evaluation-generative.json", 36)
        for lost, modality in enumerate(MODALITIES, start=1):
            answered(rl / f"evaluation-after-without-{modality}.json", after - lost)
    return tmp_path


def test_finished_runs_are_read_and_tabled(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "run", lambda *_: pytest.fail("a finished run was run again"))
    lines = learning.table({seed: learning.outcome(runs, seed) for seed in (0, 1)}).splitlines()
    assert lines[0] == "| held-out accuracy, % | seed 0 | seed 1 | all |"
    assert "| warm start | 25.0 | 30.0 | 27.5 |" in lines
    assert "| after RL | 50.0 | 75.0 | 62.5 |" in lines
    assert "| SFT on all answers (ceiling) | 90.0 | 90.0 | 90.0 |" in lines
    assert "| minutes in training steps | 2.0 | 2.0 | 2.0 |" in lines
    gain, video = (next(line for line in lines if name in line) for name in ("gain by RL", "without video"))
    assert [cell.split("[")[0].strip() for cell in gain.split("|")[2:5]] == ["+25.0", "+45.0", "+35.0"]
    assert [cell.split("[")[0].strip() for cell in video.split("|")[2:5]] == ["-7.5", "-7.5", "-7.5"]
    assert "40 held-out samples" in lines[-1]


def test_a_run_of_another_config_is_not_taken_for_this_one(runs: Path) -> None:
    other = learning.config("rl", 0)
    other.rl.steps = 1
    (runs / "rl-0" / "config.json").write_text(other.to_json_best_effort(indent=2))
    with pytest.raises(ValueError, match=r"another config \(differs in rl\)"):
        learning.outcome(runs, 0)


def test_pooling_draws_samples_with_all_their_seeds() -> None:
    """Three equal seeds are no more evidence than one; three independent ones are."""
    rng = np.random.default_rng(0)
    before, *after = (rng.random((4, 300)) < np.array([[0.4], [0.5], [0.5], [0.5]])).astype(bool)
    one = paired_bootstrap(before, after[0])
    same = learning.pooled([before] * 3, [after[0]] * 3)
    assert same.mean == pytest.approx(one.mean) and (same.low, same.high) == pytest.approx((one.low, one.high), abs=0.01)
    several = learning.pooled([before] * 3, after)
    assert several.high - several.low < 0.9 * (same.high - same.low)


def test_the_table_replaces_what_stood_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"a\n{learning.BEGIN}\nold\n{learning.END}\nz\n")
    learning.write_between_markers(path, "new\n")
    assert path.read_text() == f"a\n{learning.BEGIN}\nnew\n{learning.END}\nz\n"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="no place for the table"):
        learning.write_between_markers(path, "new")


@pytest.mark.slow
def test_missing_runs_are_run_and_leave_their_pages(tmp_path: Path) -> None:
    def configure(job: str, seed: int) -> ConfigDict:
        made = world.config(job, (8, 1, 1))
        made.seed = seed
        made.atlas.buckets = 1
        if job == "rl":
            made.rl.steps = 2
            made.rl.record_every = 1
            made.blanked = MODALITIES
        return made

    measured = learning.outcome(tmp_path, 3, configure)
    assert all(len(right) == 31 for right in measured.right.values()) and len(measured.right) == 6
    assert json.loads((tmp_path / "rl-3" / "config.json").read_text())["seed"] == 3
    for job in ("rl", "generative"):
        page = (tmp_path / f"{job}-3" / "report.html").read_text()
        assert "of 31 samples" in page and "data:video/mp4;base64," in page
    assert "With one modality taken away" in (tmp_path / "rl-3" / "report.html").read_text()
