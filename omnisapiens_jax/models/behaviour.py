"""Behaviour attention: the decoder's states look up the frames of a descriptor, where the published adapter reads their mean and spread.

Between some layers of the frozen decoder stands a gated cross-attention to the landmarks and the low-level descriptors of a clip, its gate
shut at first (Alayrac et al. 2022, section 3.1.2, without the feed-forward part). Time is on TMRoPE's clock: a frame lies where the clip's
own tokens lie, so many positions a second after their first, and queries and keys are turned by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnisapiens_jax.models.attention import attend
from omnisapiens_jax.models.bam import Behaviour, Dropped
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.decoder import Between, Cache, Hidden, KeyValue
from omnisapiens_jax.models.layers import Build, LayerNorm, Linear, RMSNorm, rotate
from omnisapiens_jax.models.thinker import Batch, Prompt, Thinker, last_token

_BUILD = Build("bam", jnp.float32, jnp.float32)
_EPS = 1e-6
_THETA = 10_000.0
_STREAMS = (("landmarks", "video"), ("low_level", "audio"))  # sequences of descriptors and their modalities


class Statistic(nnx.Variable):
    """A fact of the training data that no gradient changes."""


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The shapes of behaviour attention.

    Attributes:
      depths: after so many layers of the decoder it stands, rising, from 1 to one less than there are: later, no head would see it.
      width: of an encoded frame.
      heads: of each attention.
      head_dim: width of a head, even.
      streams: name and features of a frame of each sequence: `landmarks`, `low_level`, or both. (Pairs: what a module keeps is hashed.)
    """

    depths: tuple[int, ...]
    width: int
    heads: int
    head_dim: int
    streams: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        known = [name for name, _ in _STREAMS]
        names = [name for name, _ in self.streams]
        if names not in ([known[0]], [known[1]], known):
            raise ValueError(f"behaviour attention reads {', '.join(known)}, at least one of them, in this order; not {names}")
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < 1:
            raise ValueError(f"behaviour attention stands after one or more layers, each named once, rising from 1; not {self.depths}")
        if min(self.width, self.heads, self.head_dim, *(size for _, size in self.streams)) < 1 or self.head_dim % 2:
            raise ValueError(f"widths of behaviour attention are at least 1 and head_dim is even: {self}")

    def check(self, layers: int) -> None:
        """Raises ValueError unless a decoder of so many layers has all depths."""
        if self.depths[-1] >= layers:
            raise ValueError(f"behaviour attention cannot stand after layer {self.depths[-1]} of {layers}: from 1 to {layers - 1}")


class FrameEncoder(nnx.Module):
    """Frames of one stream, in units of their own spread, to a common width."""

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs):
        """`mean` and `spread` are to be set from the training data."""
        self.mean = Statistic(jnp.zeros(features), out_sharding=(None,), eager_sharding=False)
        self.spread = Statistic(jnp.ones(features), out_sharding=(None,), eager_sharding=False)
        self.proj = Linear(_BUILD, "proj", (features, width), (None, None), bias=True, rngs=rngs)
        self.norm = LayerNorm(_BUILD, width, _EPS, rngs=rngs)

    def __call__(self, frames: jax.Array, mask: jax.Array) -> jax.Array:
        """`[B, S, F]` -> `[B, S, W]`; what is in the place of frames that `mask [B, S]` lacks does not matter. A feature that never
        changes says nothing."""
        spread = self.spread[...]
        scale = jnp.where(spread > 0, 1 / jnp.where(spread > 0, spread, 1.0), 0.0)
        return self.norm(self.proj(jnp.where(mask[..., None], (frames - self.mean[...]) * scale, 0.0)))


