"""OmniSapiens in JAX: the Qwen2.5-Omni thinker in pure Flax, trained on Human Behavior Atlas by SFT and on-device GRPO.

`omnisapiens_jax.load(path)` opens any checkpoint of the family.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnisapiens_jax.convert.loading import Loaded


def load(path: Any, **options: Any) -> Loaded:
    """A checkpoint with its processor and shapes; see `omnisapiens_jax.convert.loading.load`."""
    from omnisapiens_jax.convert.loading import load  # here, so that importing the package loads no library

    return load(path, **options)
