"""Training of what brings descriptors into a frozen thinker, a set for each dataset, over states that are computed once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from omnisapiens_jax.atlas.behaviour import Behaviour as Descriptors
from omnisapiens_jax.atlas.labels import HBA
from omnisapiens_jax.atlas.plan import Planner
from omnisapiens_jax.models.bam import MODALITIES, Dropped, ResidualAdapter, ResidualAdapters
from omnisapiens_jax.models.behaviour import AttentionConfig, BehaviourAttention, Statistic
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.decoder import DecoderLayer
from omnisapiens_jax.models.heads import DomainHeads, pool
from omnisapiens_jax.models.layers import Linear
from omnisapiens_jax.models.thinker import Batch, Thinker, token_log_probs
from omnisapiens_jax.parallel.mesh import put_batch
from omnisapiens_jax.processing.descriptors.batch import DescriptorConfig
from omnisapiens_jax.processing.descriptors.read import AUDIO_WIDTH, FRAME_WIDTH, LOW_LEVEL_WIDTH, VIDEO_WIDTH
from omnisapiens_jax.training.checkpoints import Checkpoints
from omnisapiens_jax.training.data import Split
from omnisapiens_jax.training.frozen import Site
from omnisapiens_jax.training.journal import Bar, Journal, console
from omnisapiens_jax.training.losses import CLASSES, class_loss, confusion
from omnisapiens_jax.training.selection import BY_LOSS, CRITERIA, Selection
from omnisapiens_jax.training.state import TrainState, apply_gradients, check_finite, fresh_optimizer, micro_gradients, parameters

Kind = Literal["adapter", "attention"]
ResidualSite = Literal["last_hidden", "penultimate"]
Stage = Literal["adapters", "adapters+heads", "adapters+lm_head+last_block"]
FEATURES = {"video": VIDEO_WIDTH, "audio": AUDIO_WIDTH}  # of pooled descriptors
LAST_BLOCK: Stage = "adapters+lm_head+last_block"


@dataclasses.dataclass(frozen=True)
class Group:
    """Datasets that share one set of adapters; nearly always one dataset. `task` is `cls` or `qa`."""

    datasets: tuple[str, ...]
    task: str

    @property
    def name(self) -> str:
        """That of its folder."""
        return "+".join(self.datasets)


def check(settings: ml_collections.ConfigDict, thinker: ThinkerConfig) -> None:
    """Looks at `config.bam` before the long work.

    Raises:
      ValueError: a setting has a value that it cannot have; names those it can.
    """
    wanted = [("kind", settings.kind, get_args(Kind)), ("stage", settings.stage, get_args(Stage))]
    wanted += [("best", settings.best, CRITERIA), ("residual_site", settings.residual_site, get_args(ResidualSite))]
    wanted += [("modalities", modality, MODALITIES) for modality in settings.modalities]
    for name, value, known in wanted:
        if value not in known:
            raise ValueError(f"unknown config.bam.{name} {value!r}; known: {', '.join(known)}")
    if not settings.modalities:
        raise ValueError(f"config.bam.modalities is empty: name {' or '.join(MODALITIES)}, or both")
    counts = {"batch_size": settings.batch_size, "micro_batches": settings.micro_batches}
    for name, value in {**counts, **{f"hidden.{modality}": width for modality, width in settings.hidden.items()}}.items():
        if value < 1:
            raise ValueError(f"config.bam.{name} {value} must be at least 1")
    if settings.epochs < 0:
        raise ValueError(f"config.bam.epochs {settings.epochs} cannot be negative; 0 evaluates what the weights bring")
    for modality, odds in settings.drop.items():
        if not 0 <= odds < 1:
            raise ValueError(f"config.bam.drop.{modality} {odds} is a probability, from 0 to less than 1")
    groups(settings)
    if settings.stage == LAST_BLOCK and thinker.tie_head:
        raise ValueError(
            f"config.bam.stage {LAST_BLOCK}: the LM head of this model is its table of embeddings, which the frozen layers read as well"
        )
    if settings.kind == "attention":
        if not settings.epochs:
            raise ValueError("config.bam.epochs 0 evaluates what the weights bring, and none bring behaviour attention: train it")
        attention_config(settings, [modality for modality in MODALITIES if modality in settings.modalities]).check(thinker.text.num_layers)
        descriptor_config(settings, trailing_pad=False)
        if not all(settings.attention[name] for name in ("landmarks", "low_level")):
            raise ValueError("config.bam.attention.landmarks and low_level say how many frames are read: at least 1")


def groups(settings: ml_collections.ConfigDict) -> list[Group]:
    """What `bam.datasets` names: `all`, or datasets with commas between them, those joined by `+` with one set of adapters in common.

    Raises:
      ValueError: there is no such dataset, one is named twice, classified and free-form ones are joined, or the stage is not for them.
    """
    known = {dataset.name: dataset for dataset in HBA.datasets}
    named = [*known] if settings.datasets == "all" else [name.strip() for name in settings.datasets.split(",")]
    flat = [dataset for name in named for dataset in name.split("+")]
    if strange := sorted({*flat} - known.keys()):
        raise ValueError(f"unknown dataset {', '.join(map(repr, strange))} in config.bam.datasets; the atlas has {', '.join(known)}")
    if len(flat) != len({*flat}):
        raise ValueError(f"config.bam.datasets {settings.datasets!r} names a dataset twice")
    found = []
    for name in named:
        tasks = {known[dataset].kind for dataset in name.split("+")}
        if len(tasks) > 1:
            raise ValueError(f"config.bam.datasets joins {name}: classified and free-form datasets have no adapters in common")
        found.append(Group(tuple(name.split("+")), tasks.pop()))
    if settings.stage == LAST_BLOCK and (classified := [group.name for group in found if group.task == "cls"]):
        raise ValueError(
            f"config.bam.stage {LAST_BLOCK} is for free-form datasets, not for {', '.join(classified)}, whose heads read what the last "
            "block reads: name the others in config.bam.datasets"
        )
    return found


class Tail(nnx.Module):
    """The last layer of a decoder and the LM head, to be trained beside the frozen rest."""

    def __init__(self, thinker: Thinker):
        """Begins as those of `thinker`, whose head is its own, in float32: an update of 1e-4 would vanish in bfloat16."""
        block, head = thinker.decoder.layers.layer(-1), nnx.clone(thinker.lm_head)
        assert isinstance(block, DecoderLayer) and isinstance(head, Linear)  # `check` refuses a tied one
        for module in (block, head):
            nnx.update(module, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(module)))
        self.block, self.lm_head, self.dtype = block, head, thinker.decoder.dtype

    def head(self) -> jax.Array:
        """The LM head `[D, V]`."""
        return self.lm_head.kernel[...].astype(self.dtype)

    def put(self, thinker: Thinker) -> None:
        """Makes them those of `thinker`, whose layers are stacked."""
        assert thinker.lm_head is not None
        head, stack = thinker.lm_head, thinker.decoder.layers.block
        nnx.update(head, jax.tree.map(lambda old, new: new.astype(old.dtype), nnx.state(head), nnx.state(self.lm_head)))
        own = jax.tree.leaves(nnx.state(self.block))
        leaves, tree = jax.tree.flatten(nnx.state(stack))
        nnx.update(stack, jax.tree.unflatten(tree, [old.at[-1].set(new.astype(old.dtype)) for old, new in zip(leaves, own, strict=True)]))


class Learner(nnx.Module):
    """What stands on the frozen thinker."""

    def __init__(self, behaviour: ResidualAdapters | BehaviourAttention, heads: DomainHeads | None = None, tail: Tail | None = None):
        """`heads` where classes are learnt; `tail` where the last block is."""
        self.behaviour, self.heads, self.tail = behaviour, heads, tail

    def logits(self, site: Site, thinker: Thinker, batch: Batch, dropped: Dropped | None = None) -> jax.Array:
        """Of the labels of all domains `[B, C]`, from the states of a site, kept or to be computed; see `DomainHeads`."""
        assert self.heads is not None
        batch = _with_states(site, thinker, batch)
        remembered: Any = self.behaviour.remember(batch, dropped)  # nobody but the behaviour itself reads it
        if site.kind == "pooled":
            pooled = batch["pooled"]
        else:
            states = self._through(site, thinker, batch, remembered, thinker.config.text.num_layers - 1)
            pooled = pool(states, batch["segment_ids"] == 1)
        return self.heads(self.behaviour.finish(pooled, remembered), batch["domain"])

    def answer(self, site: Site, thinker: Thinker, batch: Batch, dropped: Dropped | None = None) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities of the tokens of the answers `[B, T]`, 0 where none is, and those tokens `[B, T]`, negative there."""
        batch = _with_states(site, thinker, batch)
        remembered: Any = self.behaviour.remember(batch, dropped)  # nobody but the behaviour itself reads it
        states, targets = batch["states"], _targets(batch)
        if site.kind == "depth":
            depth = thinker.config.text.num_layers
            states = self._through(site, thinker, batch, remembered, depth if self.tail is None else depth - 1)
            if self.tail is not None:
                states, _ = self.tail.block(states, thinker.decoder.angles(batch["positions"]), batch["segment_ids"])
            states = thinker.decoder.norm(states)[:, :-1]
        return token_log_probs(thinker if self.tail is None else self.tail, self.behaviour.finish(states, remembered), targets), targets

    def _through(self, site: Site, thinker: Thinker, batch: Batch, remembered: Any, stop: int) -> jax.Array:
        between = self.behaviour.between(remembered, batch["positions"][:, 0])
        return thinker.decoder.through(
            batch["states"], batch["positions"], batch["segment_ids"], start=site.depth, stop=stop, between=between
        )


