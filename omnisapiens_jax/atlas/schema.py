"""One row of the atlas: the frozen `Sample`, and the validation that turns a raw JSONL or parquet row into it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omnisapiens_jax.processing.descriptors.read import Descriptor

MEDIA_FIELDS = ("images", "videos", "audios")
FEATURE_FIELDS = ("ext_video_feats", "ext_audio_feats")
TASK_KINDS = ("cls", "qa")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_Default = TypeVar("_Default", str, None)

Media = bytes | Path
Feature = Media | Descriptor


class SampleError(ValueError):
    """A row that cannot be used, with what a person needs to find and mend it.

    `kind` is one of `schema` (the row itself), `no_media` (its signature or its tags promise media of which it names none), `label` (answer
    outside the label scheme), `media` (a file that is missing or cannot be decoded), `descriptor` (its file is broken), `placeholders`
    (tags and media items do not match), `too_long` (no room left after shortening the transcript), and where rows are read in processes
    of their own `crash`, `timeout` and `memory`: what ended the process.
    """

    def __init__(self, reason: str, *, kind: str, file: str, row: int, dataset: str, field: str) -> None:
        super().__init__(f"{file}, row {row}, dataset {dataset!r}, field {field!r}: {reason}")
        self.reason, self.kind, self.file, self.row, self.dataset, self.field = reason, kind, file, row, dataset, field

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_error, (self.reason, self.kind, self.file, self.row, self.dataset, self.field)


def _rebuild_error(reason: str, kind: str, file: str, row: int, dataset: str, field: str) -> SampleError:
    return SampleError(reason, kind=kind, file=file, row=row, dataset=dataset, field=field)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A record of the atlas. Media and descriptor items are file paths (JSONL) or the file's bytes (tar, parquet).

    A prepared atlas has its descriptors read already: pooled, and frame by frame with their times.

    `problem` is the whole prompt with literal `<audio>`, `<video>`, `<image>` tags; `task` ends in `_cls` or `_qa`; `rationale` is a
    one-line reasoning text (miniature atlas only, "" elsewhere); `raters` are the labels that people gave with the share of each (real
    texts only, empty elsewhere); `id` is the row index in `file`; `names` are the media's paths as the release writes them, images first,
    then videos, then audios (parquet has none).
    """

    id: int
    file: str
    problem: str
    answer: str
    dataset: str
    modality_signature: str
    task: str
    class_label: str
    images: tuple[Media, ...] = ()
    videos: tuple[Media, ...] = ()
    audios: tuple[Media, ...] = ()
    ext_video_feats: tuple[Feature, ...] = ()
    ext_audio_feats: tuple[Feature, ...] = ()
    rationale: str = ""
    raters: tuple[tuple[str, float], ...] = ()
    names: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`cls` (one of a list of labels) or `qa` (free text): what follows the last underscore of `task`."""
        return task_kind(self.task)

    def error(self, reason: str, *, kind: str, field: str) -> SampleError:
        """A `SampleError` about this row."""
        return SampleError(reason, kind=kind, file=self.file, row=self.id, dataset=self.dataset, field=field)


def task_kind(task: str) -> str:
    """The type of a task name: its last underscore token, `cls` or `qa`. Raises `ValueError` for anything else."""
    kind = task.rsplit("_", 1)[-1]
    if kind not in TASK_KINDS:
        raise ValueError(f"task {task!r} must end in _{' or _'.join(TASK_KINDS)}")
    return kind


def sample_from_row(row: Mapping[str, Any], *, file: str, index: int, root: Path | None) -> Sample:
    """Validates one raw row.

    Args:
        row: column name -> value, as JSON or parquet gave it.
        file: what errors call the file.
        index: row number in the file, from 0.
        root: directory that relative paths start from; None when media are bytes (parquet).

    Raises:
        SampleError: naming file, row, dataset and field.
    """
    dataset = row.get("dataset")

    def fault(field: str, reason: str, kind: str = "schema") -> SampleError:
        return SampleError(reason, kind=kind, file=file, row=index, dataset=str(dataset or "?"), field=field)

    def text(field: str) -> str:
        value = optional_text(field, None)
        if value is None:
            raise fault(field, "is missing; every row needs it")
        if not value.strip():
            raise fault(field, "is blank; every row needs it")
        return value

    def optional_text(field: str, default: _Default) -> str | _Default:
        value = row.get(field)
        if value is None:
            return default
        if not isinstance(value, str):
            raise fault(field, f"must be a string, got {type(value).__name__}")
        if _LONE_SURROGATE.search(value):  # JSON can say so, but no vocabulary and no file can take it
            raise fault(field, "holds half of a character, a surrogate without the other")
        return value

    def items(field: str) -> tuple[Media, ...]:
        value = row.get(field)
        if value is None:
            return ()
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise fault(field, f"must be a list, got {type(value).__name__}")
        return tuple(item(field, i, entry) for i, entry in enumerate(value))

    def item(field: str, i: int, entry: Any) -> Media:
        if root is None:
            if not isinstance(entry, bytes):
                raise fault(field, f"item {i} must be the file's bytes, got {type(entry).__name__}")
            return entry
        if not isinstance(entry, str) or not entry.strip():
            raise fault(field, f"item {i} must be a path relative to the file's directory, got {entry!r}")
        if "\0" in entry or _LONE_SURROGATE.search(entry):
            raise fault(field, f"item {i} is no file name in UTF-8: {entry!r}")
        return root / entry

    def shares(field: str) -> tuple[tuple[str, float], ...]:
        value = row.get(field)
        if value is None:
            return ()
        if not isinstance(value, Mapping) or not all(isinstance(share, int | float) and share >= 0 for share in value.values()):
            raise fault(field, f"must give each label a share of at least 0, got {value!r}")
        if abs(sum(value.values()) - 1) > 1e-3:  # shares are written with few digits
            raise fault(field, f"has shares that add up to {sum(value.values())}, not to 1")
        return tuple(value.items())

    dataset = text("dataset")
    task = text("task")
    try:
        task_kind(task)
    except ValueError as error:
        raise fault("task", str(error)) from None
    answer, problem, signature = text("answer"), text("problem"), text("modality_signature").strip()
    media = {field: items(field) for field in MEDIA_FIELDS}
    for field in (field for field, named in media.items() if not named):  # else it would be read as a text like others
        medium = field.removesuffix("s")
        if medium in signature.split("_") and not (medium == "audio" and media["videos"]):  # a video may bring its own sound
            raise fault(field, f"names none, but modality_signature is {signature!r}", "no_media")
        if f"<{medium}>" in problem:
            raise fault(field, f"names none, but the problem has <{medium}>", "no_media")
    return Sample(
        id=index,
        file=file,
        problem=problem,
        answer=answer,
        dataset=dataset,
        modality_signature=signature,
        task=task,
        class_label=optional_text("class_label", answer),
        **media,
        ext_video_feats=items("ext_video_feats"),
        ext_audio_feats=items("ext_audio_feats"),
        rationale=optional_text("rationale", ""),
        raters=shares("raters"),
        names=() if root is None else tuple(str(path) for field in MEDIA_FIELDS for path in row.get(field) or ()),
    )