class GatedAttention(nnx.Module):
    """`x + tanh(gate) * attention(norm(x), frames)`; nothing for samples without frames."""

    def __init__(self, config: AttentionConfig, hidden: int, *, rngs: nnx.Rngs):
        """`hidden` is the width of the decoder's states."""
        inner = config.heads * config.head_dim
        self.head_dim = config.head_dim
        self.norm = RMSNorm(_BUILD, hidden, _EPS, rngs=rngs)
        self.q_proj = Linear(_BUILD, "q_proj", (hidden, inner), ("embed", "heads"), bias=False, rngs=rngs)
        self.k_proj = Linear(_BUILD, "k_proj", (config.width, inner), (None, "heads"), bias=False, rngs=rngs)
        self.v_proj = Linear(_BUILD, "v_proj", (config.width, inner), (None, "heads"), bias=False, rngs=rngs)
        self.o_proj = Linear(_BUILD, "o_proj", (inner, hidden), ("heads", "embed"), bias=False, rngs=rngs)
        self.gate = _BUILD.param(nnx.initializers.zeros, rngs, (1,), ("norm",))

    def keys(self, frames: jax.Array, angles: jax.Array) -> KeyValue:
        """Of encoded frames `[B, S, W]` with the angles `[B, S, H/2]` of their times: `[B, S, N, H]`."""
        key, value = (proj(frames).reshape(*frames.shape[:2], -1, self.head_dim) for proj in (self.k_proj, self.v_proj))
        return KeyValue(rotate(key, angles), value)

    def __call__(self, x: jax.Array, angles: jax.Array, kv: KeyValue, seen: jax.Array) -> jax.Array:
        """States `x [B, T, D]` with the angles `[B, T, H/2]` of their times, and the frames that are `seen [B, S]`."""
        query = self.q_proj(self.norm(x.astype(jnp.float32))).reshape(*x.shape[:2], -1, self.head_dim)
        ones = jnp.ones(x.shape[:2], jnp.int32)
        found = attend(rotate(query, angles), kv.key, kv.value, ones, seen.astype(jnp.int32), causal=False).out
        delta = jnp.tanh(self.gate[...]) * self.o_proj(found.reshape(*x.shape[:2], -1))
        return x + jnp.where(seen.any(axis=1)[:, None, None], delta, 0.0).astype(x.dtype)


class Frames(NamedTuple):
    """What `BehaviourAttention` remembers of a batch: keys of every depth, and which frames there are `[B, S]`."""

    keys: tuple[KeyValue, ...]
    seen: jax.Array


class BehaviourAttention(nnx.Module):
    """Cross-attention between the layers of a decoder."""

    def __init__(self, config: AttentionConfig, thinker: ThinkerConfig, *, rngs: nnx.Rngs):
        """Gates are zero: nothing changes until they have learnt to open."""
        config.check(thinker.text.num_layers)
        self.config, self.per_second = config, thinker.position_id_per_seconds
        self.encoders = nnx.Dict({name: FrameEncoder(size, config.width, rngs=rngs) for name, size in config.streams})
        self.layers = nnx.List([GatedAttention(config, thinker.text.hidden_size, rngs=rngs) for _ in config.depths])

    def remember(self, batch: Mapping[str, jax.Array], dropped: Dropped | None = None) -> Frames:
        """Keys and values of the frames. Reads `landmarks [B, S, 1659]` or `low_level [B, S, 65]` or both, their `_times [B, S]` in seconds
        and `_mask [B, S]`, and `media_starts [B, 2]`."""
        encoded, times, seen = [], [], []
        for place, (name, modality) in enumerate(_STREAMS):
            if name in self.encoders:
                mask = batch[f"{name}_mask"] if dropped is None else batch[f"{name}_mask"] & ~dropped[modality][:, None]
                encoded.append(self.encoders[name](batch[name], mask))
                times.append(batch["media_starts"][:, place, None] + batch[f"{name}_times"] * self.per_second)
                seen.append(mask)
        frames, angles = jnp.concatenate(encoded, axis=1), self._angles(jnp.concatenate(times, axis=1))
        return Frames(tuple(layer.keys(frames, angles) for layer in self.layers), jnp.concatenate(seen, axis=1))

    def between(self, remembered: Frames, time: jax.Array) -> Between:
        """Its layers."""
        angles = self._angles(time)

        def change(layer: GatedAttention, kv: KeyValue) -> Callable[[jax.Array], jax.Array]:
            return lambda x: layer(x, angles, kv, remembered.seen)

        return {depth: change(layer, kv) for depth, layer, kv in zip(self.config.depths, self.layers, remembered.keys, strict=True)}

    def finish(self, states: jax.Array, remembered: Frames) -> jax.Array:
        """The states as they are."""
        return states

    def _angles(self, time: jax.Array) -> jax.Array:
        half = self.config.head_dim // 2
        inverse = _THETA ** (-np.arange(half, dtype=np.float32) / half)
        return time[..., None].astype(jnp.float32) * inverse


