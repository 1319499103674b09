"""Reads behavioural descriptors: the `.pt` files of the published release and the `.npz` files of ours. Nothing in them is executed.

A video's file is a dict of landmarks: `pose [T, 33, 3]`, `face [T, 478, 3]`, `left_hand` and `right_hand [T, 21, 3]`, zero where nothing
was found, and `frame_indices [T]`; ours has `times [T]` too. A sound's is a dict with `features [1, 6373]`, the ComParE 2016 functionals
of the whole clip; ours has `low_level [T, 65]` and their `times [T]` too. Sources: reference 4.3 and 4.4.
"""

from __future__ import annotations

import dataclasses
import io
import math
import threading
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from omnisapiens_jax.processing.tensors import ConversionError, HeldFile, HeldTensor, StoredTensor
from omnisapiens_jax.processing.torch_files import read_torch_file

PARTS = {"pose": 33, "face": 478, "left_hand": 21, "right_hand": 21}  # points of x, y (0 to 1 of the picture) and z (as x, from the hips)
FACE_WITHOUT_IRISES = 468  # points of the face in the released file of a clip that shows none
FRAME_WIDTH = 3 * sum(PARTS.values())  # 1659
VIDEO_WIDTH = 2 * FRAME_WIDTH  # 3318
AUDIO_WIDTH = 6373
LOW_LEVEL_WIDTH = 65
ASSUMED_FPS = 30.0  # of a clip whose rate neither its descriptor nor the caller says

_ONE_HEADER = threading.Lock()  # numpy parses it with `ast`, of which Python 3.11 counts the depth for all threads together
_MOST_BYTES = 1 << 30  # of one file, unpacked: an hour and a half of landmarks


class DescriptorError(ValueError):
    """A descriptor that cannot be used; the message names the file, the key and what is wrong."""

    def __init__(self, name: str, cause: str):
        super().__init__(f"{name}: {cause}")
        self.name, self.cause = name, cause

    def __reduce__(self) -> tuple[Any, ...]:
        return DescriptorError, (self.name, self.cause)


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """One modality of one sample.

    Attributes:
      pooled: `[D]` float32: of a video the mean and the population standard deviation of its frames (3318), of a sound its functionals
        (6373), not normed.
      frames: `[T, d]` float32: landmarks (1659) or low-level descriptors (65); T = 0 where the file has no sequence.
      times: `[T]` float32 seconds, the middle of each frame or window.
    """

    pooled: np.ndarray
    frames: np.ndarray
    times: np.ndarray


def read_video_descriptor(
    data: bytes | Path, name: str = "video descriptor", *, fps: float | None = None, compat_trailing_pad: bool = False
) -> Descriptor | None:
    """The landmarks of a video; None where the file says that no frame could be read (T = 0).

    Each part is padded to its own width: a face of 468 points to 478.

    Args:
      data: the file, or its bytes.
      name: what errors call it.
      fps: frames a second, for files without `times` (released ones); `ASSUMED_FPS` where it is None.
      compat_trailing_pad: pools such a face without padding it and puts the zeros behind everything else, as the published code does. All
        behind the means of the face then stands where the adapter expects something else; only released adapters want that.

    Raises:
      DescriptorError: the file is missing, broken, refused, or its arrays are not such; NaN and infinity are told, too.
    """
    file, content = read_content(data, name)
    arrays = {part: _array(file, content, part) for part in PARTS}
    if all(array.shape[:1] == (0,) for array in arrays.values()):
        return None
    frames = len(arrays["pose"]) if arrays["pose"].ndim else 0
    for part, points in PARTS.items():
        known = (points, FACE_WITHOUT_IRISES) if part == "face" else (points,)
        if arrays[part].shape not in [(frames, width, 3) for width in known]:
            raise DescriptorError(file.name, f"{part} is {list(arrays[part].shape)}, not [{frames}, {points}, 3]")
    sequence = np.zeros((frames, FRAME_WIDTH), np.float32)
    begin = 0
    for part, points in PARTS.items():
        flat = arrays[part].reshape(frames, -1)
        sequence[:, begin : begin + flat.shape[1]] = flat
        begin += 3 * points
    if compat_trailing_pad:
        pooled = _pooled(file, np.concatenate([arrays[part].reshape(frames, -1) for part in PARTS], axis=1))
        pooled = np.pad(pooled, (0, VIDEO_WIDTH - len(pooled)))
    else:
        pooled = _pooled(file, sequence)
    if "times" in content:
        times = _times(file, content, frames)
    else:
        times = ((_indices(file, content, frames) + 0.5) / (fps or ASSUMED_FPS)).astype(np.float32)
    return Descriptor(pooled, sequence, times)


