"""Behaviour attention: its formula, a shut gate, time on TMRoPE's clock, and decoding with a cache, for both kinds of behaviour."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.generation.sampling import Generator, Sampling, rollout_keys
from omnisapiens_jax.models.bam import ResidualAdapter, ResidualAdapters
from omnisapiens_jax.models.behaviour import AttentionConfig, BehaviourAttention, BehaviourThinker, media_starts
from omnisapiens_jax.models.thinker import Thinker
from tests import tiny

SHAPES = AttentionConfig(depths=(1,), width=12, heads=2, head_dim=8, streams=(("landmarks", 10), ("low_level", 6)))
LENGTHS, SLOTS, TOKENS = (5, 9, 12), 12, 6
TOLERANCE = 1e-5  # float32: sums of up to 32 products of numbers around 1


def batch() -> dict[str, np.ndarray]:
    """Three prompts: one with both sequences, one with neither, one with a short video alone; pooled descriptors likewise."""
    random = np.random.default_rng(0)
    given = tiny.text_prompts(LENGTHS, SLOTS, jump=2)
    for name, width, counts in (("landmarks", 10, (5, 0, 3)), ("low_level", 6, (4, 0, 0))):
        mask = np.arange(5) < np.asarray(counts)[:, None]
        frames = random.standard_normal((3, 5, width)).astype(np.float32)
        given |= {name: frames, f"{name}_mask": mask, f"{name}_times": np.tile(np.arange(5, dtype=np.float32) / 4, (3, 1))}
    for name, width, present in (("video", 10, (True, False, True)), ("audio", 6, (True, False, False))):
        given |= {f"{name}_descriptor": random.standard_normal((3, width)).astype(np.float32), f"{name}_present": np.array(present)}
    return given


def attention(gate: float, *, shift: float = 0.3) -> BehaviourAttention:
    """With statistics that are not those of standard normal frames."""
    made = BehaviourAttention(SHAPES, tiny.TINY, rngs=nnx.Rngs(1))
    made.layers[0].gate.set_value(jnp.full(1, gate))
    for encoder in made.encoders.values():
        encoder.mean.set_value(jnp.full_like(encoder.mean[...], shift))
        encoder.spread.set_value(jnp.linspace(0.0, 2.0, encoder.spread[...].size))  # the first feature never changes
    return made


def adapters(depth: int | None = None) -> ResidualAdapters:
    rngs = nnx.Rngs(2)
    made = {name: ResidualAdapter(width, 7, 32, normed=True, alpha=4.0, rngs=rngs) for name, width in (("video", 10), ("audio", 6))}
    return ResidualAdapters(made, depth)


def on_device(given: dict[str, np.ndarray], starts: np.ndarray) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in {**given, "media_starts": starts}.items()}


@functools.cache
def unchanged() -> tuple[np.ndarray, np.ndarray]:
    """Last and penultimate states of the thinker alone."""
    hidden = nnx.jit(lambda model, given: model(given))(tiny.thinker(), batch())
    return np.asarray(hidden.last), np.asarray(hidden.penultimate)


def states(behaviour: BehaviourAttention | ResidualAdapters, given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    hidden = nnx.jit(lambda model, given: model(given))(BehaviourThinker(tiny.thinker(), behaviour), given)
    return np.asarray(hidden.last), np.asarray(hidden.penultimate)


def test_a_shut_gate_is_bit_equal_to_no_layer() -> None:
    for found, wanted in zip(states(attention(0.0), batch()), unchanged(), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_an_open_gate_changes_the_samples_that_have_frames_and_no_others() -> None:
    changes = [np.abs(found - wanted).max(axis=(1, 2)) for found, wanted in zip(states(attention(0.5), batch()), unchanged(), strict=True)]
    for change in changes:
        assert change[1] == 0 and change[0] > 0.01 and change[2] > 0.01


def test_what_lies_in_masked_places_does_not_matter() -> None:
    given = batch()
    broken = {**given}
    for name in ("landmarks", "low_level"):
        broken[name] = np.where(given[f"{name}_mask"][..., None], given[name], np.nan)
        broken[f"{name}_times"] = np.where(given[f"{name}_mask"], given[f"{name}_times"], 1e4).astype(np.float32)
    for found, wanted in zip(states(attention(0.5), broken), states(attention(0.5), given), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_equals_the_formula() -> None:
    """Written down anew in double precision: standardised frames, rotary time, softmax over both streams, the gate."""
    given, behaviour, x = batch(), attention(0.7), np.random.default_rng(3).standard_normal((3, SLOTS, 32)).astype(np.float32)
    starts = np.array([[3, 5], [0, 0], [2, 2]])
    time = given["positions"][:, 0]
    remembered = behaviour.remember(on_device(given, starts))
    found = np.asarray(behaviour.between(remembered, jnp.asarray(time))[1](jnp.asarray(x)))

    layer, per_second = behaviour.layers[0], tiny.TINY.position_id_per_seconds
    matrix = {name: np.asarray(getattr(layer, name).kernel[...], np.float64) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}

    def turned(vector: np.ndarray, position: float) -> np.ndarray:  # pairs (i, i + 4) as complex numbers
        angle = position * 10_000.0 ** (-np.arange(4) / 4)
        pairs = (vector[:4] + 1j * vector[4:]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag])

    for row in range(3):
        frames = []
        for place, name in enumerate(("landmarks", "low_level")):
            encoder = behaviour.encoders[name]
            spread = np.asarray(encoder.spread[...], np.float64)
            for frame, seconds, there in zip(*(given[key][row] for key in (name, f"{name}_times", f"{name}_mask")), strict=True):
                if there:
                    units = np.divide(frame - 0.3, spread, out=np.zeros_like(spread), where=spread > 0)
                    made = units @ np.asarray(encoder.proj.kernel[...], np.float64)
                    made = (made - made.mean()) / np.sqrt(made.var() + 1e-6)
                    frames.append((made, starts[row, place] + seconds * per_second))
        for token in range(SLOTS):
            state = x[row, token].astype(np.float64)
            wanted = state.copy()
            if frames:
                query = state / np.sqrt((state**2).mean() + 1e-6) @ matrix["q_proj"]
                heads = []
                for head in (slice(0, 8), slice(8, 16)):
                    scores = [
                        turned(query[head], time[row, token]) @ turned((made @ matrix["k_proj"])[head], at) / np.sqrt(8)
                        for made, at in frames
                    ]
                    weights = np.exp(scores) / np.exp(scores).sum()
                    heads.append(sum(weight * (made @ matrix["v_proj"])[head] for weight, (made, _) in zip(weights, frames, strict=True)))
                wanted = wanted + np.tanh(0.7) * np.concatenate(heads) @ matrix["o_proj"]
            np.testing.assert_allclose(found[row, token], wanted, atol=TOLERANCE)


def test_only_the_distance_in_time_counts() -> None:
    """Tokens and clip moved on together give the same; the clip alone does not."""
    given, behaviour = batch(), attention(0.7)
    x, time = jnp.asarray(np.random.default_rng(3).standard_normal((3, SLOTS, 32)), jnp.float32), jnp.asarray(given["positions"][:, 0])

    def after(starts: int, tokens: int) -> np.ndarray:
        remembered = behaviour.remember(on_device(given, np.full((3, 2), starts)))
        return np.asarray(behaviour.between(remembered, time + tokens)[1](x))

    np.testing.assert_allclose(after(57, 50), after(7, 0), atol=1e-4)  # angles of 57 in float32
    assert np.abs(after(57, 0) - after(7, 0)).max() > 0.05


def test_a_clip_begins_where_its_first_token_stands() -> None:
    """The video's own first token and the sound's; the other's where one has none; 0 for words alone."""
    index = np.array([[-1, 0, 1, -1, 4, 5], [-1, -1, 7, 4, -1, -1], [-1, 0, -1, -1, -1, -1], [-1] * 6])
    positions = np.broadcast_to(10 + np.arange(6), (4, 3, 6))
    given = {"media_index": index, "positions": positions, "audio_pairs": np.zeros((4, 4, 2), np.int32)}
    np.testing.assert_array_equal(media_starts(jax.tree.map(jnp.asarray, given)), [[14, 11], [12, 12], [11, 11], [0, 0]])


