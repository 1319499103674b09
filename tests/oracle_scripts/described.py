"""Descriptors as the published extraction makes them: MediaPipe's solutions and openSMILE's defaults, called here and pooled by numpy.

Runs in the descriptors' environment, not in that of torch.
"""

from __future__ import annotations

import tempfile
import wave
from pathlib import Path

import av
import cv2
import mediapipe as mp
import numpy as np
import opensmile
from _serve import serve


def frame_vectors(video: str) -> np.ndarray:
    """`[T, 1659]`: body, face, left hand, right hand."""
    solutions = mp.solutions
    pose = solutions.pose.Pose(static_image_mode=False, min_detection_confidence=0.5, min_tracking_confidence=0.5)
    mesh = solutions.face_mesh.FaceMesh(
        static_image_mode=False, max_num_faces=1, refine_landmarks=True, min_detection_confidence=0.5, min_tracking_confidence=0.5
    )
    hands = solutions.hands.Hands(static_image_mode=False, max_num_hands=2, min_detection_confidence=0.5, min_tracking_confidence=0.5)
    capture, rows = cv2.VideoCapture(video), []
    ok, frame = capture.read()
    while ok:
        rgb = np.ascontiguousarray(frame[:, :, ::-1])
        row = np.zeros(1659)
        if (body := pose.process(rgb).pose_landmarks) is not None:
            row[:99] = [value for point in body.landmark for value in (point.x, point.y, point.z)]
        if faces := mesh.process(rgb).multi_face_landmarks:
            row[99:1533] = [value for point in faces[0].landmark for value in (point.x, point.y, point.z)]
        seen = hands.process(rgb)
        for number in range(len(seen.multi_hand_landmarks or [])):
            label = seen.multi_handedness[number].classification[0].label
            begin = {"Left": 1533, "Right": 1596}[label]
            points = seen.multi_hand_landmarks[number].landmark
            row[begin : begin + 63] = [value for point in points for value in (point.x, point.y, point.z)]
        rows.append(row)
        ok, frame = capture.read()
    return np.array(rows, np.float32)


def sound_file(source: str, folder: str) -> str:
    """A sound as it is; of a video its track as a file of 16 kHz, mono, 16 bits."""
    if source.endswith(".wav"):
        return source
    target = f"{folder}/track.wav"
    with av.open(source) as container, wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        resampler = av.AudioResampler("s16", "mono", 16_000)
        for frame in [*container.decode(container.streams.audio[0]), None]:
            for block in resampler.resample(frame):
                file.writeframes(bytes(block.planes[0])[: block.samples * 2])
    return target


def run(video: list[str], audio: list[str]) -> dict[str, np.ndarray]:
    """Of each file by its name: its frames and pooled vector, and its functionals, low-level descriptors and their spans in seconds."""
    answers = {}
    for file in video:
        rows = frame_vectors(file)
        answers[f"{Path(file).name} frames"] = rows
        answers[f"{Path(file).name} pooled"] = np.concatenate([rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)])
    low = opensmile.Smile(feature_set=opensmile.FeatureSet.ComParE_2016, feature_level=opensmile.FeatureLevel.LowLevelDescriptors)
    with tempfile.TemporaryDirectory() as folder:
        for file in audio:
            sound = sound_file(file, folder)
            answers[f"{Path(file).name} features"] = opensmile.Smile().process_file(sound).values
            table = low.process_file(sound).reset_index()
            answers[f"{Path(file).name} low_level"] = table.iloc[:, 3:].values
            answers[f"{Path(file).name} spans"] = np.stack([table[name].dt.total_seconds() for name in ("start", "end")], axis=1)
    return answers


if __name__ == "__main__":
    serve(run)
