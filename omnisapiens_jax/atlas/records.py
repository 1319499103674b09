"""Samples as records of a TFDS dataset in ArrayRecord files, and the receipt that lies beside the files. No tensorflow anywhere."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av.error
import numpy as np

from omnisapiens_jax.atlas.schema import MEDIA_FIELDS, Feature, Media, Sample, SampleError
from omnisapiens_jax.processing.descriptors.read import (
    FRAME_WIDTH,
    LOW_LEVEL_WIDTH,
    Descriptor,
    DescriptorError,
    read_audio_descriptor,
    read_video_descriptor,
    trailing_pad,
)
from omnisapiens_jax.processing.media import open_container

NAME = "human_behavior_atlas"
VERSION = "1.0.0"
RECEIPT = "atlas.json"
HOMEPAGE = "https://huggingface.co/datasets/HumanBehaviorAtlas/human_behavior_atlas"
DESCRIPTION = (
    "Human Behavior Atlas: sixteen datasets of affect, cognition, pathology and social processes in one schema. Every record has the "
    "prompt, the answer, the encoded media, and behavioural descriptors pooled and frame by frame with their times in seconds."
)

_TEXTS = ("problem", "answer", "dataset", "modality_signature", "task", "class_label", "rationale")
_DESCRIPTORS = {"video_descriptor": "ext_video_feats", "audio_descriptor": "ext_audio_feats"}
_FRAME_WIDTHS = {"video_descriptor": FRAME_WIDTH, "audio_descriptor": LOW_LEVEL_WIDTH}


def tfds() -> Any:
    """The module `tensorflow_datasets`. Raises `ImportError` that says what to install."""
    try:
        import tensorflow_datasets
    except ImportError as reason:
        raise ImportError(f"prepared atlases need the extra `tfds`: pip install 'omnisapiens-jax[tfds]' ({reason})") from reason
    return tensorflow_datasets


@functools.cache
def features() -> Any:
    """The features of a record as a TFDS `FeaturesDict`.

    Texts; `images`, `videos`, `audios` as lists of encoded files; `names` of those; and `video_descriptor` and `audio_descriptor`, each
    `pooled [D]`, `frames [T, d]` and `times [T]` float32; D = T = 0 where the sample has none.
    """
    kinds = tfds().features

    def array(*shape: int | None) -> Any:
        return kinds.Tensor(shape=shape, dtype=np.float32, encoding="bytes")

    return kinds.FeaturesDict(
        {name: kinds.Text() for name in _TEXTS}
        | {name: kinds.Sequence(kinds.Tensor(shape=(), dtype=np.object_)) for name in MEDIA_FIELDS}
        | {"names": kinds.Sequence(kinds.Text())}
        | {
            name: kinds.FeaturesDict({"pooled": array(None), "frames": array(None, width), "times": array(None)})
            for name, width in _FRAME_WIDTHS.items()
        }
    )


@functools.cache
def _serializer() -> Any:
    from tensorflow_datasets.core import example_serializer

    return example_serializer.ExampleSerializer(features().get_serialized_info())


def load_serializer() -> None:
    """Loads what `encode` needs, once."""
    _serializer()


class NoSuchSplit(FileNotFoundError):
    """A split that is not there at all, rather than in part."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A sample as a record.

    Attributes:
        record: the bytes.
        descriptors: whether it has a video and an audio descriptor.
        faults: the descriptors that had to be left out of it because they are broken.
    """

    record: bytes
    descriptors: tuple[bool, bool]
    faults: tuple[SampleError, ...]


def encode(sample: Sample) -> Encoded:
    """The record of a sample, the same bytes every time.

    A descriptor file that does not exist is no fault: rows of the benchmark name files that were never made.

    Raises:
        SampleError: a medium cannot be read.
    """
    faults: list[SampleError] = []
    row: dict[str, Any] = {name: getattr(sample, name) for name in _TEXTS}
    row |= {field: [_media_bytes(sample, field, item) for item in getattr(sample, field)] for field in MEDIA_FIELDS}
    row["names"] = list(sample.names)
    for name, field in _DESCRIPTORS.items():
        try:
            descriptor = read_descriptor(sample, field)
        except DescriptorError as reason:
            faults.append(sample.error(str(reason), kind="descriptor", field=field))
            descriptor = None
        row[name] = vars(descriptor or Descriptor(_NOTHING, np.zeros((0, _FRAME_WIDTHS[name]), np.float32), _NOTHING))
    video, audio = (len(row[name]["pooled"]) > 0 for name in _DESCRIPTORS)
    # Map fields of a protocol buffer have no order of their own.
    example = _serializer().get_tf_example(features().encode_example(row))
    return Encoded(example.SerializeToString(deterministic=True), (video, audio), tuple(faults))


def decode(row: Mapping[str, Any], *, file: str, index: int) -> Sample:
    """The sample of a record as TFDS reads it. `file` and `index` are what errors about it will say."""
    texts: dict[str, Any] = {name: row[name].decode() for name in _TEXTS}
    media: dict[str, Any] = {field: tuple(row[field]) for field in MEDIA_FIELDS}
    video, audio = ((Descriptor(**row[name]),) if len(row[name]["pooled"]) else () for name in _DESCRIPTORS)
    names = tuple(name.decode() for name in row["names"])
    return Sample(id=index, file=file, **texts, **media, ext_video_feats=video, ext_audio_feats=audio, names=names)


def open_records(folder: Path, split: str) -> Sequence[Mapping[str, Any]]:
    """The rows of a split by number, for `decode`; can be sent to other processes. Raises ValueError when what TFDS needs is broken."""
    try:
        return tfds().builder_from_directory(folder).as_data_source(split)
    except (ValueError, KeyError, FileNotFoundError) as reason:
        raise ValueError(f"{folder}: dataset_info.json or features.json is broken; prepare again, which mends it ({reason})") from reason


_NOTHING = np.zeros(0, np.float32)


def _media_bytes(sample: Sample, field: str, item: Media) -> bytes:
    try:
        content = item if isinstance(item, bytes) else item.read_bytes()
    except OSError as reason:
        raise sample.error(f"{item} cannot be read ({reason.strerror})", kind="media", field=field) from reason
    if not content:
        raise sample.error(f"{item if isinstance(item, Path) else 'the file'} is empty", kind="media", field=field)
    return content


def read_descriptor(sample: Sample, field: str, *, compat_trailing_pad: bool = False) -> Descriptor | None:
    """The descriptor of a sample, None where it has none: it names no file, or one that was never made, or one without a frame.

    Args:
        sample: the row.
        field: `ext_video_feats` or `ext_audio_feats`; only the first that it names is ever used.
        compat_trailing_pad: as in `read_video_descriptor`.

    Raises:
        DescriptorError: the file is broken.
    """
    items: Sequence[Feature] = getattr(sample, field)
    item = items[0] if items else None
    match item:
        case Descriptor() if compat_trailing_pad and field == "ext_video_feats":
            return trailing_pad(item)
        case None | Descriptor():
            return item
        case Path() if not item.exists():
            return None
    if field == "ext_audio_feats":
        return read_audio_descriptor(item)
    rate = _frame_rate(sample.videos[0]) if sample.videos else None
    return read_video_descriptor(item, fps=rate, compat_trailing_pad=compat_trailing_pad)


def _frame_rate(video: Media) -> float | None:
    """Frames a second by the container's header; None where it does not say."""
    try:
        with open_container(io.BytesIO(video if isinstance(video, bytes) else video.read_bytes())) as container:
            rate = container.streams.video[0].average_rate if container.streams.video else None
    except (av.error.FFmpegError, OSError, ValueError):  # a name with a null byte is the last
        return None  # the sample's own fault, found when it is decoded
    return float(rate) if rate else None


