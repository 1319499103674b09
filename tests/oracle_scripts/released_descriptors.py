"""Descriptor files as the release has them, saved by torch, and the vectors that torch makes of them as the published code says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _serve import serve

PARTS = {"pose": 33, "face": 478, "left_hand": 21, "right_hand": 21}


def landmarks(frames: int, face: int, seed: int) -> dict:
    torch.manual_seed(seed)
    parts = {part: torch.rand(frames, points, 3) for part, points in (PARTS | {"face": face}).items()}
    if face == 468:
        parts["face"].zero_()
    return {**parts, "frame_indices": torch.arange(frames), "total_frames": frames, "video_path": "/somewhere/clip.mp4"}


def pool(content: dict, face: int) -> torch.Tensor:
    """The published pooling; a face of fewer points than `face` is padded first."""
    parts = [torch.as_tensor(content[part]).float() for part in PARTS]
    parts[1] = F.pad(parts[1], (0, 0, 0, max(face - parts[1].shape[1], 0)))
    sequence = torch.cat([part.reshape(len(part), -1) for part in parts], dim=-1)
    pooled = torch.cat([sequence.mean(dim=0), sequence.std(dim=0, unbiased=False)])
    return F.pad(pooled, (0, 3318 - len(pooled)))


def run(folder: str) -> dict[str, np.ndarray]:
    folder, answers = Path(folder), {}
    clips = {"face": landmarks(7, 478, 0), "faceless": landmarks(5, 468, 1), "one": landmarks(1, 478, 2), "long": landmarks(400, 478, 3)}
    clips["numpy"] = {key: value.numpy() if torch.is_tensor(value) else value for key, value in landmarks(300, 478, 4).items()}
    clips["turned"] = {key: np.asfortranarray(value) if key in PARTS else value for key, value in clips["numpy"].items()}
    clips["lists"] = {key: value.tolist() if torch.is_tensor(value) else value for key, value in landmarks(3, 478, 5).items()}
    clips["double"] = {key: value.double() if key in PARTS else value for key, value in landmarks(3, 478, 6).items()}
    clips["unreadable"] = landmarks(0, 478, 7)
    clips["empty"] = clips["unreadable"] | dict.fromkeys(PARTS, torch.tensor([]))
    for name, content in clips.items():
        torch.save(content, folder / f"{name}.pt")
        if content["total_frames"]:
            answers[name] = pool(content, 478).numpy()
            answers[f"{name} trailing"] = pool(content, 0 if name == "faceless" else 478).numpy()
    torch.save(clips["numpy"], folder / "protocol_4.pt", pickle_protocol=4)
    answers["protocol_4"] = answers["numpy"]
    torch.manual_seed(8)
    features = torch.randn(1, 6373)
    names = [f"feature_{number}" for number in range(6373)]
    more = {"feature_names": names, "file_path": "/somewhere/clip.wav", "num_windows": 1, "num_features": 6373}
    for name, values in {"sound": features, "sound_row": features[0], "sound_numpy": features.numpy()}.items():
        torch.save({"features": values, **more}, folder / f"{name}.pt")
        answers[name] = features[0].numpy()
    torch.save({"features": features, "feature_names": names[:9]}, folder / "sound_few_names.pt")
    torch.save({"features": features.numpy(), "feature_names": names[:9]}, folder / "sound_few_numpy.pt")
    return answers


if __name__ == "__main__":
    serve(run)
