"""The tolerances of the parity test are tight enough: every deliberate defect is at least ten times our own error, and is refused.

`pytest -s` prints the margins.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.models import audio
from omnisapiens_jax.models.attention import Attended, attend
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing import positions
from omnisapiens_jax.processing.example import Batch
from tests.models import cases, ours, references

LEAST_MARGIN = 10.0

Found = dict[str, np.ndarray]


def _as_is(config: str, case: str) -> Found:
    return ours.answers(ours.thinker(config), cases.batch(config, case))


def _with_config(change: Callable[[ThinkerConfig], ThinkerConfig], config: str, case: str) -> Found:
    """Our model with the same parameters and another config."""
    params = nnx.to_pure_dict(nnx.state(ours.thinker(config), nnx.Param))
    return ours.answers(ours.make(change(cases.CONFIGS[config]), params), cases.batch(config, case), run=_recompiled())


def _with_batch(change: Callable[[Batch, str], Batch], config: str, case: str) -> Found:
    return ours.answers(ours.thinker(config), change(cases.batch(config, case), config))


def _with_patch(patch: Callable[[], pytest.MonkeyPatch], config: str, case: str) -> Found:
    patched = patch()
    try:
        return ours.answers(ours.thinker(config), cases.batch(config, case), run=_recompiled())
    finally:
        patched.undo()


def _recompiled() -> Callable[..., dict[str, jax.Array]]:
    return nnx.jit(lambda model, batch: ours.forward(model, batch))


def _sections_permuted(config: ThinkerConfig) -> ThinkerConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, mrope_section=config.text.mrope_section[::-1]))


def _text_eps(config: ThinkerConfig) -> ThinkerConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, rms_norm_eps=1e-5))


def _windows_off(config: ThinkerConfig) -> ThinkerConfig:
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, fullatt_block_indexes=tuple(range(config.vision.depth))))


def _frames_joined(batch: Batch, config: str) -> Batch:
    """All frames of a row as the windows of one: whole-frame attention then crosses frames."""
    shapes = {name: (batch[name].shape[0], 1, -1, *batch[name].shape[3:]) for name in ("patches", "patch_mask", "patch_coords")}
    return batch | {name: batch[name].reshape(shape) for name, shape in shapes.items()}


def _order_kept(batch: Batch, config: str) -> Batch:
    """Cells stay in window order instead of going back to reading order."""
    index = batch["media_index"].copy()
    for row, tokens in enumerate(batch["tokens"]):
        places = np.isin(tokens, (cases.IDS.image, cases.IDS.video))
        index[row, places] = np.sort(index[row, places])
    return batch | {"media_index": index}


def _chunks_joined() -> pytest.MonkeyPatch:
    """Audio states attend to those of every chunk."""

    def everywhere(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array, *, causal: bool) -> Attended:
        joined = (leaf.reshape(1, -1, *leaf.shape[2:]) for leaf in (q, k, v, q_segments, k_segments))
        out = attend(*joined, causal=causal)
        return Attended(out.out.reshape(q.shape), out.lse.reshape(*q.shape[:3]))

    patch = pytest.MonkeyPatch()
    patch.setattr(audio, "attend", everywhere)
    return patch


def _tanh_gelu() -> pytest.MonkeyPatch:
    approximated = functools.partial(jax.nn.gelu, approximate=True)
    patch = pytest.MonkeyPatch()
    patch.setattr(audio, "_gelu", approximated)
    patch.setattr(jax.nn, "gelu", lambda x, approximate=False: approximated(x))
    return patch


@contextmanager
def _replaced(module: object, name: str, value: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, value)
        yield


def _positions_with(name: str, value: object, config: str, case: str) -> Found:
    """Positions made with a function of `processing.positions` replaced."""
    with _replaced(positions, name, value):
        made = cases.batch(config, case)
    return ours.answers(ours.thinker(config), made)


def _times_rounded(steps: int, seconds_per_grid: float, config: ThinkerConfig) -> np.ndarray:
    return np.round(np.arange(steps) * seconds_per_grid * config.position_id_per_seconds).astype(np.int64)


def _without_k_bias(config: str, case: str) -> Found:
    """No bias on the keys of decoder and vision encoder."""

    def dropped(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        names = [str(getattr(key, "key", key)) for key in path]
        return jnp.zeros_like(leaf) if names[-2:] in (["k_proj", "bias"], ["k", "bias"]) else leaf

    params = jax.tree_util.tree_map_with_path(dropped, nnx.to_pure_dict(nnx.state(ours.thinker(config), nnx.Param)))
    return ours.answers(ours.make(cases.CONFIGS[config], params), cases.batch(config, case))


DEFECTS: dict[str, tuple[str, Callable[[str, str], Found]]] = {
    "rope sections permuted": ("mixed_right", functools.partial(_with_config, _sections_permuted)),
    "eps 1e-5 for 1e-6": ("mixed_right", functools.partial(_with_config, _text_eps)),
    "window mask off": ("images_right", functools.partial(_with_config, _windows_off)),
    "frame mask off": ("videos_right", functools.partial(_with_batch, _frames_joined)),
    "window order not undone": ("images_right", functools.partial(_with_batch, _order_kept)),
    "chunk mask off": ("audios_right", functools.partial(_with_patch, _chunks_joined)),
    "tanh gelu": ("mixed_right", functools.partial(_with_patch, _tanh_gelu)),
    "k bias dropped": ("mixed_right", _without_k_bias),
    "t rounded, not truncated": ("videos_right", functools.partial(_positions_with, "video_times", _times_rounded)),
    "both bos apart": ("audio_longer", functools.partial(_positions_with, "_pair", lambda at: np.stack([[at, at + 1]] * 3))),
}
RECOMPILING = ("rope sections permuted", "eps 1e-5 for 1e-6", "window mask off", "frame mask off", "chunk mask off", "tanh gelu")


@pytest.mark.parametrize(
    ("config", "defect"),
    [
        pytest.param(config, defect, marks=[pytest.mark.slow] if config == "tied" and defect in RECOMPILING else [])
        for config in cases.CONFIGS
        for defect in DEFECTS
    ],
)
def test_a_defect_is_seen(config: str, defect: str) -> None:
    case, broken = DEFECTS[defect]
    reference = references.golden(config)[case]
    own, wrong = (
        float(np.abs(found["logits"] - reference.values["logits"]).max()) for found in (_as_is(config, case), broken(config, case))
    )
    tolerance = reference.tolerance("logits")
    margins = f"{wrong:.1e} = {wrong / own:9.0f} x our {own:.1e}, {wrong / tolerance:9.0f} x tolerance"
    print(f"{config:7} {defect:26} {case:12} logits off by {margins}")
    assert wrong > tolerance
    assert wrong >= LEAST_MARGIN * own