@dataclasses.dataclass(frozen=True)
class Shard:
    """What is known of one finished file.

    Attributes:
        file: its name.
        size: bytes.
        sha256: of its content.
        datasets: dataset of every record, in order.
        descriptors: how many records have a video and how many an audio descriptor.
        faults: the rows that were left out, and rows whose descriptor was.
    """

    file: str
    size: int
    sha256: str
    datasets: tuple[str, ...]
    descriptors: tuple[int, int]
    faults: tuple[SampleError, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "faults": [vars(fault) for fault in self.faults]}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Shard:
        """The reverse of `to_json`."""
        return cls(
            **{
                **plain,
                "datasets": tuple(plain["datasets"]),
                "descriptors": tuple(plain["descriptors"]),
                "faults": tuple(SampleError(**fault) for fault in plain["faults"]),
            }
        )


@dataclasses.dataclass(frozen=True)
class Receipt:
    """What a prepared atlas was made from and of: `plan` as plain data, and the files of every split in order."""

    plan: Mapping[str, Any]
    splits: Mapping[str, tuple[Shard, ...]]

    @classmethod
    def load(cls, folder: Path) -> Receipt:
        """Reads the receipt of a folder. Raises `FileNotFoundError` when it has none, ValueError when it is broken."""
        try:
            plain = json.loads((folder / RECEIPT).read_text())
            return cls(plain["plan"], {split: tuple(map(Shard.from_json, shards)) for split, shards in plain["splits"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as reason:
            raise ValueError(f"{folder / RECEIPT} is broken ({reason}): copy it again, or remove {folder} and prepare it anew") from reason

    def text(self) -> str:
        """The content of the file."""
        plain = {"plan": self.plan, "splits": {split: [shard.to_json() for shard in shards] for split, shards in self.splits.items()}}
        return json.dumps(plain) + "\n"

    def check(self, folder: Path, split: str) -> None:
        """Raises `NoSuchSplit` when the split is not there, `FileNotFoundError` when a file of it in full length is not."""
        if split not in self.splits:
            raise NoSuchSplit(f"the atlas in {folder} has no split {split!r}; it has {', '.join(self.splits)}")
        for shard in self.splits[split]:
            path = folder / shard.file
            found = path.stat().st_size if path.is_file() else None
            if found != shard.size:
                what = "is missing" if found is None else f"has {found:,} bytes, not {shard.size:,}"
                raise FileNotFoundError(f"{path} {what}: copy it again, or run the preparation again, which mends it")

    def datasets(self, split: str) -> list[str]:
        """The dataset of every row of a split."""
        return [name for shard in self.splits[split] for name in shard.datasets]

    def fingerprint(self, split: str) -> str:
        """SHA-256 over the checksums of a split."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.splits[split]).encode()).hexdigest()
