"""Our checkpoint of a thinker, written and read a few rows at a time.

A directory with `params/` and, where LoRA factors are kept beside the weights, `lora/` (Orbax trees); heads and adapters in
`parts.safetensors`; `config.json` in Hugging Face's spelling; and `manifest.json`, the receipt: where every tensor came from, its shape,
dtype and SHA-256, and what was left behind. The hash is of the values as Hugging Face orders them, so it is the same before an import, in
the checkpoint and after an export.

Kernels are stored as Zarr arrays in Fortran order: the bytes of a layer are those of the transposed tensor it came from. So an import moves
bytes and transposes nothing, and a reader that wants a shard reads the chunks that hold it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.nnx as nnx
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import traverse_util

from omnisapiens_jax.convert.huggingface import is_plain, read_config
from omnisapiens_jax.convert.names import Mapping as Row
from omnisapiens_jax.convert.names import lora_mappings, mappings
from omnisapiens_jax.convert.parts import OURS, write_parts
from omnisapiens_jax.convert.source import Lora, Params, Progress, Source, check_one_dtype, check_params, params_source
from omnisapiens_jax.convert.unfinished import Journal, flush, whole_or_nothing
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.layers import LoraConfig, LoraParam
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.processing.tensors import ConversionError, Tensor, as_bytes, blocks, origin, read_finite, read_safetensors, some

FORMAT = "omnisapiens-jax thinker"
VERSION = 2
MANIFEST = "manifest.json"
TREES = ("params", "lora")
CHUNK_BYTES = 32 << 20  # of a file of the checkpoint, and what is read at once
THREADS = 2  # one waits for the disk while the other hashes; each holds a few chunks


def write_checkpoint(
    source: Source, folder: Path, journal: Journal, *, dtype: np.dtype | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes a checked source into a directory of `whole_or_nothing`, going on after what the journal has; returns the manifest.

    Args:
      source: any checkpoint.
      folder: to write into.
      journal: of what is done.
      dtype: to cast the thinker to; the stored one when None. LoRA factors, heads and adapters stay as they are.
      progress: called after each tensor.

    Raises:
      ConversionError: a tensor cannot be read, holds values that are not finite, or layers that are stacked differ in dtype.
    """
    made = arrays(source, dtype)
    jobs = [job for tree in TREES for job in _jobs(folder / tree, [array for array in made if array.tree == tree])]
    left = [job for job in jobs if job.key not in journal.done]
    total = sum(job.nbytes for job in jobs)
    done, counting = total - sum(job.nbytes for job in left), threading.Lock()

    def run(job: _Job) -> None:
        nonlocal done
        record = job.run()
        with counting:
            journal.add(job.key, record)
            done += job.nbytes
            if progress:
                progress(job.tensor.name, done, total)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(run, left))
    records = [journal.done[job.key] for job in jobs] + write_parts(source.parts, folder)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **source.receipt(),
        "parameters": sum(math.prod(array.row.shape) for array in made if array.tree == "params"),
        "dtypes": sorted({record["dtype"] for record in records if record["tree"] == "params"}),
        "lora": None if source.lora is None else dataclasses.asdict(source.lora.config),
        "tensors": records,
    }
    (folder / "config.json").write_text(json.dumps(source.config.to_hf(), indent=2))
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a checkpoint of ours: all tensors of a row of the name table, in one dtype."""

    tree: str  # of `TREES`
    row: Row
    dtype: np.dtype
    tensors: Mapping[str, Tensor]


def arrays(source: Source, dtype: np.dtype | None = None) -> list[Array]:
    """What a checked source becomes; see `write_checkpoint`.

    Raises:
      ConversionError: layers that are stacked differ in dtype, and none is named.
    """
    trees = [("params", mappings(source.config), source.tensors, dtype)]
    if source.lora is not None:
        trees.append(("lora", lora_mappings(source.config, source.lora.config), source.lora.factors, None))
    found = []
    for tree, rows, tensors, chosen in trees:
        check_one_dtype(source, rows, tensors, chosen)
        found += [Array(tree, row, chosen or tensors[row.their_names[0]].dtype, tensors) for row in rows]
    return found


@dataclasses.dataclass(frozen=True)
class _Job:
    """One tensor of theirs on its way to its place in an array of ours."""

    array: Array
    layer: int
    store: Any

    @property
    def key(self) -> str:
        return self.array.row.their_names[self.layer]

    @property
    def tensor(self) -> Tensor:
        return self.array.tensors[self.key]

    @property
    def nbytes(self) -> int:
        return math.prod(self.array.row.their_shape) * self.array.dtype.itemsize

    def run(self) -> dict[str, Any]:
        row, dtype, digest = self.array.row, self.array.dtype, hashlib.sha256()
        for start, stop in blocks(row.their_shape, dtype.itemsize, CHUNK_BYTES):
            values = read_finite(self.tensor, start, stop, dtype)
            digest.update(as_bytes(values))
            part = self.store[row.place(self.layer, start, stop)]
            try:  # the file is on disk, fsync and all, when the write is done
                part.write(row.to_ours(values), can_reference_source_data_indefinitely=True).result()
            except ValueError as reason:
                raise OSError(f"{self.key} cannot be written: {reason}") from reason
        return {
            "name": self.key,
            "file": self.tensor.file.name,
            **origin(self.tensor),
            "tree": self.array.tree,
            "path": ".".join(row.ours),
            "layer": None if row.layers is None else self.layer,
            "shape": list(row.their_shape),
            "dtype": str(dtype),
            "sha256": digest.hexdigest(),
        }


def _jobs(folder: Path, mine: Sequence[Array]) -> Iterator[_Job]:
    if not mine:
        return
    _make_tree(folder, [array.row for array in mine])
    stores = [_create(folder, array.row, array.dtype) for array in mine]
    flush(folder)
    for array, store in zip(mine, stores, strict=True):
        for layer in range(len(array.row.their_names)):
            yield _Job(array, layer, store)


def _make_tree(folder: Path, rows: Sequence[Row]) -> None:
    """An Orbax tree whose arrays are still to be made: Orbax writes its own metadata, which do not depend on the arrays' shapes."""
    scratch = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed here; Orbax makes more than one directory
    if folder.exists():
        return
    tree = traverse_util.unflatten_dict({row.ours: np.zeros(()) for row in rows})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
        writer.save(scratch / folder.name, args=ocp.args.PyTreeSave(tree))
    for row in rows:
        shutil.rmtree(scratch / folder.name / ".".join(row.ours))
    (scratch / folder.name).rename(folder)
    scratch.rmdir()


