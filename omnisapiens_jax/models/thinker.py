"""The omni thinker: audio encoder, vision encoder, decoder with TMRoPE and LM head (Qwen2.5-Omni technical report, section 2)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from omnisapiens_jax.models.audio import AudioEncoder
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.decoder import Cache, Decoder, Hidden
from omnisapiens_jax.models.layers import Build, Linear, LoraConfig, Remat, shard
from omnisapiens_jax.models.vision import VisionEncoder

Batch = Mapping[str, jax.Array]  # the keys and shapes are those of `processing.example.collate`


class Prompt(NamedTuple):
    """What decoding reads of the prompts again and again."""

    kv: Cache  # keys and values of every layer, as `Decoder.prefill` gives them
    segments: jax.Array  # [B, P]
    remembered: Any = ()  # what the model keeps of them besides


class Thinker(nnx.Module):
    """Text, audio, images and video in, text out."""

    def __init__(
        self,
        config: ThinkerConfig,
        *,
        rngs: nnx.Rngs,
        lora: LoraConfig | None = None,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        remat: Remat = "none",
    ):
        """Random weights; see `convert` for published ones. `dtype` is computed in, `param_dtype` is stored."""
        self.config = config
        audio, vision, decoder = (Build(tower, dtype, param_dtype, lora, remat) for tower in ("audio", "vision", "decoder"))
        self.audio = AudioEncoder(audio, config.audio, rngs=rngs)
        self.vision = VisionEncoder(vision, config.vision, rngs=rngs)
        self.decoder = Decoder(decoder, config.text, rngs=rngs)
        head = (config.text.hidden_size, config.text.vocab_size)
        self.lm_head = None if config.tie_head else Linear(decoder, "lm_head", head, ("embed", "vocab"), bias=False, rngs=rngs)

    def embed(self, batch: Batch) -> jax.Array:
        """Token embeddings with the encoded media put in their places.

        Reads `tokens [B, T]`, `media_index [B, T]`, `audio_chunks`, `audio_frames`, `audio_pairs`, `patches`, `patch_mask` and
        `patch_coords`; towers without slots in this batch are not run. Or `embedded [B, T, D]`, what was kept of all this. Returns
        `[B, T, D]`.
        """
        if "embedded" in batch:
            return shard(batch["embedded"].astype(self.decoder.dtype), "batch", "length", "act_embed")
        x = self.decoder.embed(batch["tokens"])
        media = []
        if batch["audio_pairs"].shape[1]:
            media.append(self.audio(batch["audio_chunks"], batch["audio_frames"], batch["audio_pairs"]))
        if batch["patches"].shape[1]:
            media.append(self.vision(batch["patches"], batch["patch_mask"], batch["patch_coords"]))
        if media:
            index = batch["media_index"][..., None]
            gathered = jnp.take_along_axis(jnp.concatenate(media, axis=1), jnp.maximum(index, 0), axis=1)
            x = jnp.where(index >= 0, gathered.astype(x.dtype), x)
        return shard(x, "batch", "length", "act_embed")

    def __call__(self, batch: Batch) -> Hidden:
        """Hidden states `[B, T, D]` of whole rows; reads `positions [B, 3, T]` and `segment_ids [B, T]` besides what `embed` reads."""
        return self.decoder(self.embed(batch), batch["positions"], batch["segment_ids"])

    def penultimate(self, batch: Batch) -> jax.Array:
        """The raw input of the last layer `[B, T, D]`, which classification heads and BAM pool; that layer is not run."""
        return self.decoder.penultimate(self.embed(batch), batch["positions"], batch["segment_ids"])

    def grouped(self, batch: Batch, responses: jax.Array, response_mask: jax.Array) -> jax.Array:
        """States that predict each response token, prompts and media computed once per group.

        Args:
          batch: prompts, right-padded, with `prompt_length [B]` and `rope_delta [B]`.
          responses: `[B, n, R]` token ids.
          response_mask: `[B, n, R]`, true on response tokens (a prefix of each row).

        Returns: `[B, n, R, D]` normed states; entry t predicts token t (entry 0 is the prompt's last state).
        """
        length = responses.shape[2]
        positions = response_positions(batch["prompt_length"], batch["rope_delta"], jnp.arange(length))
        prompt, states = self.decoder.grouped(
            self.embed(batch),
            batch["positions"],
            batch["segment_ids"],
            self.decoder.embed(responses),
            positions,
            response_mask.astype(jnp.int32),
        )
        first = last_token(prompt, batch["prompt_length"])[:, None, None]  # [B, 1, 1, D]
        return jnp.concatenate([jnp.broadcast_to(first, (*states.shape[:2], 1, states.shape[-1])), states[:, :, :-1]], axis=2)

    def prefill(self, batch: Batch) -> tuple[jax.Array, Prompt]:
        """What decoding begins with: states `[B, D]` that predict each first token, and what it is to read of the prompts."""
        hidden, kv = self.decoder.prefill(self.embed(batch), batch["positions"], batch["segment_ids"])
        assert kv is not None
        return last_token(hidden.last, batch["prompt_length"]), Prompt(kv, batch["segment_ids"])

    def decode(self, tokens: jax.Array, positions: jax.Array, prompt: Prompt, cache: Cache, step: jax.Array) -> tuple[jax.Array, Cache]:
        """States `[B, n, D]` that predict the token after `tokens [B, n]`, and the cache; see `Decoder.decode`."""
        return self.decoder.decode(self.decoder.embed(tokens), positions, prompt.kv, prompt.segments, cache, step)

    def unroll(self) -> None:
        """Makes a list of the decoder's layers, see `Stack`."""
        self.decoder.layers.unroll()

    def head(self) -> jax.Array:
        """The LM head `[D, V]`: its own, or the transposed table of token embeddings where they are tied."""
        kernel = self.decoder.embed_tokens[...].T if self.lm_head is None else self.lm_head.kernel[...]
        return kernel.astype(self.decoder.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """LM logits `[..., V]` (float32) of normed states `[..., D]`."""
        return (hidden @ self.head()).astype(jnp.float32)


def response_positions(prompt_length: jax.Array, rope_delta: jax.Array, step: jax.Array) -> jax.Array:
    """Position of response token `step`, for sampler and learner alike: prompt length + rope delta + step (`[B, R]`)."""
    return (prompt_length + rope_delta)[:, None] + step


def last_token(states: jax.Array, lengths: jax.Array) -> jax.Array:
    """The state `[B, D]` of each row's last token, rows `[B, T, D]` right-padded to `lengths [B]` (0 reads the first slot)."""
    return jnp.take_along_axis(states, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]


class LmHead(Protocol):
    """What has an LM head."""

    def head(self) -> jax.Array:
        """The head `[D, V]`."""
        ...


def token_log_probs(thinker: LmHead, hidden: jax.Array, targets: jax.Array, *, temperature: float = 1.0, chunk: int = 1024) -> jax.Array:
    """Log-probability of each target, without `[B, T, V]` logits.

    `log_softmax(logits / temperature)` in float32, before any truncation of the distribution. Logits are made for `chunk` tokens at a time,
    and made again in the backward pass only if the head is trained: for the states, the forward keeps what their gradient needs.

    Args:
      thinker: gives the head.
      hidden: `[..., D]` normed states.
      targets: `[...]` ids; a negative one is not asked for, and a chunk of such is not computed.
      temperature: of the sampler.
      chunk: tokens whose logits exist at once.

    Returns: log-probabilities `[...]` in float32, 0 where not asked for.
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    total = flat.shape[0]
    pad = -total % min(chunk, total)
    flat, wanted = jnp.pad(flat, ((0, pad), (0, 0))), jnp.pad(wanted, (0, pad), constant_values=-1)
    picked: jax.Array = _target_log_probs(flat, thinker.head(), wanted, temperature, min(chunk, total))
    return picked[:total].reshape(targets.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _target_log_probs(hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: float, chunk: int) -> jax.Array:
    """`token_log_probs` of `hidden [T, D]` and `targets [T]` under `head [D, V]`, T a multiple of `chunk`."""

    def some(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return _logits(hidden, head, targets, temperature)[1]

    return _by_chunks(some, chunk, hidden, targets)


def _forward(hidden: Any, head: Any, targets: Any, temperature: float, chunk: int) -> tuple[jax.Array, Any]:
    """Log-probabilities, and their gradient by the states `[T, D]`: linear in what comes back, so it can be made now, logits at hand."""

    def some(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores, picked = _logits(hidden, head.value, targets, temperature)
        return picked, shard(_by_logits(scores, targets, temperature).astype(hidden.dtype) @ head.value.T, "batch", "act_embed")

    picked, slope = _by_chunks(some, chunk, hidden.value, targets.value)
    return picked, (slope, targets.value, (hidden.value, head.value) if head.perturbed else None)


def _backward(temperature: float, chunk: int, saved: Any, grad: Any) -> tuple[jax.Array, jax.Array | None, None]:
    slope, targets, trained = saved
    grad = jnp.zeros(targets.shape) if isinstance(grad, SymbolicZero) else grad
    by_hidden = (slope * grad[:, None]).astype(slope.dtype)
    if trained is None:
        return by_hidden, None, None
    hidden, head = trained

    def some(hidden: jax.Array, targets: jax.Array, grad: jax.Array) -> jax.Array:
        scores, _ = _logits(hidden, head, targets, temperature)
        by_logits = (_by_logits(scores, targets, temperature) * grad[:, None]).astype(hidden.dtype)
        return jax.lax.dot_general(hidden, by_logits, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    return by_hidden, _by_chunks(some, chunk, hidden, targets, grad, add=True).astype(head.dtype), None


_target_log_probs.defvjp(_forward, _backward, symbolic_zeros=True)


class _Scores(NamedTuple):
    """Logits `[T, V]` over the temperature, and the logarithm of the sum of their exponentials `[T, 1]`, in float32.

    Not their difference, the log-probabilities: XLA on CPU joins the subtraction to the product with the head, and takes
    three times as long.
    """

    logits: jax.Array
    normaliser: jax.Array


def _logits(hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: float) -> tuple[_Scores, jax.Array]:
    """Scores of all tokens, and the log-probabilities `[T]` of the targets, in float32."""
    # A chunk's tokens are divided like rows, or every device would make the logits of all of them.
    logits = shard((hidden @ head).astype(jnp.float32) / temperature, "batch", "act_vocab")
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1) - normaliser
    return _Scores(logits, normaliser), jnp.where(targets >= 0, picked[:, 0], 0.0)


def _by_logits(scores: _Scores, targets: jax.Array, temperature: float) -> jax.Array:
    """The gradient `[T, V]` of the targets' log-probabilities by the logits."""
    chosen = jnp.arange(scores.logits.shape[-1]) == targets[:, None]
    return jnp.where(targets[:, None] >= 0, (chosen - jnp.exp(scores.logits - scores.normaliser)) / temperature, 0.0)


def _by_chunks(some: Callable[..., Any], chunk: int, hidden: jax.Array, targets: jax.Array, *more: jax.Array, add: bool = False) -> Any:
    """`some(hidden, targets, *more)` of `chunk` rows at a time, zeros where none of them is asked for; joined, or added up."""
    arrays = (hidden, targets, *more)
    if targets.shape[0] == chunk:
        return some(*arrays)
    parts = tuple(array.reshape(-1, chunk, *array.shape[1:]) for array in arrays)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(some, *(part[0] for part in parts)))

    def step(total: Any, part: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        made = jax.lax.cond(jnp.any(part[1] >= 0), some, lambda *_: zeros, *part)
        return (jax.tree.map(jnp.add, total, made), None) if add else (None, made)

    total, made = jax.lax.scan(step, zeros if add else None, parts)
    return total if add else jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)
