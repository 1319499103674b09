"""A synthetic release of Human Behavior Atlas: its columns, sixteen dataset keys, splits and kinds of files; content from templates.

python -m tests.atlas.release FOLDER [--rows N] [--form parquet|tar|jsonl]
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from omnisapiens_jax.atlas.labels import HBA, Dataset
from omnisapiens_jax.atlas.sources import RELEASED
from tests.atlas.toys import write_video
from tests.pickles import FLOATS, Call, Name, Persistent, archive

Form = Literal["parquet", "tar", "jsonl"]
BYTES = ("images", "videos", "audios", "ext_video_feats", "ext_audio_feats")
TEXTS = ("problem", "answer", "dataset", "modality_signature", "task", "class_label")
SHARES = {"train": 0.74, "validation": 0.08, "test": 0.18}
LEAST = 20  # rows of a dataset, if there are so many; the others are spread as the paper's are


class Splits(dict[str, list[dict[str, Any]]]):
    """The rows of every split, kept out of messages: they hold whole files."""

    def __repr__(self) -> str:
        return f"<{ {split: len(rows) for split, rows in self.items()} }>"


def write_release(folder: Path, rows: int = 2048, form: Form = "parquet") -> Splits:
    """Writes the release and returns the rows of each split: texts, and for each list of files (path, content)."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = script(rows)
    if form == "parquet":
        for split, content in splits.items():
            shards = [content[i : i + 256] for i in range(0, len(content), 256)]
            for number, shard in enumerate(shards):
                _write_parquet(folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet", shard)
        return splits
    for split, content in splits.items():
        lines = [{**row, **{name: [path for path, _ in row[name]] for name in BYTES}, "texts": []} for row in content]
        (folder / RELEASED[split]).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    files = {path: data for content in splits.values() for row in content for name in BYTES for path, data in row[name]}
    if form == "tar":
        for archived, begins in (("media.tar", ("audios/", "videos/")), ("descriptors.tar", ("pose/", "opensmile/"))):
            with tarfile.open(folder / archived, "w") as tar:
                for path, data in files.items():
                    if path.startswith(begins):
                        entry = tarfile.TarInfo(f"./{path}")
                        entry.size = len(data)
                        tar.addfile(entry, io.BytesIO(data))
        return splits
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return splits


def script(rows: int) -> Splits:
    """The rows of every split, each dataset in each of them from 96 rows on; no speaker, dialogue or file is in two."""
    total = sum(dataset.samples or 0 for dataset in HBA.datasets)
    least = min(LEAST, rows // len(HBA.datasets))
    spread = rows - least * len(HBA.datasets)
    counts = {d.name: least + int(spread * (d.samples or 0) / total) for d in HBA.datasets}
    counts["mosei_senti"] += rows - sum(counts.values())
    splits = Splits({split: [] for split in SHARES})
    for dataset in HBA.datasets:
        ends = np.round(np.cumsum([*SHARES.values()]) * counts[dataset.name]).astype(int)
        for i in range(counts[dataset.name]):
            place = int(np.searchsorted(ends, i, side="right"))
            splits[[*SHARES][place]].append(_row(dataset, i, place))
    for seed, content in enumerate(splits.values()):
        order = np.random.default_rng(seed).permutation(len(content))
        content[:] = [content[i] for i in order]
    return splits


def _row(dataset: Dataset, i: int, place: int) -> dict[str, Any]:
    rng = np.random.default_rng([HBA.datasets.index(dataset), i])
    words = " ".join(f"word{w}" for w in rng.integers(0, 500, rng.integers(4, 40)))
    if dataset.kind == "cls":
        question, answer = f"Which of {', '.join(dataset.labels)}?", dataset.labels[i % len(dataset.labels)]
    else:
        question, answer = "What happens here?", f"they do {i}"
    row: dict[str, Any] = {name: [] for name in BYTES}
    name = f"{dataset.name}/{_name(dataset.name, i, place)}"
    tags = ""
    if "audio" in dataset.signature:
        row["audios"] = [(f"audios/{name}.wav", _marked_wav(i % len(waves()), dataset.name, i))]
        row["ext_audio_feats"] = [(f"opensmile/audios/{name}.wav.pt", sounds_described()[0 if i == 0 else 1 + i % 2])]
        tags = "<audio>\n"
    if "video" in dataset.signature:
        row["videos"] = [(f"videos/{name}.mp4", _marked_mp4(i % len(videos()), dataset.name, i))]
        row["ext_video_feats"] = [(f"pose/videos/{name}.mp4.pt", videos_described()[i % 4])]
        tags = "<video>\n" + tags
    task = dataset.domain or "free"
    return row | {
        "problem": f"{'' if i % 3 == 0 else tags}A clip {i} of {dataset.name}. Transcript: {words} 你好\n{question}",
        "answer": answer,
        "dataset": dataset.name,
        "modality_signature": dataset.signature,
        "task": f"{task}_{dataset.kind}",
        "class_label": answer,
    }


def _name(dataset: str, i: int, place: int) -> str:
    """As the dataset's own files are called; speakers and dialogues differ from split to split (`place`)."""
    match dataset:
        case "cremad":
            return f"{1001 + 30 * place + i % 30}_IEO_ANG_{i}"
        case "tess":
            return f"{('OAF', 'YAF', 'ZAF')[place]}_back{i}_angry"
        case "meld_emotion" | "meld_senti":
            return f"dia{1000 * place + i // 4}_utt{i % 4}"
        case "daicwoz":
            return f"{300 + i}_AUDIO"
        case _:
            return f"clip{i:06d}"


@cache
def waves() -> tuple[bytes, ...]:
    """Sound files of different lengths, rates and channels."""
    files = []
    for i, (seconds, rate, channels) in enumerate([(0.4, 16000, 1), (0.9, 16000, 1), (0.6, 22050, 2), (1.4, 16000, 1)]):
        buffer = io.BytesIO()
        samples = np.random.default_rng(i).normal(size=(int(seconds * rate), channels)) * 0.1
        soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
        files.append(buffer.getvalue())
    return tuple(files)


@cache
def videos() -> tuple[bytes, ...]:
    """MP4 files of different sizes and lengths, 8 frames a second."""
    with TemporaryDirectory() as folder:
        files = []
        for i, (frames, width, height) in enumerate([(4, 64, 64), (7, 96, 64), (5, 64, 96), (9, 80, 80)]):
            write_video(Path(folder) / f"{i}.mp4", frames, width, height)
            files.append((Path(folder) / f"{i}.mp4").read_bytes())
        return tuple(files)


def _marked_wav(template: int, dataset: str, i: int) -> bytes:
    """A sound file that no other is equal to: its last samples are its own."""
    mark = f"{dataset}{i:08d}".encode()
    return waves()[template][: -2 * len(mark)] + mark + mark


def _marked_mp4(template: int, dataset: str, i: int) -> bytes:
    """A video that no other is equal to: a box that players skip is its own."""
    mark = f"{dataset}{i:08d}".encode()
    return videos()[template] + (8 + len(mark)).to_bytes(4, "big") + b"free" + mark


@cache
def videos_described() -> tuple[bytes, ...]:
    """Landmark files as torch saves them: of three frames, of one, without a face, and of a video that could not be read."""
    files = []
    for seed, (frames, face) in enumerate([(3, 478), (1, 478), (2, 468), (0, 478)]):
        rng = np.random.default_rng(seed)
        parts = {"pose": 33, "face": face, "left_hand": 21, "right_hand": 21}
        arrays: dict[str, Any] = {name: rng.random((frames, points, 3), np.float32) for name, points in parts.items()}
        if face == 468:
            arrays["face"][:] = 0
        files.append(torch_saved({**arrays, "frame_indices": np.arange(frames), "total_frames": frames, "video_path": "clip.mp4"}))
    return tuple(files)


@cache
def sounds_described() -> tuple[bytes, ...]:
    """Files of openSMILE functionals as torch saves them. All but the first have a few names only: many take the most time to read."""
    names = [f"audspec_functional_{i}" for i in range(6373)]
    return tuple(
        torch_saved(
            {
                "features": np.random.default_rng(seed).normal(size=(1, 6373)).astype(np.float32),
                "feature_names": names if seed == 0 else names[:3],
                "file_path": "clip.wav",
                "num_windows": 1,
                "num_features": 6373,
            }
        )
        for seed in range(3)
    )


def torch_saved(content: dict[str, Any]) -> bytes:
    """A dict as torch.save writes it, its arrays as tensors."""
    storages: dict[str, bytes] = {}

    def tensors() -> Iterator[tuple[str, Any]]:
        for name, value in content.items():
            if not isinstance(value, np.ndarray):
                yield name, value
                continue
            key, kind = str(len(storages)), FLOATS if value.dtype == np.float32 else Name("torch", "LongStorage")
            storages[key] = value.tobytes()
            strides = tuple(stride // value.itemsize for stride in value.strides)
            hooks = Call(Name("collections", "OrderedDict"), ())
            view = (Persistent(("storage", kind, key, "cpu", value.size)), 0, value.shape, strides, False, hooks)
            yield name, Call(Name("torch._utils", "_rebuild_tensor_v2"), view)

    with TemporaryDirectory() as folder:
        return archive(Path(folder) / "content.pt", dict(tensors()), storages).read_bytes()


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in TEXTS}
    columns |= {name: pa.array([[data for _, data in row[name]] for row in rows], pa.list_(pa.binary())) for name in BYTES}
    pq.write_table(pa.table(columns), path, row_group_size=64, compression="zstd")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--form", default="parquet", choices=("parquet", "tar", "jsonl"))
    arguments = parser.parse_args()
    print({split: len(rows) for split, rows in write_release(arguments.folder, arguments.rows, arguments.form).items()})
