"""What the original trainers leave: a classifier (thinker, LoRA, heads, behavioural adapters), its released form, and verl's shards.

Modules, names in the files and the forward are those of the reference. A classifier answers `name/pooled [B, D]` and `name/logits [B, C]`.
"""

import copy
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from _serve import serve
from peft import LoraConfig, get_peft_model
from peft_adapters import shake
from thinker import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

RANKS = 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # by suffix: they are found in every tower
HIDDEN = 6


class Adapter(torch.nn.Module):
    """BAM: what is added to the pooled state, of a descriptor of the clip."""

    def __init__(self, features: int, width: int, normed: bool):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(features, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, width))
        self.alpha = torch.nn.Parameter(torch.tensor([4.0]))
        self.ln_feats = torch.nn.LayerNorm(features) if normed else None

    def forward(self, descriptor: torch.Tensor) -> torch.Tensor:
        return self.alpha * self.mlp(descriptor if self.ln_feats is None else self.ln_feats(descriptor))


class Classifier(torch.nn.Module):
    """Heads on the pooled penultimate states; adapters are attached where there are some."""

    def __init__(self, backbone: torch.nn.Module, width: int, counts: list[int]):
        super().__init__()
        self.backbone = backbone
        self.heads = torch.nn.ModuleList(torch.nn.Linear(width, count) for count in counts)

    def forward(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mask = given["attention_mask"]
        states = self.backbone(input_ids=given["input_ids"], attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        for modality in ("video", "audio"):
            if hasattr(self, f"{modality}_adapter"):
                pooled = pooled + getattr(self, f"{modality}_adapter")(given[modality])
        counts = [head.out_features for head in self.heads]
        logits = torch.full((len(pooled), sum(counts)), torch.finfo(pooled.dtype).min / 2)
        for row, domain in enumerate(given["domains"].tolist()):
            begin = sum(counts[:domain])
            logits[row, begin : begin + counts[domain]] = self.heads[domain](pooled[row])
        return {"pooled": pooled, "logits": logits}


def attach(model: Classifier, order: tuple[str, ...], given: dict[str, torch.Tensor], normed: bool = True) -> None:
    for modality in order:
        setattr(model, f"{modality}_adapter", Adapter(given[modality].shape[1], model.heads[0].in_features, normed))
        module = getattr(model, f"{modality}_adapter")
        if normed:  # away from the identity it begins as
            torch.nn.init.normal_(module.ln_feats.weight, 1, 0.3)
            torch.nn.init.normal_(module.ln_feats.bias, 0, 0.3)


def as_saved(model: torch.nn.Module, wrapper: str = "") -> dict[str, torch.Tensor]:
    """The state dict in the names of transformers 4; `wrapper` is put where FSDP, DDP or torch.compile put theirs."""
    names = {"model.language_model.": "model.", "model.audio_tower.": "audio_tower.", "model.visual.": "visual."}
    found = {}
    for name, value in model.state_dict().items():
        for memory, disk in names.items():
            name = name.replace(memory, disk)
        found[name.replace(".layers.", f".layers.{wrapper}") if wrapper.startswith("_fsdp") else wrapper + name] = value
    return found


def save(folder: Path, state: dict[str, torch.Tensor], adapters: dict[str, torch.nn.Module] | None = None, **meta: object) -> None:
    """A `step_N` directory."""
    folder.mkdir(parents=True)
    torch.save(state, folder / "pytorch_model_fsdp.bin")
    for number, module in enumerate((adapters or {}).values(), 1):
        torch.save(module.state_dict(), folder / f"pytorch_model_fsdp_{number}.bin")
    facts = {"epoch": 2, "global_step": 43539, "len_train_dataloader": 14513, "training_strategy": "lora", "saved_at_unix": 1.0}
    (folder / "meta.json").write_text(json.dumps(facts | meta))


def release(folder: Path, model: Classifier, order: tuple[str, ...]) -> None:
    """The published form: the merged thinker in half precision, and files of their own for what stands on it."""
    model.backbone.save_pretrained(folder)
    state = model.state_dict()
    torch.save({name: value for name, value in state.items() if name.startswith("heads.")}, folder / "heads.bin")
    if order:
        torch.save({name: value for name, value in state.items() if "_adapter." in name}, folder / "adapters.bin")
    (folder / "label_scheme.json").write_text("{}")
    (folder / "training_meta.json").write_text("{}")


def rank(number: int, folder: str, target: str) -> None:
    """One process of an RL run saves its shards; what they make is the thinker in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{target}/rendezvous", rank=number, world_size=RANKS)
    model, mesh = load(folder, "eager"), init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",))
    state = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in as_saved(model).items()}
    actor = Path(target) / "global_step_3" / "actor"
    actor.mkdir(parents=True, exist_ok=True)
    torch.save(state, actor / f"model_world_size_{RANKS}_rank_{number}.pt")
    torch.save({"state": {}}, actor / f"optim_world_size_{RANKS}_rank_{number}.pt")
    if number == 0:
        model.config.save_pretrained(actor / "huggingface")
    dist.barrier()
    os._exit(0)  # without the second that gloo takes to say goodbye


@torch.no_grad()
def run(folder: str, target: str, counts: list, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    torch.multiprocessing.start_processes(rank, (folder, target), RANKS, start_method="fork")  # before torch has threads of its own
    given = {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}
    given |= {name: given[name].long() for name in ("input_ids", "attention_mask")}
    root, answer = Path(target), {}
    torch.manual_seed(0)
    width = load(folder, "eager").config.text_config.hidden_size
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=TARGETS, task_type="CAUSAL_LM")

    def note(name: str, model: Classifier) -> None:
        answer.update({f"{name}/{what}": value.numpy() for what, value in model.eval()(given).items()})

    plain = Classifier(load(folder, "eager"), width, counts)
    save(root / "full", plain.state_dict())  # in the names of transformers 5
    note("full", plain)

    model = Classifier(get_peft_model(load(folder, "eager"), lora), width, counts)
    shake(model)
    save(root / "sft", as_saved(model))
    for name, wrapper in {"fsdp": "_fsdp_wrapped_module.", "compiled": "_orig_mod.", "ddp": "module."}.items():
        save(root / name, as_saved(model, wrapper))
    note("sft", model)

    for order in (("audio",), ("video", "audio")):
        name = "_and_".join(order)
        attached = copy.deepcopy(model)
        attach(attached, order, given)
        adapters = {modality: getattr(attached, f"{modality}_adapter") for modality in order}
        save(root / name, as_saved(attached), adapters, model_order=["base", *order])
        note(name, attached)
    save(root / "attached_only", as_saved(attached))

    bare = {name: value for name, value in as_saved(attached).items() if "_adapter." not in name}
    save(root / "files_only", bare, dict(reversed(adapters.items())), model_order=["base", "audio", "video"])

    released = attached
    released.backbone = released.backbone.merge_and_unload().half()
    release(root / "released", released, order)
    released.backbone = load(str(root / "released"), "eager")
    note("released", released)
    return answer


if __name__ == "__main__":
    serve(run)
