"""transformers' feature extractors on real data: log-mel of waveforms, patches of pictures.

Pictures are resized as torchvision does it for the published processor, by torch's bicubic on bytes; torchvision itself is absent, and the
processor for Pillow, which takes over then, has other weights.
"""

import numpy as np
import torch
from _serve import serve
from PIL import Image
from torch.nn.functional import interpolate
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
            _, rows, columns = pictures(Image.fromarray(value), return_tensors="np")["image_grid_thw"][0]
            channels = torch.from_numpy(value).permute(2, 0, 1)[None].contiguous()
            resized = interpolate(channels, (int(rows) * 14, int(columns) * 14), mode="bicubic", antialias=True, align_corners=False)
            out = pictures(Image.fromarray(resized[0].permute(1, 2, 0).numpy()), return_tensors="np")
            assert out["image_grid_thw"][0].tolist() == [1, rows, columns]
            answer[name.replace("image", "patches")] = out["pixel_values"]
            answer[name.replace("image", "grid")] = out["image_grid_thw"][0]
    return answer


if __name__ == "__main__":
    serve(run)
