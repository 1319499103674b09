"""PEFT on transformers' thinker: adapters are made and saved, and those that others wrote are loaded.

Inputs are named `config/argument`. `made` has the settings of PEFT's LoraConfig for adapters to save in `target`, `loaded` directories of
adapters, `merged` directories of whole thinkers, each by a name. All answer `name/logits`.
"""

import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from _serve import serve
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from thinker import load, tensors


def shake(model: torch.nn.Module) -> None:
    """Random factors: PEFT begins with B = 0, which would change nothing."""
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.5 * torch.randn_like(value) / value.shape[1] ** 0.5


@torch.no_grad()
def logits(model: torch.nn.Module, given: dict) -> np.ndarray:
    return model(**given).logits.numpy()


def run(folders: dict, target: str, made: dict, loaded: dict, merged: dict, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    given = {
        config: tensors({name.removeprefix(f"{config}/"): value for name, value in arrays.items() if name.startswith(f"{config}/")})
        for config in folders
    }
    answer = {}
    for name, (config, settings) in made.items():
        model = get_peft_model(load(folders[config], "eager"), LoraConfig(**settings)).eval()
        shake(model)
        model.save_pretrained(f"{target}/{name}")
        answer[f"{name}/logits"] = logits(model, given[config])
    for name, (config, adapter) in loaded.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # that is how PEFT tells of factors it did not find
            model = PeftModel.from_pretrained(load(folders[config], "eager"), adapter).eval()
        report = model.load_adapter(adapter, "again")
        answer[f"{name}/unexpected"] = np.array(report.unexpected_keys)
        answer[f"{name}/missing"] = np.array([key for key in report.missing_keys if "lora_" in key])
        answer[f"{name}/logits"] = logits(model, given[config])
    for name, (config, folder) in merged.items():
        answer[f"{name}/logits"] = logits(load(folder, "eager"), given[config])
    other_files(Path(target) / "decoder", load(folders["uneven"], "eager"))
    return answer


def other_files(adapter: Path, model: torch.nn.Module) -> None:
    """The same adapter as older PEFT pickled it, and in shards, as transformers itself saves it."""
    for name in ("pickled", "sharded"):
        shutil.copytree(adapter, adapter.with_name(name))
        (adapter.with_name(name) / "adapter_model.safetensors").unlink()
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter.with_name("pickled") / "adapter_model.bin")
    model.load_adapter(str(adapter))
    model.save_pretrained(adapter.with_name("sharded"), max_shard_size="4KB")


if __name__ == "__main__":
    serve(run)
