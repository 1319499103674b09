"""What the rest of the atlas is worth to one dataset: it is held out, then learnt from the base and from what all others have taught.

Each of the two is learnt without and with the dataset's descriptors: four cells. The base is `config.model.weights`, or random.
"""

from ml_collections import ConfigDict

from omnisapiens_jax import defaults


def get_config(size: str = "mini") -> ConfigDict:
    mini = size == "mini"
    config = defaults.base(size)
    config.job = "transfer"
    config.model.heads = defaults.HEADS
    config.processing.format_prompt = "none"
    config.atlas.descriptors = True
    config.transfer = ConfigDict({"dataset": "meld_emotion"})  # held out; its domain's head is drawn anew before it is learnt
    config.pretrain = defaults.classes(size)  # on all other datasets
    config.finetune = defaults.classes(size)  # on it alone
    if mini:
        config.finetune.update({"steps": 300, "eval_every": 15})  # of 15 steps an epoch
    else:
        config.finetune.update({"batch_size": 64, "micro_batches": 16, "steps": 156, "eval_every": 39})  # an epoch, as published
        config.finetune.optim.update({"schedule": "constant", "warmup": 0})
    config.bam = defaults.adapters(size)
    config.bam.datasets = config.transfer.get_ref("dataset")
    return config
