"""Behavioural adapters on a frozen classifier, such as `--config.model.weights=runs/sft/sft`: one set for each dataset."""

from ml_collections import ConfigDict

from omnisapiens_jax import defaults


def get_config(size: str = "mini") -> ConfigDict:
    mini = size == "mini"
    config = defaults.base(size)
    config.job = "bam"
    config.model.heads = defaults.HEADS
    config.model.lora.rank = 0  # of factors that the weights keep apart
    config.processing.format_prompt = "none"
    config.generation.max_tokens = 16 if mini else 60
    config.atlas.descriptors = True
    config.bam = ConfigDict(
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
    return config
