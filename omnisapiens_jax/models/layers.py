"""Projections, norms, rotary angles and the stack of layers that every tower is built of.

Logical axis names (see `parallel/mesh.py` for the mesh axes they map to) are written on every parameter; activations are constrained
with `shard`. Nothing here names a mesh axis.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.spmd import with_logical_constraint

Remat = Literal["none", "full", "dots"]
Names = tuple[str | None, ...]

_REMAT_POLICIES: dict[Remat, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _all_but_slices(primitive: Any, *_: Any, **__: Any) -> bool:
    """A remat policy: the backward pass takes slices of stacked weights again, or they would be kept, copied, for every layer."""
    return primitive.name not in ("dynamic_slice", "squeeze")


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation's layout by logical names; does nothing outside a mesh."""
    return with_logical_constraint(x, names)


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, of which the backward pass keeps the arguments alone and computes the rest anew.

    What `jax.checkpoint` does, as long as no other `jax.checkpoint` with a policy stands around it: that one looks inside, and keeps what
    its policy finds there.
    """

    @jax.custom_vjp
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    def backward(arguments: tuple[Any, ...], grad: Any) -> Any:
        return jax.vjp(function, *jax.lax.optimization_barrier(arguments))[1](grad)

    call.defvjp(lambda *arguments: (function(*arguments), arguments), backward)
    return call


class LoraParam(nnx.Param):
    """A LoRA factor: its own type, so that a filter can split it from the frozen base."""


class DropoutKey(nnx.Variable):
    """The key of what a LoRA branch drops; stacked layers have one each. A model has them for a training step alone, see `drop_lora`."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on projections named by tower (`decoder`, `audio`, `vision`), never by bare suffix.

    `W' = W + scale * A B` with `scale = alpha / rank` (Hu et al. 2021, section 4.1), or `alpha / sqrt(rank)` when rank-stabilised
    (Kalajdzievski 2023).
    """

    rank: int
    alpha: float
    targets: Mapping[str, tuple[str, ...]]
    stabilised: bool = False

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"a LoRA rank is a whole number from 1 on, not {self.rank!r}")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha <= sys.float_info.max:
            raise ValueError(f"a LoRA alpha is a finite number above 0, not {self.alpha!r}")
        for tower, names in self.targets.items():
            if tower not in LORA_TARGETS:
                raise ValueError(f"LoRA scope {tower!r} is not a tower; known: {', '.join(LORA_TARGETS)}")
            if unknown := set(names) - set(LORA_TARGETS[tower]):
                raise ValueError(f"the {tower} has no projection {sorted(unknown)}; known: {', '.join(LORA_TARGETS[tower])}")
        # In one order, without empty scopes: two configs that mean the same are equal.
        scopes = {
            tower: tuple(n for n in LORA_TARGETS[tower] if n in self.targets[tower]) for tower in LORA_TARGETS if self.targets.get(tower)
        }
        object.__setattr__(self, "targets", scopes)

    @property
    def scale(self) -> float:
        """The factor on the low-rank product."""
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)


LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "decoder": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "audio": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "vision": ("q", "k", "v", "proj", "gate_proj", "up_proj", "down_proj"),
}


@dataclasses.dataclass(frozen=True)
class Build:
    """What every module of one tower is built with."""

    tower: str
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    lora: LoraConfig | None = None
    remat: Remat = "none"

    def lora_on(self, name: str) -> LoraConfig | None:
        """The adapter of projection `name`, or None where none is wanted."""
        if self.lora is None or name not in self.lora.targets.get(self.tower, ()):
            return None
        return self.lora

    def param(
        self, init: Callable[..., jax.Array], rngs: nnx.Rngs, shape: tuple[int, ...], names: Names, kind: type[nnx.Param] = nnx.Param
    ) -> nnx.Param:
        """A parameter with its logical axis names; it is laid out on a mesh later, by jit, not when it is made.

        LoRA factors are float32 whatever the base is stored in: an update of 1e-6 would vanish in bfloat16.
        """
        dtype = jnp.float32 if kind is LoraParam else self.param_dtype
        return kind(init(rngs.params(), shape, dtype), out_sharding=names, eager_sharding=False)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x [..., in] @ kernel [in, out]`.

    The gradient of the kernel is `x^T g` or `(g^T x)^T`, whichever transposes the narrower array. JAX's own is always the second: XLA on
    CPU then writes a transposed copy of the wide `g` of a LoRA factor, a quarter of the whole step.
    """
    return x @ kernel


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    contract = functools.partial(jax.lax.dot_general, dimension_numbers=((rows, rows), ((), ())))
    return grad @ kernel.T, contract(x, grad) if x.shape[-1] <= grad.shape[-1] else contract(grad, x).T


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """`x @ kernel + bias`, kernel `[in, out]`, with an optional LoRA branch beside it."""

    def __init__(self, build: Build, name: str, shape: tuple[int, int], names: Names, *, bias: bool, rngs: nnx.Rngs):
        """`names` are the logical axes of `(in, out)`; `name` is what LoRA scopes call this projection."""
        self.dtype = build.dtype
        self.kernel = build.param(nnx.initializers.lecun_normal(), rngs, shape, names)
        self.bias = build.param(nnx.initializers.zeros, rngs, shape[1:], names[1:]) if bias else None
        lora = build.lora_on(name)
        self.lora_scale = lora.scale if lora else 0.0
        # Kaiming uniform with a = sqrt(5) and zeros, as in the original LoRA. (One assignment each: nnx fixes what kind an attribute is.)
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.lora_a = build.param(uniform, rngs, (shape[0], lora.rank), (names[0], None), LoraParam) if lora else None
        self.lora_b = build.param(nnx.initializers.zeros, rngs, (lora.rank, shape[1]), (None, names[1]), LoraParam) if lora else None
        self.lora_dropout = 0.0
        self.dropout_key: DropoutKey | None = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in]` -> `[..., out]`."""
        x = x.astype(self.dtype)
        y = matmul(x, self.kernel[...].astype(self.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            low = matmul(self._dropped(x), self.lora_a[...].astype(self.dtype)) * self.lora_scale
            y = y + matmul(low, self.lora_b[...].astype(self.dtype))
        return y

    def _dropped(self, x: jax.Array) -> jax.Array:
        """What the LoRA branch reads of `x [..., in]`."""
        if self.dropout_key is None:
            return x
        kept = jax.random.bernoulli(self.dropout_key[...], 1 - self.lora_dropout, x.shape)
        return jnp.where(kept, x / (1 - self.lora_dropout), 0)


def drop_lora(model: nnx.Module, rate: float, key: jax.Array) -> None:
    """Makes every LoRA branch of a model drop numbers that it reads, and scale the others up, as PEFT does: `B A dropout(x)`.

    Every projection drops others. What is dropped depends on the key and on the shape of what is read, not on how that is sharded.

    Args:
      model: of one step; a model that is evaluated is left as it is.
      rate: odds that a number is dropped, from 0 to less than 1.
      key: a scalar key.
    """
    adapted = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Linear) and module.lora_a is not None}
    for number, path in enumerate(sorted(adapted)):
        module = adapted[path]
        assert module.lora_a is not None
        module.lora_dropout = rate
        module.dropout_key = DropoutKey(jax.random.split(jax.random.fold_in(key, number), module.lora_a[...].shape[:-2]))


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32; the scale is multiplied after casting back, as in Qwen2."""

    def __init__(self, build: Build, features: int, eps: float, *, rngs: nnx.Rngs):
        """`features` is the width of the last axis."""
        self.eps = eps
        self.scale = build.param(nnx.initializers.ones, rngs, (features,), ("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` -> `[..., D]`."""
        return recomputed(functools.partial(_rms_norm, eps=self.eps))(x, self.scale[...].astype(x.dtype))  # cheap to do again


def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale


class LayerNorm(nnx.Module):
    """Layer norm with affine parameters, computed in float32."""

    def __init__(self, build: Build, features: int, eps: float, *, rngs: nnx.Rngs):
        """`features` is the width of the last axis."""
        self.eps = eps
        self.scale = build.param(nnx.initializers.ones, rngs, (features,), ("norm",))
        self.bias = build.param(nnx.initializers.zeros, rngs, (features,), ("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` -> `[..., D]`."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, build: Build, width: int, hidden: int, *, bias: bool, rngs: nnx.Rngs):
        """`width` in and out, `hidden` between."""
        self.gate_proj = Linear(build, "gate_proj", (width, hidden), ("embed", "mlp"), bias=bias, rngs=rngs)
        self.up_proj = Linear(build, "up_proj", (width, hidden), ("embed", "mlp"), bias=bias, rngs=rngs)
        self.down_proj = Linear(build, "down_proj", (hidden, width), ("mlp", "embed"), bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` -> `[..., D]`."""
        gated = recomputed(lambda gate, up: jax.nn.silu(gate) * up)  # two wide arrays are kept for the backward pass, not six
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotary embedding, half-split convention: `x [..., T, N, H]` turned by `angles [..., T, H/2]`, in float32."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Stack(nnx.Module):
    """`depth` alike layers whose parameters are stacked on a leading `layers` axis and run by one `lax.scan`.

    `unroll` gives the same layers as a list with its own buffers: decoding on CPU reads weights in place then, where the scan
    copies a slice of every stacked leaf for every token (2x there).
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], depth: int, remat: Remat, *, rngs: nnx.Rngs):
        """`make(rngs)` builds one layer."""
        self.depth = depth
        self.remat: Remat = remat

        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0, axis_size=depth, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def make_all(rngs: nnx.Rngs) -> nnx.Module:
            return make(rngs)

        self.block: nnx.Module | nnx.List = make_all(rngs)

    def run(
        self, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any = None, *, start: int = 0, stop: int | None = None
    ) -> tuple[Any, Any]:
        """Like `jax.lax.scan` over the layers: `body(layer, carry, x) -> (carry, y)`; `xs` leads with `depth`, `ys` with the layers run.

        When unrolled, `xs` is a list with one entry a layer and so is `ys`. Only layers `start` to `stop - 1` are run.
        """
        stop = self.depth if stop is None else stop
        if isinstance(self.block, nnx.List):
            ys = []
            for i in range(start, stop):
                carry, y = body(self.block[i], carry, None if xs is None else xs[i])
                ys.append(y)
            return carry, ys
        if (start, stop) != (0, self.depth):
            return self._run_part(body, carry, xs, start, stop)
        graph, state = nnx.split(self.block)

        def step(carry: Any, inputs: tuple[nnx.State, Any]) -> tuple[Any, Any]:
            layer_state, x = inputs
            return body(nnx.merge(graph, layer_state), carry, x)

        if self.remat != "none":
            step = jax.checkpoint(step, policy=_REMAT_POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(step, carry, (state, xs), length=self.depth)

    def _run_part(self, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any, start: int, stop: int) -> tuple[Any, Any]:
        """`run` of some of the stacked layers; the others cost nothing, forwards or backwards.

        The layers' weights are read where they lie: a slice of the stack, which a scan would want, is a copy of them. Only LoRA factors,
        which are small and trained, are sliced, so that their gradients need not be added up in a whole stack.
        """
        graph, factors, weights = nnx.split(self.block, LoraParam, ...)

        def step(carry: Any, inputs: tuple[jax.Array, nnx.State]) -> tuple[Any, Any]:
            index, own = inputs
            read, x = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), (weights, xs))
            return body(nnx.merge(graph, own, read), carry, x)

        sliced = jax.tree.map(lambda leaf: leaf[start:stop], factors)
        policy = _all_but_slices if self.remat == "none" else _REMAT_POLICIES[self.remat]
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        return jax.lax.scan(step, carry, (jnp.arange(start, stop), sliced), length=stop - start)

    def layer(self, index: int) -> nnx.Module:
        """One layer with buffers of its own (-1: the last)."""
        if isinstance(self.block, nnx.List):
            return nnx.clone(self.block[index])
        graph, state = nnx.split(self.block)

        def take(leaf: nnx.Param) -> nnx.Variable:
            return leaf.replace(leaf[...][index], out_sharding=leaf.get_metadata("out_sharding")[1:])

        return nnx.merge(graph, jax.tree.map(take, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)))

    def unroll(self) -> None:
        """Replaces the stacked layers by a list of single ones (inference only)."""
        self.block = nnx.List([self.layer(index) for index in range(self.depth)])
