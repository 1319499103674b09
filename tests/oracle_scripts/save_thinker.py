"""Reads a thinker directory with transformers and saves it again, in its own spelling of names, config and shards."""

import numpy as np
import torch
from _serve import serve
from transformers import Qwen2_5OmniThinkerForConditionalGeneration


def run(source: str, target: str, dtype: str, shard: str) -> dict[str, np.ndarray]:
    model, report = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        source, dtype=getattr(torch, dtype), output_loading_info=True
    )
    model.save_pretrained(target, max_shard_size=shard)
    return {kind: np.array(sorted(map(str, names))) for kind, names in report.items()}


if __name__ == "__main__":
    serve(run)
