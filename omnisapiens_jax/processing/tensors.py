"""Tensors where they lie in files: found by reading headers, read by offset when asked for, and safetensors files written as they come.

The safetensors package hands out whole tensors of a mapped file, where a conversion wants a few rows at a time and no more of them in
memory; and it takes the last of two tensors of one name. So the header, a length and a JSON object, is read here, and the package has the
last word on it. Everything wrong is a `ConversionError`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

_LONGEST_HEADER = 100_000_000  # bytes; the limit of the format's own library
_MOST_AXES = 64  # of an array of numpy
_MOST_BYTES = 1 << 63  # beyond it numpy's arithmetic on shapes overflows, also where another axis is zero

# The names of the format, in the order in which its library sorts tensors when it writes (widest first, read from the end). Those that
# pack numbers of less than a byte are not here: numpy has no such arrays.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_FLOATING = {DTYPES[name] for name in ("F16", "BF16", "F32", "F64")}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {name: rank for rank, name in enumerate(DTYPES)}


class ConversionError(ValueError):
    """A checkpoint that is not what it should be; the message names the file and the tensors."""


@dataclasses.dataclass(frozen=True)
class HeldFile:
    """A file whose bytes are in memory already: of a table's row, say."""

    name: str
    content: bytes = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return self.name

    def open(self, mode: str = "rb", buffering: int = -1) -> io.BytesIO:
        """As a path is opened."""
        return io.BytesIO(self.content)


File = Path | HeldFile


