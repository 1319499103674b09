"""Heads and adapters beside a thinker: of whatever form they answer as in torch, are checked by name, and go out as they are released."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from omnisapiens_jax.convert.parts import ADAPTERS, HEADS, OURS, AdapterShape, is_part, modern, part_shapes, write_parts, write_released
from omnisapiens_jax.processing.tensors import ConversionError, HeldTensor, Tensor
from omnisapiens_jax.processing.torch_files import read_torch_file
from tests import parts
from tests.oracle import run_oracle

TOLERANCE = 1e-5  # float32: sums of up to 6376 products, times an alpha of 4, round to about 3e-6
LEAST_MARGIN = 100.0
FORMS = {
    "video": parts.form(3318, 256),
    "video_of_two_coordinates": parts.form(2212, 256, normed=False),
    "video_of_468_points": parts.form(3258, 256),
    "audio": parts.form(6373, 512, "audio"),
    "early_video": parts.form(3318, 256, confidences=True, conf_norm=True),
    "early_audio": parts.form(6373, 512, "audio", confidences=True, conf_norm=True, scalar=True),
    "early_without_its_norm": parts.form(40, confidences=True),
    "early_with_that_norm_alone": parts.form(40, normed=False, confidences=True, conf_norm=True),
    "early_without_marks": parts.form(40, normed=False, confidences=True),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder with `heads.bin` and a file for each form, and what torch answers."""
    folder = tmp_path_factory.mktemp("parts")
    return folder, parts.torchs_answer(folder, FORMS)