def _with_states(site: Site, thinker: Thinker, batch: Batch) -> Batch:
    """The batch with the states of the frozen thinker, which are computed where they were not kept."""
    return batch if "pooled" in batch or "states" in batch else {**batch, **site.states(thinker, batch)}


def _targets(batch: Batch) -> jax.Array:
    """The tokens of the answers `[B, T]`, negative where none is; kept states of answers have theirs beside them."""
    return batch["targets"] if "targets" in batch else batch["labels"][:, 1:]


def site_of(settings: ml_collections.ConfigDict, task: str, thinker: ThinkerConfig, dtype: Any) -> Site:
    """Where the states are taken that the learners of a task read: as late as nothing before it changes."""
    layers, width, dtype = thinker.text.num_layers, thinker.text.hidden_size, np.dtype(dtype)
    depths = [settings.attention.depths[0]] if settings.kind == "attention" else []
    if task == "qa" and (settings.stage == LAST_BLOCK or settings.residual_site == "penultimate"):
        depths.append(layers - 1)
    if depths:
        return Site("depth", min(depths), width, dtype)
    return Site("pooled", layers - 1, width, dtype) if task == "cls" else Site("answers", layers, width, dtype)


def attention_config(settings: ml_collections.ConfigDict, modalities: Sequence[str]) -> AttentionConfig:
    """The shapes that `bam.attention` asks for, for a group that has descriptors of some modalities."""
    widths = {"video": ("landmarks", FRAME_WIDTH), "audio": ("low_level", LOW_LEVEL_WIDTH)}
    shape = settings.attention
    streams = tuple(widths[modality] for modality in modalities)
    return AttentionConfig(tuple(shape.depths), shape.width, shape.heads, shape.head_dim, streams)


