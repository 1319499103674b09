"""Every kind of checkpoint of the family, opened as a `Source`: told apart by the files that are there, never by guessing at tensors."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omnisapiens_jax.convert import checkpoint, huggingface
from omnisapiens_jax.convert.hub import resolve
from omnisapiens_jax.convert.names import mappings
from omnisapiens_jax.convert.parts import ADAPTERS, HEADS, MODALITIES, is_part, modern
from omnisapiens_jax.convert.peft import ADAPTER, ADAPTER_CONFIG
from omnisapiens_jax.convert.runs import is_stage, open_stage, stages
from omnisapiens_jax.convert.shards import join_shards
from omnisapiens_jax.convert.source import Lora, Skipped, Source
from omnisapiens_jax.models.layers import LORA_TARGETS, LoraConfig
from omnisapiens_jax.processing.tensors import ConversionError, StoredTensor, Tensor, read_safetensors, some
from omnisapiens_jax.processing.torch_files import ShardedTensor, read_torch_file

ADAPTER_PICKLED = "adapter_model.bin"
STATE, STATE_META = "pytorch_model_fsdp.bin", "meta.json"
# The models that a trainer saved, in the order of its files: the whole one, then the adapters of a BAM run.
_ORDERS = (["base"], ["base", "video"], ["base", "audio"], ["base", "video", "audio"], ["base", "audio", "video"])
_VERL = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_orig_mod|module)\.")
_LORA = re.compile(r"\.lora_(A|B)(?:\.[^.]+)?\.weight$")

# Prefixes that libraries put before the thinker's own names, outermost first.
_PREFIXES = ("backbone.", "base_model.model.", "thinker.")
# Names of transformers 5 in memory; its files have those of transformers 4.
_RENAMED = {"model.language_model.": "model.", "model.audio_tower.": "audio_tower.", "model.visual.": "visual."}
_HOW_TO_NAME = "base=DIR in Python, --base DIR of tools/convert_weights.py"


def open_source(path: str | Path, *, base: str | Path | None = None, lora_alpha: float | None = None) -> Source:
    """Opens a checkpoint of any kind: a directory, or the hub's `OWNER/NAME`.

    Args:
      path: a checkpoint of ours, or a stage of a run of ours (`runs/rl/rl`); a thinker or full Omni directory of Hugging Face, with
        released heads and adapters beside it; a PEFT adapter; a `step_N` directory of the original SFT and BAM trainers; one of verl's
        shards.
      base: what the checkpoint itself lacks, likewise named: `config.json`, and for a PEFT adapter the weights.
      lora_alpha: of the factors in a trainer's state dict, which does not say it; twice the rank when None, as in all runs of the original.

    Raises:
      ConversionError: it is none of these, or broken, or says another alpha itself.
    """
    source = _open(resolve(path), None if base is None else resolve(base), lora_alpha)
    if lora_alpha is not None and (source.lora is None or source.lora.config.alpha != lora_alpha):
        says = f"says that alpha is {source.lora.config.alpha:g}" if source.lora else "has no LoRA factors"
        raise ConversionError(f"{path} is {source.kind}, which {says}; leave out the {lora_alpha:g} that was given (lora_alpha)")
    return source


def _open(path: Path, base: Path | None, lora_alpha: float | None) -> Source:
    if not path.is_dir():
        raise ConversionError(f"{path} is not a directory; name the one that holds the checkpoint's files")
    if checkpoint.is_ours(path):
        return checkpoint.open_checkpoint(path)
    if is_stage(path):
        return open_stage(path, open_source)
    if found := stages(path):
        raise ConversionError(f"{path} is a run of ours; name one of its stages: {some(found)}")
    if (path / ADAPTER_CONFIG).is_file():
        return _open_peft(path, base)
    if (path / STATE).is_file():
        return _open_trainer(path, base, lora_alpha)
    if shards := _verl_shards(path):
        return _open_verl(shards, base, lora_alpha)
    return _with_parts(huggingface.open_huggingface(path))


def _with_parts(source: Source) -> Source:
    """The heads and adapters of a released model, which lie in files of their own."""
    parts: dict[str, Tensor] = {}
    for file in (HEADS, ADAPTERS):
        if (source.path / file).is_file():
            parts |= {canonical(name): tensor for name, tensor in _tensors(source.path / file).items()}
    return dataclasses.replace(source, parts=modern(parts))


def _tensors(file: Path) -> dict[str, StoredTensor]:
    """The state dict in a file of torch.save."""
    content = read_torch_file(file)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConversionError(f"{file} does not hold a dict of tensors")
    if wrong := [name for name, tensor in content.items() if not isinstance(tensor, StoredTensor)]:
        raise ConversionError(f"{file}: {some(wrong)} are no plain tensors")
    return content


def canonical(name: str) -> str:
    """A name without what wrappers (FSDP, torch.compile, DDP, PEFT, Accelerate) put around it, in the thinker's own spelling."""
    name = _WRAPPERS.sub("", name)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for spelt, ours in _RENAMED.items():
        if name.startswith(spelt):
            name = ours + name.removeprefix(spelt)
    return _LORA.sub(r".lora_\1.weight", name.replace(".base_layer.", "."))


