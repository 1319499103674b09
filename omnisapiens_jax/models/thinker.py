"""The omni thinker: audio encoder, vision encoder, decoder with TMRoPE and LM head (Qwen2.5-Omni technical report, section 2)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from omnisapiens_jax.models.audio import AudioEncoder
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.decoder import Decoder, Hidden
from omnisapiens_jax.models.layers import Build, Linear, LoraConfig, Remat, shard
from omnisapiens_jax.models.vision import VisionEncoder

Batch = Mapping[str, jax.Array]  # the keys and shapes are those of `processing.example.collate`


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
        `patch_coords`; towers without slots in this batch are not run. Returns `[B, T, D]`.
        """
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

    def logits(self, hidden: jax.Array) -> jax.Array:
        """LM logits `[..., V]` (float32) of normed states `[..., D]`."""
        table = self.decoder.embed_tokens[...]
        logits = hidden @ table.astype(hidden.dtype).T if self.lm_head is None else self.lm_head(hidden)
        return logits.astype(jnp.float32)


def response_positions(prompt_length: jax.Array, rope_delta: jax.Array, step: jax.Array) -> jax.Array:
    """Position of response token `step`, for sampler and learner alike: prompt length + rope delta + step (`[B, R]`)."""
    return (prompt_length + rope_delta)[:, None] + step


def last_token(states: jax.Array, lengths: jax.Array) -> jax.Array:
    """The state `[B, D]` of each row's last token, rows `[B, T, D]` right-padded to `lengths [B]` (0 reads the first slot)."""
    return jnp.take_along_axis(states, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]


def token_log_probs(thinker: Thinker, hidden: jax.Array, targets: jax.Array, *, temperature: float = 1.0, chunk: int = 1024) -> jax.Array:
    """Log-probability of each target, without `[B, T, V]` logits.

    `log_softmax(logits / temperature)` in float32, before any truncation of the distribution; logits are made for `chunk` tokens at a time,
    and made again in the backward pass.

    Args:
      thinker: gives the head.
      hidden: `[..., D]` normed states.
      targets: `[...]` ids.
      temperature: of the sampler.
      chunk: tokens whose logits exist at once.

    Returns: log-probabilities `[...]` in float32.
    """

    def some(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        # A chunk's tokens are divided like rows, or every device would make the logits of all of them.
        log_probs = jax.nn.log_softmax(shard(thinker.logits(hidden) / temperature, "batch", "act_vocab"), axis=-1)
        return jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]

    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    total = flat.shape[0]
    if total <= chunk:
        picked = some(flat, wanted)
    else:
        pad = -total % chunk
        chunks = jnp.pad(flat, ((0, pad), (0, 0))).reshape(-1, chunk, flat.shape[-1]), jnp.pad(wanted, (0, pad)).reshape(-1, chunk)
        picked = jax.lax.map(lambda c: jax.checkpoint(some)(*c), chunks).reshape(-1)[:total]
    return picked.reshape(targets.shape)