class Tensor(Protocol):
    """What the converters ask of a tensor, wherever it lies."""

    @property
    def name(self) -> str:
        """As its file calls it."""
        ...

    @property
    def file(self) -> File:
        """Where it lies."""
        ...

    @property
    def made_of(self) -> tuple[Tensor, ...]:
        """The stored tensors that its values are read from, the one it is named after first."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """It is stored in."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of it."""
        ...

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Its values, or those of some rows of its first axis."""
        ...


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: nothing of it is in memory until it is read."""

    name: str  # in its file
    file: File
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first element, in bytes from the beginning of the file
    strides: tuple[int, ...] | None = None  # in elements, none negative; None = rows one after the other

    @property
    def made_of(self) -> tuple[Tensor, ...]:
        """Itself."""
        return (self,)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Its values, or those of the rows `start` to `stop` of its first axis, C-contiguous and in memory of their own.

        Raises:
          ConversionError: the file ends before the tensor does.
          OSError: the file cannot be read; it may be the next time.
        """
        if not self.shape:
            return self._read((), self.offset, None)
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        row = math.prod(self.shape[1:]) if self.strides is None else self.strides[0]
        return self._read((max(stop - start, 0), *self.shape[1:]), self.offset + start * row * self.dtype.itemsize, self.strides)

    def _read(self, shape: tuple[int, ...], offset: int, strides: tuple[int, ...] | None) -> np.ndarray:
        count = math.prod(shape)
        if strides is not None and count:
            count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        values = np.empty(count, self.dtype)
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(offset)
                rest = as_bytes(values)
                while rest:
                    got = file.readinto(rest)
                    if not got:
                        raise ConversionError(f"{self.file} ends in the middle of {self.name}; is it truncated?")
                    rest = rest[got:]
        except OSError as reason:
            raise OSError(reason.errno, f"{self.file}: {self.name} cannot be read ({reason.strerror})") from reason
        if strides is None:
            return values.reshape(shape)
        steps = [stride * self.dtype.itemsize for stride in strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, shape, steps, writeable=False))


@dataclasses.dataclass(frozen=True)
class HeldTensor:
    """A tensor that is in memory already."""

    name: str
    values: np.ndarray
    file: File = Path("memory")

    @property
    def made_of(self) -> tuple[Tensor, ...]:
        """Itself."""
        return (self,)

    @property
    def dtype(self) -> np.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of it, C-contiguous."""
        return np.ascontiguousarray(self.values[start:stop] if self.values.ndim else self.values)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by their names; only the header is read.

    Raises:
      ConversionError: the file is missing, or it or its header is not what the format allows: truncated, names given twice, unknown
        dtypes, tensors that overlap, leave gaps or do not fit their shapes.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ConversionError(f"{path} is truncated or not a safetensors file ({size:,} bytes, a header of {length:,})")
            header = file.read(length)
    except OSError as reason:
        raise ConversionError(f"{path} cannot be read ({reason.strerror})") from reason
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as reason:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ConversionError(f"{path}: the header is broken ({reason})") from reason
    if not isinstance(entries, dict):
        raise ConversionError(f"{path}: the header is not a JSON object")
    entries.pop("__metadata__", None)  # checked by the package
    begin, found = 8 + length, {}
    for name, entry in entries.items():
        dtype, shape, span = _entry(path, name, entry)
        found[name] = (span, StoredTensor(name, path, dtype, shape, begin + span[0]))
    end = 0
    for (start, stop), tensor in sorted(found.values(), key=lambda item: item[0]):
        if start != end:
            raise ConversionError(f"{path}: {tensor.name} begins at byte {start} of the data, but the tensors before it end at {end}")
        end = stop
    if begin + end != size:
        raise ConversionError(f"{path} is truncated or has a tail: its tensors end at byte {begin + end:,}, the file at {size:,}")
    try:
        with safe_open(path, framework="np"):  # what else serde's JSON is strict about: NaN, -0, half a surrogate pair
            pass
    except (SafetensorError, OSError) as reason:
        raise ConversionError(f"{path}: the header is broken ({reason})") from reason
    return {name: tensor for name, (_, tensor) in found.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"given twice: {some(sorted(name for name, count in counts.items() if count > 1))}")
    return entries


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list) or not isinstance(entry.get("data_offsets"), list):
        raise ConversionError(f"{path}: the header does not describe {name} by dtype, shape and data_offsets")
    shape, span, dtype = entry["shape"], entry["data_offsets"], entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConversionError(f"{path}: {name} has dtype {dtype!r:.40}; known: {', '.join(DTYPES)}")
    if len(shape) > _MOST_AXES or not all(type(axis) is int and 0 <= axis < _MOST_BYTES for axis in shape):
        raise ConversionError(f"{path}: {name} cannot have shape [{some(shape)}]")
    if math.prod(axis or 1 for axis in shape) * DTYPES[dtype].itemsize >= _MOST_BYTES:
        raise ConversionError(f"{path}: {name} cannot have shape {shape}: no machine addresses so much")
    if len(span) != 2 or not all(type(place) is int and 0 <= place < _MOST_BYTES for place in span) or span[0] > span[1]:
        raise ConversionError(f"{path}: {name} cannot lie at [{some(span)}]")
    if span[1] - span[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ConversionError(f"{path}: {name} is {dtype} {shape} but has {span[1] - span[0]:,} bytes")
    return DTYPES[dtype], tuple(shape), (span[0], span[1])


class SafetensorsWriter:
    """A safetensors file whose tensors are named beforehand and written one after the other, in `order`.

    Header and order are those of the format's own library, so that the same tensors give the same file. Nothing bigger than what is being
    written need be in memory.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None):
        """Writes the header of a new file.

        Raises:
          ConversionError: a dtype is none of the format's.
        """
        for name, (dtype, _) in tensors.items():
            if dtype not in _NAMES:
                raise ConversionError(f"{name} is {dtype}, which safetensors files cannot hold")
        self.order = sorted(tensors, key=lambda name: (-_RANKS[_NAMES[tensors[name][0]]], name))
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in self.order:
            dtype, shape = tensors[name]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._rest = end
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                assert not self._rest, f"{self._rest} bytes were never written"
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, values: np.ndarray) -> None:
        """Appends the next rows of the tensors in `order`."""
        self._rest -= values.nbytes
        self._file.write(as_bytes(values))


def read_finite(tensor: Tensor, start: int, stop: int | None, dtype: np.dtype) -> np.ndarray:
    """Rows of a tensor in a dtype, C-contiguous. Raises ConversionError if any value is not finite, or becomes so when it is cast."""
    values = tensor.read(start, stop)
    check_finite(values, tensor)
    if values.dtype != dtype:
        with np.errstate(over="ignore"):
            values = values.astype(dtype)
        check_finite(values, tensor, f" as {dtype}: they are too large for it, choose another dtype")
    return values


_DIVERGED = "; a model with them answers nothing. Get the checkpoint again, or one saved before its training diverged"


def check_finite(values: np.ndarray, tensor: Tensor, why: str = _DIVERGED) -> None:
    """Raises ConversionError, which names the tensor, if any value is infinite or NaN; integers and bytes always pass."""
    if values.dtype not in _FLOATING:
        return
    # A floating number is not finite where all bits of its exponent are set; in pieces that stay in the processor's cache.
    info = ml_dtypes.finfo(values.dtype)
    bits = values.reshape(-1).view(f"u{values.dtype.itemsize}")
    mask = bits.dtype.type((1 << info.nexp) - 1 << info.nmant)
    for start in range(0, bits.size, 1 << 18):
        if ((bits[start : start + (1 << 18)] & mask) == mask).any():
            count = int(((bits & mask) == mask).sum())
            raise ConversionError(f"{tensor.file}: {count:,} of {bits.size:,} values read of {tensor.name} are infinite or NaN{why}")


def origin(tensor: Tensor) -> dict[str, Any]:
    """What a receipt says of where a tensor came from, beside its file: its name there, and what else went into it."""
    return {"stored_name": tensor.name, "with": [f"{other.name} in {other.file}" for other in tensor.made_of[1:]]}


def as_bytes(values: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array."""
    return values.reshape(-1).view(np.uint8).data


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the values of some tensors in the dtypes they are stored in."""
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)


def blocks(shape: tuple[int, ...], itemsize: int, most: int) -> Iterator[tuple[int, int]]:
    """Spans of rows of a tensor, each of at most `most` bytes (but at least a row), that cover it; one span where there is no row axis."""
    if not shape:
        yield 0, 1
        return
    step = max(1, most // max(math.prod(shape[1:]) * itemsize, 1))
    yield from ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def some(names: Iterable[Any], most: int = 20) -> str:
    """The first names of a list, and how many more there are."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
