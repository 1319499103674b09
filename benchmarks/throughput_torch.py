"""The other side of `throughput.py`: a torch `DataLoader` around transformers' Omni processor.

    python throughput_torch.py FOLDER TOKENIZER BATCH WORKERS theirs|ours

`theirs` reads clips with transformers' `load_video`, `ours` with this project's decoders.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from throughput_child import serve

# torchvision's compiled operators are of another build of torch; its resizing needs none of them, only that they are declared.
_LIBRARY = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import Qwen2_5OmniProcessor, Qwen2Tokenizer, WhisperFeatureExtractor  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor  # noqa: E402
from transformers.video_utils import load_video  # noqa: E402

SECONDS, FRAMES = 10, 4
SIZE = {"shortest_edge": 147_456, "longest_edge": 147_456}  # pixels
SPECIALS = {"image": "IMAGE", "audio": "AUDIO", "video": "VIDEO"}
SPECIALS |= {f"{kind}_{end}": f"{kind}_{end}" for kind in ("vision", "audio") for end in ("bos", "eos")}


class Processor(Qwen2_5OmniProcessor):
    """Takes the tokenizer of the published file, whatever its class is called in it."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """Accepts it."""
        return type(argument)


class Rows(torch.utils.data.Dataset):
    """The rows again and again, decoded: prompt, waveform, frames."""

    def __init__(self, folder: Path, decoder: str, length: int) -> None:
        self.rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
        self.folder, self.decoder, self.length = folder, decoder, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[str, np.ndarray, torch.Tensor]:
        row = self.rows[index % len(self.rows)]
        audio, video = self.folder / row["audio"], self.folder / row["video"]
        if self.decoder == "ours":
            from omnisapiens_jax.processing.media import decode_audio, decode_video

            waveform, frames = decode_audio(audio, seconds=SECONDS), decode_video(video, frames=FRAMES)
        else:
            waveform = soundfile.read(audio, frames=SECONDS * 16_000, dtype="float32")[0]
            frames, _ = load_video(str(video), sample_indices_fn=evenly, backend="pyav")
        return row["text"], waveform, torch.from_numpy(frames).permute(0, 3, 1, 2)


def evenly(metadata: Any, **_: Any) -> np.ndarray:
    """The frames that we take, too."""
    return np.round(np.linspace(0, metadata.total_num_frames - 1, FRAMES)).astype(int)


def collate(processor: Processor, rows: list[tuple[str, np.ndarray, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch, padded to its longest row."""
    texts, audios, videos = zip(*rows, strict=True)
    return processor(
        text=list(texts),
        audio=list(audios),
        videos=list(videos),
        padding=True,
        return_tensors="pt",
        videos_kwargs={"do_sample_frames": False, "size": SIZE},  # else it takes larger pictures
    )


def main(folder: Path, tokenizer: Path, batch: int, workers: int, decoder: str) -> None:
    """Keeps the prompt of row 0 as FOLDER/torch-DECODER.npz, for the comparison, then serves."""
    torch.set_num_threads(1)
    processor = Processor(
        image_processor=Qwen2VLImageProcessorPil(size=SIZE),
        video_processor=Qwen2VLVideoProcessor(size=SIZE),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=SECONDS),
        tokenizer=Qwen2Tokenizer.from_pretrained(
            tokenizer.parent, extra_special_tokens={f"{name}_token": f"<|{literal}|>" for name, literal in SPECIALS.items()}
        ),
    )
    alone = collate(processor, [Rows(folder, decoder, 1)[0]])
    np.savez(folder / f"torch-{decoder}.npz", **{name: np.asarray(value) for name, value in alone.items()})

    def batches(samples: int) -> Iterator[int]:
        loader = torch.utils.data.DataLoader(
            Rows(folder, decoder, samples), batch_size=batch, num_workers=workers, collate_fn=functools.partial(collate, processor)
        )
        for made in loader:
            yield len(made["input_ids"])

    serve(batches)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