def descriptor_config(settings: ml_collections.ConfigDict, *, trailing_pad: bool) -> DescriptorConfig:
    """What a run takes from descriptors."""
    if settings.kind == "adapter":
        return DescriptorConfig(trailing_pad=trailing_pad)
    return DescriptorConfig(settings.attention.landmarks, settings.attention.low_level, trailing_pad)


def make_behaviour(
    settings: ml_collections.ConfigDict, thinker: ThinkerConfig, modalities: Sequence[str], task: str, rngs: nnx.Rngs
) -> ResidualAdapters | BehaviourAttention:
    """A new one for datasets of a task, as `config.bam` describes it.

    Classes are read off pooled states, to which a delta may as well be added as to every penultimate state that they are the mean of.
    """
    if settings.kind == "attention":
        return BehaviourAttention(attention_config(settings, modalities), thinker, rngs=rngs)
    width = thinker.text.hidden_size
    return ResidualAdapters(
        {
            modality: ResidualAdapter(
                FEATURES[modality], settings.hidden[modality], width, normed=settings.normed, alpha=settings.alpha, rngs=rngs
            )
            for modality in modalities
        },
        thinker.text.num_layers - 1 if task == "qa" and settings.residual_site == "penultimate" else None,
    )


def set_statistics(behaviour: BehaviourAttention, statistics: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Gives the encoders the mean and spread of the training data's frames."""
    for name, encoder in behaviour.encoders.items():
        for place, values in zip((encoder.mean, encoder.spread), statistics[name], strict=True):
            place.set_value(jnp.asarray(values))


def trainable(stage: Stage) -> Any:
    """The parameters of a learner that a stage trains."""
    adapters = nnx.All(nnx.PathContains("behaviour"), nnx.Not(nnx.OfType(Statistic)))
    if stage == "adapters":
        return adapters
    return nnx.Any(adapters, nnx.PathContains("heads" if stage == "adapters+heads" else "tail"))


def make_optimizer(settings: ml_collections.ConfigDict, *, double_step: bool) -> optax.GradientTransformation:
    """Adam for the adapters and Adam for all else, each with its own rate, moments and nothing besides (reference 4.5).

    With `double_step` the adapters are stepped by both, as in the published runs, whose first optimizer had been given them too.
    """
    base, adapters = optax.adam(settings.lr), optax.adam(settings.adapter_lr)
    parts: dict[Hashable, optax.GradientTransformation] = {"adapters": _both(base, adapters) if double_step else adapters, "base": base}

    def label(params: nnx.State) -> Any:
        def of(path: tuple[Any, ...], _: jax.Array) -> str:
            return "adapters" if "behaviour" in jax.tree_util.keystr(path, simple=True, separator="/").split("/") else "base"

        return jax.tree_util.tree_map_with_path(of, params)

    never = np.iinfo(np.int32).max  # `check_finite` stops the run instead
    return optax.apply_if_finite(optax.partition(parts, label), max_consecutive_errors=never)


def _both(first: optax.GradientTransformation, second: optax.GradientTransformation) -> optax.GradientTransformation:
    """Two optimizers that step the same parameters with the same gradient, one after the other."""

    def init(params: Any) -> Any:
        return first.init(params), second.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        one, own = first.update(updates, state[0], params)
        two, other = second.update(updates, state[1], params)
        return jax.tree.map(jnp.add, one, two), (own, other)

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What a learner's steps read besides its batch: structure of the thinker, its parameters, and where the states are from."""

    site: Site
    graph: nnx.GraphDef
    params: nnx.State


@dataclasses.dataclass(frozen=True)
class Feed:
    """The batches of a split for a learner: states, or what the thinker makes them of, and descriptors of what its plan names.

    Attributes:
      split: the rows, with kept states; without, the thinker computes them, every time.
      descriptors: of the rows.
      given: whose descriptors samples get that do not get their own, -1: nobody's.
    """

    split: Split
    descriptors: Descriptors
    given: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @property
    def planner(self) -> Planner:
        """What is in which batch."""
        return self.split.pipeline.planner

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(step, this host's rows of its batch) of steps `start` to `stop - 1`; `index [B]` are their ids."""
        for step, batch in self.split.batches(start, stop):
            given = [self.given.get(sample, sample) for sample in batch["index"].tolist()]
            yield step, {**batch, **self.descriptors.batch(np.asarray(given, np.int64))}


def loss_sum(
    site: Site, task: str, learner: Learner, thinker: Thinker, batch: Batch, dropped: Dropped | None = None
) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy of a batch, and of how many samples or tokens."""
    if task == "cls":
        return class_loss(lambda batch: learner.logits(site, thinker, batch, dropped), batch)
    log_probs, targets = learner.answer(site, thinker, batch, dropped)
    return -jnp.sum(log_probs), jnp.sum(targets >= 0, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def step(
    fixed: tuple[Site, nnx.GraphDef, nnx.GraphDef],
    task: str,
    optimizer: optax.GradientTransformation,
    settings: tuple[int, int, tuple[float, ...]],
    state: TrainState,
    params: nnx.State,
    batch: Batch,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of a learner; compiled once for all groups whose learners have the same shapes, if they get the same optimizer.

    Args:
      fixed: the site, the learner's structure and the thinker's.
      task: `cls` or `qa`.
      optimizer: of `make_optimizer`.
      settings: seed, micro-batches, and for each of `MODALITIES` the odds that a sample's descriptor is withheld.
      state: of the learner; donated.
      params: of the thinker.
      batch: of `Feed.batches`, on the mesh.
    """
    site, graph, below = fixed
    seed, micro_batches, odds = settings
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    rows = batch["domain"].shape
    dropped = {
        f"dropped/{name}": jax.random.bernoulli(jax.random.fold_in(key, place), odds[place], rows) for place, name in enumerate(MODALITIES)
    }
    total = jnp.maximum(CLASSES.count(batch) if task == "cls" else jnp.sum(_targets(batch) >= 0), 1)

    def share(trained: nnx.State, part: Batch) -> tuple[jax.Array, jax.Array]:
        learner, thinker = nnx.merge(graph, trained, state.frozen), nnx.merge(below, params)
        withheld = {name: part[f"dropped/{name}"] for name in MODALITIES}
        loss, count = loss_sum(site, task, learner, thinker, part, withheld)
        return loss / total, count

    loss, count, grads = micro_gradients(share, state.trainable, {**batch, **dropped}, micro_batches)
    state, metrics = apply_gradients(state, grads, optimizer)
    return state, metrics | {"loss": loss, "tokens" if task == "qa" else "samples": count}


def fit(
    settings: ml_collections.ConfigDict,
    seed: int,
    workdir: Path,
    group: Group,
    learner: Learner,
    fixed: Fixed,
    train: Feed,
    validation: Feed,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Learner:
    """Trains a group's learner for `epochs` and returns it as it was when the validation loss was least, or what `best` names highest.

    Args:
      settings: `config.bam`.
      seed: of the withheld descriptors.
      workdir: of this group; a run found there goes on at the epoch it was in.
      group: the datasets.
      learner: where to begin.
      fixed: the thinker below it.
      train: shuffled.
      validation: in fixed order.
      optimizer: of `make_optimizer`.
      mesh: everything lies on it.

    Raises:
      FloatingPointError: too many updates in a row had gradients that are not finite, or what the best learner is selected by never was.
    """
    graph, trained, frozen = nnx.split(learner, trainable(settings.stage), ...)
    state = fresh_optimizer(TrainState(jnp.zeros((), jnp.int32), trained, frozen, ()), optimizer, mesh)
    how = (seed, settings.micro_batches, tuple(settings.drop[modality] for modality in MODALITIES))
    step_fn = functools.partial(step, (fixed.site, graph, fixed.graph), group.task, optimizer, how)
    selection = Selection(settings.best) if group.task == "cls" else BY_LOSS
    sums_fn = functools.partial(_loss_of if selection == BY_LOSS else _classes_of, fixed.site, group.task, graph, fixed.graph)
    epoch_steps = train.split.steps_per_epoch
    total = settings.epochs * epoch_steps
    best_so_far: dict[str, Any] = {"best": selection.worst, "best_step": 0}
    with Checkpoints(workdir / "best", keep=1) as best, Checkpoints(workdir / "state", keep=1) as checkpoints:
        if checkpoints.latest is not None:
            state, best_so_far = checkpoints.restore(state)
        start = int(state.step)
        with Journal(workdir, start=start) as journal, Bar(group.name, total=total, start=start) as bar:
            for number, batch in train.batches(start, total):
                state, metrics = step_fn(state, fixed.params, put_batch(batch, mesh))
                over = (number + 1) % epoch_steps == 0
                if over:
                    params, held_out = parameters(state), validation.batches(0, validation.split.steps_per_epoch)
                    metrics |= selection.validate(sums_fn(params, fixed.params, put_batch(batch, mesh)) for _, batch in held_out)
                    if selection.better(metrics[selection.key], best_so_far["best"]):
                        best_so_far = {"best": metrics[selection.key], "best_step": number + 1}
                        best.save(number + 1, state, best_so_far)
                written = journal.write(number, metrics)
                check_finite(number, written)
                if over:
                    checkpoints.save(number + 1, state, best_so_far)
                bar.advance(loss=written["loss"], best=best_so_far["best"])
        if best.latest is None:
            raise FloatingPointError(
                f"{group.name}: the validation {selection.by} was never finite in {int(state.step)} steps: start again with a lower "
                "bam.adapter_lr"
            )
        state, best_so_far = best.restore(state)
    console.print(f"{group.name}: validation {selection.by} {best_so_far['best']:.4f} at step {best_so_far['best_step']}")
    return nnx.merge(graph, state.trainable, state.frozen)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _loss_of(
    site: Site, task: str, graph: nnx.GraphDef, below: nnx.GraphDef, learner: nnx.State, params: nnx.State, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    return loss_sum(site, task, nnx.merge(graph, learner), nnx.merge(below, params), batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _classes_of(
    site: Site, task: str, graph: nnx.GraphDef, below: nnx.GraphDef, learner: nnx.State, params: nnx.State, batch: Batch
) -> tuple[jax.Array, ...]:
    logits = nnx.merge(graph, learner).logits(site, nnx.merge(below, params), batch)
    return *class_loss(lambda _: logits, batch), confusion(logits, batch["label"])
