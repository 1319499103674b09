"""Files of `torch.save`, read without torch and without executing anything in them, and written for torch to read.

Such a file is a zip archive: `data.pkl`, a pickle that says how tensors are put together, and the storages as plain bytes. A pickle is a
program, so it is run here with a list of the few things it may name: tensors, plain containers and, for the shards of an FSDP run, the
records that say how a tensor was divided. Every one of them is a stand-in of ours that only remembers what it was given. Anything else is
refused by name. The pure-Python unpickler is used because the one in C allocates what a hostile file asks for.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from omnisapiens_jax.convert.tensors import ConversionError, StoredTensor, Tensor, as_bytes, some

_LONGEST_PICKLE = 256 << 20  # bytes; that of the largest shard of the family has less than one MiB
_LARGEST_AXIS = 1 << 48
_ALIGNMENT = 64  # of a storage in the archive, as torch writes it
_LOCAL_HEADER = 30  # bytes of a zip entry's own header before its name

_STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class ShardedTensor:
    """One rank's part of a tensor that was divided over a mesh of devices (torch's DTensor).

    Attributes:
      local: what this rank holds.
      shape: of the whole tensor.
      mesh: number of devices along each axis of the mesh.
      shards: for each axis of the mesh the axis of the tensor that is divided over it; None = each device has a copy.
    """

    local: StoredTensor
    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    shards: tuple[int | None, ...]


def read_torch_file(path: Path) -> Any:
    """What `torch.save` put into a file: dicts, lists, numbers and strings, with a `StoredTensor` or `ShardedTensor` for every tensor.

    Tensors are named by their place, `heads.0.weight` or `model.layers.0`; their values stay in the file until they are read.

    Raises:
      ConversionError: the file is missing or broken, of torch before 1.6, or holds anything else; the message names it.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = _Members(path, archive, file)
            return _named(_Reader(path, members).load(), "", path)
    except ConversionError:
        raise
    except zipfile.BadZipFile as reason:
        raise ConversionError(
            f"{path} is broken, or no file of torch 1.6 or later ({reason}); files of earlier versions are pickles through and through: "
            "load such a file with torch where you trust it and save it again"
        ) from reason
    except OSError as reason:
        raise ConversionError(f"{path} cannot be read ({reason})") from reason
    except Exception as reason:  # a broken pickle or archive can raise anything, but here it can do nothing else
        raise ConversionError(f"{path} is broken ({type(reason).__name__}: {reason})") from reason


class _Members:
    """Where the members of the archive lie in the file."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, file: Any):
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        entries = archive.infolist()
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) < len(entries):
            raise ConversionError(f"{path} has members of the same name")
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConversionError(f"{path} is a zip archive but no file of torch.save: it has {len(pickles)} members data.pkl")
        self.pickle = pickles[0]
        self._root = self.pickle.removesuffix("data.pkl")
        order = f"{self._root}byteorder"
        if order in self._entries and self.content(order) != b"little":
            raise ConversionError(f"{path} was saved on a big-endian machine; load it with torch and save it again")

    def span(self, name: str) -> tuple[int, int]:
        """Offset and length of a member's bytes."""
        entry = self._entries.get(name)
        if entry is None:
            raise ConversionError(f"{self._path} has no member {name}; is it truncated?")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ConversionError(f"{self._path}: {name} is compressed or encrypted, which torch.save does not do")
        self._file.seek(entry.header_offset)
        header = self._file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\3\4":
            raise ConversionError(f"{self._path}: {name} does not begin where the archive says")
        begin = entry.header_offset + _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if begin + entry.file_size > self._size:
            raise ConversionError(f"{self._path} ends in the middle of {name}; is it truncated?")
        return begin, entry.file_size

    def content(self, name: str) -> bytes:
        """The bytes of a small member."""
        begin, length = self.span(name)
        if length > _LONGEST_PICKLE:
            raise ConversionError(f"{self._path}: {name} has {length:,} bytes, more than any file of tensors needs")
        self._file.seek(begin)
        return self._file.read(length)

    def storage(self, key: str) -> tuple[int, int]:
        """Offset and length of a storage."""
        return self.span(f"{self._root}data/{key}")


@dataclasses.dataclass(frozen=True)
class _Storage:
    offset: int
    nbytes: int
    dtype: np.dtype | None  # None where the tensor says it


