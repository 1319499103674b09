"""A full Omni model of transformers, thinker, talker and vocoder: saved in shards, and loaded again as others wrote it."""

from pathlib import Path

import numpy as np
import torch
from _serve import serve
from safetensors.torch import load_file
from thinker import load
from transformers import PreTrainedModel, Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

TALKER = {
    "vocab_size": 40,
    "embedding_size": 56,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
DIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "emb_dim": 8,
    "num_embeds": 10,
    "mel_dim": 8,
    "enc_emb_dim": 8,
    "enc_dim": 8,
    "enc_channels": [8, 8, 8, 8, 24],
    "enc_attention_channels": 8,
    "enc_res2net_scale": 2,
    "enc_se_channels": 8,
}
VOCODER = {"mel_dim": 8, "upsample_initial_channel": 64}


def make(thinker: str, target: str) -> None:
    """Saves a full model around a thinker."""
    inner = load(thinker, "eager")
    config = Qwen2_5OmniConfig(
        thinker_config=inner.config.to_dict(), talker_config=TALKER, token2wav_config={"dit_config": DIT, "bigvgan_config": VOCODER}
    )
    torch.manual_seed(0)
    model = Qwen2_5OmniForConditionalGeneration(config)
    model.thinker.load_state_dict(inner.state_dict())
    model.save_pretrained(target, max_shard_size="200KB")
    torch.save({"Voice": {"bos_token": 1, "cond": torch.ones(1, 8), "ref_mel": torch.ones(1, 4, 8)}}, Path(target) / "spk_dict.pt")


@torch.no_grad()
def run(thinker: str, target: str, loaded: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    """Makes `target` around `thinker` where it is named, and loads `loaded` where that is: its logits, and all that was amiss."""
    if target:
        make(thinker, target)
    if not loaded:
        return {}
    # Its own `from_pretrained` loads the speakers as well, and cannot be asked for a report.
    model, report = PreTrainedModel.from_pretrained.__func__(
        Qwen2_5OmniForConditionalGeneration, loaded, dtype=torch.float32, output_loading_info=True
    )
    model.load_speakers(f"{loaded}/spk_dict.pt")
    amiss = {f"amiss/{kind}": np.array(sorted(map(str, names))) for kind, names in report.items()}
    speech = {name: value for file in Path(loaded).glob("*.safetensors") for name, value in load_file(file).items()}
    state = model.state_dict()
    different = [name for name, value in speech.items() if not name.startswith("thinker.") and not torch.equal(state[name], value)]
    given = {name: torch.from_numpy(value) for name, value in arrays.items()}
    given |= {name: given[name].long() for name in ("input_ids", "attention_mask")}
    logits = model.thinker.eval()(**given).logits
    return amiss | {"logits": logits.numpy(), "different": np.array(different), "speakers": np.array(list(model.speaker_map))}


if __name__ == "__main__":
    serve(run)
