"""A classifier equals torch: transformers' thinker under peft's LoRA, pooled by the mask, heads, loss, gradients and a step of Adam."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax import defaults
from omnisapiens_jax.models import classifier as module
from omnisapiens_jax.models.classifier import Classifier, best_class
from omnisapiens_jax.models.layers import LoraParam
from omnisapiens_jax.models.thinker import Batch, Thinker
from omnisapiens_jax.processing.example import Bucket, collate, collate_packed, lay_out_words
from omnisapiens_jax.training.losses import CLASSES, class_loss
from omnisapiens_jax.training.sft import sft_gradients
from omnisapiens_jax.training.state import TrainState, apply_gradients, make_optimizer
from tests.models import cases, ours, references
from tests.oracle import run_oracle

LABELS = defaults.HEADS
RATE = 1e-2
BOUND = 1e-5  # times the largest value of a leaf: float32, sums of a few hundred products
CASES = {  # domain and label of each row; the second row of the first has neither
    "mixed_right": ((1, -1, 4), (9, -1, 20)),  # image and sound, words, video
    "texts_left": ((0, 6, 2), (3, 24, 15)),  # of 22, 10 and 15 tokens, padded on the left
    "text_only": ((5, 3, 1), (21, 17, 7)),  # the rows of the first, their media not fed (compat.media_inputs)
}

WORDS = Bucket(24)  # no places for media: the encoders are not compiled

Found = dict[str, np.ndarray]


def heads(config: str) -> tuple[np.ndarray, np.ndarray]:
    """Weight `[C, D]` and bias `[C]` of all heads."""
    width, random = cases.CONFIGS[config].text.hidden_size, np.random.RandomState(3)
    return (random.standard_normal((sum(LABELS), width)) / 4).astype(np.float32), random.standard_normal(sum(LABELS)).astype(np.float32)


def fed(config: str, case: str) -> Found:
    """What torch is given."""
    arrays = cases.for_transformers(config, "mixed_right" if case == "text_only" else case)
    names = ("input_ids", "attention_mask") if case == "text_only" else arrays.keys() - {"labels"}
    return {name: arrays[name] for name in names}


@functools.cache
def theirs(config: str) -> dict[str, Found]:
    """Of each case, what torch answers."""
    arrays: dict[str, Any] = {f"{config}/lora/{name}": value for name, value in references.lora_factors(config).items()}
    arrays |= dict(zip((f"{config}/weight", f"{config}/bias"), heads(config), strict=True))
    for case, (domain, label) in CASES.items():
        arrays |= {f"{config}/{case}/{name}": value for name, value in fed(config, case).items()}
        arrays |= {f"{config}/{case}/domain": np.array(domain), f"{config}/{case}/label": np.array(label)}
    with tempfile.TemporaryDirectory() as folder:
        cases.write_checkpoint(cases.CONFIGS[config], Path(folder))
        answer = run_oracle("classifier", folders={config: folder}, cases=list(CASES), counts=LABELS, rate=RATE, **arrays)
    prefixes = {case: f"{config}/{case}/" for case in CASES}
    return {case: {k.removeprefix(p): v for k, v in answer.items() if k.startswith(p)} for case, p in prefixes.items()}


@functools.cache
def classifier(config: str) -> Classifier:
    thinker = ours.make(cases.CONFIGS[config], nnx.to_pure_dict(nnx.state(ours.thinker(config), nnx.Param)), references.LORA)
    ours.put_factors(thinker, config)
    made, (weight, bias) = Classifier(thinker, LABELS, rngs=nnx.Rngs(0)), heads(config)
    made.heads.affine.kernel.set_value(jnp.asarray(weight.T))
    assert made.heads.affine.bias is not None
    made.heads.affine.bias.set_value(jnp.asarray(bias))
    return made


def batch(config: str, case: str, shape: Bucket | None = None) -> dict[str, jax.Array]:
    """The rows of a case, in the shape that all cases share or in another."""
    domain, label = (np.asarray(row, np.int32) for row in CASES[case])
    if case == "text_only":
        shape, inputs = cases.CONFIGS[config], cases.inputs(config, "mixed_right")
        rows = [lay_out_words(row, labels, len(row), shape) for row, labels in zip(inputs.tokens, inputs.labels, strict=True)]
        made = collate(rows, cases.bucket(config), shape)
    else:
        made = cases.batch(config, case, shape=shape)
    return {name: jnp.asarray(value) for name, value in (made | {"domain": domain, "label": label}).items()}


@functools.cache
def compiled(config: str) -> tuple[Callable[[TrainState, Batch], tuple[dict[str, jax.Array], nnx.State, TrainState]], TrainState]:
    """Everything that is compared, of one program: pooled states, logits, loss; gradients; the state after a step."""
    graph, trainable, frozen = nnx.split(classifier(config), nnx.Any(LoraParam, nnx.PathContains("heads")), ...)
    optimizer = make_optimizer(defaults.optimizer(lr=RATE, weight_decay=0.0, clip=0.0), 1)
    state = TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable))

    @jax.jit
    def run(state: TrainState, batch: Batch) -> tuple[dict[str, jax.Array], nnx.State, TrainState]:
        made = nnx.merge(graph, state.trainable, state.frozen)
        loss, _, grads = sft_gradients(graph, 1, state, dict(batch), CLASSES)
        values = {"pooled": (pooled := made.pooled(batch)), "logits": made.heads(pooled, batch["domain"]), "loss": loss}
        return values, grads, apply_gradients(state, grads, optimizer)[0]

    return run, state


def named(config: str, tree: nnx.State) -> Found:
    """Trained parameters, or what stands in their places, by the oracle's names."""
    pure = nnx.to_pure_dict(tree)
    affine, found, begin = pure["heads"]["affine"], ours.named_factors(pure["thinker"], config), 0
    for number, count in enumerate(LABELS):
        found[f"heads.{number}.weight"] = np.asarray(affine["kernel"])[:, begin : begin + count].T
        found[f"heads.{number}.bias"] = np.asarray(affine["bias"])[begin : begin + count]
        begin += count
    return found