def _create(folder: Path, row: Row, dtype: np.dtype) -> Any:
    stacked = row.layers is not None
    chunk = next(blocks(row.their_shape, dtype.itemsize, CHUNK_BYTES))[1]
    within = row.shape[1:] if stacked else row.shape
    chunks = (chunk, *within[1:]) if row.layout == "same" else (*within[:-1], chunk)
    spec = _spec(folder, row.ours) | {
        "metadata": {
            "shape": row.shape,
            "chunks": (1, *chunks) if stacked else chunks,
            "dtype": "bfloat16" if dtype == ml_dtypes.bfloat16 else dtype.str,
            "order": "C" if row.layout == "same" else "F",
            "compressor": None,
            "fill_value": None,
            "dimension_separator": ".",
        }
    }
    return tensorstore.open(spec, create=True, open=True).result()


def _spec(folder: Path, path: tuple[str, ...]) -> dict[str, Any]:
    return {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder.resolve() / '.'.join(path)}/"},
        # A file that is missing is then an error when it is read, and not a piece of zeros.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def save_params(target: str | Path, params: Params, config: ThinkerConfig) -> None:
    """Makes a checkpoint of parameters in memory, whole or not at all.

    Raises FileExistsError when `target` is there already, ConversionError when the parameters are not those of `config`.
    """
    source = params_source(params, config)
    with whole_or_nothing(target, None) as (folder, journal):
        write_checkpoint(source, folder, journal)


def is_ours(path: Path) -> bool:
    """Whether a directory is a checkpoint of ours, by its files: others may have a manifest of their own."""
    return (path / MANIFEST).is_file() and (path / "params").is_dir()


