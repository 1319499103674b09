"""What a run learns: parameters split into trainable and frozen, the optimizer, and gradients over micro-batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from omnisapiens_jax.convert.checkpoint import put_params
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.loading import fill_parts, read_params_onto
from omnisapiens_jax.convert.source import Params, Source
from omnisapiens_jax.generation.sampling import Generator, Policy, Sampling
from omnisapiens_jax.models.classifier import Classifier
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.heads import DomainHeads
from omnisapiens_jax.models.layers import LoraConfig, LoraParam
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.parallel.mesh import on_mesh, shardings

Stats = TypeVar("Stats")  # anything that adds up over micro-batches with `+`

TRAINS = ("thinker", "lm_head")
MOST_SKIPPED = 5  # updates in a row whose gradient is not finite; then a run stops


class TrainState(NamedTuple):
    """All that an update reads and writes; frozen leaves have neither gradient nor optimizer state."""

    step: jax.Array
    trainable: nnx.State
    frozen: nnx.State
    opt_state: optax.OptState


@functools.cache
def open_weights(weights: str) -> Source:
    """The checkpoint `config.model.weights`, of any kind. Opened once a process: what a name on the hub stands for may change."""
    return open_source(weights)


def thinker_config(model: ml_collections.ConfigDict) -> ThinkerConfig:
    """The shapes of the checkpoint `model.weights`, or those of `model.preset`; an LM head that is trained alone is untied."""
    config = open_weights(model.weights).config if model.weights else ThinkerConfig.preset(model.preset)
    return dataclasses.replace(config, tie_head=config.tie_head and model.trains != "lm_head")


def lora_config(model: ml_collections.ConfigDict) -> LoraConfig | None:
    """The adapters that `model.lora` asks for, or None at rank 0."""
    if not model.lora.rank:
        return None
    return LoraConfig(model.lora.rank, model.lora.alpha, dict(model.lora.targets), model.lora.stabilised)


def make_thinker(model: ml_collections.ConfigDict, seed: int) -> Thinker:
    """A thinker with random weights, as `config.model` describes it.

    An LM head that is trained alone is stored in float32, as LoRA factors are: an update of it would vanish in bfloat16.
    """
    thinker = Thinker(
        thinker_config(model),
        rngs=nnx.Rngs(seed),
        lora=lora_config(model),
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        remat=model.remat,
    )
    if model.trains == "lm_head":
        assert thinker.lm_head is not None  # `thinker_config` unties it
        thinker.lm_head.kernel.set_value(thinker.lm_head.kernel[...].astype(jnp.float32))
    return thinker


def make_model(model: ml_collections.ConfigDict, seed: int) -> Thinker | Classifier:
    """A thinker with random weights, under `model.heads` where there are some, each with as many labels as it says."""
    thinker = make_thinker(model, seed)
    return Classifier(thinker, model.heads, rngs=nnx.Rngs(seed + 1)) if model.heads else thinker


def thinker_of(model: Thinker | Classifier) -> Thinker:
    """The thinker in a model."""
    return model.thinker if isinstance(model, Classifier) else model


def make_generator(generation: ml_collections.ConfigDict, policy: Policy, *, rollouts: int = 1, temperature: float = 0.0) -> Generator:
    """A sampler for a policy, whose arrays may be abstract, as `config.generation` says; by default of the one likeliest response."""
    tokens = policy.config.tokens
    ends = (tokens.im_end, tokens.pad)
    sampling = Sampling(rollouts, generation.max_tokens, temperature, eos=ends, pad=tokens.pad, chunk=generation.chunk)
    return Generator(policy, sampling, unroll=generation.unroll)


def trainable_filter(model: ml_collections.ConfigDict) -> Any:
    """What a run trains: the LM head alone, or LoRA factors where there are any, else every parameter of the thinker; and all heads."""
    if model.trains not in TRAINS:
        raise ValueError(f"unknown model.trains {model.trains!r}; known: {', '.join(TRAINS)}")
    if model.trains == "lm_head":
        return nnx.PathContains("lm_head")
    thinker = LoraParam if model.lora.rank else nnx.All(nnx.Param, nnx.Not(nnx.PathContains("audio_bos_eos_token")))  # which none reads
    return nnx.Any(thinker, nnx.PathContains("heads"))


def make_optimizer(optim: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and clipping to a global norm (0: none); an update with a non-finite gradient is skipped and counted."""
    decay_steps = max(steps, optim.warmup + 1)
    schedules = {
        "constant": lambda: optax.warmup_constant_schedule(0.0, optim.lr, optim.warmup),
        "cosine": lambda: optax.warmup_cosine_decay_schedule(0.0, optim.lr, optim.warmup, decay_steps),
    }
    if optim.schedule not in schedules:
        raise ValueError(f"unknown optim.schedule {optim.schedule!r}; known: {', '.join(schedules)}")
    schedule = schedules[optim.schedule]() if optim.warmup or optim.schedule != "constant" else optim.lr
    adamw = optax.adamw(schedule, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay)
    never = np.iinfo(np.int32).max  # optax would let the next one through; `check_finite` stops the run instead
    clip = [optax.clip_by_global_norm(optim.clip)] if optim.clip else []
    return optax.apply_if_finite(optax.chain(*clip, adamw), max_consecutive_errors=never)


