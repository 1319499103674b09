"""transformers' Qwen2 tokenizer over a list of texts."""

import numpy as np
from _serve import serve
from transformers import Qwen2Tokenizer


def run(tokenizer: str, texts: list[str]) -> dict[str, np.ndarray]:
    qwen = Qwen2Tokenizer.from_pretrained(tokenizer)
    return {f"ids{i}": np.array(qwen(text)["input_ids"], np.int64) for i, text in enumerate(texts)}


if __name__ == "__main__":
    serve(run)
