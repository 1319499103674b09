"""A full Omni model as transformers saves it: its thinker comes in, and another goes back into it with the speech side untouched."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from omnisapiens_jax.convert.checkpoint import load_manifest
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.source import read_params
from omnisapiens_jax.processing.example import Batch
from tests.convert.test_command_line import weights
from tests.convert.test_huggingface import store, tensors
from tests.models import cases, ours
from tests.oracle import run_oracle
from tools.convert_weights import main

CONFIG, CASE = "uneven", "texts_right"
BOUND = 1e-5  # of the largest logit; float32 sums in another order


@dataclasses.dataclass(frozen=True)
class Scene:
    """The thinker inside, and the full model around it."""

    thinker: Path
    omni: Path


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    root = tmp_path_factory.mktemp("full")
    (root / "thinker").mkdir()
    cases.write_checkpoint(cases.CONFIGS[CONFIG], root / "thinker")
    run_oracle("full_omni", thinker=str(root / "thinker"), target=str(root / "omni"), loaded="")
    return Scene(root / "thinker", root / "omni")


def batch() -> Batch:
    return cases.batch(CONFIG, CASE)


@pytest.mark.oracle
def test_the_thinker_inside_comes_out_and_the_rest_is_named(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(scene.omni), str(tmp_path / "ours")]) == 0
    told = capsys.readouterr().err
    assert "omni is a full Omni model of Hugging Face: 132 tensors" in told
    assert re.search(r"left behind: \d+ tensors \(the speech side of a full Omni model\): talker\.", told)
    found, wanted = open_source(tmp_path / "ours"), open_source(scene.thinker)
    assert {skipped["name"].split(".")[0] for skipped in load_manifest(tmp_path / "ours")["skipped"]} == {"talker", "token2wav"}
    assert found.config == wanted.config and found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert found.tensors[name].read().tobytes() == tensor.read().tobytes(), name


@pytest.mark.oracle
def test_another_thinker_goes_into_it_and_transformers_finds_everything(scene: Scene, tmp_path: Path) -> None:
    """The export is bfloat16 where its thinker is, and has the voices that lie beside the weights."""
    stored = {name: (value if value.ndim == 1 else -value).astype(ml_dtypes.bfloat16) for name, value in tensors(CONFIG).items()}
    other = store(tmp_path / "other", stored, cases.CONFIGS[CONFIG].to_hf())
    assert main(["export", str(other), str(tmp_path / "back"), "--omni", str(scene.omni)]) == 0
    given: dict[str, Any] = {name: value for name, value in cases.for_transformers(CONFIG, CASE).items() if name != "labels"}
    answer = run_oracle("full_omni", thinker="", target="", loaded=str(tmp_path / "back"), **given)
    assert {name: found.tolist() for name, found in answer.items() if name.startswith("amiss/") and found.size} == {}
    assert not answer["different"].size and answer["speakers"].tolist() == ["Voice"]
    receipt = json.loads((tmp_path / "back" / "conversion_manifest.json").read_text())["tensors"]
    assert {record["source"] for record in receipt if record["name"].startswith("thinker.")} == {str(other / "model.safetensors")}
    assert {Path(record["source"]).parent for record in receipt if not record["name"].startswith("thinker.")} == {scene.omni}
    assert weights(tmp_path / "back").keys() == weights(scene.omni).keys()

    model = ours.make(cases.CONFIGS[CONFIG], read_params(open_source(other), dtype=np.dtype(np.float32)))
    found, wanted = ours.answers(model, batch())["logits"], answer["logits"][given["attention_mask"] == 1]
    assert np.abs(found - wanted).max() <= BOUND * np.abs(wanted).max()


@pytest.mark.oracle
def test_a_thinker_of_another_model_is_not_put_into_it(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path / "tied", tensors("tied"), cases.CONFIGS["tied"].to_hf())
    slower = tmp_path / "slower"
    shutil.copytree(scene.thinker, slower)
    config = dataclasses.replace(cases.CONFIGS[CONFIG], position_id_per_seconds=13)
    (slower / "config.json").write_text(json.dumps(config.to_hf()))
    for folder, said in ((tmp_path / "tied", "differ in"), (slower, "config.json does not describe the thinker of")):
        assert main(["export", str(folder), str(tmp_path / "back"), "--omni", str(scene.omni)]) == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "back").exists()