def trailing_pad(descriptor: Descriptor) -> Descriptor:
    """A video's descriptor as `compat_trailing_pad` pools it, which one that was read before must be turned into.

    A released file shows 468 points of a face exactly where no frame of the clip has a face, and they are zero then.
    """
    first, points = 3 * PARTS["pose"], 3 * PARTS["face"]
    means, deviations = descriptor.pooled[:FRAME_WIDTH], descriptor.pooled[FRAME_WIDTH:]
    if np.any(means[first : first + points]) or np.any(deviations[first : first + points]):
        return descriptor
    surplus = 3 * (PARTS["face"] - FACE_WITHOUT_IRISES)
    shorter = np.concatenate([np.delete(half, np.s_[first : first + surplus]) for half in (means, deviations)])
    return dataclasses.replace(descriptor, pooled=np.pad(shorter, (0, VIDEO_WIDTH - len(shorter))))


def read_audio_descriptor(data: bytes | Path, name: str = "audio descriptor") -> Descriptor | None:
    """The openSMILE functionals of a sound, and its low-level descriptors where the file has them; None where it holds no window at all.

    Args:
      data: the file, or its bytes.
      name: what errors call it.

    Raises:
      DescriptorError: the file is missing, broken, refused, or its arrays are not such; NaN and infinity are told, too.
    """
    file, content = read_content(data, name)
    features = _array(file, content, "features")
    if features.shape[:1] == (0,):
        return None
    if features.shape not in ((1, AUDIO_WIDTH), (AUDIO_WIDTH,)):
        raise DescriptorError(file.name, f"features is {list(features.shape)}, not [1, {AUDIO_WIDTH}]: ComParE 2016 of the whole clip")
    frames, times = np.zeros((0, LOW_LEVEL_WIDTH), np.float32), np.zeros(0, np.float32)
    if "low_level" in content:
        frames = _array(file, content, "low_level")
        if frames.ndim != 2 or frames.shape[1] != LOW_LEVEL_WIDTH:
            raise DescriptorError(file.name, f"low_level is {list(frames.shape)}, not [T, {LOW_LEVEL_WIDTH}]")
        times = _times(file, content, len(frames))
    return Descriptor(features.reshape(AUDIO_WIDTH), frames, times)


def read_content(data: bytes | Path, name: str) -> tuple[HeldFile, Mapping[str, Any]]:
    """The file under its full name, and the dict in it. Raises DescriptorError: it is missing, broken or refused."""
    file = HeldFile(f"{name} ({data})" if isinstance(data, Path) else f"{name} ({len(data)} bytes)", _bytes(data, name))
    if not file.content:
        raise DescriptorError(file.name, "is empty")
    try:
        with file.open() as opened, zipfile.ZipFile(opened) as archive:
            ours = any(entry.filename.endswith(".npy") for entry in archive.infolist())
            content = _numpy_arrays(file, archive) if ours else read_torch_file(file)
    except ConversionError as reason:
        raise DescriptorError(file.name, str(reason).removeprefix(f"{file}").lstrip(": ")) from reason
    except DescriptorError:
        raise
    except Exception as reason:  # a broken archive can raise anything
        raise DescriptorError(file.name, f"neither a file of torch.save (1.6 or later) nor of numpy.savez ({reason})") from reason
    if not isinstance(content, dict):
        raise DescriptorError(file.name, "holds no dict")
    return file, content


