"""One worker of `extract`: reads a line of JSON for each media file, writes its descriptor and answers with a line of JSON.

Runs as a script in the descriptors' environment (`make descriptors-env`), because MediaPipe and openSMILE cannot share ours; so it imports
nothing of this package. The kernel ends it when a file takes too long or too much memory, also in the middle of a library in C.

    {"kind": "video", "source": "a.mp4", "target": "draft.npz", "seconds": 600}
    {"frames": 105} or {"nothing": why} or {"error": why} or {"stop": why}
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
import warnings
from typing import Any

import numpy as np

# Points of a body, of a face with its irises, and of a hand.
POSE, FACE, HAND = 33, 478, 21
SOUND_TRACK_RATE = 16_000
WINDOW = 0.06  # seconds of the longest window of ComParE 2016: of a shorter sound every functional is NaN
FPS = 30.0  # of a video that says none, and no times of its frames either


class Nothing(Exception):
    """There is nothing to describe, and that is in order: a video without a sound track."""


class Unusable(Exception):
    """A file that cannot be described, and why."""


def landmarks(source: str) -> dict[str, np.ndarray]:
    """Landmarks of every frame of a video: `pose [T, 33, 3]`, `face [T, 478, 3]`, both hands `[T, 21, 3]`, zero where nothing was found.

    The clip is followed from its first frame on by fresh trackers, so that what was seen before does not matter. Of two hands with the
    same label the second counts.
    """
    import cv2  # pyright: ignore[reportMissingImports]
    from mediapipe import solutions  # pyright: ignore[reportMissingImports]

    confident = {"min_detection_confidence": 0.5, "min_tracking_confidence": 0.5}
    video = cv2.VideoCapture(source, cv2.CAP_FFMPEG)
    frames, stamps = [], []
    with (
        solutions.pose.Pose(**confident) as pose,
        solutions.face_mesh.FaceMesh(max_num_faces=1, refine_landmarks=True, **confident) as face,
        solutions.hands.Hands(max_num_hands=2, **confident) as hands,
    ):
        while True:
            read, picture = video.read()
            if not read:
                break
            stamps.append(video.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
            found_hands = hands.process(picture)
            sides = {"Left": np.zeros((HAND, 3), np.float32), "Right": np.zeros((HAND, 3), np.float32)}
            for points, handedness in zip(found_hands.multi_hand_landmarks or (), found_hands.multi_handedness or (), strict=True):
                sides[handedness.classification[0].label] = coordinates(points, HAND)
            found_faces = face.process(picture).multi_face_landmarks or [None]
            body = coordinates(pose.process(picture).pose_landmarks, POSE)
            frames.append((body, coordinates(found_faces[0], FACE), sides["Left"], sides["Right"]))
    if not frames:
        raise Unusable("no frame of it can be read")
    parts = zip(("pose", "face", "left_hand", "right_hand"), zip(*frames, strict=True), strict=True)
    return {
        **{part: np.stack(points) for part, points in parts},
        "frame_indices": np.arange(len(frames), dtype=np.int64),
        "total_frames": np.asarray(len(frames), np.int64),
        "times": middles(np.array(stamps), video.get(cv2.CAP_PROP_FPS)),
    }


def coordinates(found: Any, points: int) -> np.ndarray:
    """Coordinates `[points, 3]` of landmarks, or zeros."""
    if found is None:
        return np.zeros((points, 3), np.float32)
    return np.array([(point.x, point.y, point.z) for point in found.landmark], np.float32)


def middles(stamps: np.ndarray, fps: float) -> np.ndarray:
    """The middle of each frame in seconds, from when it is shown; from its number where the container does not say when."""
    fps = fps if np.isfinite(fps) and fps > 0 else FPS
    told = np.isfinite(stamps).all() and (np.diff(stamps) > 0).all()
    begins = stamps - stamps[0] if told else np.arange(len(stamps)) / fps
    length = float(np.median(np.diff(begins))) if len(begins) > 1 else 1 / fps
    return (begins + length / 2).astype(np.float32)


class Functionals:
    """openSMILE's ComParE 2016: functionals of the whole sound and its low-level descriptors."""

    def __init__(self) -> None:
        import opensmile  # pyright: ignore[reportMissingImports]

        self._functionals = opensmile.Smile()  # ComParE 2016 is its default
        self._low_level = opensmile.Smile(feature_level=opensmile.FeatureLevel.LowLevelDescriptors)

    def __call__(self, source: str) -> dict[str, np.ndarray]:
        """`features [1, 6373]`, `low_level [T, 65]` and `times [T]`, the middle of each window in seconds."""
        samples, rate = waveform(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a sound that is too short is all NaN, which is told below
            features, low_level = (smile.process_signal(samples, rate) for smile in (self._functionals, self._low_level))
        values = {"features": features.to_numpy(np.float32), "low_level": low_level.to_numpy(np.float32)}
        for key, array in values.items():
            if not np.isfinite(array).all():
                wrong = int((~np.isfinite(array)).sum())
                sound = f"these {samples.shape[-1] / rate:.3f} s of sound (its windows have {WINDOW} s)"
                raise Unusable(f"openSMILE makes {wrong:,} of {array.size:,} {key} of {sound} NaN or infinite")
        begins, ends = (low_level.index.get_level_values(name).total_seconds() for name in ("start", "end"))
        return {**values, "times": np.asarray((begins + ends) / 2, np.float32)}


def waveform(source: str) -> tuple[np.ndarray, int]:
    """A sound file at its own rate, `[channels, samples]`; the sound track of anything else at 16 kHz, mono, rounded to 16 bits."""
    import soundfile  # pyright: ignore[reportMissingImports]

    try:
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
        samples = samples.T
    except soundfile.LibsndfileError:
        samples, rate = sound_track(source), SOUND_TRACK_RATE
    if not samples.shape[-1]:
        raise Unusable("it holds no sound")
    return samples, rate


def sound_track(source: str) -> np.ndarray:
    """The first sound track of a container, `[1, samples]` float32, through 16-bit PCM as `ffmpeg -ac 1 -ar 16000` writes it."""
    import av
    import av.error

    try:
        with av.open(source, options={"protocol_whitelist": "file"}, metadata_errors="replace") as container:
            if not container.streams.audio:
                raise Nothing("it has no sound track")
            convert = av.AudioResampler(format="s16", layout="mono", rate=SOUND_TRACK_RATE)
            parts = [part.to_ndarray() for frame in container.decode(audio=0) for part in convert.resample(frame)]
            parts += [part.to_ndarray() for part in convert.resample(None)]
    except av.error.FFmpegError as reason:
        raise Unusable(f"its sound cannot be decoded ({reason.strerror})") from reason
    return np.concatenate(parts, axis=1, dtype=np.float32) / 32768 if parts else np.zeros((1, 0), np.float32)


def versions() -> dict[str, str | None]:
    """Of the packages that describe; None where one is not there. One that is there and broken ends the process before any file suffers."""
    found = {}
    for name in ("mediapipe", "opensmile"):
        there = importlib.util.find_spec(name) is not None
        found[name] = importlib.import_module(name).__version__ if there else None
    return found


def describe(job: dict[str, Any], functionals: Functionals | None) -> dict[str, Any]:
    """Does one job: the answer to it."""
    try:
        arrays = landmarks(job["source"]) if functionals is None else functionals(job["source"])
    except Nothing as reason:
        return {"nothing": str(reason)}
    except Unusable as reason:
        return {"error": str(reason)}
    except Exception as reason:  # of a library: one file's fault is told, not everyone's
        return {"error": f"{type(reason).__name__}: {reason}"}
    try:
        with open(job["target"], "wb") as file:
            np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
    except OSError as reason:  # a full disk is no fault of this file
        return {"stop": str(reason)}
    return {"frames": len(arrays["times"])}


def main() -> None:
    """Serves the jobs on stdin; `child.py BYTES` of memory are what it may take."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    most = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this one ends it
    functionals = None
    print(json.dumps(versions()), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])  # nothing handles its signal, so it ends the process
        if job["kind"] == "audio" and functionals is None:
            functionals = Functionals()
        answer = describe(job, functionals if job["kind"] == "audio" else None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
