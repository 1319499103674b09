"""Shapes of the omni thinker: one frozen dataclass a tower, presets, and Hugging Face `config.json` in and out.

This file imports neither jax nor flax, so that host-side processing can read the geometry it must obey.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Of the pixels (0 to 1) that the published vision encoder was trained on, by channel.
PIXEL_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
PIXEL_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The Qwen2.5 decoder."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    mrope_section: tuple[int, int, int]  # rotary frequencies given to time, height, width; sums to head_dim / 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_positions: int = 32768

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads do not divide over {self.num_kv_heads} key/value heads")
        if sum(self.mrope_section) * 2 != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must sum to head_dim / 2 = {self.head_dim / 2}")
        if len(self.mrope_section) != 3:
            raise ValueError(f"mrope_section {self.mrope_section} must have three parts: time, height and width")


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """The Whisper-like audio encoder. Attention stays inside a chunk of `2 * n_window` mel frames."""

    d_model: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    output_dim: int
    num_mel_bins: int = 128
    n_window: int = 100
    max_source_positions: int = 1500

    def __post_init__(self) -> None:
        if self.d_model % 2 or self.d_model % self.num_heads:
            raise ValueError(f"the audio encoder's width {self.d_model} must be even and divide over its {self.num_heads} heads")
        if self.chunk_tokens > self.max_source_positions:
            raise ValueError(f"a chunk of {self.chunk_frames} mel frames has more states than {self.max_source_positions} positions")

    @property
    def chunk_frames(self) -> int:
        """Mel frames a chunk holds."""
        return 2 * self.n_window

    @property
    def chunk_tokens(self) -> int:
        """Encoder states a full chunk holds, after the stride-2 convolution and before pairwise pooling."""
        return (self.chunk_frames - 1) // 2 + 1


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The windowed vision encoder. A *cell* is one `spatial_merge_size`-squared block of patches: one decoder token."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    window_size: int = 112
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.num_heads):  # rotary pairs of rows and of columns
            raise ValueError(f"the vision encoder's width {self.hidden_size} must divide over {self.num_heads} heads of a multiple of four")
        if self.window_cells < 1:
            raise ValueError(f"a window of {self.window_size} pixels does not hold a cell of {self.spatial_merge_size} patches")

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch, ordered (channel, time, row, column)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def cell_patches(self) -> int:
        """Patches merged into one decoder token."""
        return self.spatial_merge_size**2

    @property
    def window_cells(self) -> int:
        """Side of an attention window, in cells."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Ids of the tokens that carry structure. `audio`, `image` and `video` are the repeated placeholders."""

    pad: int = 151643
    im_start: int = 151644
    im_end: int = 151645
    audio: int = 151646
    audio_bos: int = 151647
    audio_eos: int = 151648
    vision_bos: int = 151652
    vision_eos: int = 151653
    image: int = 151655
    video: int = 151656


