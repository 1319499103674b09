"""all-MiniLM-L6-v2: a BERT encoder whose mean state, scaled to length 1, says what a sentence means."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

_ones, _zeros, _normal = nnx.initializers.ones_init(), nnx.initializers.zeros_init(), nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class EmbedderConfig:
    """Shape of the encoder; the defaults are all-MiniLM-L6-v2."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_layers: int = 6
    num_heads: int = 12
    intermediate_size: int = 1536
    max_positions: int = 512
    layer_norm_eps: float = 1e-12


def _norm(config: EmbedderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels, and an epsilon of 1e-12 hides none of it
        scale_init=nnx.with_partitioning(_ones, ("embed",)),
        bias_init=nnx.with_partitioning(_zeros, ("embed",)),
        rngs=rngs,
    )


def _linear(inputs: int, outputs: int, axes: tuple[str, str], rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        kernel_init=nnx.with_partitioning(_normal, axes),
        bias_init=nnx.with_partitioning(_zeros, axes[1:]),
        rngs=rngs,
    )


class EncoderLayer(nnx.Module):
    """Post-norm BERT layer: attention, then a two-layer network with the exact GELU."""

    def __init__(self, config: EmbedderConfig, *, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.query = _linear(width, width, ("embed", "heads"), rngs)
        self.key = _linear(width, width, ("embed", "heads"), rngs)
        self.value = _linear(width, width, ("embed", "heads"), rngs)
        self.attention_output = _linear(width, width, ("heads", "embed"), rngs)
        self.attention_norm = _norm(config, rngs)
        self.intermediate = _linear(width, config.intermediate_size, ("embed", "mlp"), rngs)
        self.output = _linear(config.intermediate_size, width, ("mlp", "embed"), rngs)
        self.output_norm = _norm(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """States [B, T, D] and the mask [B, T] of real tokens to states [B, T, D]."""
        q, k, v = (layer(x).reshape(*x.shape[:2], self.num_heads, -1) for layer in (self.query, self.key, self.value))
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        x = self.attention_norm(x + self.attention_output(attended.reshape(x.shape)))
        return self.output_norm(x + self.output(jax.nn.gelu(self.intermediate(x), approximate=False)))


class SentenceEmbedder(nnx.Module):
    """Token ids to unit vectors. The layers are one module whose parameters have a leading `layers` axis.

    Every parameter carries logical axis names (`vocab`, `embed`, `heads`, `mlp`, `layers`; None stays whole); sharding them is the caller's
    choice, so nothing is sharded here.
    """

    def __init__(self, config: EmbedderConfig, *, rngs: nnx.Rngs) -> None:
        def table(rows: int, name: str | None) -> nnx.Embed:
            return nnx.Embed(rows, config.hidden_size, embedding_init=nnx.with_partitioning(_normal, (name, "embed")), rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stacked(rngs: nnx.Rngs) -> EncoderLayer:
            return EncoderLayer(config, rngs=rngs)

        with nnx.use_eager_sharding(False):
            self.word = table(config.vocab_size, "vocab")
            self.position = table(config.max_positions, None)
            self.token_type = table(2, None)
            self.norm = _norm(config, rngs)
            self.layers = stacked(rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeds a batch of sentences.

        Args:
            tokens: [B, T] int32 WordPiece ids, padded on the right, T at most `max_positions`.
            mask: [B, T] bool, True on real tokens.

        Returns:
            [B, D] float32 of length 1; zeros for a row with no token.
        """
        x = self.word(tokens) + self.position(jnp.arange(tokens.shape[1])) + self.token_type(jnp.zeros_like(tokens[:1, :1]))
        graph, stack = nnx.split(self.layers)

        def layer(x: jax.Array, state: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graph, state)(x, mask), None

        x, _ = jax.lax.scan(layer, self.norm(x), stack)
        total = jnp.sum(jnp.where(mask[..., None], x, 0.0), axis=1)  # its length cancels: the mean needs no division
        return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-12)