def off(found: np.ndarray | jax.Array, wanted: np.ndarray) -> float:
    """How far, beside the largest value."""
    return float(np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max())


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", ["uneven", pytest.param("tied", marks=pytest.mark.slow)])
def test_equals_torch(config: str, case: str) -> None:
    run, state = compiled(config)
    values, grads, after = run(state, batch(config, case))
    wanted, near = theirs(config)[case], np.asarray(CASES[case][0]) >= 0
    rows = len(near)
    open_ = wanted["logits"] > np.finfo(np.float32).min / 4
    np.testing.assert_array_equal(np.asarray(values["logits"])[:rows][~open_], wanted["logits"][~open_])
    errors = {"pooled": off(values["pooled"][:rows], wanted["pooled"]), "loss": off(values["loss"], wanted["loss"])}
    errors["logits"] = off(np.asarray(values["logits"])[:rows][open_], wanted["logits"][open_])
    print(f"{config} {case}: " + ", ".join(f"{name} off by {error:.1e}" for name, error in errors.items()))
    assert max(errors.values()) <= BOUND

    moved = {}
    for name, gradient in named(config, grads).items():
        reference = wanted[f"grad/{name}"]
        if not reference.any():  # a head of no row, or the last layer, which nothing reads
            assert not gradient.any(), name
            continue
        errors[name] = off(gradient, reference)
        # Where a gradient is nearly nothing, Adam makes a step out of its rounding.
        clear = np.abs(reference) > max(1e-3 * np.abs(reference).max(), 1e-6)
        start, end = named(config, state.trainable)[name], named(config, after.trainable)[name]
        moved[name] = float(np.abs((end - wanted[f"step/{name}"])[clear]).max(initial=0))
        assert np.abs(end - start)[clear].min(initial=1) > RATE / 2
    worst = max(errors, key=lambda name: errors[name])
    print(f"{len(moved)} gradients, {worst} differs most: {errors[worst]:.1e} of its largest; steps by {max(moved.values()):.1e}")
    assert errors[worst] <= BOUND
    assert max(moved.values()) <= BOUND * max(np.abs(value).max() for name, value in wanted.items() if name.startswith("step/"))


def _last_layer(self: Thinker, batch: Batch) -> jax.Array:
    return self(batch).last


def _everything(segments: jax.Array, domains: jax.Array) -> jax.Array:
    return jnp.ones(segments.shape, bool)


@pytest.mark.oracle
@pytest.mark.parametrize(("where", "name", "defect"), [(Thinker, "penultimate", _last_layer), (module, "own_tokens", _everything)])
def test_a_wrong_layer_or_padding_in_the_mean_would_be_seen(
    where: object, name: str, defect: Callable[..., jax.Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, defect)
    pooled = nnx.jit(lambda made, batch: made.pooled(batch))(classifier("uneven"), batch("uneven", "texts_left", WORDS))
    wrong = off(pooled, theirs("uneven")["texts_left"]["pooled"])
    print(f"{name}: off by {wrong:.1e} of the largest pooled state, {wrong / BOUND:.0f} times the tolerance")
    assert wrong > 100 * BOUND


def test_the_last_layer_is_not_run() -> None:
    """Its weights may be anything."""
    graph, params = nnx.split(classifier("uneven"))
    given = batch("uneven", "texts_left", WORDS)
    run = jax.jit(lambda params, batch: nnx.merge(graph, params).pooled(batch))

    def spoilt(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        names = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf.at[-1].set(jnp.nan) if "decoder/layers" in names else leaf

    broken = jax.tree_util.tree_map_with_path(spoilt, params)
    np.testing.assert_array_equal(run(broken, given), run(params, given))


def test_packed_samples_are_classified_as_alone() -> None:
    """The three rows of a case in one row, with a place left out between them: the same loss and the same classes."""
    config, case = "uneven", "mixed_right"
    examples = [
        dataclasses.replace(example, domain=domain, label=label)
        for example, domain, label in zip(cases.examples(config, case), *CASES[case], strict=True)
    ]
    bucket = dataclasses.replace(Bucket.together(example.size() for example in examples), segments=4)
    rows = collate_packed([[examples[0], None, *examples[1:]]], bucket, cases.CONFIGS[config])
    packed = {name: jnp.asarray(value) for name, value in rows.items()}
    run = nnx.jit(lambda made, batch: (class_loss(made, batch), best_class(made, batch)))
    (loss, count), found = run(classifier(config), packed)
    (alone, number), each = run(classifier(config), batch(config, case))
    assert float(count) == float(number) == 2
    np.testing.assert_allclose(loss, alone, rtol=1e-5)  # float32, summed in another order
    assert found.tolist() == [[each[0], -1, each[1], each[2]]] and each[1] == -1
