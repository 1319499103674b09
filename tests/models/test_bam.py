"""The behavioural adapter against torch, and its size at the published widths."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.models import bam
from omnisapiens_jax.models.bam import ResidualAdapter
from omnisapiens_jax.processing.torch_files import read_torch_file
from tests import parts

TOLERANCE = 1e-5  # float32: sums of up to 6373 products, times an alpha of 4, round to about 3e-6
LEAST_MARGIN = 100.0
FORMS = {
    "video": parts.form(3318, modality="video"),
    "audio": parts.form(6373, modality="audio"),
    "plain": parts.form(40, modality="video", normed=False),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder with a file of each form, and what torch answers."""
    folder = tmp_path_factory.mktemp("adapters")
    return folder, parts.torchs_answer(folder, FORMS)


def adapter_of(folder: Path, name: str) -> ResidualAdapter:
    _, adapters = parts.ours(read_torch_file(folder / f"{name}.bin"), folder)
    return adapters[FORMS[name]["modality"]]


def deltas(adapter: ResidualAdapter, descriptors: np.ndarray) -> np.ndarray:
    return np.asarray(nnx.jit(lambda adapter, given: adapter(given, jnp.ones(len(given), bool)))(adapter, descriptors))


@pytest.mark.oracle
@pytest.mark.parametrize("name", FORMS)
def test_equals_torch(theirs: tuple[Path, dict[str, np.ndarray]], name: str) -> None:
    """Also for a descriptor of zeros, as in training a dropped modality has: the bias of the norm goes through."""
    adapter, wanted = adapter_of(theirs[0], name), theirs[1]
    descriptors = wanted[f"{name}/descriptors"]
    for given, delta in ((descriptors, "delta"), (np.zeros_like(descriptors), "nothing")):
        found = deltas(adapter, given)
        error = np.abs(found - wanted[f"{name}/{delta}"]).max()
        print(f"{name} {delta}: max |ours - torch| = {error:.1e}, of up to {np.abs(found).max():.2f}")
        assert error <= TOLERANCE


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["video", "audio"])
def test_another_epsilon_is_far_outside_the_tolerance(
    theirs: tuple[Path, dict[str, np.ndarray]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptors are of length 1, so that their variance is about as small as the epsilon."""
    monkeypatch.setattr(bam, "_EPS", 1e-6)
    found = deltas(adapter_of(theirs[0], name), theirs[1][f"{name}/descriptors"])
    margin = np.abs(found - theirs[1][f"{name}/delta"]).max() / TOLERANCE
    print(f"{name}: {margin:.0f} times the tolerance")
    assert margin > LEAST_MARGIN


def test_a_row_without_a_descriptor_gets_nothing_whatever_is_in_its_place() -> None:
    adapter = ResidualAdapter(5, 4, 3, normed=True, rngs=nnx.Rngs(0))
    descriptors = jnp.stack([jnp.arange(5.0), jnp.full(5, jnp.nan), jnp.arange(5.0)])
    found = np.asarray(adapter(descriptors, jnp.array([True, False, True])))
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[0]).max() > 0


def test_a_batch_with_a_row_without_a_descriptor_still_learns() -> None:
    """Its gradient is that of the other rows; NaN in an unused place must not spread."""
    adapter, present = ResidualAdapter(5, 4, 3, normed=True, rngs=nnx.Rngs(0)), jnp.array([True, False])

    def loss(adapter: ResidualAdapter, filler: float) -> jax.Array:
        return (adapter(jnp.stack([jnp.arange(5.0), jnp.full(5, filler)]), present) ** 2).sum()

    ordinary, broken = nnx.grad(loss)(adapter, 1.0), nnx.grad(loss)(adapter, jnp.nan)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), ordinary, broken)


def test_alpha_begins_where_it_is_told() -> None:
    descriptors, present = jnp.arange(10.0).reshape(2, 5), jnp.ones(2, bool)
    one, four = (ResidualAdapter(5, 4, 3, normed=False, alpha=alpha, rngs=nnx.Rngs(0))(descriptors, present) for alpha in (1.0, 4.0))
    np.testing.assert_allclose(four, 4 * np.asarray(one), rtol=1e-6)


@pytest.mark.parametrize(("features", "hidden", "count"), [(3318, 256, 1_777_389), (6373, 256, 2_565_579), (6373, 512, 5_114_827)])
def test_has_as_many_parameters_as_published(features: int, hidden: int, count: int) -> None:
    """With the LayerNorm, on states of 3584."""
    adapter = nnx.eval_shape(lambda: ResidualAdapter(features, hidden, 3584, normed=True, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(adapter, nnx.Param))) == count
