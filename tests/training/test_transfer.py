"""The transfer job at the smallest size: a dataset held out, learnt from the base and from the others, in four cells."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax import resources
from omnisapiens_jax.atlas.labels import HBA
from omnisapiens_jax.evaluation.answers import evaluations, load_answers
from omnisapiens_jax.parallel.mesh import on_mesh
from omnisapiens_jax.training import jobs, sft
from omnisapiens_jax.training.journal import read_metrics
from omnisapiens_jax.training.state import fresh_head, parameters
from tests.training import world

SMALL: dict[str, Any] = {
    "transfer__dataset": "mmsd",
    "bam__hidden__video": 6,
    "bam__hidden__audio": 6,
    "bam__batch_size": 8,
    "bam__epochs": 1,
}
CELLS = ["scratch", "scratch-descriptors", "transfer", "transfer-descriptors"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place of its own for what is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield resources.cache()


def run(folder: Path, **changes: Any) -> None:
    made = world.config("transfer", **{**SMALL, **changes})
    jobs.check(made, world.mesh_of((1, 1, 1)))
    jobs.claim(folder, made)
    here = world.world(made)
    with on_mesh(here.mesh):
        jobs.JOBS["transfer"](here.run(folder), here.state)


def files(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in evaluations(folder).items()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transfer")
    run(folder)
    return folder


@pytest.mark.slow
def test_four_cells_answer_the_held_out_rows_and_are_compared(done: Path) -> None:
    assert [*evaluations(done)] == CELLS
    answered = [load_answers(path) for path in evaluations(done).values()]
    assert {answer.dataset for own in answered for answer in own} == {"mmsd"}
    assert len({tuple(answer.id for answer in own) for own in answered}) == 1
    found = json.loads((done / "comparison.json").read_text())
    (line,) = found["datasets"]
    assert line["name"] == "mmsd" and [*line["scores"]] == CELLS and [*line["against scratch"]] == CELLS[1:]
    assert {"low", "high"} <= {*line["against scratch"]["transfer"]["difference"]}
    page = (done / "report.html").read_text()
    assert all(f"{told}: 4 steps" in page for told in ("All other datasets", "from the base", "from what the others taught"))
    assert {path.name for cell in jobs.CELLS for path in (done / cell / "bam").iterdir()} == {"mmsd"}


@pytest.mark.slow
def test_pretraining_never_sees_the_held_out_dataset_and_fine_tuning_nothing_else(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[str]] = {}

    class Enough(Exception):
        pass

    def watched(config: Any, workdir: Path, graph: Any, state: Any, train: Any, validation: Any, *_: Any) -> Any:
        for split in (train, validation):
            index = split.pipeline.planner.index
            seen.setdefault(workdir.name, []).extend({index.dataset_names[i] for i in index.datasets.tolist()})
        if workdir.name == "pretrain":
            raise Enough
        return state

    monkeypatch.setattr(sft, "fit", watched)
    monkeypatch.setattr(jobs, "adapt", lambda *_: None)
    with pytest.raises(Enough):
        run(done)  # its cells are answered, so that only training is left to be asked for
    assert {*seen["finetune-scratch"]} == {"mmsd"}
    assert {*seen["pretrain"]} == {"cremad", "meld_emotion", "meld_senti", "urfunny", "daicwoz", "mmpsy_anxiety"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune-scratch", "pretrain", "finetune-transfer"])
def test_a_run_that_was_killed_goes_on_to_the_same_end(stage: str, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    whole = sft.fit

    def killed(config: Any, workdir: Path, *rest: Any) -> Any:
        if workdir.name == stage:
            raise Killed
        return whole(config, workdir, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "fit", killed)
        with pytest.raises(Killed):
            run(tmp_path)
    run(tmp_path)
    assert files(tmp_path) == files(done)
    for folder in ("pretrain", "finetune-scratch", "finetune-transfer", "transfer/bam/mmsd"):
        ours, theirs = ([row["loss"] for row in read_metrics(at / folder / "metrics.jsonl")] for at in (tmp_path, done))
        assert ours == theirs


@pytest.mark.slow
def test_a_dataset_without_descriptors_has_two_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, transfer__dataset="mmpsy_anxiety")
    assert [*evaluations(tmp_path)] == [*jobs.CELLS] and (tmp_path / "comparison.html").exists()
    told = " ".join(capsys.readouterr().out.split())
    assert "mmpsy_anxiety: no training sample has descriptors" in told
    assert re.search(r"transfer beside scratch: [+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\] points of accuracy", told)


def test_one_head_is_drawn_anew_and_all_else_is_as_it_was() -> None:
    here = world.world(world.config("transfer", **SMALL))
    learnt = here.state._replace(trainable=jax.tree.map(lambda leaf: leaf + 1, here.state.trainable))
    head = HBA.head("mmsd")
    with on_mesh(here.mesh):
        after = fresh_head(learnt, here.config.model, here.config.seed, head, here.mesh)
    own = np.isin(np.arange(25), [*HBA.head_classes(head)])
    begun, old, new = (nnx.to_pure_dict(parameters(state)) for state in (here.state, learnt, after))
    for name in ("kernel", "bias"):
        at = [np.asarray(params["heads"]["affine"][name]) for params in (begun, old, new)]
        np.testing.assert_array_equal(at[2][..., own], at[0][..., own])
        np.testing.assert_array_equal(at[2][..., ~own], at[1][..., ~own])
    jax.tree.map(np.testing.assert_array_equal, new["thinker"], old["thinker"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"transfer__dataset": "mead"}, "config.transfer.dataset 'mead' is no dataset of the atlas: name one of .*cremad"),
        ({"transfer__dataset": "mimeqa"}, "'mimeqa' has free-form answers, which no head gives: name one of (?!.*siq2)"),
        ({"pretrain__best": "luck"}, "unknown config.pretrain.best 'luck'"),
        ({"finetune__rows": "some"}, "unknown config.finetune.rows 'some'"),
        ({"finetune__steps": 0}, "config.finetune.steps 0 must be at least 1"),
        ({"bam__modalities": ()}, "video or audio, or both"),
        ({"blanked": ("text",)}, "blanked is not for transfer"),
        ({"model__heads": (2,)}, "must be .* in a run of the job transfer"),
        ({"atlas__batches": "packed"}, "packed is not for"),
    ],
)
def test_what_cannot_be_is_told(changes: dict[str, Any], says: str) -> None:
    made = world.config("transfer", **{**SMALL, **changes})
    with pytest.raises(ValueError, match=says):
        jobs.check(made, world.mesh_of((1, 1, 1)))


def test_a_dataset_that_the_atlas_lacks_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train has no rows of tess, which config.transfer.dataset names"):
        run(tmp_path, transfer__dataset="tess")


@pytest.mark.parametrize("size", ["mini", "3b", "7b"])
def test_adapters_are_of_the_held_out_dataset(size: str) -> None:
    made = world.runpy.run_path(str(world.resource("configs/transfer.py")))["get_config"](size)
    made.transfer.dataset = "mmsd"
    assert made.bam.datasets == "mmsd"