class _Record:
    """An object of torch of which only the class's name and the state are kept."""

    def __init__(self, *arguments: Any, **state: Any):
        self.arguments = arguments
        self.state: dict[str, Any] = state


class _DTensor(_Record): ...


class _Spec(_Record): ...


class _Mesh(_Record): ...


class _TensorMeta(_Record): ...


class _Shard(_Record): ...


class _Replicate(_Record): ...


class _Parameter(_Record): ...


_PLACEMENTS = "torch.distributed.tensor.placement_types", "torch.distributed._tensor.placement_types"
_RECORDS: dict[tuple[str, str], type[_Record]] = {
    **{(f"torch.distributed.{name}", "DTensor"): _DTensor for name in ("tensor", "tensor._api", "_tensor", "_tensor.api")},
    **{(f"torch.distributed.{name}", "DTensorSpec"): _Spec for name in ("tensor._dtensor_spec", "_tensor._dtensor_spec", "_tensor.placement_types")},
    **{(f"torch.distributed.{name}", "TensorMeta"): _TensorMeta for name in ("tensor._dtensor_spec", "_tensor._dtensor_spec", "_tensor.placement_types")},
    **{(f"torch.distributed.{name}", "DeviceMesh"): _Mesh for name in ("device_mesh", "_tensor.device_mesh")},
    **{(module, "Shard"): _Shard for module in _PLACEMENTS},
    **{(module, "Replicate"): _Replicate for module in _PLACEMENTS},
    ("torch.nn.parameter", "Parameter"): _Parameter,
}