def _rename(tensors: Mapping[str, Tensor], where: Path) -> tuple[dict[str, Tensor], tuple[Skipped, ...]]:
    """Tensors by canonical names, without those of the speech side."""
    found: dict[str, Tensor] = {}
    skipped = []
    for name, tensor in tensors.items():
        bare = canonical(name)
        if bare.startswith(huggingface.SPEECH):
            skipped.append(Skipped(name, tensor.file.name, "the speech side of a full Omni model"))
            continue
        if bare in found:
            raise ConversionError(f"{where}: {found[bare].name} and {name} are both {bare}")
        found[bare] = tensor
    return found, tuple(skipped)


def _is_factor(name: str) -> bool:
    return _LORA.search(name) is not None


def _open_peft(path: Path, base: Path | None) -> Source:
    described = _json(path / ADAPTER_CONFIG)
    if base is None:
        named = described.get("base_model_name_or_path")
        raise ConversionError(f"{path} holds LoRA factors only; name the model they belong to (it says {named!r}): {_HOW_TO_NAME}")
    _refuse_other_than_lora(described, path / ADAPTER_CONFIG)
    factors, skipped = _rename(_adapter_tensors(path), path)
    if not factors:
        raise ConversionError(f"{path} holds no LoRA factors of a thinker; left behind: {some(left.name for left in skipped) or 'nothing'}")
    if homeless := [tensor.name for name, tensor in factors.items() if not _is_factor(name)]:
        raise ConversionError(f"{path}: {some(homeless)} are no LoRA factors")
    thinker = open_source(base)
    if thinker.lora is not None:
        raise ConversionError(f"{base} has LoRA factors of its own; merge them first")
    return dataclasses.replace(
        thinker,
        path=path,
        kind=f"a PEFT adapter on {thinker.kind}",
        lora=Lora(_lora_config(described, _targets(factors, thinker), path / ADAPTER_CONFIG), factors),
        skipped=(*thinker.skipped, *skipped),
        settings=(*thinker.settings, path / ADAPTER_CONFIG, *huggingface.settings(path)),
        base=thinker.path,
    )


def _refuse_other_than_lora(described: Mapping[str, Any], where: Path) -> None:
    wrong = [f"{key} {described.get(key)!r}" for key, allowed in _PLAIN.items() if described.get(key) not in allowed]
    wrong += [f"{key} {described[key]!r}" for key in _NOT_PLAIN if described.get(key)]
    if wrong:
        raise ConversionError(f"{where}: {some(wrong)}: only plain LoRA can be read; merge this adapter with PEFT and import the result")


def _lora_config(described: Mapping[str, Any], targets: Mapping[str, tuple[str, ...]], where: Path) -> LoraConfig:
    """The LoRA on some projections that an `adapter_config.json`, or what there is in its place, describes."""
    try:
        return LoraConfig(described["r"], described["lora_alpha"], targets, stabilised=bool(described.get("use_rslora")))
    except (KeyError, ValueError) as reason:
        raise ConversionError(f"{where} does not say r and lora_alpha ({reason!r})") from reason


def _adapter_tensors(path: Path) -> Mapping[str, Tensor]:
    if (path / ADAPTER).is_file():
        return read_safetensors(path / ADAPTER)
    if (path / ADAPTER_PICKLED).is_file():
        return _tensors(path / ADAPTER_PICKLED)
    if (path / huggingface.INDEX).is_file():  # transformers names the index of a divided adapter like that of a model
        return huggingface.stored_tensors(path)
    raise ConversionError(f"{path} has {ADAPTER_CONFIG} but neither {ADAPTER} nor {ADAPTER_PICKLED} nor shards with {huggingface.INDEX}")


# Values that change nothing in W + scale * B A; other initialisations begin by changing W itself, which the factors do not tell.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_NOT_PLAIN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
)


def _targets(factors: Mapping[str, Tensor], thinker: Source) -> dict[str, tuple[str, ...]]:
    """The projections that have factors, by tower."""
    homes = {name.removesuffix(".weight"): row for row in mappings(thinker.config) for name in row.their_names}
    found: dict[str, set[str]] = {}
    homeless = []
    for name, tensor in factors.items():
        row = homes.get(_LORA.sub("", name))
        tower, projection = (row.ours[0], row.ours[-2]) if row else ("", "")
        if projection in LORA_TARGETS.get(tower, ()) and row and row.layout == "linear":
            found.setdefault(tower, set()).add(projection)
        else:
            homeless.append(f"{tensor.name} in {tensor.file}")
    if homeless:
        raise ConversionError(
            f"no projection of {thinker.path} takes the LoRA factors {some(homeless)}: they belong to another model, or to a part that has "
            "no LoRA here; merge them with PEFT and import the result"
        )
    return {tower: tuple(names) for tower, names in found.items()}


