"""transformers' feature extractors on real data: log-mel of waveforms, patches of pictures."""

import numpy as np
from _serve import serve
from PIL import Image
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def run(min_pixels: int = 0, max_pixels: int = 0, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    """`audio*`: mono 16 kHz waveforms -> `mel*` [frames, 128]. `image*`: RGB pictures -> `patches*`, `grid*`."""
    answer = {}
    whisper = WhisperFeatureExtractor(feature_size=128, sampling_rate=16000, hop_length=160, chunk_length=300, n_fft=400)
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": min_pixels, "longest_edge": max_pixels})
    for name, value in arrays.items():
        if name.startswith("audio"):
            out = whisper(value, sampling_rate=16000, padding="max_length", return_attention_mask=True, return_tensors="np")
            answer[name.replace("audio", "mel")] = out["input_features"][0][:, : int(out["attention_mask"][0].sum())].T
        else:
            out = pictures(Image.fromarray(value), return_tensors="np")
            answer[name.replace("image", "patches")] = out["pixel_values"]
            answer[name.replace("image", "grid")] = out["image_grid_thw"][0]
    return answer


if __name__ == "__main__":
    serve(run)
