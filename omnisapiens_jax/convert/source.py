"""What any checkpoint gives, whatever its kind: the thinker's tensors by Hugging Face's names, and the small parts beside them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util

from omnisapiens_jax.atlas.labels import LabelScheme
from omnisapiens_jax.convert.names import Mapping as Row
from omnisapiens_jax.convert.names import lora_mappings, mappings
from omnisapiens_jax.convert.parts import PartShapes, part_shapes
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.layers import LoraConfig
from omnisapiens_jax.processing.tensors import ConversionError, File, HeldTensor, Tensor, some

# Names of the dtypes that parameters are stored in.
FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

Params = dict[str, Any]  # nested dict of arrays, the pure state of `models.thinker.Thinker`
Progress = Callable[[str, int, int], None]  # the tensor just done, bytes done, bytes of all


@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA factors by PEFT's names without prefix, `model.layers.0.self_attn.q_proj.lora_A.weight`."""

    config: LoraConfig
    factors: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A tensor that is left behind."""

    name: str
    file: str
    why: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that is open for reading. Nothing of its tensors is in memory until it is read.

    Attributes:
      path: its directory or file.
      kind: what it is, in words.
      config: the thinker's shapes.
      tensors: the thinker's tensors by thinker-only names.
      lora: factors that are kept beside the thinker, if any.
      parts: heads and adapters by their released names (`heads.0.weight`, `video_adapter.mlp.0.weight`).
      skipped: what is left behind, and why.
      companions: the directory where tokenizer and settings lie.
      settings: files beside those of the tensors that say what they mean.
      base: the directory of what the checkpoint itself lacks: the weights beneath its factors, or the config.
      added: the LoRA whose factors were added to the weights.
      scheme: what the classes of its heads are called, if a run of ours has trained them; see `label_files` for those of others.
    """

    path: Path
    kind: str
    config: ThinkerConfig
    tensors: Mapping[str, Tensor]
    lora: Lora | None
    parts: Mapping[str, Tensor]
    skipped: tuple[Skipped, ...]
    companions: Path
    settings: tuple[Path, ...] = ()
    base: Path | None = None
    added: LoraConfig | None = None
    scheme: LabelScheme | None = None

    @property
    def files(self) -> set[Path]:
        """Everything that it is read from; a directory stands for the arrays in it."""
        factors = self.lora.factors if self.lora else {}
        tensors = (*self.tensors.values(), *factors.values(), *self.parts.values())
        return {*self.settings, *files_of(tensors)}

    def receipt(self) -> dict[str, Any]:
        """What a receipt says of it as a whole."""
        return {
            "kind": self.kind,
            "source": str(self.path),
            "base": None if self.base is None else str(self.base),
            "merged": None if self.added is None else {**dataclasses.asdict(self.added), "scale": self.added.scale},
            "skipped": [dataclasses.asdict(skipped) for skipped in self.skipped],
        }

    def without_parts(self, why: str) -> Source:
        """The same, its heads and adapters left behind."""
        left = (Skipped(tensor.name, tensor.file.name, why) for tensor in self.parts.values())
        return dataclasses.replace(self, parts={}, skipped=(*self.skipped, *left), scheme=None)

    def check(self) -> None:
        """Compares names and shapes with the tables; raises ConversionError that lists all that is unknown, missing or misshapen."""
        problems = _compare(self.tensors, mappings(self.config))
        if self.lora is not None:
            problems += _compare(self.lora.factors, lora_mappings(self.config, self.lora.config))
        if problems:
            raise ConversionError(f"the tensors in {self.path} are not those its config.json describes.\n  " + "\n  ".join(problems))
        _ = self.part_shapes

    @functools.cached_property
    def part_shapes(self) -> PartShapes:
        """What heads and adapters there are. Raises ConversionError, listing them, if some are not what they should be."""
        return part_shapes(self.parts, self.config.text.hidden_size, self.path)

    def untied(self) -> Source:
        """The same with an LM head of its own: a tied one is the table of token embeddings."""
        if not self.config.tie_head:
            return self
        config = dataclasses.replace(self.config, tie_head=False)
        return dataclasses.replace(
            self, config=config, tensors={**self.tensors, "lm_head.weight": self.tensors["model.embed_tokens.weight"]}
        )

    def merged(self) -> Source:
        """The thinker of a checked source with its LoRA factors added to the weights, `W + scale * B A`, in float32."""
        if self.lora is None:
            return self
        tensors = dict(self.tensors)
        for name, first in self.lora.factors.items():
            if name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                second = self.lora.factors[f"{module}.lora_B.weight"]
                tensors[f"{module}.weight"] = MergedTensor(tensors[f"{module}.weight"], first, second, self.lora.config.scale)
        return dataclasses.replace(self, tensors=tensors, lora=None, added=self.lora.config)


