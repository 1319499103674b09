"""A config.json that describes no thinker is told by the field that is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.layers import LoraConfig
from tests.models import cases

CONFIG = cases.CONFIGS["uneven"]
WHOLE = [f"text_config.{name}" for name in ("vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")]
WHOLE += ["audio_config.encoder_attention_heads", "audio_config.n_window", "vision_config.num_heads", "vision_config.patch_size"]
WHOLE += ["position_id_per_seconds", "seconds_per_chunk"]
SIZES = (0, -1, "16", [], {}, 1.5, float("nan"), True, 1 << 40)
NUMBERS = (0, -1e-6, "1e-6", None, [], float("nan"), float("inf"), 10**400, True)


def changed(field: str, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(CONFIG.to_hf())
    *parts, name = field.split(".")
    holder = content
    for part in parts:
        holder = holder[part]
    holder[name] = value
    return content


@pytest.mark.parametrize(
    ("field", "values"),
    [
        *((field, SIZES) for field in WHOLE),
        *((field, (1_000_000,)) for field in ("text_config.num_hidden_layers", "audio_config.encoder_layers", "vision_config.depth")),
        ("text_config.rms_norm_eps", NUMBERS),
        ("text_config.rope_theta", NUMBERS),
        ("text_config.rope_scaling.mrope_section", (None, 3, "abc", [2, "3", 4], [1.5, 2, 3], [-1, 4, 6])),
        ("vision_config.fullatt_block_indexes", (None, 1, "1", [1.5], [-1], [None])),
        ("audio_token_index", ("7", -1, 1.5, [7])),
        ("pad_token_id", ("7", -1, 1.5, [7])),
        ("tie_word_embeddings", ("yes", [], 2)),
        ("text_config.hidden_act", ("x", "gelu", 1, [])),
        ("audio_config.activation_function", ("silu", {})),
        ("vision_config.hidden_act", ("quick_gelu",)),
        ("text_config.rope_scaling.rope_type", ("x", "linear", "yarn")),
        ("text_config.rope_scaling.type", ("dynamic",)),
    ],
)
def test_a_value_that_no_thinker_has_is_told_with_its_field(field: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=field.split(".")[-1]):
            ThinkerConfig.from_hf(changed(field, value))


@pytest.mark.parametrize("field", ["text_config", "audio_config", "vision_config", "text_config.rope_scaling"])
def test_a_part_that_is_no_object_is_told(field: str) -> None:
    for value in ([1], "x", 7):
        with pytest.raises(ValueError, match=rf"{field.split('.')[-1]} is .*, not an object"):
            ThinkerConfig.from_hf(changed(field, value))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("audio_config.encoder_attention_heads", 5, "the audio encoder's width 24 must be even and divide over its 5 heads"),
        ("audio_config.n_window", 100_000, "a chunk of 200000 mel frames has more states than"),
        ("vision_config.num_heads", 7, "the vision encoder's width 40 must divide over 7 heads"),
        ("vision_config.window_size", 1, "a window of 1 pixels does not hold a cell"),
        ("text_config.head_dim", None, "text_config has no head_dim, and hidden_size does not divide over"),
    ],
)
def test_sizes_that_do_not_fit_together_are_told(field: str, value: Any, said: str) -> None:
    content = changed(field, value)
    if value is None:
        content["text_config"]["num_attention_heads"] = 3
    with pytest.raises(ValueError, match=said):
        ThinkerConfig.from_hf(content)


@pytest.mark.parametrize("holder", ["", "text_config."])
def test_a_head_is_tied_where_either_level_says_so(holder: str) -> None:
    assert not ThinkerConfig.from_hf(CONFIG.to_hf()).tie_head
    assert ThinkerConfig.from_hf(changed(f"{holder}tie_word_embeddings", True)).tie_head


@pytest.mark.parametrize(
    ("rank", "alpha"), [(0, 1.0), (-3, 1.0), (3.9, 1.0), ("3", 1.0), (3, 0), (3, float("nan")), (3, float("inf")), (3, "6"), (3, 10**400)]
)
def test_factors_have_a_whole_rank_and_a_finite_alpha(rank: Any, alpha: Any) -> None:
    with pytest.raises(ValueError, match=r"a LoRA (rank is a whole number from 1 on|alpha is a finite number above 0), not"):
        LoraConfig(rank, alpha, {})
