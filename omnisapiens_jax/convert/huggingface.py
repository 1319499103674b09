"""Hugging Face directories in and out: `config.json` beside one file of weights or an index of shards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from omnisapiens_jax.convert.names import mappings
from omnisapiens_jax.convert.parts import write_released
from omnisapiens_jax.convert.source import Params, Progress, Skipped, Source, params_source
from omnisapiens_jax.convert.unfinished import Journal, flush, whole_or_nothing
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.tensors import (
    ConversionError,
    SafetensorsWriter,
    Tensor,
    as_bytes,
    blocks,
    nbytes,
    origin,
    read_finite,
    read_safetensors,
    some,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
RECEIPT = "conversion_manifest.json"
PREFIX = "thinker."
LABELS = "label_scheme.json"  # what the classes of released heads are called
COMPANIONS = (  # what stands beside the weights and must stay with them: vocabulary, prompt, settings of the processor and of generation
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    LABELS,
)
SPEECH = ("talker.", "token2wav.")  # the parts of a full Omni checkpoint that speak
VOICES = "spk_dict.pt"  # what the talker speaks with, beside the weights of a full Omni model
SHARD_BYTES = 5_000_000_000
_READ_BYTES = 32 << 20
_AHEAD = 3  # blocks that are read while one is written

Files = Mapping[str, tuple[str, Tensor]]  # by name in a file: the file's name, and the tensor


def open_huggingface(path: str | Path) -> Source:
    """A thinker directory, or that of a full Omni model, whose speech side is left behind; they are told apart by their names.

    Raises:
      ConversionError: a file is missing or broken, or the index and the shards disagree.
    """
    path = Path(path)
    read_config(path, ())  # what is no model at all is told first
    stored = stored_tensors(path)
    prefixed = any(name.startswith(PREFIX) for name in stored)
    tensors: dict[str, Tensor] = {}
    skipped = []
    for name, tensor in stored.items():
        if name.startswith(SPEECH):
            skipped.append(Skipped(name, tensor.file.name, "the speech side of a full Omni model"))
        else:
            # In a prefixed checkpoint a name without the prefix is none of the thinker's, so it keeps a form no row of the table has.
            bare = name.removeprefix(PREFIX) if name.startswith(PREFIX) or not prefixed else f"(no {PREFIX}) {name}"
            tensors[bare] = tensor
    kind = "a full Omni model of Hugging Face" if prefixed else "a thinker of Hugging Face"
    return Source(path, kind, read_config(path, tensors), tensors, None, {}, tuple(skipped), path, settings(path))


def settings(path: Path) -> tuple[Path, ...]:
    """Those files of a directory that say what its tensors mean."""
    return tuple(path / name for name in ("config.json", INDEX) if (path / name).is_file())


def read_config(path: Path, stored: Container[str]) -> ThinkerConfig:
    """The shapes that a directory's `config.json` says, of a model that has the tensors `stored`: with a head of its own if that is there.

    Raises:
      ConversionError: it is missing or not a thinker's.
    """
    if not path.is_dir():
        raise ConversionError(f"{path} is not a directory. It must hold config.json and {SINGLE} or {INDEX}")
    if not (path / "config.json").is_file():
        raise ConversionError(f"{path} has no config.json")
    try:
        config = ThinkerConfig.from_hf(path)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as reason:
        raise ConversionError(f"{path / 'config.json'} does not describe a thinker ({reason})") from reason
    return dataclasses.replace(config, tie_head=config.tie_head and "lm_head.weight" not in stored)


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a directory by its name in the files: those of `model.safetensors`, or of all shards of the index."""
    if not path.is_dir():
        raise ConversionError(f"{path} is not a directory. It must hold config.json and {SINGLE} or {INDEX}")
    if (path / SINGLE).is_file():  # where both are there, transformers reads this one too
        return dict(read_safetensors(path / SINGLE))
    if not (path / INDEX).is_file():
        raise ConversionError(f"{path} has neither {SINGLE} nor {INDEX}; it holds {some(sorted(p.name for p in path.iterdir()))}")
    listed = _index(path / INDEX)
    stored: dict[str, Tensor] = {}
    for file in sorted(set(listed.values())):
        if not (path / file).is_file():
            raise ConversionError(f"{path / file} is named in {INDEX} but is not there")
        for name, tensor in read_safetensors(path / file).items():
            if name in stored:
                raise ConversionError(f"{name} is given twice: in {stored[name].file} and in {path / file}")
            stored[name] = tensor
    if wrong := sorted(listed.items() ^ {(name, tensor.file.name) for name, tensor in stored.items()}):
        raise ConversionError(f"{path / INDEX} and its shards disagree about {some(sorted({name for name, _ in wrong}))}")
    return stored


