"""Files of `torch.save`, read without torch and without executing anything in them, and written for torch to read.

Such a file is a zip archive: `data.pkl`, a pickle that says how tensors are put together, and the storages as plain bytes. A pickle is a
program that names functions and calls them. Here it may name nothing but what tensors consist of, and nothing is called: a call is noted
down with its arguments, and the notes are read when the program has ended. The pure-Python unpickler runs it because the one in C
allocates what a hostile file asks for.
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import itertools
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from omnisapiens_jax.processing.tensors import ConversionError, File, HeldFile, HeldTensor, StoredTensor, as_bytes

_LONGEST_PICKLE = 8 << 20  # bytes; that of the largest shard of the family has about one MiB, and a hostile one takes 70 times its length
# Arrays of numpy lie in the pickle itself, so one that holds them may be longer, if it is long because of them: of few instructions.
_LONGEST_WITH_ARRAYS = 256 << 20
_MOST_INSTRUCTIONS = 200_000
_LONGEST_NAME = 500
_MOST_AXES = 32
_LARGEST_SHAPE = 1 << 48  # elements; beyond it numpy's arithmetic on shapes overflows
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

_ARRAY_DTYPES: dict[str, np.dtype] = {name: np.dtype(name) for name in "f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1".split()}

# All that a pickle may name, by the modules that torch 1.6 to 2.13 keep it in. The last part of a name is enough to tell it.
_NAMES = {
    "collections.OrderedDict",
    *(f"torch.{name}" for name in ("Size", "Tensor", "device", *_STORAGES, *_DTYPES)),
    "torch.serialization._get_layout",
    "torch.storage.UntypedStorage",
    "torch._tensor._rebuild_from_type_v2",
    *(f"torch._utils._rebuild_{what}" for what in ("tensor_v2", "tensor_v3", "parameter", "parameter_with_state", "wrapper_subclass")),
    # Of arrays of numpy 1 and 2, whose bytes older protocols spell as text.
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{module}.multiarray.{name}" for module in ("core", "_core") for name in ("_reconstruct", "scalar")),
    "_codecs.encode",
    *(f"{module}.bytes" for module in ("__builtin__", "builtins")),  # empty ones
    # Of tensors that are divided over a mesh of devices.
    *(f"torch.distributed.{module}.DTensor" for module in ("tensor", "tensor._api", "_tensor", "_tensor.api")),
    *(
        f"torch.distributed.{module}.{name}"
        for module in ("tensor._dtensor_spec", "_tensor._dtensor_spec", "_tensor.placement_types")
        for name in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")
    ),
    *(f"torch.distributed.{module}.placement_types.{name}" for module in ("tensor", "_tensor") for name in ("Shard", "Replicate")),
    *(f"torch.distributed.{module}.DeviceMesh" for module in ("device_mesh", "_tensor.device_mesh")),
    *(f"torch.distributed._mesh_layout.{name}" for name in ("_MeshLayout", "_FlatLayout")),
}


@dataclasses.dataclass(frozen=True)
class ShardedTensor:
    """One rank's part of a tensor that is divided over a mesh of devices (torch's DTensor).

    Attributes:
      local: what this rank holds.
      shape: of the whole tensor.
      place: of this rank in the mesh, an index for each axis of the mesh.
      shards: for each axis of the mesh the axis of the tensor that is divided over it; None = each device has a copy.
    """

    local: StoredTensor
    shape: tuple[int, ...]
    place: tuple[int, ...]
    shards: tuple[int | None, ...]


def read_torch_file(path: File) -> Any:
    """What `torch.save` put into a file: dicts, lists, numbers and strings, with a `StoredTensor` or `ShardedTensor` for every tensor.

    Tensors are named by their place, `heads.0.weight` or `model.layers.0`; their values stay in the file until they are read. An array of
    numpy becomes a `HeldTensor`, one number of it a number. Tuples come back as lists.

    Raises:
      ConversionError: the file is missing or broken, of torch before 1.6, or holds anything else; the message names it.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = _Members(path, archive, file)
            program = members.content(members.pickle)
            return _Notes(path, members, len(program)).read(_Reader(path, program).load(), "")
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

    def __init__(self, path: File, archive: zipfile.ZipFile, file: BinaryIO):
        self._path, self._file = path, file
        self._size = file.seek(0, os.SEEK_END)
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
            raise ConversionError(f"{path} was saved on a big-endian machine; load it with torch on another one and save it again")

    def span(self, name: str) -> tuple[int, int]:
        """Offset and length of a member's bytes."""
        entry = self._entries.get(name)
        if entry is None:
            raise ConversionError(f"{self._path} has no member {name[:_LONGEST_NAME]!r}; is it truncated?")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
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
        """The bytes of a member that is small, or long because of a few long parts."""
        begin, length = self.span(name)
        if length <= _LONGEST_WITH_ARRAYS:
            self._file.seek(begin)
            program = self._file.read(length)
            few = itertools.islice(pickletools.genops(program), _MOST_INSTRUCTIONS) if length > _LONGEST_PICKLE else ()
            if length <= _LONGEST_PICKLE or any(instruction.name == "STOP" for instruction, _, _ in few):
                return program
        raise ConversionError(f"{self._path}: {name} has {length:,} bytes, more than any file of tensors needs")

    def storage(self, key: str) -> tuple[int, int]:
        """Offset and length of a storage."""
        return self.span(f"{self._root}data/{key}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Name:
    """Something that the pickle names, of `_NAMES`, without its module."""

    name: str


@dataclasses.dataclass(eq=False)
class _Call:
    """A call that the pickle asks for and nobody makes: of what, with which arguments, and the state its result was to be given."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


_Unpickler: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]
_PLAIN = [
    getattr(pickle, name)[0]
    for name in (
        "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES "
        "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT "
        "MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID"
    ).split()
]


class _Reader(_Unpickler):
    """Runs the pickle: containers, numbers and strings are built, calls are noted down."""

    def __init__(self, path: File, program: bytes):
        super().__init__(io.BytesIO(program))
        self._path = path

    def find_class(self, module: str, name: str) -> _Name:
        """What a name in the pickle stands for."""
        if f"{module}.{name}" not in _NAMES:
            raise self._refused(f"it names {f'{module}.{name}'[:_LONGEST_NAME]!r}, and only tensors and plain containers are read")
        return _Name(name)

    def persistent_load(self, pid: Any) -> _Call:
        """A storage: ("storage", its type, its key, the device it was on, how many elements)."""
        return _Call("storage", pid)

    def _note(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise self._refused("it calls something that is no function")
        self.stack.append({} if function.name == "OrderedDict" and not arguments else _Call(function.name, arguments))

    def _set_state(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, _Call):
            made.state = state
        elif not isinstance(made, dict):  # whose `_metadata`, of an OrderedDict, says nothing of the tensors
            raise self._refused("it changes something that is no object")

    def _set_items(self, items: Sequence[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, str | int) for key in items[::2]):
            raise self._refused("it has a dict whose keys are neither strings nor whole numbers")  # a deep tuple's hash would crash Python
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items((key, value))

    def _set_marked_items(self) -> None:
        self._set_items(self.pop_mark())

    def _unknown(self) -> None:
        raise self._refused("it has an instruction that torch.save does not write")

    def _refused(self, why: str) -> ConversionError:
        return ConversionError(f"{self._path} is refused: {why}. Nothing was executed")

    # Of Python's own instructions only those that put plain things together.
    dispatch = dict.fromkeys(range(256), _unknown)
    dispatch |= {code: _Unpickler.dispatch[code] for code in _PLAIN}
    dispatch |= {pickle.REDUCE[0]: _note, pickle.NEWOBJ[0]: _note, pickle.BUILD[0]: _set_state}
    dispatch |= {pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_marked_items}


class _Notes:
    """Reads what the pickle left: containers are made plain, and noted calls that make tensors become tensors."""

    def __init__(self, path: File, members: _Members, most: int):
        """`most` things and bytes of arrays are read: what is put into several places, and itself consists of such, could be endless."""
        self._path, self._members, self._left, self._bytes_left = path, members, most, most

    def read(self, content: Any, name: str) -> Any:
        """What lies at the place `name`."""
        self._left -= 1
        if self._left < 0:
            raise ConversionError(f"{self._path} is refused: the same parts are repeated in it over and over")
        match content:
            case None | bool() | int() | float() | str():
                return content
            case dict():
                return {key: self.read(value, self._place(name, key)) for key, value in content.items()}
            case list() | tuple():
                return [self.read(value, self._place(name, number)) for number, value in enumerate(content)]
            case _Call("Size", (tuple() as size,)):
                return self.read(size, name)
            case _Call("_reconstruct" | "scalar"):
                return self._array(content, name)
            case _Call():
                return self._tensor(content, name)
        raise self._strange(name)

    def _place(self, name: str, key: str | int) -> str:
        place = f"{name}.{key}" if name else str(key)
        if len(place) > _LONGEST_NAME:
            raise ConversionError(f"{self._path} is refused: it has names of more than {_LONGEST_NAME} characters")
        return place

    def _strange(self, name: str) -> ConversionError:
        return ConversionError(f"{self._path}: {name or 'what it holds'} is neither a tensor nor a plain container")

    def _array(self, call: _Call, name: str) -> HeldTensor | int | float | bool:
        """An array or a number of numpy: its bytes are in the pickle, and so must be as many as its shape says."""
        match call:
            case _Call("_reconstruct", (_Name("ndarray"), *_), (_, tuple() as shape, kind, bool() as turned, content)):
                pass
            case _Call("scalar", (kind, content)):
                shape, turned = (), False
            case _:
                raise self._strange(name)
        dtype, content = self._dtype(kind, name), self._bytes(content, name)
        if len(shape) > _MOST_AXES or not all(type(axis) is int and 0 <= axis < _LARGEST_SHAPE for axis in shape):
            raise ConversionError(f"{self._path}: {name} has a shape that no array has")
        if math.prod(axis or 1 for axis in shape) > _LARGEST_SHAPE or math.prod(shape) * dtype.itemsize != len(content):
            raise ConversionError(f"{self._path}: {name} {dtype} {shape} does not consist of {len(content):,} bytes")
        values = np.frombuffer(content, dtype).reshape(shape, order="F" if turned else "C")
        return HeldTensor(name, values, self._path) if call.name == "_reconstruct" else values.item()

    def _dtype(self, kind: Any, name: str) -> np.dtype:
        match kind:
            case _Call("dtype", (str(code), *_), (_, "<" | "|", None, None, None, *_)) if code in _ARRAY_DTYPES:
                return _ARRAY_DTYPES[code]
        raise ConversionError(f"{self._path}: {name} is an array of something other than plain numbers")

    def _bytes(self, content: Any, name: str) -> bytes:
        match content:
            case _Call("bytes", ()):
                content = b""
            case _Call("encode", (str(text), "latin1")) if self._bytes_left >= len(text):
                content = codecs.encode(text, "latin1")
            case bytes() if self._bytes_left >= len(content):
                pass
            case _:
                raise ConversionError(f"{self._path}: {name} is an array without bytes of its own")
        self._bytes_left -= len(content)
        return content

    def _tensor(self, call: _Call, name: str) -> StoredTensor | ShardedTensor:
        match call:
            # Neither with anything after it: that would say that the values are to be negated.
            case _Call("_rebuild_tensor_v2", (_Call("storage", ("storage", _Name(kind), str(key), *_)), offset, shape, strides, _, _)):
                if kind in _STORAGES:
                    return self._view(name, key, _STORAGES[kind], offset, shape, strides)
            case _Call("_rebuild_tensor_v3", (_Call("storage", ("storage", _, str(key), *_)), offset, shape, strides, _, _, _Name(kind))):
                if kind in _DTYPES:
                    return self._view(name, key, _DTYPES[kind], offset, shape, strides)
            case _Call("_rebuild_parameter" | "_rebuild_parameter_with_state", (_Call() as data, *_)):
                return self._tensor(data, name)
            case _Call("_rebuild_from_type_v2", (_Name(function), _Name("Tensor"), tuple() as arguments, _)):  # has attributes of its own
                return self._tensor(_Call(function, arguments), name)
            case _Call("_rebuild_from_type_v2", (_, _Name("DTensor"), _, (_, dict() as parts))):  # its attributes and its slots
                return self._sharded(parts, name)
        raise self._strange(name)

    def _view(self, name: str, key: str, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> StoredTensor:
        """A view of a storage, checked to lie inside it. Offset and strides are in elements."""
        fine = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= _MOST_AXES
        if not fine or not all(type(number) is int and 0 <= number < _LARGEST_SHAPE for number in (offset, *shape, *strides)):
            raise ConversionError(f"{self._path}: {name} has an offset, shape or strides that no tensor has")
        begin, nbytes = self._members.storage(key)
        elements = math.prod(shape)
        end = offset + (1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if elements else 0)
        if math.prod(size or 1 for size in shape) > _LARGEST_SHAPE or max(end, elements) * dtype.itemsize > nbytes:
            raise ConversionError(f"{self._path}: {name} {dtype} {shape} does not fit into its storage of {nbytes:,} bytes")
        whole = strides == _row_major(shape) or not elements
        return StoredTensor(name, self._path, dtype, shape, begin + offset * dtype.itemsize, None if whole else strides)

    def _sharded(self, parts: Mapping[str, Any], name: str) -> ShardedTensor:
        match parts:
            case {
                "_local_tensor": _Call() as local,
                "_spec": _Call(
                    state={
                        "mesh": _Call(state={"_coordinate_on_dim": list() | tuple() as place}),
                        "placements": tuple() as placements,
                        "tensor_meta": _Call("TensorMeta", (_Call("Size", (tuple() as shape,)), *_)),
                    }
                ),
            }:
                tensor, shards = self._tensor(local, name), [self._axis(placement, name) for placement in placements]
                axes = [axis for axis in shards if axis is not None]
                numbers = (*shape, *place, *axes)
                if (
                    isinstance(tensor, StoredTensor)
                    and len(place) == len(shards)
                    and all(type(number) is int and 0 <= number < _LARGEST_SHAPE for number in numbers)
                    and all(axis < len(shape) == len(tensor.shape) for axis in axes)
                    and len(set(axes)) == len(axes)
                ):
                    return ShardedTensor(tensor, shape, tuple(place), tuple(shards))
        raise ConversionError(f"{self._path}: {name} is divided over devices in a way that is not known here")

    def _axis(self, placement: Any, name: str) -> int | None:
        match placement:
            case _Call("Replicate"):
                return None
            case _Call("Shard", state={"dim": int(axis)}):
                return axis
        raise ConversionError(f"{self._path}: {name} is divided over devices in a way that is not known here")


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()


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
        program += [
            _number(array.size),
            pickle.TUPLE,
            pickle.BINPERSID,
            _number(0),
            *_numbers(array.shape),
            *_numbers(_row_major(array.shape)),
        ]
        program += [pickle.NEWFALSE, _global("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE, pickle.TUPLE, pickle.REDUCE]
    program += [pickle.SETITEMS, pickle.STOP]
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            _store(archive, "archive/data.pkl", b"".join(program))
            _store(archive, "archive/byteorder", b"little")
            for number, array in enumerate(tensors.values()):
                _store(archive, f"archive/data/{number}", as_bytes(np.ascontiguousarray(array)))
            _store(archive, "archive/version", b"3\n")
        file.flush()
        os.fsync(file.fileno())


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
