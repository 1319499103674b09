"""Switches of `config.compat` that stand for other settings, and the settings that no run may have."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from flax import nnx

from omnisapiens_jax import defaults
from omnisapiens_jax.models.layers import LoraParam
from omnisapiens_jax.training.jobs import check
from omnisapiens_jax.training.state import make_model, make_optimizer, thinker_of
from tests.training import world

# Factors of rank 32 at 7B, as PEFT counts them on what ends in the names of the decoder's projections.
PUBLISHED = {"decoder": 80_740_352, "audio": 7_864_320, "vision": 14_438_400}


def config(job: str, size: str, **changes: Any) -> Any:
    made = world.runpy.run_path(str(world.resource(f"configs/{job}.py")))["get_config"](size)
    made.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return defaults.with_compat(made)


def test_by_default_everything_is_right() -> None:
    for job in ("rl", "generative", "sft", "qa", "bam"):
        made = world.runpy.run_path(str(world.resource(f"configs/{job}.py")))["get_config"]("7b")
        assert defaults.with_compat(made).to_dict() == made.copy_and_resolve_references().to_dict()
        assert made.compat.to_dict() == {name: right for name, (right, _) in defaults.COMPAT.items()}


@pytest.mark.parametrize(("scope", "towers"), [("named", {"decoder"}), ("suffix", {"decoder", "audio", "vision"})])
def test_lora_by_suffix_reaches_the_towers(scope: str, towers: set[str]) -> None:
    made = config("sft", "7b", compat__lora_scope=scope)
    thinker = nnx.eval_shape(lambda: thinker_of(make_model(made.model, 0)))
    for tower, count in PUBLISHED.items():
        factors = jax.tree.leaves(nnx.state(getattr(thinker, tower), LoraParam))
        assert sum(leaf.size for leaf in factors) == (count if tower in towers else 0)


def test_a_schedule_that_counts_micro_batches_stays_at_its_rate() -> None:
    made = config("sft", "7b", compat__schedule="micro_batches").sft
    assert (made.optim.schedule, made.optim.warmup, made.optim.lr) == ("constant", 25, 1e-4)
    make_optimizer(made.optim, made.steps)
    assert config("sft", "7b").sft.optim.schedule == "cosine"


@pytest.mark.parametrize("name", defaults.COMPAT)
def test_an_unknown_switch_is_told(name: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown config\.compat\.{name} 'up'; known: {', '.join(defaults.COMPAT[name])}"):
        config("sft", "mini", **{f"compat__{name}": "up"})


@pytest.mark.parametrize("name", ["truncation", "qa_prompts"])
def test_what_loses_places_of_media_wants_them_not_to_be_fed(name: str) -> None:
    wrong = {f"compat__{name}": defaults.COMPAT[name][1]}
    with pytest.raises(ValueError, match="it needs config.compat.media_inputs=text_only"):
        config("qa", "mini", **wrong)
    config("qa", "mini", compat__media_inputs="text_only", **wrong)


@pytest.mark.parametrize(
    ("job", "name", "says"),
    [
        ("sft", "qa_prompts", "changes nothing in sft"),
        ("qa", "labels", "for the jobs generative, rl"),
        ("generative", "schedule", "for the jobs sft, qa"),
        ("sft", "adapter_steps", "for the jobs bam"),
        ("rl", "descriptor_padding", "for the jobs bam"),
        ("sft", "lora_scope", "set config.model.lora.rank"),
    ],
)
def test_a_switch_that_changes_nothing_is_told(job: str, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config(job, "mini", **{f"compat__{name}": defaults.COMPAT[name][1]})


@pytest.mark.parametrize(
    ("job", "change", "told"),
    [
        ("sft", {"model__heads": ()}, r"config.model.heads \(\) must be \(7, 8, 2, 2, 2, 2, 2\) in a run of the job sft"),
        ("generative", {"model__heads": (2,)}, r"config.model.heads \(2,\) must be \(\) in a run of the job generative"),
        ("sft", {"model__trains": "lm_head"}, "config.model.trains lm_head: the job qa trains the lm_head, and no other does"),
        ("rl", {"model__trains": "tower"}, "unknown model.trains 'tower'; known: thinker, lm_head"),
        ("qa", {}, "the job qa trains the LM head of a thinker that is there"),
    ],
)
def test_what_a_job_cannot_be_run_with_is_told(job: str, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check(world.config(job, **change), world.mesh_of((1, 1, 1)))
