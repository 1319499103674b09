"""Media inside a page: files and pictures as data URLs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import av.error

from omnisapiens_jax.processing.media import Source, open_container

LARGEST_MEDIUM = 2**20  # bytes; what is larger is named, not embedded

_MAGIC = (
    (b"RIFF", 0, "audio/wav"),
    (b"fLaC", 0, "audio/flac"),
    (b"OggS", 0, "audio/ogg"),
    (b"ID3", 0, "audio/mpeg"),
    (b"ftyp", 4, "video/mp4"),
    (b"\x1a\x45\xdf\xa3", 0, "video/webm"),
    (b"\x89PNG", 0, "image/png"),
    (b"\xff\xd8\xff", 0, "image/jpeg"),
)


def embedded(item: Source) -> dict[str, str]:
    """A file as a data URL and the element that plays it, or a note why it is not here."""
    if isinstance(item, Path) and not item.exists():
        return {"note": f"{item.name} is missing"}
    data = item if isinstance(item, bytes) else item.read_bytes()
    kind = next((kind for magic, place, kind in _MAGIC if data[place : place + len(magic)] == magic), None)
    if kind is None or len(data) > LARGEST_MEDIUM:
        name = item.name if isinstance(item, Path) else "a medium"
        return {"note": f"{name} is not embedded: " + ("an unknown kind of file" if kind is None else f"{len(data) / 2**20:.1f} MiB")}
    element = kind.split("/")[0]
    return {"element": element, "url": data_url(kind, data), "poster": _poster(data) if element == "video" else ""}


def _poster(video: bytes) -> str:
    """The first picture of a video, for a page with more of them than a browser prepares; "" if there is none."""
    picture = io.BytesIO()
    try:
        with open_container(io.BytesIO(video)) as container:
            next(container.decode(video=0)).to_image().save(picture, "JPEG")
    except (av.error.FFmpegError, IndexError, StopIteration):
        return ""
    return data_url("image/jpeg", picture.getvalue())


def data_url(kind: str, data: bytes) -> str:
    """Bytes as the address of themselves; `kind` is their MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
