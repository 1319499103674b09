"""transformers' thinker on one checkpoint: forward, positions, greedy continuation, and loss with gradients under peft's LoRA.

Arguments are named `case/argument`, answers `case/attention/value`; attention is `eager` or `sdpa`.
"""

import re

import numpy as np
import torch
from _serve import serve
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig, Qwen2_5OmniThinkerForConditionalGeneration

GREEDY = 16
LORA_SCALE = 2.0


def load(folder: str, attention: str) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The checkpoint, nothing missing and nothing unknown."""
    model, report = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32, output_loading_info=True
    )
    problems = {kind: sorted(names) for kind, names in report.items() if names}
    if problems:
        raise ValueError(f"transformers does not find its own tensors: {problems}")
    for part in (model.model.audio_tower, model.model.visual, model.model.language_model):
        assert part.config._attn_implementation == attention, (type(part), part.config._attn_implementation)
    return model.eval()


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor | bool]:
    """Arguments of the forward."""
    arguments = {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}
    arguments = {name: value.long() if value.dtype == torch.int32 else value for name, value in arguments.items()}
    return {name: bool(value) if name == "use_audio_in_video" else value for name, value in arguments.items()}


@torch.no_grad()
def forward(model: Qwen2_5OmniThinkerForConditionalGeneration, given: dict) -> dict[str, np.ndarray]:
    """Logits, hidden states and what each encoder puts out, in reading order."""
    out = model(**given, output_hidden_states=True)
    answer = {"logits": out.logits, "last": out.hidden_states[-1], "penultimate": out.hidden_states[-2]}
    if "input_features" in given:
        answer["audio"] = model.get_audio_features(given["input_features"], given["feature_attention_mask"]).last_hidden_state
    if "pixel_values" in given:
        answer["image"] = torch.cat(model.get_image_features(given["pixel_values"], given["image_grid_thw"]).pooler_output)
    if "pixel_values_videos" in given:
        answer["video"] = torch.cat(model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"]).pooler_output)
    return {name: value.numpy() for name, value in answer.items()}


def positions(model: Qwen2_5OmniThinkerForConditionalGeneration, given: dict) -> dict[str, np.ndarray]:
    """Position ids `[3, B, T]` and rope deltas `[B, 1]`."""
    mask = given.get("feature_attention_mask")
    ids, deltas = model.model.get_rope_index(
        given["input_ids"],
        given.get("image_grid_thw"),
        given.get("video_grid_thw"),
        given["attention_mask"],
        given.get("use_audio_in_video", False),
        None if mask is None else mask.sum(-1),
        given.get("video_second_per_grid"),
    )
    return {"positions": ids.numpy(), "deltas": deltas.numpy()}


@torch.no_grad()
def greedy(model: Qwen2_5OmniThinkerForConditionalGeneration, given: dict) -> dict[str, np.ndarray]:
    """The next tokens, stopping at none, and how far the best was ahead of the second at each step."""
    lengths = given["attention_mask"].sum(-1)
    if not bool((given["attention_mask"][:, -1] == 1).all()):
        raise ValueError("generation wants its rows padded on the left")
    settings = GenerationConfig(max_new_tokens=GREEDY, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True)
    prompt = {name: value for name, value in given.items() if name != "labels"}
    out = model.generate(**prompt, generation_config=settings, return_dict_in_generate=True)
    best = torch.stack(out.logits, 1).topk(2, dim=-1).values
    assert lengths.min() > 0
    return {"greedy": out.sequences[:, given["input_ids"].shape[1] :].numpy(), "margin": (best[..., 0] - best[..., 1]).numpy()}


def adapted(folder: str, attention: str, factors: dict[str, np.ndarray]) -> tuple[PeftModel, dict[str, torch.nn.Parameter]]:
    """The checkpoint under peft's LoRA with these factors, and its parameters by the names on disk."""
    model = load(folder, attention)
    in_memory = {_on_disk(name): name for name, _ in model.named_modules()}
    targets = sorted({in_memory[name.split("/")[0]] for name in factors})
    rank = next(value.shape[0] for name, value in factors.items() if name.endswith("/lora_A"))
    # Whole names: peft matches a list by suffix, and would adapt the encoders' projections of the same name too.
    settings = LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, lora_dropout=0.0, target_modules="|".join(map(re.escape, targets)))
    model = get_peft_model(model, settings)
    parameters = {_on_disk(name): value for name, value in model.named_parameters()}
    adapters = {name: value for name, value in parameters.items() if "/lora_" in name}
    if adapters.keys() != factors.keys():
        raise ValueError(f"peft adapts {sorted(adapters)}, asked were {sorted(factors)}")
    for name, value in adapters.items():
        value.data = torch.from_numpy(factors[name])
    return model, parameters


def gradients(folder: str, attention: str, factors: dict[str, np.ndarray], given: dict) -> dict[str, np.ndarray]:
    """Loss, and its gradient for every parameter and both factors of every adapter, by the names on disk."""
    model, parameters = adapted(folder, attention, factors)
    for value in parameters.values():
        value.requires_grad_(True)
    out = model(**given)
    out.loss.backward()
    missing = [name for name, value in parameters.items() if value.grad is None]
    answer = {f"grad/{name}": value.grad.numpy() for name, value in parameters.items() if value.grad is not None}
    return answer | {"loss": out.loss.detach().numpy(), "without_gradient": np.array(missing)}


def _on_disk(name: str) -> str:
    """A module's or parameter's name as the file has it; a LoRA factor of module `x` is `x/lora_A`."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    name = re.sub(r"\.(lora_[AB])\.default\.weight$", r"/\1", name)
    return name.replace("model.language_model.", "model.").replace("model.audio_tower.", "audio_tower.").replace("model.visual.", "visual.")


def run(folders: dict, cases: list, gradient_cases: list, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    answer = {}
    for config, folder in folders.items():
        factors = {name.split("/", 2)[2]: value for name, value in arrays.items() if name.startswith(f"{config}/lora/")}
        given = {case: tensors(_under(f"{config}/{case}/", arrays)) for case in {*cases, *gradient_cases}}
        for attention in ("eager", "sdpa"):
            model = load(folder, attention)
            for case in cases:
                found = forward(model, given[case]) | positions(model, given[case])
                if bool((given[case]["attention_mask"][:, -1] == 1).all()):
                    found |= greedy(model, given[case])
                answer |= {f"{config}/{case}/{attention}/{name}": value for name, value in found.items()}
            for case in gradient_cases:
                found = gradients(folder, attention, factors, given[case])
                answer |= {f"{config}/{case}/{attention}/with_lora/{name}": value for name, value in found.items()}
    return answer


def _under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


if __name__ == "__main__":
    serve(run)