def _compare(found: Mapping[str, Tensor], rows: tuple[Row, ...]) -> list[str]:
    wanted = {name: row.their_shape for row in rows for name in row.their_names}
    told = {name: f"{tensor.name} in {tensor.file.name}" for name, tensor in found.items()}
    both = sorted(found.keys() & wanted.keys())
    lists = {
        "unknown": [told[name] for name in sorted(found.keys() - wanted.keys())],
        "missing": sorted(wanted.keys() - found.keys()),
        "misshapen": [f"{told[name]} {found[name].shape} instead of {wanted[name]}" for name in both if found[name].shape != wanted[name]],
        "of a dtype that no parameter has": [
            f"{told[name]} {found[name].dtype}" for name in both if found[name].dtype not in FLOATS.values()
        ],
    }
    return [f"{len(names)} {kind}: {some(names)}" for kind, names in lists.items() if names]


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """A weight with its LoRA product added, in float32, a few rows at a time."""

    base: Tensor
    first: Tensor  # A [r, in]
    second: Tensor  # B [out, r]
    scale: float

    @property
    def name(self) -> str:
        """That of the weight."""
        return self.base.name

    @property
    def file(self) -> File:
        """That of the weight."""
        return self.base.file

    @property
    def made_of(self) -> tuple[Tensor, ...]:
        """The weight and its factors."""
        return (*self.base.made_of, *self.first.made_of, *self.second.made_of)

    @property
    def dtype(self) -> np.dtype:
        """The one the weight is stored in; `read` gives float32."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.base.shape

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of the merged weight `[rows, in]` in float32."""
        weight, first, second = (
            part.astype(np.float32) for part in (self.base.read(start, stop), self.first.read(), self.second.read(start, stop))
        )
        return weight + second @ (first * np.float32(self.scale))


def files_of(tensors: Iterable[Tensor]) -> set[Path]:
    """The files that tensors are read from."""
    return {stored.file for tensor in tensors for stored in tensor.made_of if isinstance(stored.file, Path)}


def params_source(params: Params, config: ThinkerConfig) -> Source:
    """Parameters in memory as a source. Raises ConversionError, listing the paths, unless they are exactly those of a model of `config`."""
    check_params(params, config)
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    tensors = {
        name: HeldTensor(name, row.to_theirs(np.asarray(flat[row.ours] if row.layers is None else flat[row.ours][layer])))
        for row in mappings(config)
        for layer, name in enumerate(row.their_names)
    }
    return Source(Path("memory"), "parameters in memory", config, tensors, None, {}, (), Path("memory"))


def read_params(source: Source, *, dtype: np.dtype | None = None) -> Params:
    """All of a source's thinker in memory, in our layout; in the stored dtype when None. See `loading` for the way onto a mesh."""
    source.check()
    rows = mappings(source.config)
    check_one_dtype(source, rows, source.tensors, dtype)
    flat = {}
    for row in rows:
        array = np.empty(row.shape, dtype or source.tensors[row.their_names[0]].dtype)
        for layer, name in enumerate(row.their_names):
            array[... if row.layers is None else layer] = row.to_ours(source.tensors[name].read())
        flat[row.ours] = array
    return traverse_util.unflatten_dict(flat)


def check_one_dtype(source: Source, rows: tuple[Row, ...], tensors: Mapping[str, Tensor], dtype: np.dtype | None) -> None:
    """Raises ConversionError where layers that are stacked into one array have different dtypes and none is named for all."""
    for row in rows if dtype is None else ():
        first = tensors[row.their_names[0]].dtype
        for name in row.their_names:
            if tensors[name].dtype != first:
                raise ConversionError(
                    f"{source.path}: {name} is {tensors[name].dtype}, the layers before it {first}; name one dtype for all (--dtype)"
                )


def check_params(params: Params, config: ThinkerConfig) -> None:
    """Raises ConversionError, listing the paths, unless `params` has exactly the arrays of a model of `config`."""
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    wanted = {row.ours: row.shape for row in mappings(config)}
    problems = [f"unknown {'.'.join(map(str, path))}" for path in sorted(flat.keys() - wanted.keys(), key=str)]
    problems += [f"missing {'.'.join(path)}" for path in sorted(wanted.keys() - flat.keys())]
    problems += [
        f"misshapen {'.'.join(path)} {tuple(flat[path].shape)} instead of {shape}"
        for path, shape in wanted.items()
        if path in flat and tuple(flat[path].shape) != shape
    ]
    if problems:
        raise ConversionError(f"these are not the parameters of the model that the config describes: {some(problems)}")