@pytest.mark.oracle
@pytest.mark.parametrize("name", FORMS)
def test_an_adapter_of_any_form_answers_as_in_torch(theirs: tuple[Path, dict[str, np.ndarray]], name: str) -> None:
    folder, wanted = theirs
    form = FORMS[name]
    found = modern(read_torch_file(folder / f"{name}.bin"))
    _, adapters = parts.ours(found, folder)
    descriptors = wanted[f"{name}/descriptors"]
    width = part_shapes(found, parts.WIDTH, folder).adapters[form["modality"]]
    if name == "early_without_marks":  # nothing says how many of its inputs are confidences; they are zero
        descriptors = np.concatenate([descriptors, np.zeros((len(descriptors), 3), np.float32)], axis=1)
    assert width == AdapterShape(descriptors.shape[1], form["hidden"], form["normed"])
    for given, delta in ((descriptors, "delta"), (np.zeros_like(descriptors), "nothing")):
        answer = np.asarray(adapters[form["modality"]](jnp.asarray(given), jnp.ones(len(given), bool)))
        error = np.abs(answer - wanted[f"{name}/{delta}"]).max()
        print(f"{name} {delta}: max |ours - torch| = {error:.1e}")
        assert error <= TOLERANCE


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["early_video", "early_audio"])
def test_what_the_confidences_added_is_far_outside_the_tolerance(theirs: tuple[Path, dict[str, np.ndarray]], name: str) -> None:
    """A fold that forgets the norm's bias."""
    folder, wanted = theirs
    found = read_torch_file(folder / f"{name}.bin")
    modality = FORMS[name]["modality"]
    del found[f"{modality}_adapter.ln_conf.bias"]
    descriptors = jnp.asarray(wanted[f"{name}/descriptors"])
    answer = parts.ours(modern(found), folder)[1][modality](descriptors, jnp.ones(len(descriptors), bool))
    margin = np.abs(np.asarray(answer) - wanted[f"{name}/delta"]).max() / TOLERANCE
    print(f"{name} without ln_conf.bias: {margin:.0f} times the tolerance")
    assert margin > LEAST_MARGIN


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder as it is released: heads.bin, and adapters.bin with both; and what torch answers with all of them."""
    folder = tmp_path_factory.mktemp("released")
    answer = parts.torchs_answer(folder, {"video": parts.form(30), "audio": parts.form(50, modality="audio")})
    both = modern(read_torch_file(folder / "video.bin") | read_torch_file(folder / "audio.bin"))
    assert {record["file"] for record in write_released(both, folder)} == {ADAPTERS}
    return folder, answer


def released_parts(folder: Path) -> dict[str, Tensor]:
    return read_torch_file(folder / HEADS) | read_torch_file(folder / ADAPTERS)


@pytest.mark.oracle
def test_heads_and_both_adapters_answer_together_as_in_torch(released: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, wanted = released
    heads, adapters = parts.ours(released_parts(folder), folder)
    assert heads is not None
    pooled, here = jnp.asarray(wanted["pooled"]), jnp.ones(len(wanted["pooled"]), bool)
    for modality in ("video", "audio"):
        pooled = pooled + adapters[modality](jnp.asarray(wanted[f"{modality}/descriptors"]), here)
    np.testing.assert_allclose(heads(pooled, jnp.asarray(parts.DOMAINS)), wanted["logits_of_all"], rtol=0, atol=TOLERANCE)


@pytest.mark.oracle
def test_torch_reads_what_is_released_with_the_same_bits(released: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    found = released_parts(released[0])
    half = {name: HeldTensor(name, tensor.read().astype(np.float16)) for name, tensor in found.items() if name.startswith("heads.")}
    assert [record["name"] for record in write_released(found | half, tmp_path)] == sorted(found, key=lambda name: "adapter" in name)
    loaded = run_oracle("torch_loaded", file=str(tmp_path / HEADS)) | run_oracle("torch_loaded", file=str(tmp_path / ADAPTERS))
    values = {name: tensor.read() for name, tensor in (found | half).items()}
    wanted = {f"{name}/{value.dtype}/{'x'.join(map(str, value.shape))}": value.tobytes() for name, value in values.items()}
    assert {name: value.tobytes() for name, value in loaded.items()} == wanted


def some_parts() -> dict[str, HeldTensor]:
    """Two heads and an audio adapter with a norm, on states of 6."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"heads.0.weight": (2, 6), "heads.0.bias": (2,), "heads.1.weight": (3, 6), "heads.1.bias": (3,)}
    adapter = {"mlp.0.weight": (4, 5), "mlp.0.bias": (4,), "mlp.2.weight": (6, 4), "mlp.2.bias": (6,), "alpha": (1,)}
    adapter |= {"ln_feats.weight": (5,), "ln_feats.bias": (5,)}
    shapes |= {f"audio_adapter.{name}": shape for name, shape in adapter.items()}
    return {name: HeldTensor(name, random.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}


def test_shapes_are_read_off_the_parts() -> None:
    found = part_shapes(some_parts(), 6, Path("here"))
    assert found.heads == (2, 3)
    assert found.adapters == {"audio": AdapterShape(5, 4, True)}
    nothing = part_shapes({}, 6, Path("here"))
    assert (nothing.heads, nothing.adapters) == ((), {})


def test_parts_are_told_from_the_thinker() -> None:
    assert all(map(is_part, some_parts()))
    assert not any(map(is_part, ("model.norm.weight", "lm_head.weight", "audio_tower.conv1.weight", "visual.merger.ln_q.weight")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads.1.weight": None}, r"heads\.1\.weight is missing"),
        ({"heads.1.bias": None}, r"heads\.1\.bias is missing"),
        ({"heads.0.weight": (0, 6), "heads.0.bias": (0,)}, r"heads\.0\.weight is empty: \(0, 6\), heads\.0\.bias is empty: \(0,\)"),
        ({"heads.0.weight": None, "heads.0.bias": None}, r"the heads are numbered 1, not from 0 on"),
        ({"heads.999999999999.bias": (1,)}, r"the heads are numbered 0, 1, 999999999999, not from 0 on"),
        ({"heads.0.weight": (2, 7)}, r"heads\.0\.weight has shape \(2, 7\), not \(2, 6\)"),
        ({"heads.0.weight": (6,)}, r"heads\.0\.weight has shape \(6\), not \(labels, 6\), heads\.0\.bias has shape \(2\), not \(labels\)"),
        ({"heads.0.scale": (2,), "video_adapter.gate": (1,)}, r"heads\.0\.scale is unknown, video_adapter\.gate is unknown"),
        ({"video_adapter.alpha": (1,)}, r"video_adapter\.mlp\.0\.bias is missing, video_adapter\.mlp\.0\.weight is missing"),
        ({"audio_adapter.alpha": None}, r"audio_adapter\.alpha is missing"),
        ({"audio_adapter.alpha": (2,)}, r"audio_adapter\.alpha has shape \(2\), not \(1\)"),
        ({"audio_adapter.mlp.0.weight": (4, 5, 1)}, r"audio_adapter\.mlp\.0\.weight has shape \(4, 5, 1\), not \(hidden, features\)"),
        ({"audio_adapter.mlp.0.bias": (3,)}, r"audio_adapter\.mlp\.0\.bias has shape \(3\), not \(4\)"),
        ({"audio_adapter.mlp.2.weight": (4, 6)}, r"audio_adapter\.mlp\.2\.weight has shape \(4, 6\), not \(6, 4\)"),
        ({"audio_adapter.mlp.2.bias": (7,)}, r"audio_adapter\.mlp\.2\.bias has shape \(7\), not \(6\)"),
        ({"audio_adapter.ln_feats.bias": None}, r"audio_adapter\.ln_feats\.bias is missing"),
        ({"audio_adapter.ln_feats.weight": (4,)}, r"audio_adapter\.ln_feats\.weight has shape \(4\), not \(5\)"),
        # What is left of an early adapter that cannot be brought into today's form.
        ({"audio_adapter.ln_conf.bias": (3,)}, r"audio_adapter\.ln_conf\.bias is unknown"),
        ({"audio_adapter.mlp.0.weight": (4, 8), "audio_adapter.conf_gain": (3,)}, r"audio_adapter\.conf_gain is unknown"),
        ({"audio_adapter.mlp.0.weight": (4, 8), "audio_adapter.mlp.0.bias": None}, r"audio_adapter\.mlp\.0\.bias is missing"),
    ],
)
def test_what_does_not_fit_is_listed(changes: dict[str, Any], said: str) -> None:
    found: dict[str, Any] = dict(some_parts())
    for name, shape in changes.items():
        found.pop(name, None)
        if shape is not None:
            found[name] = HeldTensor(name, np.zeros(shape, np.float32))
    with pytest.raises(ConversionError, match=rf"the heads and adapters in here are not those of a model of width 6: .*{said}"):
        part_shapes(modern(found), 6, Path("here"))


def test_whole_numbers_are_no_parameters() -> None:
    found = some_parts() | {"heads.0.bias": HeldTensor("heads.0.bias", np.zeros(2, np.int64))}
    with pytest.raises(ConversionError, match=r"heads\.0\.bias is int64, no floating number"):
        part_shapes(found, 6, Path("here"))


def test_todays_parts_are_left_as_they_are() -> None:
    found = some_parts()
    assert modern(found) == found


def test_the_folded_bias_is_float32() -> None:
    """In bfloat16 the sum would lose what the fold adds; what is not summed keeps its dtype."""
    found = some_parts() | {
        "audio_adapter.mlp.0.weight": HeldTensor("w", np.ones((4, 8), ml_dtypes.bfloat16)),
        "audio_adapter.mlp.0.bias": HeldTensor("b", np.ones(4, ml_dtypes.bfloat16)),
        "audio_adapter.ln_conf.weight": HeldTensor("s", np.full(3, 9, ml_dtypes.bfloat16)),
        "audio_adapter.ln_conf.bias": HeldTensor("c", np.full(3, 1 / 256, ml_dtypes.bfloat16)),
    }
    folded = modern(found)
    assert folded.keys() == some_parts().keys()
    assert folded["audio_adapter.mlp.0.weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(folded["audio_adapter.mlp.0.bias"].read(), np.full(4, 1 + 3 / 256, np.float32), strict=True)
    assert folded["audio_adapter.mlp.0.weight"].shape == (4, 5)


def test_a_checkpoint_of_ours_keeps_them_bit_for_bit(tmp_path: Path) -> None:
    found = some_parts()
    records = write_parts(found, tmp_path)
    assert {record["name"] for record in records} == found.keys()
    stored = load_file(tmp_path / OURS)
    assert {name: value.tobytes() for name, value in stored.items()} == {name: tensor.read().tobytes() for name, tensor in found.items()}
    assert write_parts({}, tmp_path / "nothing") == [] and not (tmp_path / "nothing").exists()


def test_only_what_is_there_is_written_as_a_release(tmp_path: Path) -> None:
    assert write_released({}, tmp_path) == []
    assert len(write_released({name: tensor for name, tensor in some_parts().items() if "adapter" in name}, tmp_path)) == 7
    assert [file.name for file in tmp_path.iterdir()] == [ADAPTERS]


@pytest.mark.parametrize("write", [write_parts, write_released])
def test_broken_numbers_are_not_written(tmp_path: Path, write: Any) -> None:
    found = some_parts() | {"heads.0.bias": HeldTensor("heads.0.bias", np.array([1, np.nan], np.float32), Path("heads.bin"))}
    with pytest.raises(ConversionError, match=r"heads\.bin: 1 of .*2 values read of heads\.0\.bias are infinite or NaN"):
        write(found, tmp_path)