def _open_trainer(path: Path, base: Path | None, lora_alpha: float | None) -> Source:
    """A `step_N` directory: the whole state dict, and of a BAM run the adapters in files of their own."""
    order = _json(path / STATE_META).get("model_order", ["base"]) if (path / STATE_META).is_file() else ["base"]
    if order not in _ORDERS:
        raise ConversionError(f"{path / STATE_META}: model_order {order!r} is not 'base', then 'video' or 'audio' or both")
    files = {modality: path / f"pytorch_model_fsdp_{number}.bin" for number, modality in enumerate(order[1:], 1)}
    wanted, there = [path / STATE, *files.values()], [path / STATE, *sorted(path.glob("pytorch_model_fsdp_*.bin"))]
    if wanted != there:
        raise ConversionError(
            f"{path}: the models {some(order)} (model_order in {STATE_META}) lie in {some(file.name for file in wanted)}, "
            f"but there are {some(file.name for file in there)}; copy all files of the step"
        )
    tensors, skipped = _rename(_tensors(path / STATE), path / STATE)
    for modality, file in files.items():
        # The adapters are attached to the model as well; the files of their own are what the optimizer of the adapters stepped.
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{modality}_adapter.")}
        tensors |= {f"{modality}_adapter.{canonical(name)}": tensor for name, tensor in _tensors(file).items()}
    behavioural = any(name.startswith(f"{modality}_adapter.") for modality in MODALITIES for name in tensors)
    kind = "a BAM checkpoint" if behavioural else "an SFT checkpoint"
    return _from_state(path, f"{kind} of the original trainers", tensors, skipped, base, lora_alpha)


def _verl_shards(path: Path) -> list[Path]:
    """The shards in a directory or in its `actor/`, in the order of their ranks."""
    for folder in (path, path / "actor"):
        found = {
            int(match[2]): (file, int(match[1])) for file in folder.glob("model_world_size_*") if (match := _VERL.fullmatch(file.name))
        }
        if found:
            world = {size for _, size in found.values()}
            if world != {len(found)} or max(found) != len(found) - 1:
                raise ConversionError(
                    f"{folder} has the shards of ranks {some(sorted(found))} of world size {some(sorted(world))}; all of one are needed"
                )
            return [found[rank][0] for rank in sorted(found)]
    return []


def _open_verl(shards: Sequence[Path], base: Path | None, lora_alpha: float | None) -> Source:
    ranks = [read_torch_file(file) for file in shards]
    for file, rank in zip(shards, ranks, strict=True):
        if not isinstance(rank, dict) or not all(
            isinstance(name, str) and isinstance(tensor, StoredTensor | ShardedTensor) for name, tensor in rank.items()
        ):
            raise ConversionError(f"{file} does not hold a dict of tensors by their names")
        if rank.keys() != ranks[0].keys():
            raise ConversionError(f"{file} and {shards[0]} differ in {some(sorted(rank.keys() ^ ranks[0].keys()))}")
    joined = {name: join_shards(name, [rank[name] for rank in ranks]) for name in ranks[0]}
    renamed, skipped = _rename(joined, shards[0])
    folder = shards[0].parent
    beside = folder / "huggingface"  # verl puts config.json and the tokenizer there
    base = base or (beside if beside.is_dir() else None)
    return _from_state(folder, f"verl's shards of {len(shards)} ranks", renamed, skipped, base, lora_alpha)


def _from_state(
    path: Path, kind: str, tensors: Mapping[str, Tensor], skipped: tuple[Skipped, ...], base: Path | None, lora_alpha: float | None
) -> Source:
    """A state dict by canonical names, divided into thinker, factors and parts."""
    if base is None:
        raise ConversionError(f"{path} does not say the shapes of its model; name a directory that has its config.json: {_HOW_TO_NAME}")
    thinker = {name: tensor for name, tensor in tensors.items() if not _is_factor(name) and not is_part(name)}
    factors = {name: tensor for name, tensor in tensors.items() if _is_factor(name)}
    parts = modern({name: tensor for name, tensor in tensors.items() if is_part(name)})
    config = huggingface.read_config(base, thinker)
    adapter = path / "lora_adapter" / ADAPTER_CONFIG  # of verl, which describes the factors in its shards there
    settings = tuple(file for file in (path / STATE_META, adapter, base / "config.json") if file.is_file())
    source = Source(path, kind, config, thinker, None, parts, skipped, base, settings, base)
    if not factors:
        return source
    if adapter in settings:
        described, where = _json(adapter), adapter
        _refuse_other_than_lora(described, adapter)
    else:
        ranks = {tensor.shape[0] for name, tensor in factors.items() if name.endswith(".lora_A.weight") and tensor.shape}
        if len(ranks) != 1:
            raise ConversionError(f"{path} has LoRA factors of ranks {some(sorted(ranks))}; only factors of one rank can be read")
        rank = ranks.pop()
        described, where = {"r": rank, "lora_alpha": 2 * rank if lora_alpha is None else lora_alpha}, path
    return dataclasses.replace(source, lora=Lora(_lora_config(described, _targets(factors, source), where), factors))


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as reason:
        raise ConversionError(f"{file} cannot be read ({reason})") from reason
    if not isinstance(content, dict):
        raise ConversionError(f"{file} is not a JSON object")
    return content
