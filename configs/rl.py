"""GRPO with a warm start. `--config=configs/rl.py:7b` selects the size."""

from ml_collections import ConfigDict

from omnisapiens_jax import defaults


def get_config(size: str = "mini") -> ConfigDict:
    mini = size == "mini"
    config = defaults.base(size)
    config.job = "rl"
    config.warm_start = defaults.supervised(size)
    config.warm_start.rows = "third" if mini else "none"  # whose answers may be seen; none = skip
    if mini:
        config.atlas.training.word_dropout = 0.3  # held-out rows have other words: what is said by heart is of no use there
        config.warm_start.steps = 300  # a third of the rows is learnt by then
    config.rl = ConfigDict(
        {
            "rows": "rest" if mini else "all",  # prompts: those whose answers the warm start did not see
            "prompts": 32,  # a step
            "rollouts": 4 if mini else 5,  # n, of each prompt
            "updates": 1 if mini else 4,  # optimizer steps a rollout is cut into
            # 4 prompts at once: at 7b one for each part of fsdp=4 (32 / 4 updates / 2). The fewer, the more without signal are skipped.
            "micro_batches": 8 if mini else 2,
            "temperature": 1.0,
            "steps": 200 if mini else 10_000,
            "save_every": 25,
            "record_every": 50,  # rollouts kept for replay and for the report; 0 = none
            # At 4e-4 mini's policy drifts off; 1e-4 and 2e-4 end alike on the validation split.
            "optim": defaults.optimizer(lr=1.5e-4, schedule="cosine", warmup=10, weight_decay=0.0) if mini else defaults.optimizer(lr=1e-6),
            "loss": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "aggregation": "token_mean"},
            "reward": {
                "accuracy": 1.0,
                "format": 0.2,
                "similarity": 0.5,
                "overlong": 0.5 if mini else 0.0,  # a policy so small else forgets to end
                "longest": config.generation.get_ref("max_tokens") if mini else 812,  # tokens
                "buffer": 4 if mini else 128,  # the longest warm-start target of mini has 20 tokens, just clear of it
                "strip": True,
                "brackets_in_thinking": False,
            },
        }
    )
    return config
