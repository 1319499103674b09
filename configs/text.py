"""The classifier on real labelled texts (data/real_text), a head for each of their two domains; all of it is trained.

`benchmarks/real_text.py` gives it a smaller start with a vocabulary of these texts.
"""

from ml_collections import ConfigDict

from omnisapiens_jax import defaults


def get_config(size: str = "mini") -> ConfigDict:
    config = defaults.base(size)
    config.job = "sft"
    config.atlas.scheme = "real_text"
    config.atlas.buckets = 4
    config.model.heads = (3, 2)
    config.atlas.training.word_dropout = 0.7  # a few thousand texts are learnt by heart within three epochs otherwise
    config.processing.format_prompt = "none"
    config.sft = ConfigDict(
        {
            "rows": "all",
            "labels": "answers",  # or raters: what people said in which share, where a row tells
            "batch_size": 64,
            "micro_batches": 1,
            "steps": 420,  # six epochs
            "eval_every": 70,
            "best": "macro_f1",  # what the best state is selected by: a metric of the classes, or loss
            "patience": 6,  # evaluations without a new best: as many as there are
            "cached": False,  # what frozen towers give is computed once and kept on disk: 2 bytes x width x tokens of each row in bfloat16
            "optim": defaults.optimizer(schedule="cosine", warmup=70, lr=1e-3, weight_decay=0.1),
        }
    )
    return config