class _Reader(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Runs the pickle with stand-ins. Calls and states are allowed for those alone; containers are built as usual."""

    def __init__(self, path: Path, members: _Members):
        super().__init__(io.BytesIO(members.content(members.pickle)))
        self._path, self._members = path, members
        self._calls: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._typed_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch._utils", "_rebuild_wrapper_subclass"): lambda *_: None,  # its parts are in the state
            ("torch._tensor", "_rebuild_from_type_v2"): self._subclass,
            ("torch.serialization", "_get_layout"): str,
            ("torch", "device"): lambda *names: names,
            ("torch", "Size"): tuple,
        }

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in (("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")):
            return None
        known = self._calls.get((module, name)) or _RECORDS.get((module, name))
        if known is None:
            raise ConversionError(
                f"{self._path} is refused: it names {module}.{name}, and only tensors and plain containers are read. Nothing was executed"
            )
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: ("storage", its type, its key, the device it was on, how many elements)."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not (pid[1] is None or isinstance(pid[1], np.dtype)):
            raise ConversionError(f"{self._path}: a persistent object is no storage")
        if not isinstance(pid[2], str):
            raise ConversionError(f"{self._path}: a storage has the key {pid[2]!r}")
        return _Storage(*self._members.storage(pid[2]), pid[1])

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
        return self._typed_tensor(storage, offset, shape, strides, False, None, storage.dtype)

    def _typed_tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any, *_: Any
    ) -> StoredTensor:
        """A view of a storage, checked to lie inside it. Offset and strides are in elements."""
        numbers = (offset, *shape, *strides)
        fine = isinstance(storage, _Storage) and isinstance(dtype, np.dtype) and len(shape) == len(strides) <= 32
        if not fine or not all(type(number) is int and 0 <= number < _LARGEST_AXIS for number in numbers):
            raise ConversionError(f"{self._path}: a tensor cannot have shape {some(shape)}, strides {some(strides)} and offset {offset}")
        last = offset + (1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if math.prod(shape) else 0)
        if last * dtype.itemsize > storage.nbytes:
            raise ConversionError(f"{self._path}: a tensor of shape {some(shape)} does not fit its storage of {storage.nbytes:,} bytes")
        whole = tuple(strides) == _row_major(shape) or not math.prod(shape)
        begin = storage.offset + offset * dtype.itemsize
        return StoredTensor("", self._path, dtype, tuple(shape), begin, None if whole else tuple(strides))

    def _subclass(self, call: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """A tensor of a subclass: how it is made, its class, the arguments of the making, and its state."""
        if kind is _DTensor:
            return self._sharded(_fields(state))
        if kind is _Parameter:
            return call(*arguments)
        raise ConversionError(f"{self._path}: a tensor of a class of its own")

    def _sharded(self, parts: Mapping[str, Any]) -> ShardedTensor:
        local, spec = parts["_local_tensor"], parts["_spec"].state
        mesh, meta = spec["mesh"].state, spec["tensor_meta"]
        shape = meta.arguments[0] if meta.arguments else meta.state["shape"]
        shards = tuple(self._axis(placement) for placement in spec["placements"])
        sizes = self._mesh_shape(mesh)
        axes = [axis for axis in shards if axis is not None]
        if not isinstance(local, StoredTensor) or len(shards) != len(sizes) or len(set(axes)) < len(axes):
            raise ConversionError(f"{self._path}: a tensor is divided in a way that is not known here: {shards} over {sizes}")
        if any(not 0 <= axis < len(shape) for axis in axes):
            raise ConversionError(f"{self._path}: a tensor of shape {some(shape)} is divided along {some(axes)}")
        return ShardedTensor(local, tuple(shape), sizes, shards)

    def _axis(self, placement: Any) -> int | None:
        if isinstance(placement, _Replicate):
            return None
        if isinstance(placement, _Shard):
            axis = placement.arguments[0] if placement.arguments else placement.state["dim"]
            if type(axis) is int:
                return axis
        raise ConversionError(f"{self._path}: a tensor is divided in a way that is not known here")

    def _mesh_shape(self, mesh: Mapping[str, Any]) -> tuple[int, ...]:
        """Devices along each axis, of which torch keeps nested lists or a tensor of ranks, or a layout of sizes."""
        raise ConversionError(f"{self._path}: the mesh {sorted(mesh)} is not known here")

    dispatch = dict(pickle._Unpickler.dispatch)  # pyright: ignore[reportAttributeAccessIssue]

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        call = self.stack[-1]
        if call is not OrderedDict and call not in self._calls.values() and not (isinstance(call, type) and issubclass(call, _Record)):
            raise ConversionError(f"{self._path} is refused: it calls something other than what makes tensors. Nothing was executed")
        self.stack[-1] = call(*arguments)

    def _load_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, _Record):
            made.state |= _fields(state)
        elif not isinstance(made, OrderedDict):  # whose `_metadata` says nothing of the tensors
            raise ConversionError(f"{self._path} is refused: it sets the state of something that is no tensor. Nothing was executed")

    dispatch[pickle.REDUCE[0]] = _load_reduce
    dispatch[pickle.BUILD[0]] = _load_build


def _fields(state: Any) -> dict[str, Any]:
    """Attributes as pickle keeps them: a dict, or a dict and one of slots."""
    parts = state if isinstance(state, tuple) else (state,)
    if not all(part is None or isinstance(part, dict) for part in parts):
        raise ConversionError("the state of a tensor is no dict")
    return {name: value for part in parts if part for name, value in part.items()}


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()


def _named(content: Any, name: str, path: Path) -> Any:
    """Plain containers again, with each tensor named by its place."""
    match content:
        case StoredTensor():
            return dataclasses.replace(content, name=name)
        case ShardedTensor():
            return dataclasses.replace(content, local=dataclasses.replace(content.local, name=name))
        case dict():
            return {key: _named(value, f"{name}.{key}" if name else str(key), path) for key, value in content.items()}
        case list() | tuple():
            return [_named(value, f"{name}.{place}" if name else str(place), path) for place, value in enumerate(content)]
        case None | bool() | int() | float() | str() | bytes():
            return content
    raise ConversionError(f"{path}: {name or 'what it holds'} is neither a tensor nor a plain container")


@dataclasses.dataclass(frozen=True)
class JoinedTensor:
    """A tensor whose pieces lie in several files, one after the other along one of its axes."""

    name: str
    pieces: tuple[Tensor, ...]
    axis: int
    shape: tuple[int, ...]

    @property
    def file(self) -> Path:
        """Where the first piece lies."""
        return self.pieces[0].file

    @property
    def dtype(self) -> np.dtype:
        """Of all pieces."""
        return self.pieces[0].dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Its values, or those of some rows of its first axis."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        if self.axis:
            return np.concatenate([piece.read(start, stop) for piece in self.pieces], axis=self.axis)
        found, begin = [], 0
        for piece in self.pieces:
            end = begin + piece.shape[0]
            if start < end and begin < stop:
                found.append(piece.read(max(start - begin, 0), min(stop, end) - begin))
            begin = end
        return np.concatenate(found) if found else np.empty((0, *self.shape[1:]), self.dtype)


def join_shards(name: str, ranks: Sequence[StoredTensor | ShardedTensor]) -> Tensor:
    """The whole of a tensor of which each rank of a run, in their order, saved its part.

    Raises:
      ConversionError: the ranks disagree about how it was divided, or their parts do not make the whole.
    """
    first = ranks[0]
    if isinstance(first, StoredTensor):  # not divided: every rank has it
        if any(not isinstance(rank, StoredTensor) or (rank.shape, rank.dtype) != (first.shape, first.dtype) for rank in ranks):
            raise ConversionError(f"{first.file}: the ranks disagree about {name}")
        return first
    described = {(rank.shape, rank.mesh, rank.shards) if isinstance(rank, ShardedTensor) else None for rank in ranks}
    if len(described) != 1 or math.prod(first.mesh) != len(ranks):
        raise ConversionError(f"{first.local.file}: the {len(ranks)} ranks disagree about how {name} was divided")
    parts = np.empty(len(ranks), object)
    parts[:] = [rank.local for rank in ranks if isinstance(rank, ShardedTensor)]
    parts = parts.reshape(first.mesh)
    # The innermost axis of the mesh first: what it divides was divided last.
    for axis in reversed(first.shards):
        flat = parts.reshape(-1, parts.shape[-1])
        joined = np.empty(len(flat), object)
        joined[:] = [row[0] if axis is None else _join(name, tuple(row), axis) for row in flat]
        parts = joined.reshape(parts.shape[:-1])
    whole: Tensor = parts.item()
    if whole.shape != first.shape:
        raise ConversionError(f"{first.local.file}: the parts of {name} make {whole.shape}, not {first.shape}")
    return whole


def _join(name: str, pieces: tuple[Tensor, ...], axis: int) -> JoinedTensor:
    shapes = {(piece.dtype, len(piece.shape), piece.shape[:axis], piece.shape[axis + 1 :]) for piece in pieces}
    if len(shapes) != 1 or len(pieces[0].shape) <= axis:
        raise ConversionError(f"{pieces[0].file}: the parts of {name} do not fit together along axis {axis}")
    shape = list(pieces[0].shape)
    shape[axis] = sum(piece.shape[axis] for piece in pieces)
    return JoinedTensor(name, pieces, axis, tuple(shape))


def write_torch_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as `torch.save` writes a dict of tensors; `torch.load(weights_only=True)` reads it.

    Raises:
      ConversionError: an array has a dtype that torch's storages do not have.
    """
    names = {dtype: name for name, dtype in _STORAGES.items()}
    program = [pickle.PROTO, b"\2", pickle.EMPTY_DICT, pickle.MARK]
    for number, (name, array) in enumerate(tensors.items()):
        if array.dtype not in names:
            raise ConversionError(f"{name} is {array.dtype}, which files of torch.save cannot hold")
        program += [_text(name), _global("torch._utils", "_rebuild_tensor_v2"), pickle.MARK]
        program += [pickle.MARK, _text("storage"), _global("torch", names[array.dtype]), _text(str(number)), _text("cpu")]
        program += [_number(array.size), pickle.TUPLE, pickle.BINPERSID, _number(0), *_numbers(array.shape), *_numbers(_row_major(array.shape))]
        program += [pickle.NEWFALSE, _global("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE, pickle.TUPLE, pickle.REDUCE]
    program += [pickle.SETITEMS, pickle.STOP]
    with zipfile.ZipFile(path, "w") as archive:
        root = path.stem
        _store(archive, f"{root}/data.pkl", b"".join(program))
        _store(archive, f"{root}/byteorder", b"little")
        for number, array in enumerate(tensors.values()):
            _store(archive, f"{root}/data/{number}", as_bytes(np.ascontiguousarray(array)))
        _store(archive, f"{root}/version", b"3\n")


def _store(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    entry = zipfile.ZipInfo(name)
    assert archive.fp is not None
    begin = archive.fp.tell() + _LOCAL_HEADER + len(name) + 4  # 4: the head of the field that pads
    padding = -begin % _ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    archive.writestr(entry, content)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _number(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return pickle.LONG1 + len(encoded).to_bytes(1, "little") + encoded


def _numbers(values: Sequence[int]) -> list[bytes]:
    return [pickle.MARK, *map(_number, values), pickle.TUPLE]
