"""Stage 1 of OmniSapiens SFT: a classification head for each domain, LoRA on the decoder (mini: all of it) below them."""

from ml_collections import ConfigDict

from omnisapiens_jax import defaults


def get_config(size: str = "mini") -> ConfigDict:
    mini = size == "mini"
    config = defaults.base(size)
    config.job = "sft"
    config.model.heads = defaults.HEADS
    config.processing.format_prompt = "none"  # heads read the prompt, and nobody answers
    config.sft = ConfigDict(
        {
            "rows": "all",
            "labels": "answers",  # or raters: what people said in which share, where a row tells
            "batch_size": 32 if mini else 512,
            "micro_batches": 1 if mini else 128,
            "steps": 500 if mini else 570,  # of the whole atlas: five epochs
            "eval_every": 50 if mini else 57,
            "best": "loss",  # what the best state is selected by; or a metric of its classes: accuracy, micro_f1, macro_f1, ...
            "patience": 4,  # evaluations without a new best
            "cached": False,  # what frozen towers give is computed once and kept on disk: 2 bytes x width x tokens of each row in bfloat16
            "optim": defaults.optimizer(schedule="cosine", warmup=50, lr=1e-3 if mini else 1e-4, weight_decay=0.0, clip=0.0),
        }
    )
    return config
