"""Rollouts on the device: prompts are prefilled once a group, responses decoded in jitted chunks with a donated cache.

A sample depends on (seed, step, prompt id, rollout, token) alone, never on what it was batched with. Log-probabilities are those the
learner computes: `log_softmax(logits / temperature)` in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.decoder import Cache, KeyValue
from omnisapiens_jax.models.layers import shard
from omnisapiens_jax.models.thinker import Batch, Prompt, response_positions

Array = TypeVar("Array", jax.Array, np.ndarray)
Other = TypeVar("Other", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
      rollouts: responses to each prompt, n.
      max_tokens: longest response, R.
      temperature: divides the logits; 0 = greedy.
      eos: a response ends after any of these.
      pad: what finished rows are filled with.
      chunk: tokens decoded between two looks of the host.
    """

    rollouts: int
    max_tokens: int
    temperature: float
    eos: tuple[int, ...]
    pad: int
    chunk: int = 16


class Responses(NamedTuple, Generic[Array]):
    """Sampled responses of G prompts, on the device (`jax.Array`) or the host (`np.ndarray`)."""

    tokens: Array  # [G, n, R] int32, pad after the end
    log_probs: Array  # [G, n, R] float32 under the sampling policy; 0 after the end
    mask: Array  # [G, n, R] bool, true up to and including the end token

    def map(self, function: Callable[[Array], Other]) -> Responses[Other]:
        """`function` of each array."""
        return Responses(*(function(array) for array in self))


class DecodeState(NamedTuple):
    """Everything one decode chunk hands to the next; donated."""

    step: jax.Array  # scalar, tokens decoded so far
    hidden: jax.Array  # [G, n, D] states that predict token `step`
    positions: jax.Array  # [G] position of token 0
    prompt: Prompt
    cache: Cache
    keys: jax.Array  # [G, n] PRNG keys
    done: jax.Array  # [G, n] bool
    responses: Responses[jax.Array]


@functools.partial(jax.jit, static_argnames=("seed", "rollouts"))
def rollout_keys(seed: int, step: jax.Array | int, prompt_ids: jax.Array, rollouts: int) -> jax.Array:
    """PRNG keys `[G, n]` of rollouts, from what they are: `prompt_ids [G]` and the rollout's index."""
    base = jax.random.fold_in(jax.random.key(seed), step)

    def one(prompt: jax.Array, rollout: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(base, prompt), rollout)

    return jax.vmap(lambda prompt: jax.vmap(lambda rollout: one(prompt, rollout))(jnp.arange(rollouts)))(prompt_ids)


class Policy(Protocol):
    """What can be sampled from: a thinker, or one with descriptors. See `Thinker` for the methods."""

    @property
    def config(self) -> ThinkerConfig:
        """Its shapes."""
        ...

    def prefill(self, batch: Batch) -> tuple[jax.Array, Prompt]:
        """What decoding begins with."""
        ...

    def decode(self, tokens: jax.Array, positions: jax.Array, prompt: Prompt, cache: Cache, step: jax.Array) -> tuple[jax.Array, Cache]:
        """One token."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Of the states that the others give."""
        ...

    def unroll(self) -> None:
        """Makes a list of the decoder's layers."""
        ...


