"""Reading and writing a Hugging Face thinker directory: `config.json` beside one `model.safetensors` or an index of shards."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from omnisapiens_jax.convert.names import Mapping, mappings
from omnisapiens_jax.models.config import ThinkerConfig

Params = dict[str, Any]  # nested dict of arrays, the pure state of `models.thinker.Thinker`
Progress = Callable[[str, int, int], None]  # what is being done, how many tensors are done, of how many

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PREFIX = "thinker."
COMPANIONS = (  # what stands beside the weights and must stay with them: vocabulary, prompt, settings of the processor and of generation
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "generation_config.json",
)
IGNORED_PARTS = ("talker.", "token2wav.")  # the speech side of a full Omni checkpoint
_SHOWN = 20  # names an error lists of each kind


class ConversionError(ValueError):
    """A checkpoint that is not what it should be; the message names the file and the tensors."""


@dataclasses.dataclass(frozen=True)
class Imported:
    """A thinker read from a directory: its config, its parameters, and how many tensors of each ignored part were left behind."""

    config: ThinkerConfig
    params: Params
    skipped: dict[str, int]


class Directory:
    """The thinker's tensors in a directory by their thinker-only names, whatever file they are in; each is read when asked for."""

    def __init__(self, path: str | Path):
        """Reads `config.json` and the names, not the tensors."""
        self.path = Path(path)
        self._handles: dict[Path, Any] = {}
        if not self.path.is_dir():
            raise ConversionError(f"{self.path} is not a directory. It must hold config.json and {SINGLE} or {INDEX}")
        if not (self.path / "config.json").is_file():
            raise ConversionError(f"{self.path} has no config.json")
        files = self._files()
        prefixed = any(name.startswith(PREFIX) for name in files)
        self._stored: dict[str, tuple[Path, str]] = {}  # thinker-only name -> file, name in the file
        skipped: Counter[str] = Counter()
        for name, file in files.items():
            part = next((part for part in IGNORED_PARTS if name.startswith(part)), None)
            if part:
                skipped[part.rstrip(".")] += 1
            else:
                # In a prefixed checkpoint a name without the prefix is none of the thinker's, so it keeps a form no row of the table has.
                bare = name.removeprefix(PREFIX) if name.startswith(PREFIX) or not prefixed else f"(no {PREFIX}) {name}"
                self._stored[bare] = (file, name)
        self.skipped = dict(skipped)
        self.config = ThinkerConfig.from_hf(self.path, tie_head="lm_head.weight" not in self._stored)

    def _files(self) -> dict[str, Path]:
        """File of every tensor, by its name in the file."""
        if (self.path / INDEX).is_file():
            listed = {name: self.path / file for name, file in json.loads((self.path / INDEX).read_text())["weight_map"].items()}
            stored = {name: file for file in sorted(set(listed.values())) for name in self._handle(file).keys()}  # noqa: SIM118 (a handle, not a dict)
            if wrong := sorted(set(listed.items()) ^ set(stored.items())):
                raise ConversionError(f"{self.path / INDEX} and its shards disagree about {_some(name for name, _ in wrong)}")
            return stored
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._handle(self.path / SINGLE).keys(), self.path / SINGLE)
        raise ConversionError(
            f"{self.path} has neither {SINGLE} nor {INDEX}; it holds {_some(sorted(p.name for p in self.path.iterdir()))}"
        )

    def _handle(self, file: Path) -> Any:
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(file, framework="numpy")
            return self._handles[file]
        except FileNotFoundError as reason:
            raise ConversionError(f"{file} is named in {INDEX} but is not there") from reason
        except SafetensorError as reason:
            raise ConversionError(f"{file} cannot be read; is it truncated or not a safetensors file? ({reason})") from reason

    def check(self) -> None:
        """Compares names and shapes with the table; raises ConversionError that lists all that is unknown, missing or misshapen."""
        wanted = {name: row.their_shape for row in mappings(self.config) for name in row.their_names}
        unknown = sorted(self._stored[name][1] for name in self._stored.keys() - wanted.keys())
        missing = sorted(wanted.keys() - self._stored.keys())
        misshapen = [
            f"{name} {shape} instead of {wanted[name]}"
            for name in sorted(self._stored.keys() & wanted.keys())
            if (shape := self.shape(name)) != wanted[name]
        ]
        problems = [
            f"{len(names)} {kind}: {_some(names)}"
            for kind, names in (("unknown", unknown), ("missing", missing), ("misshapen", misshapen))
            if names
        ]
        if problems:
            raise ConversionError(f"the tensors in {self.path} are not those its config.json describes.\n  " + "\n  ".join(problems))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from its file's header."""
        file, stored = self._stored[name]
        return tuple(self._handle(file).get_slice(stored).get_shape())

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in the dtype it is stored in (bfloat16 as ml_dtypes')."""
        file, stored = self._stored[name]
        return self._handle(file).get_tensor(stored)


def read(source: str | Path, *, dtype: Any = None, progress: Progress | None = None) -> Imported:
    """Reads a thinker directory into our layout.

    Full Omni checkpoints (names that begin with `thinker.`) and thinker-only ones are told apart by their names.

    Args:
      source: the directory.
      dtype: to cast to; the stored one when None.
      progress: called before each tensor.

    Raises:
      ConversionError: a name is unknown, missing or misshapen, or a file cannot be read.
    """
    directory = Directory(source)
    directory.check()
    flat = dict(stream(directory, dtype=dtype, progress=progress))
    return Imported(directory.config, traverse_util.unflatten_dict(flat), directory.skipped)


def stream(directory: Directory, *, dtype: Any = None, progress: Progress | None = None) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Our arrays one by one as (path, array), so that a caller may place each before the next is read."""
    rows = mappings(directory.config)
    done, total = 0, sum(len(row.their_names) for row in rows)
    for row in rows:
        array = None
        for layer, name in enumerate(row.their_names):
            if progress:
                progress(name, done, total)
            tensor = row.to_ours(directory.tensor(name))
            if array is None:
                array = np.empty(row.shape, dtype or tensor.dtype)
            elif dtype is None and tensor.dtype != array.dtype:
                raise ConversionError(
                    f"{directory.path}: {name} is {tensor.dtype}, the layers before it {array.dtype}; name one dtype for all"
                )
            array[... if row.layers is None else layer] = tensor
            done += 1
        assert array is not None  # a model has at least one layer
        yield row.ours, array


def write(
    params: Params, config: ThinkerConfig, target: Path, *, shard_bytes: int = 5_000_000_000, progress: Progress | None = None
) -> None:
    """Writes a thinker-only directory that transformers reads: `config.json`, and the tensors in one file or in shards with an index.

    Args:
      params: as `read` gives them.
      config: of the model.
      target: an existing directory.
      shard_bytes: largest size of one file.
      progress: called before each tensor.
    """
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    rows = mappings(config)
    check_params(params, config)
    names = [(row, layer, name) for row in rows for layer, name in enumerate(row.their_names)]
    sizes = {name: _layer(flat[row.ours], row, layer).nbytes for row, layer, name in names}
    shards: list[list[tuple[Mapping, int, str]]] = [[]]
    filled = 0
    for entry in names:
        size = sizes[entry[2]]
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for row, layer, name in shard:
            if progress:
                progress(name, len(where), len(names))
            tensors[name] = np.ascontiguousarray(row.to_theirs(np.asarray(_layer(flat[row.ours], row, layer))))
            where[name] = file
        save_file(tensors, target / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (target / INDEX).write_text(json.dumps(index, indent=2))
    stored = sorted({str(flat[row.ours].dtype) for row in rows})
    described = config.to_hf() | ({"torch_dtype": stored[0]} if len(stored) == 1 else {})
    (target / "config.json").write_text(json.dumps(described, indent=2))


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
        raise ConversionError(f"these are not the parameters of the model that the config describes: {_some(problems)}")


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies those of `COMPANIONS` that `source` has; returns their names."""
    found = [name for name in COMPANIONS if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def parse_dtype(name: str) -> np.dtype:
    """`float32`, `float16` or `bfloat16` as a numpy dtype."""
    known = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
    if name not in known:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(known)}")
    return known[name]


def _layer(array: Any, row: Mapping, layer: int) -> Any:
    return array if row.layers is None else array[layer]


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")
