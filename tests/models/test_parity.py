"""The thinker equals transformers' Qwen2.5-Omni thinker: encoders, hidden states, logits, positions, greedy tokens, loss and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from omnisapiens_jax.convert.names import mappings
from omnisapiens_jax.models.layers import LoraParam
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.processing.example import Batch, Bucket
from omnisapiens_jax.training.losses import lm_loss
from tests.models import cases, ours, references
from tests.models.references import Reference

LEAST_LEAD = 20  # of a greedy token, in tolerances of the logits; a closer race would prove nothing


def check(found: dict[str, np.ndarray], reference: Reference, label: str) -> None:
    """Every tensor within its tolerance; prints the table row (`pytest -s`)."""
    assert found.keys() == reference.values.keys()
    errors = {name: float(np.abs(value - reference.values[name]).max()) for name, value in found.items()}
    cells = [f"{name} {error:.1e} / {reference.noise[name]:.1e}" for name, error in errors.items()]
    print(f"{label:28} ours / eager-sdpa: " + ", ".join(cells))
    over = {name: (error, reference.tolerance(name)) for name, error in errors.items() if not error <= reference.tolerance(name)}
    assert not over, f"{label}: (error, tolerance) {over}"


def check_case(config: str, case: str, reference: Reference) -> None:
    made = cases.batch(config, case)
    real, rows = made["segment_ids"] == 1, len(cases.CASES[case].rows)
    np.testing.assert_array_equal(made["positions"].transpose(0, 2, 1)[real], reference.positions)
    np.testing.assert_array_equal(made["rope_delta"][:rows], reference.deltas)
    check(ours.answers(ours.thinker(config), made), reference, f"{config} {case}")
    if reference.greedy is not None:
        assert reference.margin > LEAST_LEAD * reference.tolerance("logits")
        np.testing.assert_array_equal(ours.greedy(config, case), reference.greedy)


def device(made: Batch) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in made.items()}


@pytest.mark.parametrize("case", references.STORED)
@pytest.mark.parametrize("config", cases.CONFIGS)
def test_equals_the_stored_answers(config: str, case: str) -> None:
    check_case(config, case, references.golden(config)[case])


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize("config", cases.CONFIGS)
def test_equals_transformers_live(config: str, case: str) -> None:
    check_case(config, case, references.live()[config, case])


def test_without_media_the_encoders_are_not_run() -> None:
    """The same text in a bucket without media slots."""
    config = "uneven"
    made = cases.batch(config, "text", shape=Bucket(tokens=cases.bucket(config).tokens))
    found = ours.answers(ours.thinker(config), made)
    check(found, references.golden(config)["text"], f"{config} text, no media slots")


def test_the_unrolled_stack_decodes_the_same_tokens() -> None:
    case = "sound_mixed_right"
    np.testing.assert_array_equal(ours.greedy("uneven", case, unroll=True), ours.greedy("uneven", case))


def our_gradients(config: str) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients by the names and in the axes of the file."""
    model = ours.make(cases.CONFIGS[config], nnx.to_pure_dict(nnx.state(ours.thinker(config), nnx.Param)), references.LORA)
    ours.put_factors(model, config)

    @nnx.jit
    def run(model: Thinker, batch: dict[str, jax.Array]) -> tuple[jax.Array, nnx.State]:
        def loss(model: Thinker) -> jax.Array:
            total, count = lm_loss(model, batch)
            return total / count

        return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.Param))(model)

    value, state = run(model, device(cases.batch(config, references.GRADIENT_CASE)))
    adapters, base = (nnx.to_pure_dict(part) for part in nnx.split_state(state, LoraParam, ...))
    flat, found = traverse_util.flatten_dict(base), {}
    for row in mappings(cases.CONFIGS[config]):
        array = np.asarray(flat[row.ours])
        for layer, name in enumerate(row.their_names):
            found[name] = row.to_theirs(array if row.layers is None else array[layer])
    return float(value), found | ours.named_factors(adapters, config)


@pytest.mark.oracle
@pytest.mark.parametrize("config", ["uneven", pytest.param("tied", marks=pytest.mark.slow)])
def test_loss_and_gradients_with_lora_equal_peft(config: str) -> None:
    """Of both LoRA factors of every projection of every tower, and of every parameter beneath them."""
    their_loss, theirs = references.live_gradients()[config]
    loss, found = our_gradients(config)
    assert loss == pytest.approx(their_loss, rel=1e-5)
    unused = "audio_tower.audio_bos_eos_token.weight"  # read by neither model
    assert not found.pop(unused).any()
    assert found.keys() == theirs.keys()
    errors = {name: float(np.abs(found[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in theirs}
    for tower in ("audio_tower", "visual", "model", "lm_head"):
        for kind, chosen in (("factors", True), ("parameters", False)):
            some = [error for name, error in errors.items() if name.startswith(tower) and ("/lora_" in name) == chosen]
            print(f"{config} {tower} {kind}: " + (f"{len(some)} gradients, worst {max(some):.1e} of the largest entry" if some else "none"))
    assert max(errors.values()) <= 1e-4, {name: error for name, error in errors.items() if error > 1e-4}