def create_state(model: ml_collections.ConfigDict, seed: int, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
    """Parameters from `model.weights`, or random ones; made or read where they will live: no device holds more than its share.

    Heads go on from those of the weights where these have some, and an LM head that is trained alone from a tied one as well. There is no
    optimizer yet: a stage brings its own (`fresh_optimizer`).
    """
    abstract = nnx.eval_shape(lambda: make_model(model, seed))
    source = open_weights(model.weights) if model.weights else None
    if source is not None:
        source.check()
        if model.trains == "lm_head":
            source = source.untied()
        if model.heads and source.part_shapes.heads not in ((), tuple(model.heads)):
            raise ValueError(f"{model.weights} has heads of {source.part_shapes.heads} labels, the run wants {tuple(model.heads)}")
        kept = source.lora and source.lora.config
        if kept and kept != lora_config(model):
            raise ValueError(
                f"{model.weights} has LoRA factors ({kept}), the config asks for {lora_config(model)}: set config.model.lora to what is "
                f"there, or merge them first: python tools/convert_weights.py merge {model.weights} MERGED"
            )

    def init(params: Params | None, factors: Params | None) -> TrainState:
        made = make_model(model, seed)
        if params is not None:
            put_params(thinker_of(made), params, factors)
        if isinstance(made, Classifier) and source is not None and source.part_shapes.heads:
            fill_parts(made.heads, {}, source.parts)
        _, trainable, frozen = nnx.split(made, trainable_filter(model), ...)
        return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, ())

    with on_mesh(mesh):
        params, factors = (None, None) if source is None else read_params_onto(source, thinker_of(abstract), mesh)
        # Donated, so that a checkpoint's parameters are not on the devices twice.
        placed = shardings(jax.eval_shape(init, params, factors), mesh)
        state = jax.jit(init, out_shardings=placed, donate_argnums=(0, 1))(params, factors)
    return nnx.graphdef(abstract), state


def fresh_head(state: TrainState, model: ml_collections.ConfigDict, seed: int, domain: int, mesh: Mesh) -> TrainState:
    """The same parameters, but those of one domain's head are again what `create_state` draws for a model without weights."""
    heads = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.trainable) if _of_heads(path)]
    own = np.repeat(np.arange(len(model.heads)), model.heads) == domain  # [C]: heads lie side by side

    def draw(heads: list[jax.Array]) -> list[jax.Array]:
        width = thinker_config(model).text.hidden_size
        made = jax.tree.leaves(nnx.state(DomainHeads(width, model.heads, rngs=nnx.Rngs(seed + 1))))
        return [jnp.where(own, new, old) for new, old in zip(made, heads, strict=True)]

    with on_mesh(mesh):
        drawn = iter(jax.jit(draw, out_shardings=[leaf.sharding for leaf in heads])(heads))
    trainable = jax.tree_util.tree_map_with_path(lambda path, leaf: next(drawn) if _of_heads(path) else leaf, state.trainable)
    return state._replace(trainable=trainable)


def _of_heads(path: tuple[Any, ...]) -> bool:
    return jax.tree_util.keystr(path, simple=True, separator="/").startswith("heads/")


def fresh_optimizer(state: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The same parameters at step 0 with a new optimizer: what a stage starts with."""
    abstract = jax.eval_shape(optimizer.init, state.trainable)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings(abstract, mesh))(state.trainable)
    return state._replace(step=jnp.zeros_like(state.step), opt_state=opt_state)


def parameters(state: TrainState) -> nnx.State:
    """Trainable and frozen parameters as one state."""
    return nnx.merge_state(state.trainable, state.frozen)


def micro_gradients(
    loss: Callable[[nnx.State, Any], tuple[jax.Array, Stats]],
    trainable: nnx.State,
    batch: Any,
    micro_batches: int,
    wanted: Callable[[Any], jax.Array] | None = None,
) -> tuple[jax.Array, Stats, nnx.State]:
    """Loss, statistics and gradient of a batch, `micro_batches` rows-interleaved parts at a time.

    `loss` gives a part's *share* of the loss (denominators of the whole batch), so the parts add up whatever their number. A part that is
    not `wanted`, because its share and its gradient are zero, is not run; all are where `wanted` is None or there is but one.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if micro_batches == 1:
        (value, stats), grads = gradient(trainable, batch)
        return value, stats, grads
    # Rows m, m + M, ... make part m: the batch axis stays divided over the devices as it was.
    parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1), batch)

    def add(total: tuple[Any, Any, Any], part: Any) -> tuple[Any, Any, Any]:
        (value, stats), grads = gradient(trainable, part)
        return total[0] + value, total[1] + stats, jax.tree.map(jnp.add, total[2], grads)

    def step(total: tuple[Any, Any, Any], part: Any) -> tuple[tuple[Any, Any, Any], None]:
        return add(total, part) if wanted is None else jax.lax.cond(wanted(part), add, lambda total, _: total, total, part), None

    first = jax.tree.map(lambda x: x[0], parts)
    (value, stats), grads = jax.eval_shape(gradient, trainable, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value, stats, grads))
    return jax.lax.scan(step, zeros, parts)[0]


def apply_gradients(
    state: TrainState, grads: nnx.State, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step, and `grad_norm`, `skipped_updates` (so far, for a gradient that was not finite) and `skipped_in_a_row`."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    assert isinstance(opt_state, optax.ApplyIfFiniteState)  # as make_optimizer makes it
    trainable = optax.apply_updates(state.trainable, updates)
    metrics = {"grad_norm": optax.global_norm(grads), "skipped_updates": opt_state.total_notfinite}
    metrics["skipped_in_a_row"] = opt_state.notfinite_count
    return state._replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Stops a run that no longer learns.

    Raises:
      FloatingPointError: the gradients of the last `MOST_SKIPPED` updates were not finite; the parameters are those from before them.
    """
    if metrics["skipped_in_a_row"] >= MOST_SKIPPED:
        raise FloatingPointError(
            f"step {step}: the gradients of the last {metrics['skipped_in_a_row']:.0f} updates were not finite, so nothing is learnt. The "
            "parameters are still finite and the last checkpoint is good: start again with a lower optim.lr, or look for a broken sample"
        )
