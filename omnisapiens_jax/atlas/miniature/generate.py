"""Makes the miniature atlas: WAV and MP4 files, JSONL with relative paths, and on request descriptors and parquet with bytes.

python -m omnisapiens_jax.atlas.miniature.generate TARGET --samples 4500 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import fractions
import io
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from omnisapiens_jax import resources
from omnisapiens_jax.atlas.miniature import acoustics, face, speech, words
from omnisapiens_jax.atlas.miniature.script import DATASETS, Row, write_script
from omnisapiens_jax.atlas.miniature.words import SPLITS

VERSION = 3  # of the generator's output: raise it whenever the same seed gives other rows or media
SAMPLES = 4500
SEED = 0

Progress = Callable[[int, int], None]  # rows done, rows in all


def atlas(
    samples: int = SAMPLES, seed: int = SEED, *, descriptors: bool = False, cache: Path | None = None, progress: Progress | None = None
) -> Path:
    """The folder of the atlas with these arguments, made on first use under `cache` (default `resources.cache()`)."""
    target = (cache or resources.cache()) / f"atlas-{VERSION}-{seed}-{samples}{'-descriptors' if descriptors else ''}"
    return target if target.exists() else generate(target, samples, seed, descriptors=descriptors, progress=progress)


def generate(
    target: Path,
    samples: int = SAMPLES,
    seed: int = SEED,
    *,
    descriptors: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes `train.jsonl`, `validation.jsonl`, `test.jsonl` and their media into the new folder `target`; returns it.

    The rows are made in a temporary folder beside `target` and moved in one step, so a killed run leaves no half atlas. The same
    `samples` and `seed` give the same JSONL bytes and the same decoded media, whatever `workers` (default: one a core) is.
    `descriptors` adds the files that `ext_video_feats` (landmarks of the drawings) and `ext_audio_feats` (`acoustics`) name; without them
    these lists are empty.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already: remove it, or choose another folder")
    script = write_script(samples, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        jobs = [(work, row, seed, descriptors) for split in SPLITS for row in script[split]]
        for folder in ("audios", "videos", "pose/videos", "opensmile/audios") if descriptors else ("audios", "videos"):
            for split in SPLITS:
                (work / folder / split).mkdir(parents=True)
        # spawn: a forked child of a process that already runs jax can deadlock
        with multiprocessing.get_context("spawn").Pool(workers or os.cpu_count()) as pool:
            records: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
            for done, (job, record) in enumerate(zip(jobs, pool.imap(_make_row, jobs, chunksize=16), strict=True), start=1):
                records[job[1].split].append(record)
                if progress is not None:
                    progress(done, len(jobs))
        for split, rows in records.items():
            (work / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        work.chmod(0o755)
        with contextlib.suppress(FileExistsError):
            _publish(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _publish(work: Path, target: Path) -> None:
    """Moves the finished folder into place; the loser of a race between two runs keeps the winner's."""
    try:
        work.rename(target)
    except OSError as error:
        if target.exists():
            raise FileExistsError(target) from error
        raise