class Generator:
    """Samples responses with the parameters it is given; compiles two programs for each bucket of prompts."""

    def __init__(self, thinker: Policy, sampling: Sampling, *, unroll: bool):
        """`thinker` gives the structure (abstract arrays will do); `unroll` decodes with a list of layers (faster on CPU)."""
        graph, params = nnx.split(thinker)
        self.sampling, self._unroll = sampling, unroll
        self._graph = nnx.graphdef(nnx.eval_shape(lambda p: _unrolled(graph, p), params)) if unroll else graph
        self._view = jax.jit(lambda p: nnx.state(_unrolled(graph, p)))
        self._prefill = jax.jit(self._start)
        self._decode = jax.jit(self._chunk, donate_argnums=1)

    def view(self, params: nnx.State) -> nnx.State:
        """The parameters as decoding reads them: take it once after each update."""
        return self._view(params) if self._unroll else params

    def __call__(self, view: nnx.State, batch: Batch, keys: jax.Array) -> Responses[jax.Array]:
        """Responses to a batch of prompts; `view` from `view()`, `keys [G, n]` from `rollout_keys`.

        Raises:
          ValueError: the rows are packed.
        """
        if batch["prompt_length"].ndim != 1:
            raise ValueError("packed rows cannot be continued: a response follows one prompt a row; plan them homogeneous or mixed")
        state = self._prefill(view, batch, keys)
        for _ in range(0, self.sampling.max_tokens, self.sampling.chunk):
            state, finished = self._decode(view, state)
            if np.asarray(finished):
                break
        return state.responses

    def _start(self, view: nnx.State, batch: Batch, keys: jax.Array) -> DecodeState:
        thinker: Policy = nnx.merge(self._graph, view)
        sampling = self.sampling
        text = thinker.config.text
        groups, rollouts = batch["tokens"].shape[0], sampling.rollouts
        first, prompt = thinker.prefill(batch)
        shape = (groups * rollouts, sampling.max_tokens, text.num_kv_heads, text.head_dim)
        if isinstance(prompt.kv, list):
            cache: Cache = [KeyValue(jnp.zeros(shape, first.dtype), jnp.zeros(shape, first.dtype)) for _ in prompt.kv]
        else:
            shape = (text.num_layers, *shape)
            cache = KeyValue(*(shard(jnp.zeros(shape, first.dtype), None, "batch", None, "act_kv_heads", None) for _ in range(2)))
        tokens = (groups, rollouts, sampling.max_tokens)
        return DecodeState(
            step=jnp.zeros((), jnp.int32),
            hidden=jnp.broadcast_to(first[:, None], (groups, rollouts, first.shape[-1])),
            positions=response_positions(batch["prompt_length"], batch["rope_delta"], jnp.zeros(1, jnp.int32))[:, 0],
            prompt=prompt,
            cache=cache,
            keys=keys,
            done=jnp.broadcast_to(~batch["row_mask"][:, None], (groups, rollouts)),
            responses=Responses(jnp.full(tokens, sampling.pad, jnp.int32), jnp.zeros(tokens, jnp.float32), jnp.zeros(tokens, bool)),
        )

    def _chunk(self, view: nnx.State, state: DecodeState) -> tuple[DecodeState, jax.Array]:
        thinker: Policy = nnx.merge(self._graph, view)
        sampling = self.sampling
        stop = jnp.minimum(state.step + sampling.chunk, sampling.max_tokens)

        def wanted(state: DecodeState) -> jax.Array:
            return (state.step < stop) & ~jnp.all(state.done)

        def one(state: DecodeState) -> DecodeState:
            token, log_prob = _draw(thinker.logits(state.hidden), state.keys, state.step, sampling.temperature)
            token = jnp.where(state.done, sampling.pad, token)
            written = (token, jnp.where(state.done, 0.0, log_prob), ~state.done)
            place = (0, 0, state.step)
            responses = Responses(
                *(jax.lax.dynamic_update_slice(old, new[..., None], place) for old, new in zip(state.responses, written, strict=True))
            )
            done = state.done | jnp.isin(token, jnp.asarray(sampling.eos))
            positions = state.positions + state.step
            hidden, cache = thinker.decode(token, positions, state.prompt, state.cache, state.step)
            return state._replace(step=state.step + 1, hidden=hidden, cache=cache, done=done, responses=responses)

        state = jax.lax.while_loop(wanted, one, state)
        responses = state.responses.map(lambda leaf: shard(leaf, "batch", None, None))  # each process reads its own rows
        return state._replace(responses=responses), jnp.all(state.done)


def _unrolled(graph: nnx.GraphDef, params: nnx.State) -> Policy:
    thinker: Policy = nnx.merge(graph, params)
    thinker.unroll()
    return thinker


def _draw(logits: jax.Array, keys: jax.Array, step: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """A token of each row and its log-probability: `logits [G, n, V]`, `keys [G, n]` -> `[G, n]`, `[G, n]`."""
    log_probs = jax.nn.log_softmax(logits / temperature if temperature else logits, axis=-1)
    if temperature:
        draw = jax.vmap(jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row)))
        token = draw(keys, log_probs)
    else:
        token = jnp.argmax(logits, axis=-1)
    return token.astype(jnp.int32), jnp.take_along_axis(log_probs, token[..., None], axis=-1)[..., 0]
