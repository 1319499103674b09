"""Pooling and domain heads against torch; a classifier's loss is the one within the domain of each row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from omnisapiens_jax.models.heads import DomainHeads, own_tokens, pool
from omnisapiens_jax.processing.torch_files import read_torch_file
from tests import parts

TOLERANCE = 1e-5  # float32: sums of 30 and of 24 products of values below 10 round to about 1e-6
LEAST_MARGIN = 100.0


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[DomainHeads, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("heads")
    answer = parts.torchs_answer(folder, {})
    heads, _ = parts.ours(read_torch_file(folder / "heads.bin"), folder)
    assert heads is not None
    return heads, answer


def of_domain(logits: np.ndarray, domain: int) -> np.ndarray:
    begin = sum(parts.LABELS[:domain])
    return logits[..., begin : begin + parts.LABELS[domain]]


@pytest.mark.oracle
def test_equals_torch(theirs: tuple[DomainHeads, dict[str, np.ndarray]]) -> None:
    heads, wanted = theirs
    values, mask = parts.states()
    pooled = jax.jit(pool)(values, mask)
    logits = nnx.jit(lambda heads, pooled: heads(pooled, jnp.asarray(parts.DOMAINS)))(heads, pooled)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(parts.TARGETS))
    for name, found in (("pooled", pooled), ("logits", logits), ("loss", losses.mean())):
        print(f"{name}: max |ours - torch| = {np.abs(np.asarray(found) - wanted[name]).max():.1e}")
        np.testing.assert_allclose(found, wanted[name], rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.oracle
def test_a_pooling_with_a_defect_is_far_outside_the_tolerance(theirs: tuple[DomainHeads, dict[str, np.ndarray]]) -> None:
    """Padding that counts, a first token that is left out, a denominator that is one too large."""
    values, mask = parts.states()
    tokens = mask.sum(1, keepdims=True)
    defects = {
        "padding counts": values.mean(1),
        "no first token": np.asarray(pool(jnp.asarray(values), jnp.asarray(mask & (np.arange(mask.shape[1]) > 0)))),
        "one too many": (values * mask[..., None]).sum(1) / (tokens + 1),
    }
    for name, pooled in defects.items():
        margin = np.abs(pooled - theirs[1]["pooled"]).max() / TOLERANCE
        print(f"{name}: {margin:.0f} times the tolerance")
        assert margin > LEAST_MARGIN


def test_a_row_without_tokens_is_zero_and_padding_does_not_count() -> None:
    values, mask = parts.states()
    pooled = pool(jnp.asarray(values), jnp.asarray(mask))
    np.testing.assert_array_equal(pooled[parts.LENGTHS.index(0)], 0)
    wild = np.where(mask[..., None], values, 3e4)
    np.testing.assert_array_equal(pool(jnp.asarray(wild), jnp.asarray(mask)), pooled)


def test_samples_that_share_a_row_are_pooled_and_scored_apart() -> None:
    """Two and three in a row, between them a place without any, behind them padding."""
    values, _ = parts.states()
    segments = np.array([[1] * 4 + [3] * 9 + [0] * 17, [2] * 3 + [1] * 20 + [3] * 2 + [0] * 5])
    domains = np.array([[0, -1, 4], [1, 6, 2]])
    packed = pool(jnp.asarray(values[:2]), own_tokens(jnp.asarray(segments), jnp.asarray(domains)))
    scored = heads_of(parts.LABELS)(packed, jnp.asarray(domains))
    assert packed.shape == (2, 3, parts.WIDTH) and scored.shape == (2, 3, sum(parts.LABELS))
    for row, sample in np.ndindex(2, 3):
        alone = pool(jnp.asarray(values[row : row + 1]), own_tokens(jnp.asarray(segments[row : row + 1] == sample + 1), jnp.zeros(1)))
        np.testing.assert_allclose(packed[row, sample], alone[0], rtol=1e-6)  # a few float32 roundings: summed in another order
        found = heads_of(parts.LABELS)(alone, jnp.asarray(domains[row, sample : sample + 1]))
        np.testing.assert_allclose(scored[row, sample], found[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(packed[0, 1], 0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_states_are_summed_in_float32(dtype: jnp.dtype) -> None:
    """Four thousand tokens of 300 make 1.2 million, twenty times what float16 can hold."""
    pooled = pool(jnp.full((1, 4096, 2), 300, dtype), jnp.ones((1, 4096), bool))
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, 300, rtol=1e-6)


def heads_of(labels: tuple[int, ...]) -> DomainHeads:
    return DomainHeads(parts.WIDTH, labels, rngs=nnx.Rngs(0))


def test_only_the_labels_of_the_domain_have_logits() -> None:
    heads = heads_of(parts.LABELS)
    pooled = jnp.asarray(parts.states()[0][:, 0])
    logits = np.asarray(heads(pooled, jnp.asarray(parts.DOMAINS)))
    alike = [np.asarray(heads(pooled, jnp.full(len(pooled), domain))) for domain in range(len(parts.LABELS))]
    for row, domain in enumerate(parts.DOMAINS):
        assert (logits[row] > np.finfo(np.float32).min / 4).sum() == parts.LABELS[domain]
        assert (np.delete(logits[row], np.flatnonzero(logits[row] > -1e6)) == np.finfo(np.float32).min / 2).all()
        np.testing.assert_array_equal(of_domain(logits[row], domain), of_domain(alike[domain][row], domain))
    assert (np.asarray(heads(pooled, jnp.full(len(pooled), -1))) == np.finfo(np.float32).min / 2).all()  # a row without classes


def test_the_loss_over_all_labels_is_the_loss_within_the_domain() -> None:
    logits = heads_of(parts.LABELS)(jnp.asarray(parts.states()[0][:, 0]), jnp.asarray(parts.DOMAINS))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(parts.TARGETS))
    for row, domain in enumerate(parts.DOMAINS):
        target = parts.TARGETS[row] - sum(parts.LABELS[:domain])
        within = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(of_domain(np.asarray(logits[row]), domain)), target)
        np.testing.assert_allclose(losses[row], within, rtol=1e-6)  # a few float32 roundings: the others' exponentials are 0


def test_a_head_learns_from_the_rows_of_its_domain_alone() -> None:
    heads, pooled = heads_of((2, 3)), jnp.asarray(parts.states()[0][:2, 0])

    def loss(heads: DomainHeads) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(heads(pooled, jnp.array([1, 1])), jnp.array([2, 4])).mean()

    gradient = np.asarray(nnx.grad(loss)(heads).affine.kernel[...])
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, :2], 0)
    assert (np.abs(gradient[:, 2:]).max(0) > 0).all()
