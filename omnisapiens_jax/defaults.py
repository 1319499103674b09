"""Settings that all runs share, and what each model size changes in them. A file in `configs/` adds what its run does."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from omnisapiens_jax.processing.options import ProcessingConfig

SIZES = ("mini", "3b", "7b")
_DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base(size: str) -> ConfigDict:
    """Model, data, processing and mesh of a size: `mini` trains from scratch on a laptop; `3b` and `7b` want `config.model.weights`."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    mini = size == "mini"
    config = ConfigDict()
    config.size = size
    config.seed = 0
    config.model = ConfigDict(
        {
            "preset": size,
            "weights": "",  # a checkpoint of any kind that needs no base, or OWNER/NAME on the hub; empty = random weights of the preset
            "dtype": "float32" if mini else "bfloat16",
            "param_dtype": "float32" if mini else "bfloat16",
            "remat": "none" if mini else "full",
            "lora": {  # rank 0 = train every parameter
                "rank": 0 if mini else 32,
                "alpha": 64.0,
                "stabilised": False,  # scale by alpha / sqrt(rank) (rslora) instead of alpha / rank
                "targets": {"decoder": _DECODER, "audio": (), "vision": ()},
            },
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1 if mini else 4, "tensor": 1})
    config.atlas = ConfigDict(
        {
            "path": "",  # the folder of the splits; empty = the miniature atlas, made on first use
            "samples": 4500,  # of the miniature atlas
            "seed": 0,
            "train": "train",  # a split in any form that the folder has it, or a .jsonl or .parquet file
            "validation": "validation",
            "test": "test",
            "max_tokens": 256 if mini else 4096,
            # homogeneous (of one modality signature), mixed, or packed: several samples in each row of max_tokens, which sft can
            "batches": "mixed" if mini else "homogeneous",
            "buckets": 1 if mini else 8,
            "training": {  # of what is trained on; see atlas.plan.PlanConfig
                "temperature": 1.0,  # above 1 an epoch is a mixture, in which every dataset has a share of size ** (1 / temperature)
                "balance": "dataset",  # or task: what the mixture weighs
                "audio_dropout": 0.0,  # odds that a sample's sound is silenced,
                "video_dropout": 0.0,  # its pictures greyed
            },
            # A row that cannot be used: raise stops the run, skip leaves it out, zero feeds silence and black for its media.
            "on_error": "raise" if mini else "skip",
            "quarantine": "",  # a run's quarantine.jsonl, whose rows are left out
            "cache_bytes": 2**31 if mini else 0,
            "workers": 0,  # processes that decode and that a broken file may crash; 0 decodes in the run's own
            "deadline": 60.0,  # seconds that a worker may take for a row
            "worker_bytes": 2**32,  # that it may allocate
        }
    )
    pixels = 56 * 56 if mini else 147_456
    config.processing = ConfigDict(
        {
            **dataclasses.asdict(ProcessingConfig()),
            "video_min_pixels": pixels,
            "video_max_pixels": pixels,
            "format_prompt": "think",  # the name of one in chat.FORMAT_PROMPTS
        }
    )
    config.generation = ConfigDict({"unroll": mini, "chunk": 16, "max_tokens": 24 if mini else 2048})
    config.eval_batch = 64
    config.blanked = ()  # modalities (text, audio, video) without which the final policy is evaluated once more
    return config


def optimizer(**changes: float | str) -> ConfigDict:
    """AdamW as the published runs set it, with `changes`."""
    config = ConfigDict({"lr": 1e-4, "schedule": "constant", "warmup": 0, "b1": 0.9, "b2": 0.999, "weight_decay": 0.01, "clip": 1.0})
    config.update(changes)
    return config


def sft(size: str) -> ConfigDict:
    """Supervised fine-tuning to the minimum of the validation loss."""
    mini = size == "mini"
    return ConfigDict(
        {
            "batch_size": 32 if mini else 64,
            "micro_batches": 1 if mini else 16,
            "steps": 500 if mini else 3000,
            "eval_every": 50,
            "patience": 4,  # evaluations without a new minimum
            "optim": optimizer(schedule="cosine", **({"lr": 1e-3, "warmup": 50} if mini else {"lr": 1e-4, "warmup": 10, "b2": 0.95})),
        }
    )
