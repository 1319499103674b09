"""Settings that all runs share, and what each model size changes in them. A file in `configs/` adds what its run does."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from omnisapiens_jax.processing.options import ProcessingConfig

SIZES = ("mini", "3b", "7b")
_DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADS = (7, 8, 2, 2, 2, 2, 2)  # labels of each domain of Human Behavior Atlas

# What is done right by default (first) and otherwise by the published code (second); `with_compat` knows those that mean other settings.
COMPAT = {
    "media_inputs": ("fed", "text_only"),  # SFT and BAM never feed media: of them only the placeholders' own embeddings are left
    "system_prompt": ("always", "with_audio"),  # the generative SFT gives the official system sentence to rows with sound alone
    "truncation": ("transcript", "right"),  # what a prompt that is too long loses; "right" only where no media are fed
    "qa_prompts": ("whole", "padding"),  # QA teaches answers behind padding instead of the prompt; only where no media are fed
    "labels": ("response", "shifted"),  # the generative SFT teaches the prompt's last token, and never the end of a response
    "lora_scope": ("named", "suffix"),  # LoRA on whatever ends in the name of a decoder's projection, in the towers too
    "schedule": ("updates", "micro_batches"),  # a schedule that counts micro-batches: a constant rate after 25 updates of warm-up
    "adapter_steps": ("once", "twice"),  # BAM adapters stepped by the optimizer of the heads too, at its rate, before their own
    "descriptor_padding": ("parts", "trailing"),  # a clip without a face has 468 points: padded behind everything, not the face
}
_JOBS = {  # that a switch changes something in, where it is not all of them
    "qa_prompts": ("qa", "bam"),
    "labels": ("generative", "rl"),  # the warm start of the latter
    "schedule": ("sft", "qa"),
    "adapter_steps": ("bam", "transfer"),
    "descriptor_padding": ("bam", "transfer"),
}
SWITCHED = ("feed_media", "system")  # how media are read in that is not in `processing`, because a switch of `compat` says it


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
            "heads": (),  # labels of each classification head; empty = a thinker alone
            "trains": "thinker",  # (its LoRA factors where there are any), or lm_head: it alone. Heads always are
            "lora": {  # rank 0 = train every parameter
                "rank": 0 if mini else 32,
                "alpha": 64.0,
                "dropout": 0.05,  # odds that a number which a factor A reads is dropped in supervised training; RL drops none
                "stabilised": False,  # scale by alpha / sqrt(rank) (rslora) instead of alpha / rank
                "targets": {"decoder": _DECODER, "audio": (), "vision": ()},
            },
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1 if mini else 4, "tensor": 1})
    config.atlas = ConfigDict(
        {
            "path": "",  # the folder of the splits; empty = the miniature atlas or the real texts, by the scheme, made on first use
            "scheme": "hba",  # what its datasets and labels are: those of Human Behavior Atlas, or real_text
            "samples": 4500,  # of the miniature atlas
            "seed": 0,
            "descriptors": False,  # whether the miniature atlas has descriptors of its faces and voices
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
                "video_dropout": 0.0,  # its pictures greyed,
                "word_dropout": 0.0,  # each word of its transcript left out
            },
            # A row that cannot be used: raise stops the run, skip leaves it out, zero feeds silence and black for its media.
            "on_error": "raise" if mini else "skip",
            "quarantine": "",  # a run's quarantine.jsonl, whose rows are left out
            "cache_bytes": 2**31 if mini else 0,
            "workers": 0,  # processes that decode and that a broken file may crash; 0 decodes in the run's own
            "deadline": 60.0,  # seconds of processor time that a worker may take for a row
            "worker_bytes": 2**32,  # that it may allocate
        }
    )
    pixels = 56 * 56 if mini else 147_456
    config.processing = ConfigDict(
        {
            **{name: value for name, value in dataclasses.asdict(ProcessingConfig()).items() if name not in SWITCHED},
            "video_min_pixels": pixels,
            "video_max_pixels": pixels,
            "format_prompt": "think",  # the name of one in chat.FORMAT_PROMPTS
        }
    )
    config.generation = ConfigDict({"unroll": mini, "chunk": 16, "max_tokens": 24 if mini else 2048})
    config.eval_batch = 64
    config.compat = ConfigDict({name: right for name, (right, _) in COMPAT.items()})
    config.blanked = ()  # modalities (text, audio, video) without which what was learnt is evaluated once more
    return config


def with_compat(config: ConfigDict) -> ConfigDict:
    """A copy of a run's config in which the switches of `compat` that stand for other settings have changed those.

    Raises:
      ValueError: a switch is not one of `COMPAT`, changes nothing in this run, or wants media not to be fed.
    """
    config = config.copy_and_resolve_references()
    for name, known in COMPAT.items():
        if config.compat[name] not in known:
            raise ValueError(f"unknown config.compat.{name} {config.compat[name]!r}; known: {', '.join(known)}")
        if config.compat[name] == known[1] and config.job not in _JOBS.get(name, (config.job,)):
            raise ValueError(
                f"config.compat.{name} {known[1]} is for the jobs {', '.join(_JOBS[name])}: it changes nothing in {config.job}"
            )
        if name in ("truncation", "qa_prompts") and config.compat[name] == known[1] and config.compat.media_inputs == "fed":
            raise ValueError(f"config.compat.{name} {known[1]} loses places of media: it needs config.compat.media_inputs=text_only")
    if config.compat.lora_scope == "suffix":
        if not config.model.lora.rank:
            raise ValueError("config.compat.lora_scope suffix changes nothing without LoRA: set config.model.lora.rank")
        towers = {"audio": ("q_proj", "k_proj", "v_proj"), "vision": ("gate_proj", "up_proj", "down_proj")}
        config.model.lora.targets.update({"decoder": _DECODER, **towers})
    if config.compat.schedule == "micro_batches":
        config[config.job].optim.update({"schedule": "constant", "warmup": 25})
    return config


def optimizer(**changes: float | str) -> ConfigDict:
    """AdamW as the published runs set it, with `changes`."""
    config = ConfigDict({"lr": 1e-4, "schedule": "constant", "warmup": 0, "b1": 0.9, "b2": 0.999, "weight_decay": 0.01, "clip": 1.0})
    config.update(changes)
    return config


def supervised(size: str) -> ConfigDict:
    """Supervised fine-tuning on responses, to the minimum of the validation loss."""
    mini = size == "mini"
    return ConfigDict(
        {
            "rows": "all",
            "batch_size": 32 if mini else 64,
            "micro_batches": 1 if mini else 16,
            "steps": 500 if mini else 3000,
            "eval_every": 50,
            "patience": 4,  # evaluations without a new minimum
            "cached": False,  # what frozen towers give is computed once and kept on disk: 2 bytes x width x tokens of each row in bfloat16
            "optim": optimizer(schedule="cosine", **({"lr": 1e-3, "warmup": 50} if mini else {"lr": 1e-4, "warmup": 10, "b2": 0.95})),
        }
    )


def classes(size: str) -> ConfigDict:
    """Supervised training of heads, and of what is trained below them, to the minimum of the validation loss or the best of a metric."""
    mini = size == "mini"
    return ConfigDict(
        {
            "rows": "all",
            "batch_size": 32 if mini else 512,
            "micro_batches": 1 if mini else 128,
            "steps": 500 if mini else 570,  # of the whole atlas: five epochs
            "eval_every": 50 if mini else 57,
            "best": "loss",  # what the best state is selected by; or a metric of its classes: accuracy, micro_f1, macro_f1, ...
            "patience": 4,  # evaluations without a new best
            "cached": False,  # what frozen towers give is computed once and kept on disk: 2 bytes x width x tokens of each row in bfloat16
            "optim": optimizer(schedule="cosine", warmup=50, lr=1e-3 if mini else 1e-4, weight_decay=0.0, clip=0.0),
        }
    )


def adapters(size: str) -> ConfigDict:
    """What brings descriptors into a frozen thinker, and its training."""
    mini = size == "mini"
    return ConfigDict(
        {
            "kind": "adapter",  # the published one: pooled descriptors make a residual; or attention: to their frames
            "datasets": "all",  # a set of parameters each; or names; those that share a set joined: mmsd,siq2+mimeqa
            "stage": "adapters+heads",  # what is trained: adapters, or for free-form datasets adapters+lm_head+last_block
            "modalities": ("video", "audio"),
            "hidden": {"video": 256, "audio": 512},
            "normed": True,  # a LayerNorm over the descriptor
            "alpha": 4.0,  # to begin with
            "drop": {"video": 0.2, "audio": 0.2},  # odds that a sample's descriptor is withheld in training
            "residual_site": "last_hidden",  # of free-form datasets; or penultimate
            "attention": {
                "depths": (2, 3) if mini else (14, 21, 27) if size == "7b" else (18, 27, 35),  # after so many layers of the decoder
                "width": 64 if mini else 512,
                "heads": 4 if mini else 8,
                "head_dim": 16 if mini else 64,
                "landmarks": 16 if mini else 128,  # the most frames of a sample, evenly spread
                "low_level": 32 if mini else 256,
            },
            "batch_size": 32,
            "micro_batches": 1,
            "epochs": 4,  # 0 evaluates what the weights bring
            "best": "loss",  # what the best epoch is selected by; for classes also a metric of these: accuracy, micro_f1, macro_f1, ...
            "lr": 1e-4,  # of heads, or of the last block and the LM head
            "adapter_lr": 5e-4,
            "cached": True,  # states of the frozen thinker are computed once and kept on disk
        }
    )