def _make_row(job: tuple[Path, Row, int, bool]) -> dict[str, Any]:
    """Writes one row's media and returns its JSONL record. Runs in a worker process."""
    folder, row, seed, descriptors = job
    dataset = DATASETS[row.dataset]
    rng = np.random.default_rng([seed, SPLITS.index(row.split), row.index, 1])
    audios, videos, poses, acoustic = [], [], [], []
    if "audio" in dataset.signature:
        voice = words.SPEAKERS[row.split][row.speaker]
        wave = speech.speak(row.transcript, voice, row.voice, rng, row.laugh) if row.voice else speech.room(rng)
        audios.append(f"audios/{row.split}/{row.name}.wav")
        soundfile.write(folder / audios[0], wave, speech.RATE, subtype="PCM_16")
        if descriptors:
            acoustic.append(f"opensmile/{audios[0]}.npz")
            np.savez_compressed(folder / acoustic[0], allow_pickle=False, **acoustics.describe(wave))
        if "video" in dataset.signature:
            look = face.draw_look(np.random.default_rng([SPLITS.index(row.split), row.speaker]))
            count = max(8, round(len(wave) / speech.RATE * face.FPS))
            late = {"": None, "after": True, "before": False}[row.laugh]
            loudness = speech.envelope(wave, count) if row.voice else np.zeros(count)
            frames, drawn = face.animate(look, row.face, loudness, rng, late=late)
            videos.append(f"videos/{row.split}/{row.name}.mp4")
            (folder / videos[0]).write_bytes(encode_mp4(frames, wave))
            if descriptors:
                poses.append(f"pose/{videos[0]}.npz")
                _write_landmarks(folder / poses[0], face.landmarks(drawn))
    return {
        "problem": row.problem,
        "answer": row.answer,
        "images": [],
        "videos": videos,
        "audios": audios,
        "dataset": row.dataset,
        "modality_signature": dataset.signature,
        "ext_video_feats": poses,
        "ext_audio_feats": acoustic,
        "task": dataset.task,
        "class_label": row.answer,
        "rationale": row.rationale,
    }


def encode_mp4(frames: np.ndarray, wave: np.ndarray) -> bytes:
    """H.264 video of `frames` `[T, H, W, 3]` uint8 with an AAC track of `wave` `[samples]` float32 at 16 kHz."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # One thread and no look-ahead: with either, the same frames do not always give the same bits.
        video = container.add_stream("libx264", rate=face.FPS, options={"crf": "27", "tune": "zerolatency", "threads": "1"})
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        audio = container.add_stream("aac", rate=speech.RATE, layout="mono", options={"b": "32000", "aac_coder": "fast"})
        for picture in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        for start in range(0, len(wave), 1024):
            sound = av.AudioFrame.from_ndarray(wave[None, start : start + 1024].astype(np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = speech.RATE, start, fractions.Fraction(1, speech.RATE)
            container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    return buffer.getvalue()


def _write_landmarks(file: Path, points: np.ndarray) -> None:
    """Landmarks in the benchmark's layout: every fourth frame; no body and no hands are drawn, so those are zero."""
    kept = np.arange(0, len(points), 4)
    np.savez_compressed(
        file,
        pose=np.zeros((len(kept), 33, 3), np.float32),
        face=np.round(points[kept], 3),
        left_hand=np.zeros((len(kept), 21, 3), np.float32),
        right_hand=np.zeros((len(kept), 21, 3), np.float32),
        frame_indices=kept.astype(np.int64),
        total_frames=np.asarray(len(points), np.int64),
    )


_BYTES = ("images", "videos", "audios", "ext_video_feats", "ext_audio_feats")


def write_parquet(folder: Path, target: Path) -> list[Path]:
    """Packs the JSONL splits of an atlas `folder` into `target/<split>-00000-of-00001.parquet`, media as bytes."""
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for split in SPLITS:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        columns = {
            name: pa.array([[(folder / path).read_bytes() for path in row[name]] for row in rows], pa.list_(pa.binary()))
            if name in _BYTES
            else pa.array([row[name] for row in rows], pa.string())
            for name in rows[0]
        }
        written.append(target / f"{split}-00000-of-00001.parquet")
        pq.write_table(pa.table(columns), written[-1], row_group_size=256)
    return written


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the miniature atlas: drawn faces, synthetic speech, templated words.")
    parser.add_argument("target", type=Path, help="folder to make; must not exist")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="rows of all splits together (default %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="default %(default)s")
    parser.add_argument("--descriptors", action="store_true", help="also write landmarks and acoustics (.npz)")
    parser.add_argument("--parquet", action="store_true", help="also write TARGET/parquet with the media inside")
    arguments = parser.parse_args()
    folder = generate(
        arguments.target,
        arguments.samples,
        arguments.seed,
        descriptors=arguments.descriptors,
        progress=lambda done, total: print(f"\r{done}/{total} rows", end="" if done < total else "\n", flush=True),
    )
    if arguments.parquet:
        write_parquet(folder, folder / "parquet")
    print(folder)


if __name__ == "__main__":
    main()