def load_manifest(source: str | Path) -> dict[str, Any]:
    """The receipt of a checkpoint of ours. Raises ConversionError when there is none, or it is broken, or of another version."""
    manifest = Path(source) / MANIFEST
    if not manifest.is_file():
        raise ConversionError(f"{source} is no checkpoint of ours (no {MANIFEST}); tools/convert_weights.py import {source} DIR makes one")
    try:
        described = json.loads(manifest.read_text())
        found = described["format"], described["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as reason:
        raise ConversionError(f"{manifest} is broken ({reason!r}); import the checkpoint again") from reason
    if found != (FORMAT, VERSION):
        raise ConversionError(f"{manifest} is {found[0]!r} version {found[1]!r}, not {FORMAT!r} {VERSION}; import the checkpoint again")
    if wrong := next(_amiss(described), None):
        raise ConversionError(f"{manifest} is broken ({wrong}); import the checkpoint again")
    return described


_SAID: dict[str, Any] = {"kind": str, "lora": dict | None, "tensors": list, "skipped": list}
_SAID_OF_EACH = {"tensors": ("name", "file", "tree", "sha256"), "skipped": ("name", "file", "why")}


def _amiss(described: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a receipt, one after the other."""
    yield from (f"it does not say {key}" for key, kind in _SAID.items() if not isinstance(described.get(key, ...), kind))
    for key, wanted in _SAID_OF_EACH.items():
        for record in described[key]:
            if not isinstance(record, dict) or not all(isinstance(record.get(said), str) for said in wanted):
                yield f"in {key}, {record!r:.80} does not say {', '.join(wanted)}"
            elif not is_plain(record["file"]):
                yield f"{record['name']} lies in {record['file']!r}, which is no name of a file"


def load_config(source: str | Path) -> ThinkerConfig:
    """The model's shapes, from a checkpoint of ours."""
    return read_config(Path(source), {record["name"] for record in load_manifest(source)["tensors"]})


def load_lora_config(source: str | Path) -> LoraConfig | None:
    """The LoRA that lies beside the weights of a checkpoint of ours, if any."""
    described = load_manifest(source)["lora"]
    try:
        return described and LoraConfig(**described | {"targets": {tower: tuple(names) for tower, names in described["targets"].items()}})
    except (ValueError, TypeError, KeyError, AttributeError) as reason:
        raise ConversionError(f"{Path(source) / MANIFEST} describes no LoRA ({reason!r}); import the checkpoint again") from reason


def file_layout(source: Path) -> dict[str, str] | None:
    """The file that every tensor of a checkpoint of ours came from, if from files of a thinker alone: an export can give them again."""
    if not is_ours(source):
        return None
    manifest = load_manifest(source)
    files = {record["name"]: record["file"] for record in manifest["tensors"] if record["tree"] == "params"}
    whole = {skipped["file"] for skipped in manifest["skipped"]}.isdisjoint(files.values())
    return files if whole and all(file.endswith(".safetensors") for file in files.values()) else None


def open_checkpoint(path: str | Path) -> Source:
    """A checkpoint of ours as a source: tensors by Hugging Face's names, read from the arrays that hold them.

    Raises:
      ConversionError: it is none, or something that its receipt names is not there.
    """
    path = Path(path)
    manifest, config, lora = load_manifest(path), load_config(path), load_lora_config(path)
    tensors = stored_tensors(mappings(config), path / "params", lambda place: _spec(path / "params", place))
    rows = () if lora is None else lora_mappings(config, lora)
    factors = lora and Lora(lora, stored_tensors(rows, path / "lora", lambda place: _spec(path / "lora", place)))
    parts = read_safetensors(path / OURS) if (path / OURS).is_file() else {}
    found = {*tensors, *(factors.factors if factors else ()), *parts}
    if wrong := sorted(found ^ {record["name"] for record in manifest["tensors"]}):
        raise ConversionError(f"{path / MANIFEST} and the files beside it disagree about {some(wrong)}; import the checkpoint again")
    kind, settings = f"a checkpoint of ours, from {manifest['kind']}", (path / MANIFEST, path / "config.json")
    return Source(path, kind, config, tensors, factors, parts, (), path, settings)


@dataclasses.dataclass(frozen=True)
class _OurTensor:
    """One of their tensors, read from the array of ours that holds it."""

    name: str
    file: Path
    row: Row
    layer: int
    store: Any

    @property
    def made_of(self) -> tuple[Tensor, ...]:
        return (self,)

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype.numpy_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.row.their_shape

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        values = self.store[self.row.place(self.layer, start, stop)]
        turned = self.row.layout in ("linear", "conv3d")  # before it is read: then the stored bytes are copied, not turned
        try:
            read = (values.transpose([1, 0]) if turned else values).read().result()
        except ValueError as reason:
            said = f"{self.file}: {self.name} cannot be read ({reason})"
            raise OSError(said) if "os_error_code" in str(reason) else ConversionError(said) from reason
        return read.reshape(-1, *self.shape[1:]) if turned else np.ascontiguousarray(self.row.to_theirs(read))


def stored_tensors(rows: tuple[Row, ...], file: Path, spec: Callable[[tuple[str, ...]], dict[str, Any]]) -> dict[str, Tensor]:
    """Their tensors of some rows of the table, read from the arrays of ours that `spec` names for TensorStore by their paths.

    Raises:
      ConversionError: an array is not there, or misshapen; names it and `file`.
    """
    found: dict[str, Tensor] = {}
    for row in rows:
        name = ".".join(row.ours)
        try:
            store = tensorstore.open(spec(row.ours), open=True, read=True).result()
        except ValueError as reason:
            raise ConversionError(f"{file}: {name} is missing or broken ({reason})") from reason
        if store.shape != row.shape:
            raise ConversionError(f"{file}: {name} has shape {store.shape}, the config says {row.shape}")
        found |= {theirs: _OurTensor(theirs, file, row, layer, store) for layer, theirs in enumerate(row.their_names)}
    return found


def put_params(thinker: Thinker, params: Params, lora: Params | None = None) -> None:
    """Fills the parameters of `thinker`, cast to its own dtypes; its LoRA factors are left alone where `lora` is None.

    Raises ConversionError that names what does not fit.
    """
    check_params(params, thinker.config)
    _put(nnx.state(thinker, nnx.All(nnx.Param, nnx.Not(LoraParam))), params)
    if lora is not None:
        _put(nnx.state(thinker, LoraParam), lora)


def _put(state: nnx.State, params: Params) -> None:
    flat = traverse_util.flatten_dict(params)
    places = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    if wrong := [".".join(path) for path in sorted(places.keys() ^ flat.keys())]:
        raise ConversionError(f"the model and the checkpoint differ in {some(wrong)}")
    for path, variable in places.items():
        variable.set_value(jnp.asarray(flat[path], variable.get_value().dtype))


def take_params(thinker: Thinker) -> Params:
    """The parameters of `thinker` without LoRA factors, as `put_params` takes and `save_params` saves them."""
    return nnx.to_pure_dict(nnx.state(thinker, nnx.All(nnx.Param, nnx.Not(LoraParam))))