def _bytes(data: bytes | Path, name: str) -> bytes:
    if isinstance(data, bytes):
        return data
    try:
        return data.read_bytes()
    except OSError as reason:
        raise DescriptorError(f"{name} ({data})", f"cannot be read ({reason.strerror})") from reason


def _numpy_arrays(file: HeldFile, archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """What `numpy.load` gives; it allocates what a header says before it looks whether there is so much."""
    if sum(entry.file_size for entry in archive.infolist()) > _MOST_BYTES:
        raise DescriptorError(file.name, f"is refused: it unpacks to more than {_MOST_BYTES:,} bytes")
    arrays = {}
    for entry in archive.infolist():
        key = entry.filename.removesuffix(".npy")
        try:
            arrays[key] = _numpy_array(io.BytesIO(archive.read(entry)))
        # zipfile says of an unknown compression that it is not implemented, of an encrypted entry RuntimeError; SyntaxError is of a header
        except (ValueError, SyntaxError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as reason:
            raise DescriptorError(file.name, f"{key[:100]} is no array of numbers ({reason})") from reason
    return arrays


def _numpy_array(opened: BinaryIO) -> np.ndarray:
    version = np.lib.format.read_magic(opened)
    if version != (1, 0):
        raise ValueError(f"format {version}")
    with _ONE_HEADER:
        shape, turned, dtype = np.lib.format.read_array_header_1_0(opened)
    content = opened.read()
    if dtype.kind not in "fiub" or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{dtype} {shape} of {len(content):,} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if turned else "C")


def _values(file: HeldFile, content: Mapping[str, Any], key: str) -> np.ndarray:
    """An array as the file holds it."""
    value = content.get(key)
    if isinstance(value, StoredTensor | HeldTensor):
        value = value.read()
    elif isinstance(value, list):
        try:
            value = np.asarray(value)
        except ValueError as reason:
            raise DescriptorError(file.name, f"{key} is a list of unequal parts") from reason
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub" and value.dtype.name != "bfloat16":
        raise DescriptorError(file.name, f"{key} is missing" if value is None else f"{key} is no array of numbers")
    return value


def _array(file: HeldFile, content: Mapping[str, Any], key: str) -> np.ndarray:
    """An array as float32, all of it finite."""
    with np.errstate(over="ignore"):
        values = _values(file, content, key).astype(np.float32)
    if wrong := values.size - int(np.count_nonzero(np.isfinite(values))):
        raise DescriptorError(file.name, f"{wrong:,} of {values.size:,} values of {key} are NaN or infinite")
    return values


def _times(file: HeldFile, content: Mapping[str, Any], frames: int) -> np.ndarray:
    times = _array(file, content, "times")
    if times.shape != (frames,):
        raise DescriptorError(file.name, f"times is {list(times.shape)}, but there are {frames} frames")
    return times


def _indices(file: HeldFile, content: Mapping[str, Any], frames: int) -> np.ndarray:
    """Which frames of the video these are."""
    indices = _values(file, content, "frame_indices")
    if indices.shape != (frames,) or indices.dtype.kind not in "iu" or (indices < 0).any():
        raise DescriptorError(file.name, f"frame_indices is {indices.dtype} {list(indices.shape)}, not the numbers of {frames} frames")
    return indices.astype(np.float64)


def _pooled(file: HeldFile, sequence: np.ndarray) -> np.ndarray:
    """Mean and population standard deviation over `[T, d]`, one after the other: `[2 d]` float32."""
    wide = sequence.astype(np.float64)
    with np.errstate(over="ignore"):
        pooled = np.concatenate([wide.mean(axis=0), wide.std(axis=0)]).astype(np.float32)
    if not np.isfinite(pooled).all():
        raise DescriptorError(file.name, "its landmarks are so large that their spread is infinite")
    return pooled
