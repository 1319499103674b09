"""Stage 1 of OmniSapiens SFT: a classification head for each domain, LoRA on the decoder (mini: all of it) below them."""

from ml_collections import ConfigDict

from omnisapiens_jax import defaults


def get_config(size: str = "mini") -> ConfigDict:
    config = defaults.base(size)
    config.job = "sft"
    config.model.heads = defaults.HEADS
    config.processing.format_prompt = "none"  # heads read the prompt, and nobody answers
    config.sft = defaults.classes(size)
    config.sft.labels = "answers"  # or raters: what people said in which share, where a row tells
    return config