@dataclasses.dataclass(frozen=True)
class ThinkerConfig:
    """The whole thinker: audio encoder + vision encoder + decoder with TMRoPE + LM head (kept when `tie_head` is false)."""

    text: TextConfig
    audio: AudioConfig
    vision: VisionConfig
    tokens: TokenIds = TokenIds()
    tie_head: bool = False
    position_id_per_seconds: int = 25
    seconds_per_chunk: int = 2

    def __post_init__(self) -> None:
        for tower, width in (("audio", self.audio.output_dim), ("vision", self.vision.out_hidden_size)):
            if width != self.text.hidden_size:
                raise ValueError(f"the {tower} encoder gives {width} features, the decoder takes {self.text.hidden_size}")

    @classmethod
    def preset(cls, name: str) -> ThinkerConfig:
        """One of `PRESETS`: `mini` (laptop), `3b` and `7b` (the published Qwen2.5-Omni thinkers)."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(sorted(PRESETS))}")
        return PRESETS[name]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | Path) -> ThinkerConfig:
        """Reads a Hugging Face `config.json` (a mapping, a file or its directory).

        Accepts the full omni file (`thinker_config` inside), a thinker-only one, and the spellings of transformers 4
        (`rope_theta`, `rope_scaling`, `*_token_index`) and 5 (`rope_parameters`, `*_token_id`). Class defaults of the library are
        never guessed: a missing size is an error that names it, as is a value that no thinker can have.
        """
        if isinstance(config, Mapping):
            content: Any = config
        else:
            path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
            if not path.is_file():
                raise FileNotFoundError(f"{path} is not there: name a Hugging Face directory, a checkpoint of ours or a config.json")
            content = json.loads(path.read_text())
        if not isinstance(content, Mapping):
            raise ValueError("config.json is not a JSON object")
        root = _part(content, "thinker_config") if "thinker_config" in content else content
        if missing := [part for part in ("text_config", "audio_config", "vision_config") if part not in root]:
            raise ValueError(f"config.json has no {missing[0]!r}: not a Qwen2.5-Omni thinker (model_type {content.get('model_type')!r})")
        text, audio, vision = (_part(root, part) for part in ("text_config", "audio_config", "vision_config"))
        spelling = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
        rope = _part(text, spelling) if text.get(spelling) else {}
        theta = rope if "rope_theta" in rope else text
        if "rope_theta" not in theta or "mrope_section" not in rope:
            raise ValueError("text_config needs rope_theta and mrope_section (in rope_parameters or rope_scaling)")
        if text.get("use_sliding_window"):
            raise ValueError("text_config.use_sliding_window is true; only full causal attention is supported")
        for holder, part, name, known in (
            (text, "text_config", "hidden_act", ("silu",)),
            (vision, "vision_config", "hidden_act", ("silu",)),
            (audio, "audio_config", "activation_function", ("gelu",)),
            (rope, spelling, "rope_type", ("default", "mrope")),
            (rope, spelling, "type", ("default", "mrope")),
        ):
            if holder.get(name) not in (None, *known):
                raise ValueError(f"config.json: {part} has {name} {holder[name]!r}; only {known[0]!r} is supported")
        sizes = {ours: _whole(text, "text_config", theirs) for ours, theirs in _TEXT_NAMES.items()}
        if text.get("head_dim") is not None:
            head_dim = _whole(text, "text_config", "head_dim")
        elif sizes["hidden_size"] % sizes["num_heads"]:
            raise ValueError(f"config.json: text_config has no head_dim, and hidden_size does not divide over {sizes['num_heads']} heads")
        else:
            head_dim = sizes["hidden_size"] // sizes["num_heads"]
        tokens = {}
        for field, names in _TOKEN_SPELLINGS.items():
            found = [(holder, part, name) for holder, part in ((root, "the thinker"), (text, "text_config")) for name in names]
            if said := [place for place in found if place[0].get(place[2]) is not None]:
                tokens[field] = _whole(*said[0], least=0)
        channels = "in_channels" if "in_channels" in vision else "in_chans"
        tied = [holder.get("tie_word_embeddings") for holder in (root, text)]
        if wrong := [value for value in tied if value not in (None, True, False)]:
            raise ValueError(f"config.json has tie_word_embeddings {wrong[0]!r}, neither true nor false")
        return cls(
            text=TextConfig(
                **sizes,
                head_dim=head_dim,
                mrope_section=_wholes(rope, spelling, "mrope_section"),
                rms_norm_eps=_positive(text, "text_config", "rms_norm_eps"),
                rope_theta=_positive(theta, "text_config", "rope_theta"),
            ),
            audio=AudioConfig(**{ours: _whole(audio, "audio_config", theirs) for ours, theirs in _AUDIO_NAMES.items()}),
            vision=VisionConfig(
                **{ours: _whole(vision, "vision_config", theirs) for ours, theirs in _VISION_NAMES.items()},
                in_channels=_whole(vision, "vision_config", channels, default=3),
                fullatt_block_indexes=_wholes(vision, "vision_config", "fullatt_block_indexes"),
            ),
            tokens=TokenIds(**tokens),
            tie_head=any(tied),
            position_id_per_seconds=_whole(root, "the thinker", "position_id_per_seconds", default=25),
            seconds_per_chunk=_whole(root, "the thinker", "seconds_per_chunk", default=2),
        )

    def to_hf(self) -> dict[str, Any]:
        """The thinker-only `config.json`, in the spelling that transformers 4.x and 5.x both read."""
        text: dict[str, Any] = {theirs: getattr(self.text, ours) for ours, theirs in _TEXT_NAMES.items()}
        text |= {
            "model_type": "qwen2_5_omni_text",
            "head_dim": self.text.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.text.rms_norm_eps,
            "rope_theta": self.text.rope_theta,
            "rope_scaling": {"mrope_section": list(self.text.mrope_section), "rope_type": "default", "type": "default"},
            "use_sliding_window": False,
            "tie_word_embeddings": self.tie_head,
            "pad_token_id": self.tokens.pad,
        }
        audio: dict[str, Any] = {theirs: getattr(self.audio, ours) for ours, theirs in _AUDIO_NAMES.items()}
        audio |= {"model_type": "qwen2_5_omni_audio_encoder", "activation_function": "gelu"}
        vision: dict[str, Any] = {theirs: getattr(self.vision, ours) for ours, theirs in _VISION_NAMES.items()}
        vision |= {
            "model_type": "qwen2_5_omni_vision_encoder",
            "in_channels": self.vision.in_channels,
            "in_chans": self.vision.in_channels,
            "fullatt_block_indexes": list(self.vision.fullatt_block_indexes),
            "hidden_act": "silu",
        }
        tokens = {names[0]: getattr(self.tokens, field) for field, names in _TOKEN_SPELLINGS.items()}
        return {
            "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
            "model_type": "qwen2_5_omni_thinker",
            "text_config": text,
            "audio_config": audio,
            "vision_config": vision,
            "tie_word_embeddings": self.tie_head,
            "position_id_per_seconds": self.position_id_per_seconds,
            "seconds_per_chunk": self.seconds_per_chunk,
            **tokens,
        }


_TEXT_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
_AUDIO_NAMES = {
    "d_model": "d_model",
    "num_layers": "encoder_layers",
    "num_heads": "encoder_attention_heads",
    "ffn_dim": "encoder_ffn_dim",
    "output_dim": "output_dim",
    "num_mel_bins": "num_mel_bins",
    "n_window": "n_window",
    "max_source_positions": "max_source_positions",
}
_VISION_NAMES = {
    "depth": "depth",
    "hidden_size": "hidden_size",
    "num_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "out_hidden_size": "out_hidden_size",
    "window_size": "window_size",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "spatial_merge_size",
}
_TOKEN_SPELLINGS = {  # our field -> names on disk, the one we write first
    "pad": ("pad_token_id",),
    "im_start": ("bos_token_id",),
    "im_end": ("eos_token_id",),
    "audio": ("audio_token_index", "audio_token_id"),
    "audio_bos": ("audio_start_token_id",),
    "audio_eos": ("audio_end_token_id",),
    "vision_bos": ("vision_start_token_id",),
    "vision_eos": ("vision_end_token_id",),
    "image": ("image_token_index", "image_token_id"),
    "video": ("video_token_index", "video_token_id"),
}


_LARGEST = (1 << 31) - 1  # of sizes and ids: arrays are indexed in int32
# Every layer's tensors are listed by name.
_MOST_LAYERS: dict[str, int] = dict.fromkeys(("num_hidden_layers", "encoder_layers", "depth"), 1000)


def _need(config: Mapping[str, Any], part: str, name: str) -> Any:
    if name not in config:
        raise ValueError(f"config.json: {part} has no {name!r}")
    return config[name]


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(config[name], Mapping):
        raise ValueError(f"config.json: {name} is {config[name]!r:.80}, not an object")
    return config[name]


def _whole(config: Mapping[str, Any], part: str, name: str, *, least: int = 1, default: int | None = None) -> int:
    value = _need(config, part, name) if default is None else config.get(name, default)
    most = _MOST_LAYERS.get(name, _LARGEST)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"config.json: {part} has {name} {value!r:.80}, not a whole number from {least} to {most:,}")
    return value


def _wholes(config: Mapping[str, Any], part: str, name: str) -> Any:
    values = _need(config, part, name)
    if not isinstance(values, list | tuple) or not all(type(value) is int and 0 <= value <= _LARGEST for value in values):
        raise ValueError(f"config.json: {part} has {name} {values!r:.80}, not a list of whole numbers")
    return tuple(values)


def _positive(config: Mapping[str, Any], part: str, name: str) -> float:
    value = _need(config, part, name)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"config.json: {part} has {name} {value!r:.80}, not a finite number above 0")
    return float(value)


def _published(*, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> ThinkerConfig:
    """A published Qwen2.5-Omni thinker: the encoders of both sizes are alike but for the width they put out."""
    return ThinkerConfig(
        text=TextConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=128,
            intermediate_size=ffn,
            mrope_section=(16, 24, 24),
        ),
        audio=AudioConfig(d_model=1280, num_layers=32, num_heads=20, ffn_dim=5120, output_dim=hidden),
        vision=VisionConfig(
            depth=32,
            hidden_size=1280,
            num_heads=16,
            intermediate_size=3420,
            out_hidden_size=hidden,
            fullatt_block_indexes=(7, 15, 23, 31),
        ),
    )


# The ids of `mini` are those of the bundled sentencepiece vocabulary (processing/tokenizers.py keeps them in this order).
PRESETS: dict[str, ThinkerConfig] = {
    "mini": ThinkerConfig(
        text=TextConfig(
            vocab_size=1024,
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            intermediate_size=384,
            mrope_section=(4, 6, 6),
        ),
        audio=AudioConfig(
            d_model=96, num_layers=2, num_heads=4, ffn_dim=256, output_dim=128, num_mel_bins=128, n_window=25, max_source_positions=1500
        ),
        vision=VisionConfig(
            depth=2,
            hidden_size=96,
            num_heads=4,
            intermediate_size=256,
            out_hidden_size=128,
            window_size=56,
            fullatt_block_indexes=(1,),
        ),
        tokens=TokenIds(pad=0, im_start=1, im_end=2, audio=3, audio_bos=4, audio_eos=5, vision_bos=6, vision_eos=7, image=8, video=9),
    ),
    "3b": _published(hidden=2048, layers=36, heads=16, kv_heads=2, ffn=11008, vocab=151936),
    "7b": _published(hidden=3584, layers=28, heads=28, kv_heads=4, ffn=18944, vocab=152064),
}
