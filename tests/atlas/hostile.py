"""Media and parquet files with a seeded mutation each, as a source. A worker makes the bytes itself, so that only numbers travel."""

import dataclasses
import functools
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image

from omnisapiens_jax.atlas.parquet import ParquetSource
from omnisapiens_jax.atlas.schema import Sample, SampleError
from tests.atlas.toys import write_video

LENGTHS = (0, 1, 7, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def mutated(data: bytes, seed: int) -> bytes:
    """`data` with one to three of: bits flipped, the end cut off, a piece moved, a length field overwritten, a piece repeated."""
    random, changed = np.random.default_rng(seed), bytearray(data)

    def place() -> int:
        """Half of them within 256 bytes of an end, where headers lie."""
        near = int(random.integers(256)) * int(random.choice((1, -1)))
        return int(random.integers(len(changed))) if random.random() < 0.5 else near % len(changed)

    for _ in range(random.integers(1, 4)):
        match random.integers(5):
            case 0:
                for _ in range(random.integers(1, 12)):
                    changed[place()] ^= 1 << random.integers(8)
            case 1:
                changed = changed[: max(place(), 1)]
            case 2:
                source, target, size = place(), place(), int(random.integers(1, 200))
                changed[target : target + size] = changed[source : source + size]
            case 3:
                at, value = place(), int(random.choice(LENGTHS))
                changed[at : at + 4] = value.to_bytes(4, "big" if random.random() < 0.5 else "little")
            case _:
                at, size = place(), int(random.integers(1, 200))
                changed[at:at] = changed[at : at + size] * int(random.integers(1, 4))
    return bytes(changed)


@functools.cache
def originals(kind: str) -> tuple[bytes, ...]:
    """Small real files."""
    random = np.random.default_rng(0)
    if kind == "wav":
        sound, forms = 0.1 * random.normal(size=(4000, 2)), ("WAV PCM_16", "WAV FLOAT", "WAV IMA_ADPCM", "FLAC PCM_16")
        split = [form.split() for form in forms]
        return tuple(_file(lambda out, f=f, s=s: soundfile.write(out, sound, 22050, format=f, subtype=s)) for f, s in split)
    if kind == "png":
        colours = Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8))
        return tuple(_file(lambda out, mode=mode: colours.convert(mode).save(out, "PNG")) for mode in ("RGB", "P", "LA", "1"))
    if kind == "mp4":
        with tempfile.TemporaryDirectory() as folder:
            write_video(Path(folder) / "clip.mp4", 6, 96, 64)
            return ((Path(folder) / "clip.mp4").read_bytes(),)
    row = {**ROW, "audios": [[originals("wav")[0]]], "videos": [[originals("mp4")[0]]], "images": [[]]}
    table = pa.table({name: value if isinstance(value, list) else [value] for name, value in row.items()})
    return tuple(_file(lambda out, codec=codec: pq.write_table(table, out, compression=codec)) for codec in ("snappy", "zstd", "none"))


ROW: dict[str, Any] = {
    "problem": "Transcript: word\nWhich of anger, sad?",
    "answer": "sad",
    "dataset": "meld_emotion",
    "modality_signature": "text_video_audio",
    "task": "emotion_cls",
}


@dataclasses.dataclass(frozen=True)
class Hostile:
    """`count` rows, each with one mutated file of a kind: wav, mp4, png or parquet."""

    kind: str
    count: int

    def __len__(self):
        return self.count

    def fingerprint(self):
        return f"{self.kind} {self.count}"

    def stamp(self, index: int, fields: Sequence[str] = ()) -> str:
        return ""

    def file(self, index: int) -> str:
        return self.kind

    def __getitem__(self, index: int) -> Sample:
        kept = originals(self.kind)
        data = mutated(kept[index % len(kept)], index)
        if self.kind != "parquet":
            media: dict[str, Any] = {{"wav": "audios", "mp4": "videos", "png": "images"}[self.kind]: (data,)}
            return Sample(id=index, file=self.kind, class_label="sad", **(ROW | media))
        with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
            file.write(data)
            file.flush()
            try:
                source = ParquetSource([Path(file.name)])
                if not len(source):
                    raise ValueError("holds no row")
                return dataclasses.replace(source[0], id=index)
            except SampleError as fault:
                reason, kind = fault.reason, fault.kind
            except ValueError as error:  # no run begins with such a file
                reason, kind = str(error), "schema"
            raise SampleError(reason, kind=kind, file=file.name, row=index, dataset="?", field="(the row)")


def _file(write):
    out = io.BytesIO()
    write(out)
    return out.getvalue()
