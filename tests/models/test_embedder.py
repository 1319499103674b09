"""MiniLM in Flax against transformers' BertModel, and what its parameters promise to the mesh."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.convert.minilm import fetch_minilm, load_minilm
from omnisapiens_jax.models.embedder import EmbedderConfig, SentenceEmbedder
from tests.minilm import TINY, tiny_file
from tests.oracle import run_oracle


def oracle_config(config: EmbedderConfig) -> dict[str, object]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": "gelu",
    }


def batch(config: EmbedderConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = np.array([1, 3, 17, 40, 40])
    mask = np.arange(40) < lengths[:, None]
    return np.where(mask, rng.integers(1, config.vocab_size, mask.shape), 0).astype(np.int32), mask


@pytest.mark.oracle
@pytest.mark.parametrize("weights", ["tiny", "published"])
def test_equals_transformers(weights: str, tmp_path: Path) -> None:
    config = TINY if weights == "tiny" else EmbedderConfig()
    file = tiny_file(tmp_path / "model.safetensors") if weights == "tiny" else fetch_minilm() / "model.safetensors"
    tokens, mask = batch(config)
    ours = np.asarray(jax.jit(load_minilm(file, config))(tokens, mask))
    theirs = run_oracle("bert", file=str(file), config=oracle_config(config), tokens=tokens, mask=mask)["embeddings"]
    error = np.abs(ours - theirs).max()
    print(f"{weights}: max |ours - transformers| = {error:.1e}")
    assert error <= 2e-6


@pytest.fixture
def model(tmp_path: Path) -> SentenceEmbedder:
    return load_minilm(tiny_file(tmp_path / "model.safetensors"), TINY)


def test_padding_does_not_change_an_embedding(model: SentenceEmbedder) -> None:
    tokens, mask = batch(TINY)
    embed = jax.jit(model)
    whole = np.asarray(embed(tokens, mask))
    np.testing.assert_allclose(np.linalg.norm(whole, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(embed(tokens[:3, :17], mask[:3, :17]), whole[:3], atol=1e-6)
    np.testing.assert_allclose(embed(np.where(mask, tokens, 9), mask), whole, atol=1e-6)
    assert not np.asarray(embed(tokens, np.zeros_like(mask))).any()


def test_parameters_are_stacked_and_carry_logical_axes() -> None:
    with nnx.use_eager_sharding(False):
        state = nnx.state(nnx.eval_shape(lambda: SentenceEmbedder(EmbedderConfig(), rngs=nnx.Rngs(0))))
    flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    published = 22_713_728 - 512 - (384 * 384 + 384)  # the file's numbers, less position ids and the unused pooler
    assert sum(leaf.value.size for leaf in flat.values()) == published
    for path, leaf in flat.items():
        names = leaf.get_metadata()["out_sharding"]
        assert len(names) == leaf.value.ndim, path
        assert (names[0] == "layers") == path.startswith("layers/"), path
    axes = {path: leaf.get_metadata()["out_sharding"] for path, leaf in flat.items()}
    assert axes["layers/query/kernel"] == ("layers", "embed", "heads")
    assert axes["layers/attention_output/kernel"] == ("layers", "heads", "embed")
    assert axes["layers/intermediate/kernel"] == ("layers", "embed", "mlp")
    assert axes["layers/intermediate/bias"] == ("layers", "mlp")
    assert axes["word/embedding"] == ("vocab", "embed")
