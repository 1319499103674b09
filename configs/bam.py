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
    config.bam = defaults.adapters(size)
    return config
