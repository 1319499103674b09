"""transformers' get_rope_index over many rows in one process."""

import types

import numpy as np
import torch
from _serve import serve
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniPreTrainedModelForConditionalGeneration as Base


def run(rows: list[dict], ids: dict[str, int], seconds_per_chunk: float) -> dict[str, np.ndarray]:
    """`rows`: tokens, mel_frames of every clip, grids, seconds_per_grid, sound (use_audio_in_video). Gives `positions{i}`, `delta{i}`."""
    config = types.SimpleNamespace(
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        audio_token_id=ids["audio"],
        vision_start_token_id=ids["vision_bos"],
        audio_start_token_id=ids["audio_bos"],
        position_id_per_seconds=25,
        seconds_per_chunk=seconds_per_chunk,
    )
    model = types.SimpleNamespace(spatial_merge_size=2, config=config)
    model.get_llm_pos_ids_for_vision = types.MethodType(Base.get_llm_pos_ids_for_vision, model)
    model.get_chunked_index = types.MethodType(Base.get_chunked_index, model)
    answer = {}
    for number, row in enumerate(rows):
        tokens = torch.tensor([row["tokens"]])
        positions, delta = Base.get_rope_index(
            model,
            tokens,
            image_grid_thw=torch.tensor(row["image_grids"]) if row["image_grids"] else None,
            video_grid_thw=torch.tensor(row["video_grids"]) if row["video_grids"] else None,
            attention_mask=torch.ones_like(tokens),
            use_audio_in_video=row["sound"],
            audio_seqlens=torch.tensor(row["mel_frames"]) if row["mel_frames"] else None,
            second_per_grids=torch.tensor(row["seconds_per_grid"]) if row["seconds_per_grid"] else None,
        )
        answer[f"positions{number}"] = positions[:, 0].numpy()
        answer[f"delta{number}"] = delta.numpy().reshape(-1)[0]
    return answer


if __name__ == "__main__":
    serve(run)
