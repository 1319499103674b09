"""The whole Qwen2_5OmniProcessor on one row: chat template, feature extractors, placeholders, ids.

torchvision is absent, so the video processor is a stand-in that answers the grids it is given: everything after it is the real thing.
"""

import json

import numpy as np
from _serve import serve
from PIL import Image
from transformers import Qwen2_5OmniProcessor, Qwen2Tokenizer, WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class Videos:
    """Answers grids; `videos` are only counted."""

    temporal_patch_size = 2
    merge_size = 2
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, grids: list[list[int]]):
        self.grids = np.array(grids).reshape(-1, 3)

    def __call__(self, videos, **_):
        return {"video_grid_thw": self.grids[: len(videos)]}


class Processor(Qwen2_5OmniProcessor):
    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def run(
    tokenizer: str,
    template: str,
    rows: list[dict],
    min_pixels: int,
    max_pixels: int,
    **arrays: np.ndarray,
) -> dict[str, np.ndarray]:
    """`rows`: messages, names of the arrays of its audios and images, grids of its videos, fps, sound. Gives `tokens{i}`, `text{i}`."""
    extra = {name: f"<|{literal}|>" for name, literal in SPECIALS.items()}
    answer = {}
    for number, row in enumerate(rows):
        processor = Processor(
            image_processor=Qwen2VLImageProcessorPil(size={"shortest_edge": min_pixels, "longest_edge": max_pixels}),
            video_processor=Videos(row["video_grids"]),
            feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=300),
            tokenizer=Qwen2Tokenizer.from_pretrained(tokenizer, extra_special_tokens=extra),
            chat_template=template,
        )
        text = processor.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        out = processor(
            text=text,
            audio=[arrays[name] for name in row["audios"]] or None,
            images=[Image.fromarray(arrays[name]) for name in row["images"]] or None,
            videos=[np.zeros((4, 3, 28, 28), np.uint8)] * len(row["video_grids"]) or None,
            fps=row["fps"],
            **({"load_audio_from_video": True, "audio_from_video_indices": row["sound"]} if row["sound"] else {}),
        )
        answer[f"tokens{number}"] = np.asarray(out["input_ids"][0])
        answer[f"text{number}"] = np.array(json.dumps(text))
    return answer


SPECIALS = {
    "image_token": "IMAGE",
    "audio_token": "AUDIO",
    "video_token": "VIDEO",
    "vision_bos_token": "vision_bos",
    "vision_eos_token": "vision_eos",
    "audio_bos_token": "audio_bos",
    "audio_eos_token": "audio_eos",
}

if __name__ == "__main__":
    serve(run)