def _index(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_text())["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as reason:
        raise ConversionError(f"{path} is no index of shards ({reason!r})") from reason
    for name, file in listed:
        if not isinstance(file, str) or not is_plain(file):
            raise ConversionError(f"{path}: {name} lies in {file!r}, which is no file beside it")
    return dict(listed)


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in the directory where it is read, and nowhere else."""
    return name not in ("", "..") and Path(name).name == name and "\0" not in name


def thinker_files(source: Source, *, shard_bytes: int = SHARD_BYTES, layout: Mapping[str, str] | None = None) -> Files:
    """What `write_thinker` writes, and where."""
    names = [name for row in mappings(source.config) for name in row.their_names]
    layout = layout or _divide({name: source.tensors[name] for name in names}, shard_bytes)
    return {name: (layout[name], source.tensors[name]) for name in names}


def write_thinker(
    source: Source,
    folder: Path,
    journal: Journal,
    *,
    shard_bytes: int = SHARD_BYTES,
    layout: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a thinker-only directory that transformers reads: `config.json`, and the tensors in one file or in shards with an index.

    Heads and adapters go beside them as they are released, and a receipt.

    Args:
      source: checked, without LoRA factors.
      folder: of `whole_or_nothing`.
      journal: of the files that are done.
      shard_bytes: largest size of one file (but a tensor is never divided).
      layout: file of every tensor, to give files like those the tensors came from; divided by `shard_bytes` when None.
      progress: called after each tensor.
    """
    files = thinker_files(source, shard_bytes=shard_bytes, layout=layout)
    write_files(source, files, folder, journal, progress)
    _write_index(folder, files)
    described = source.config.to_hf()
    stored = sorted({str(tensor.dtype) for tensor in source.tensors.values()})
    (folder / "config.json").write_text(json.dumps(described | ({"torch_dtype": stored[0]} if len(stored) == 1 else {}), indent=2))


def omni_files(source: Source, base: Path) -> Files:
    """What `write_omni` writes, and where.

    Raises:
      ConversionError: `base` is no full Omni directory, or its thinker has other names or another config than the source's.
    """
    stored = stored_tensors(base)
    theirs = {name.removeprefix(PREFIX) for name in stored if name.startswith(PREFIX)}
    if not theirs:
        raise ConversionError(f"{base} is no full Omni model: no tensor's name begins with {PREFIX}")
    if wrong := sorted(theirs ^ source.tensors.keys()):
        raise ConversionError(f"the thinkers of {base} and {source.path} differ in {some(wrong)}")
    if read_config(base, theirs) != source.config:
        raise ConversionError(f"{base / 'config.json'} does not describe the thinker of {source.path}: it is of another model")
    if not (base / VOICES).is_file():
        raise ConversionError(f"{base} has no {VOICES}, without which transformers loads no full Omni model")
    return {
        name: (tensor.file.name, source.tensors[name.removeprefix(PREFIX)] if name.startswith(PREFIX) else tensor)
        for name, tensor in stored.items()
    }


def write_omni(source: Source, base: Path, folder: Path, journal: Journal, *, progress: Progress | None = None) -> None:
    """Writes a full Omni directory: the files of `base` with the thinker's tensors replaced, in the source's dtypes; likewise a receipt.

    Raises ConversionError; see `omni_files`.
    """
    files = omni_files(source, base)
    write_files(source, files, folder, journal, progress)
    _write_index(folder, files)
    copy_companions(base, folder)
    for name in ("config.json", VOICES):
        shutil.copyfile(base / name, folder / name)


def _divide(tensors: Mapping[str, Tensor], most: int) -> dict[str, str]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = nbytes([tensor])
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return dict.fromkeys(tensors, SINGLE)
    return {name: f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number, shard in enumerate(shards, 1) for name in shard}


def write_files(
    source: Source,
    tensors: Files,
    folder: Path,
    journal: Journal,
    progress: Progress | None,
) -> None:
    """Writes tensors `name -> (file, tensor)`, the source's heads and adapters, and the receipt of all.

    A file that the journal has is there already.
    """
    files: dict[str, dict[str, Tensor]] = {}
    for name, (file, tensor) in tensors.items():
        files.setdefault(file, {})[name] = tensor
    total = nbytes(tensor for _, tensor in tensors.values())
    done = sum(nbytes(chosen.values()) for file, chosen in files.items() if file in journal.done)
    with ThreadPoolExecutor(1) as pool:
        for file, chosen in files.items():
            if file in journal.done:
                continue
            records = []
            shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in chosen.items()}
            with SafetensorsWriter(folder / file, shapes, {"format": "pt"}) as writer:
                reads = _reads(pool, [chosen[name] for name in writer.order])
                for name in writer.order:
                    tensor, digest = chosen[name], hashlib.sha256()
                    for _ in blocks(tensor.shape, tensor.dtype.itemsize, _READ_BYTES):
                        values = next(reads)
                        digest.update(as_bytes(values))
                        writer.write(values)
                    record = {"name": name, "file": file, "source": str(tensor.file), **origin(tensor)}
                    records.append(record | {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": digest.hexdigest()})
                    done += nbytes([tensor])
                    if progress:
                        progress(name, done, total)
            flush(folder)
            journal.add(file, records)
    written = [record for file in files for record in journal.done[file]] + write_released(source.parts, folder)
    (folder / RECEIPT).write_text(json.dumps({**source.receipt(), "tensors": written}, indent=1))


def _write_index(folder: Path, files: Files) -> None:
    where = {name: file for name, (file, _) in sorted(files.items())}
    if set(where.values()) != {SINGLE}:
        index = {"metadata": {"total_size": nbytes(tensor for _, tensor in files.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _reads(pool: ThreadPoolExecutor, tensors: Sequence[Tensor]) -> Iterator[np.ndarray]:
    """The blocks of all tensors one after the other, a few of them read ahead."""
    waiting: list[Future[np.ndarray]] = []
    for tensor in tensors:
        for start, stop in blocks(tensor.shape, tensor.dtype.itemsize, _READ_BYTES):
            waiting.append(pool.submit(read_finite, tensor, start, stop, tensor.dtype))
            if len(waiting) > _AHEAD:
                yield waiting.pop(0).result()
    while waiting:
        yield waiting.pop(0).result()


def save_thinker(params: Params, config: ThinkerConfig, target: str | Path) -> None:
    """Makes a thinker-only directory of parameters in memory, whole or not at all."""
    with whole_or_nothing(target, None) as (folder, journal):
        write_thinker(params_source(params, config), folder, journal)


def companions(source: Path) -> list[str]:
    """Those of `COMPANIONS` that a directory has."""
    return [name for name in COMPANIONS if (source / name).is_file()]


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies those of `COMPANIONS` that `source` has; returns their names."""
    found = companions(source)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found
