"""Sentence embeddings of transformers' BertModel: mean over real tokens, scaled to length 1."""

import numpy as np
import torch
from _serve import serve
from safetensors.torch import load_file
from transformers import BertConfig, BertModel


def run(file: str, config: dict, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    model = BertModel(BertConfig(**config), add_pooling_layer=False).eval()
    weights = {name: value for name, value in load_file(file).items() if not name.startswith("pooler.") and "position_ids" not in name}
    model.load_state_dict(weights, strict=True)
    ids, attention = torch.from_numpy(tokens).long(), torch.from_numpy(mask).long()
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=attention).last_hidden_state
    weight = attention[..., None].float()
    mean = (states * weight).sum(1) / weight.sum(1)
    return {"embeddings": torch.nn.functional.normalize(mean, dim=-1).numpy()}


if __name__ == "__main__":
    serve(run)