KINDS = {"attention": lambda: attention(0.7), "adapter": adapters, "adapter before the last layer": lambda: adapters(1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unroll", [False, True])
def test_greedy_decoding_with_a_cache_equals_recomputing_everything(kind: str, unroll: bool) -> None:
    """And differs from what the thinker answers alone, wherever there is a descriptor."""
    policy, given = BehaviourThinker(tiny.thinker(), KINDS[kind]()), batch()
    cached, alone = (answers(model, given, unroll=unroll) for model in (policy, tiny.thinker()))
    tokens = np.zeros((3, 0), np.int32)
    whole = nnx.jit(lambda model, rows: model.logits(model(rows).last))
    for _ in range(TOKENS):
        rows, last = followed(given, tokens), np.asarray(LENGTHS) + tokens.shape[1] - 1
        logits = np.asarray(whole(policy, rows))[np.arange(3), last]
        tokens = np.concatenate([tokens, logits.argmax(-1)[:, None].astype(np.int32)], axis=1)
    np.testing.assert_array_equal(cached, tokens)
    assert (cached[0] != alone[0]).any() and (cached[2] != alone[2]).any()
    np.testing.assert_array_equal(cached[1], alone[1])


def answers(policy: BehaviourThinker | Thinker, given: dict[str, np.ndarray], *, unroll: bool) -> np.ndarray:
    generator = Generator(policy, Sampling(1, TOKENS, 0.0, eos=(-2,), pad=0, chunk=4), unroll=unroll)
    view = generator.view(nnx.state(policy))
    return np.asarray(generator(view, jax.tree.map(jnp.asarray, given), rollout_keys(0, 0, given["index"], 1)).tokens)[:, 0]


def followed(given: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Whole rows: each prompt with its answer so far, in rows of one length."""
    rows = {**given}
    wider = ((0, 0), (0, TOKENS))
    rows |= {
        name: np.pad(given[name], wider, constant_values=fill) for name, fill in (("tokens", 0), ("segment_ids", 0), ("media_index", -1))
    }
    rows["positions"] = np.pad(given["positions"], ((0, 0), *wider))
    for row, length in enumerate(LENGTHS):
        own = slice(length, length + tokens.shape[1])
        rows["tokens"][row, own], rows["segment_ids"][row, own] = tokens[row], 1
        rows["positions"][row, :, own] = length + given["rope_delta"][row] + np.arange(tokens.shape[1])
    return rows


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"streams": (("faces", 3),)}, "landmarks, low_level"),
        ({"depths": (2, 1)}, "rising"),
        ({"depths": ()}, "one or more"),
        ({"head_dim": 7}, "even"),
        ({"depths": (2,)}, "after layer 2 of 2"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, object], says: str) -> None:
    shapes = {name: getattr(SHAPES, name) for name in ("depths", "width", "heads", "head_dim", "streams")}
    with pytest.raises(ValueError, match=says):
        BehaviourAttention(AttentionConfig(**{**shapes, **changes}), tiny.TINY, rngs=nnx.Rngs(0))
