"""Stage 2 of OmniSapiens SFT: free-form answers. The LM head alone is trained, of what `config.model.weights` names (`runs/sft/sft`)."""

from ml_collections import ConfigDict

from omnisapiens_jax import defaults


def get_config(size: str = "mini") -> ConfigDict:
    mini = size == "mini"
    config = defaults.base(size)
    config.job = "qa"
    config.model.trains = "lm_head"
    config.processing.format_prompt = "none"  # answers are given as they are
    config.generation.max_tokens = 16 if mini else 60
    config.qa = ConfigDict(
        {
            "rows": "all",
            "batch_size": 32 if mini else 16,
            "micro_batches": 1 if mini else 4,
            "steps": 300 if mini else 5000,
            "eval_every": 50 if mini else 250,
            "patience": 4,  # evaluations without a new minimum
            "cached": False,  # what frozen towers give is computed once and kept on disk: 2 bytes x width x tokens of each row in bfloat16
            "optim": defaults.optimizer(schedule="cosine", warmup=50, lr=1e-3 if mini else 1e-4, weight_decay=0.0, clip=0.0),
        }
    )
    return config
