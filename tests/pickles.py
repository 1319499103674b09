"""Pickles written instruction by instruction, in files as torch.save makes them: what Python or torch would not write, or not any more."""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omnisapiens_jax.processing.tensors import StoredTensor
from omnisapiens_jax.processing.torch_files import ShardedTensor


@dataclasses.dataclass(frozen=True)
class Name:
    """A global."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """What a function is to make of arguments, and the state that is then to be put into it."""

    function: Any
    arguments: Any
    state: Any = None
    instruction: bytes = pickle.REDUCE


@dataclasses.dataclass(frozen=True)
class Persistent:
    """Something outside the pickle: a storage."""

    pid: Any


def pickled(thing: Any) -> bytes:
    """The instructions that make a thing."""
    match thing:
        case bytes():  # instructions already
            return thing
        case None | bool():
            return {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[thing]
        case float():
            return pickle.dumps(thing, 2)[2:-1]
        case int():
            encoded = pickle.encode_long(thing)
            return pickle.LONG1 + bytes([len(encoded)]) + encoded
        case str():
            return pickle.BINUNICODE + len(thing.encode()).to_bytes(4, "little") + thing.encode()
        case tuple():
            return pickle.MARK + b"".join(map(pickled, thing)) + pickle.TUPLE
        case list():
            return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(pickled, thing)) + pickle.APPENDS
        case dict():
            return pickle.EMPTY_DICT + pickle.MARK + b"".join(pickled(part) for item in thing.items() for part in item) + pickle.SETITEMS
        case Name():
            return pickle.GLOBAL + f"{thing.module}\n{thing.name}\n".encode()
        case Call():
            made = pickled(thing.function) + pickled(thing.arguments) + thing.instruction
            return made if thing.state is None else made + pickled(thing.state) + pickle.BUILD
        case Persistent():
            return pickled(thing.pid) + pickle.BINPERSID
    raise AssertionError(thing)


def archive(path: Path, content: Any, storages: dict[str, bytes] | None = None, **more: bytes) -> Path:
    """A file as torch.save makes it, with a pickle of ours (`Call` and so on, or instructions) in it."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.PROTO + b"\2" + pickled(content) + pickle.STOP)
        for key, storage in (storages or {"0": bytes(range(48))}).items():
            file.writestr(f"archive/data/{key}", storage)
        for name, member in more.items():
            file.writestr(f"archive/{name}", member)
    return path


FLOATS = Name("torch", "FloatStorage")


def tensor(shape: Any = (3, 4), strides: Any = (4, 1), offset: Any = 0, *, kind: Any = FLOATS, key: Any = "0") -> Call:
    """A view of a storage, as torch.save describes it."""
    view = (Persistent(("storage", kind, key, "cpu", 12)), offset, shape, strides, False, Call(Name("collections", "OrderedDict"), ()))
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), view)


def stored(content: Any) -> Iterator[StoredTensor]:
    """Every tensor in the content of a file."""
    match content:
        case StoredTensor():
            yield content
        case ShardedTensor():
            yield content.local
        case dict():
            for value in content.values():
                yield from stored(value)
        case list():
            for value in content:
                yield from stored(value)