def media_starts(batch: Batch) -> jax.Array:
    """Temporal positions `[B, 2]` of the first token of each row's video and of its sound; of the other where one is missing, else 0.

    Reads `media_index [B, T]`, `audio_pairs` and `positions [B, 3, T]`. The clip's seconds count from there. Where the processor does not
    let positions follow the clip's clock (`real_timing`), its tokens part from it.
    """
    index, time = batch["media_index"], batch["positions"][:, 0]
    sounds = batch["audio_pairs"].shape[1]
    never = jnp.iinfo(jnp.int32).max
    seen, heard = (jnp.where(places, time, never).min(axis=1) for places in (index >= sounds, (index >= 0) & (index < sounds)))
    first = jnp.stack([jnp.where(seen < never, seen, heard), jnp.where(heard < never, heard, seen)], axis=1)
    return jnp.where(first < never, first, 0)


class BehaviourThinker(nnx.Module):
    """A thinker with descriptors: a policy to sample from, and whole rows. Reads what `processing.descriptors.batch` adds to a batch."""

    def __init__(self, thinker: Thinker, behaviour: Behaviour):
        """Either may be shared with others."""
        self.thinker, self.behaviour = thinker, behaviour

    @property
    def config(self) -> ThinkerConfig:
        """The thinker's."""
        return self.thinker.config

    def __call__(self, batch: Batch) -> Hidden:
        """Hidden states of whole rows, `last` as the LM head reads it. A pooled `penultimate` is still to be given to `finish`."""
        hidden, _, remembered = self._prefill(batch, keep=False)
        return Hidden(self.behaviour.finish(hidden.last, remembered), hidden.penultimate)

    def prefill(self, batch: Batch) -> tuple[jax.Array, Prompt]:
        """As `Thinker.prefill`; what is remembered is that of `Behaviour.remember`."""
        hidden, kv, remembered = self._prefill(batch, keep=True)
        assert kv is not None
        first = self.behaviour.finish(last_token(hidden.last, batch["prompt_length"]), remembered)
        return first, Prompt(kv, batch["segment_ids"], remembered)

    def _prefill(self, batch: Batch, *, keep: bool) -> tuple[Hidden, Cache | None, object]:
        remembered = self.behaviour.remember({**batch, "media_starts": media_starts(batch)})
        between = self.behaviour.between(remembered, batch["positions"][:, 0])
        hidden, kv = self.thinker.decoder.prefill(
            self.thinker.embed(batch), batch["positions"], batch["segment_ids"], keep=keep, between=between
        )
        return hidden, kv, remembered

    def decode(self, tokens: jax.Array, positions: jax.Array, prompt: Prompt, cache: Cache, step: jax.Array) -> tuple[jax.Array, Cache]:
        """As `Thinker.decode`."""
        decoder = self.thinker.decoder
        between = self.behaviour.between(prompt.remembered, jnp.broadcast_to(positions[:, None], tokens.shape))
        hidden, cache = decoder.decode(decoder.embed(tokens), positions, prompt.kv, prompt.segments, cache, step, between)
        return self.behaviour.finish(hidden, prompt.remembered), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The thinker's."""
        return self.thinker.logits(hidden)

    def unroll(self) -> None:
        """Makes a list of the decoder's layers."""
        self.thinker.unroll()
