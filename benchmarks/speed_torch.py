"""transformers' side of `speed.py`: `python speed_torch.py FOLDER` in the oracle's environment, at the fastest settings found.

Tried for decoding, in CPU seconds of 256 + 24 tokens at batch 1: this loop 1.19, `generate` 1.23, a static cache 1.31, eager attention
1.37, `torch.compile` with a static cache 1.39 (and more than three minutes to compile).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import speed_child as shared
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from speed_child import Case
from transformers import Qwen2_5OmniThinkerForConditionalGeneration
from transformers.cache_utils import DynamicCache

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main(folder: Path) -> None:
    """Serves the cases."""
    torch.set_num_threads(2)
    torch.set_num_interop_threads(1)

    def load() -> Qwen2_5OmniThinkerForConditionalGeneration:
        return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)

    tasks = {"prefill": prefill, "train": train, "heads": classify, "decode": decode}
    shared.serve(lambda case: tasks[case.task](load, case, folder))


def prefill(load: Callable, case: Case, folder: Path) -> Callable[[], np.ndarray]:
    """The keys and values of the prompt, and the logits of its last token `[B, V]`."""
    model, ids = load().eval(), torch.from_numpy(case.ids()).long()
    decoder, head = model.model.language_model, model.lm_head

    @torch.inference_mode()
    def run() -> np.ndarray:
        out = decoder(input_ids=ids, past_key_values=DynamicCache(config=decoder.config), use_cache=True)
        return head(out.last_hidden_state[:, -1]).numpy()

    return run


def decode(load: Callable, case: Case, folder: Path) -> Callable[[], np.ndarray]:
    """Greedy tokens `[B, new]`."""
    model, ids = load().eval(), torch.from_numpy(case.ids()).long()
    decoder, head = model.model.language_model, model.lm_head

    @torch.inference_mode()
    def run() -> np.ndarray:
        cache, step, tokens = DynamicCache(config=decoder.config), ids, []
        for _ in range(case.new):
            hidden = decoder(input_ids=step, past_key_values=cache, use_cache=True).last_hidden_state
            step = head(hidden[:, -1]).argmax(-1, keepdim=True)
            tokens.append(step)
        return torch.cat(tokens, 1).numpy()

    return run


def train(load: Callable, case: Case, folder: Path) -> Callable[[], np.ndarray]:
    """One update of the LoRA factors on the cross-entropy of every token; gives the loss."""
    model, ids = adapted(load(), folder, shared.LORA_RANK, shared.LORA_ALPHA), torch.from_numpy(case.ids()).long()
    trained = [value for value in model.parameters() if value.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=shared.LEARNING_RATE, weight_decay=shared.WEIGHT_DECAY, fused=True)

    def run() -> np.ndarray:
        adamw.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, shared.CLIP)
        adamw.step()
        return loss.detach().numpy()

    return run


def classify(load: Callable, case: Case, folder: Path) -> Callable[[], np.ndarray]:
    """One update of the LoRA factors and the heads on the cross-entropy of every row's class; gives the loss."""
    model, ids = adapted(load(), folder, shared.HEADS_RANK, shared.HEADS_ALPHA), torch.from_numpy(case.ids()).long()
    weights = torch.from_numpy(shared.heads(folder)).split(shared.LABELS)
    affine = torch.nn.ModuleList(torch.nn.Linear(weight.shape[1], len(weight)) for weight in weights)
    for head, weight in zip(affine, weights, strict=True):
        head.weight.data, head.bias.data = weight.clone(), torch.zeros(len(weight))
    decoder, mask = model.base_model.model.model.language_model, torch.ones(ids.shape)  # below the LM head
    domains, labels = (torch.from_numpy(array).long() for array in case.classes())
    first = [sum(shared.LABELS[:domain]) for domain in range(len(shared.LABELS))]
    adam = torch.optim.Adam(
        [value for value in (*model.parameters(), *affine.parameters()) if value.requires_grad], lr=shared.LEARNING_RATE, fused=True
    )

    def run() -> np.ndarray:
        adam.zero_grad(set_to_none=True)
        states = decoder(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-2]
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        logits = torch.full((len(pooled), sum(shared.LABELS)), torch.finfo(pooled.dtype).min / 2)
        for row, domain in enumerate(domains.tolist()):
            logits[row, first[domain] : first[domain] + shared.LABELS[domain]] = affine[domain](pooled[row])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        adam.step()
        return loss.detach().numpy()

    return run


def adapted(model: Qwen2_5OmniThinkerForConditionalGeneration, folder: Path, rank: int, alpha: float) -> PeftModel:
    """The model under LoRA on the decoder's projections; A factors as given, B zero."""
    scope = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(" + "|".join(PROJECTIONS) + ")"
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=scope)
    made, given = get_peft_model(model, settings).train(), shared.factors(folder, rank)
    for name, value in made.named_parameters():
        if match := re.search(r"layers\.(\d+)\.\w+\.(\w+)\.lora_A", name):
            value.data = torch.from_numpy(given[match[2]][int(match[1])].T.copy())
    return made


if __name__ == "__main__":
    main(Path(sys.argv[1]))
