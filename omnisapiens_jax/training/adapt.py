"""The BAM job: descriptors read, the frozen thinker run once, a learner trained for each dataset, and its held-out answers."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from omnisapiens_jax import resources
from omnisapiens_jax.atlas.behaviour import Behaviour, read_behaviour
from omnisapiens_jax.atlas.faults import FaultLog
from omnisapiens_jax.atlas.labels import HBA
from omnisapiens_jax.atlas.recipe import lower_answer
from omnisapiens_jax.atlas.sources import Source, open_source
from omnisapiens_jax.convert.behaviour import write_behaviour, write_tail
from omnisapiens_jax.convert.label_files import write_labels
from omnisapiens_jax.convert.loading import fill_parts
from omnisapiens_jax.convert.parts import AdapterShape
from omnisapiens_jax.evaluation.answers import load_answers
from omnisapiens_jax.evaluation.classify import by_heads
from omnisapiens_jax.evaluation.evaluate import Ask, answer_all, greedy
from omnisapiens_jax.evaluation.metrics import dataset_metrics
from omnisapiens_jax.models.bam import MODALITIES
from omnisapiens_jax.models.behaviour import BehaviourAttention, BehaviourThinker
from omnisapiens_jax.models.classifier import Classifier
from omnisapiens_jax.models.thinker import Batch
from omnisapiens_jax.parallel.mesh import meet, shardings
from omnisapiens_jax.training import bam
from omnisapiens_jax.training.bam import Feed, Fixed, Group, Learner, Tail
from omnisapiens_jax.training.data import Atlas, Split, rows_among, rows_of_datasets
from omnisapiens_jax.training.frozen import FrozenStates, Site, encode
from omnisapiens_jax.training.journal import Bar, console
from omnisapiens_jax.training.state import make_generator, open_weights

CONTROLS = ("with", "without", "shuffled")  # descriptors: a sample's own, none, another's


@dataclasses.dataclass(frozen=True)
class Adapting:
    """What all groups of a run share."""

    config: ml_collections.ConfigDict
    workdir: Path
    mesh: Mesh
    atlas: Atlas
    graph: nnx.GraphDef
    params: nnx.State

    @property
    def settings(self) -> ml_collections.ConfigDict:
        """`config.bam`."""
        return self.config.bam

    @property
    def classifier(self) -> Classifier:
        """The thinker and its heads."""
        return nnx.merge(self.graph, self.params)

    def split(self, name: str, datasets: Sequence[str], task: str, ids: np.ndarray | None = None, *, train: bool = False) -> Split:
        """Rows of some datasets, of the samples `ids` (all): with their answers where these are free text."""
        size = self.settings.batch_size if train else self.config.eval_batch
        target = lower_answer if task == "qa" else None
        rows = rows_of_datasets(datasets, None if ids is None else rows_among(ids))
        return self.atlas.split(name, batch_size=size, target=target, shuffle=train, rows=rows)

    def prompts(self, datasets: Sequence[str]) -> Split:
        """Held-out rows of some datasets, without their answers."""
        return self.atlas.split(
            self.config.atlas.test, batch_size=self.config.eval_batch, target=None, shuffle=False, rows=rows_of_datasets(datasets)
        )

    def descriptors(self, split: Split) -> Behaviour:
        """Those of a split's samples."""
        trailing, ids = self.config.compat.descriptor_padding == "trailing", split.pipeline.planner.index.ids
        faults = FaultLog()
        with Bar(f"descriptors of {split.name}", total=len(split.source), at_once=False) as bar:
            found = read_behaviour(
                split.source,
                ids.tolist(),
                bam.descriptor_config(self.settings, trailing_pad=trailing),
                cache=resources.cache() / "descriptors",
                on_error=self.config.atlas.on_error,
                faults=faults,
                progress=lambda done, _: bar.reach(done),
                share=(jax.process_index(), jax.process_count()),
                wait=lambda: meet("descriptors"),
            )
        if faults:
            console.print(f"{len(faults)} descriptors cannot be read, and their samples go without: {faults.report()}")
        present = found.present(ids)
        there = ", ".join(f"{present[modality]} have {modality} descriptors" for modality in MODALITIES)
        console.print(f"{split.name}: of {len(ids)} samples {there}")
        return found


def adapt(config: ml_collections.ConfigDict, workdir: Path, mesh: Mesh, atlas: Atlas, graph: nnx.GraphDef, params: nnx.State) -> None:
    """Trains every group that `config.bam.datasets` names, one after the other, on states that are computed once for all of them.

    What each has learnt lies in `workdir/bam/DATASET`: checkpoints, metrics, the parts in the form in which they are released, held-out
    answers with the descriptors, without any and with another sample's, and `scores.json`.

    Args:
      config: of the run.
      workdir: of the run.
      mesh: everything lies on it.
      atlas: of the run.
      graph: structure of the classifier.
      params: its parameters.

    Raises:
      ValueError: a dataset that is named has no rows in a split or no descriptors, or the weights do not go with the settings.
    """
    run = Adapting(config, workdir, mesh, atlas, graph, params)
    wanted, everything = bam.groups(config.bam), config.bam.datasets == "all"
    for name in (config.atlas.train, config.atlas.validation, config.atlas.test):
        there = {*open_source(atlas.root / name).datasets()}
        if missing := [group.name for group in wanted if not {*group.datasets} <= there]:
            if not everything:
                raise ValueError(f"{name} has no rows of {', '.join(missing)}, which config.bam.datasets names")
            console.print(f"left out, for want of rows in {name}: {', '.join(missing)}", soft_wrap=True)
            wanted = [group for group in wanted if group.name not in missing]
    _check_weights(run, wanted)
    for task in ("cls", "qa"):
        if of_task := [group for group in wanted if group.task == task]:
            _adapt_task(run, task, of_task, everything=everything)


def described(config: ml_collections.ConfigDict, workdir: Path, mesh: Mesh, atlas: Atlas, graph: nnx.GraphDef, params: nnx.State) -> bool:
    """Whether some training sample of the datasets that `config.bam.datasets` names has a descriptor that `adapt` would learn from.

    Takes what `adapt` takes, and reads all their descriptors: a broken one is told before the long work.
    """
    run = Adapting(config, workdir, mesh, atlas, graph, params)
    return any(gather(run, group.task, group.datasets).modalities(group) for group in bam.groups(config.bam))


@dataclasses.dataclass(frozen=True)
class Material:
    """What the groups of a task are trained and judged on: by split its descriptors and, unless they are computed anew, its states."""

    run: Adapting
    task: str
    datasets: Sequence[str]
    fixed: Fixed
    splits: Mapping[str, Split]
    descriptors: Mapping[str, Behaviour]
    states: Mapping[str, FrozenStates] = dataclasses.field(default_factory=dict)

    def encoded(self) -> Material:
        """With the states of all splits: the frozen thinker is run once over every sample that has none yet."""
        run, fixed, states = self.run, self.fixed, {}
        for name, split in self.splits.items():
            if self.task == "cls" or name != run.config.atlas.test:  # free-form answers are generated, from prompts alone
                again = functools.partial(run.split, name, self.datasets, self.task)
                states[name] = encode(fixed.site, fixed.graph, fixed.params, split, again, run.mesh, resources.cache() / "states")
        return dataclasses.replace(self, states=states)

    def feed(self, name: str, datasets: Sequence[str], *, train: bool = False) -> Feed:
        """Batches of some datasets' rows of a split: shuffled, in `batch_size` rows, to `train`; else in order."""
        kept = self.states.get(name)
        split = self.run.split(name, datasets, self.task, None if kept is None else kept.ids, train=train)
        return Feed(dataclasses.replace(split, kept=kept), self.descriptors[name])

    def modalities(self, group: Group) -> list[str]:
        """Those that the run wants and some training sample of a group has."""
        train = self.run.config.atlas.train
        index = self.splits[train].pipeline.planner.index
        present = self.descriptors[train].present(index.ids[rows_of_datasets(group.datasets)(index)])
        return [modality for modality in MODALITIES if modality in self.run.settings.modalities and present[modality]]


def gather(run: Adapting, task: str, datasets: Sequence[str]) -> Material:
    """Opens the splits, so that a row that cannot be used is told before the long work, and reads their descriptors."""
    atlas, thinker = run.config.atlas, run.classifier.thinker
    below, params = nnx.split(thinker)
    site = bam.site_of(run.settings, task, thinker.config, thinker.decoder.dtype)
    splits = {name: run.split(name, datasets, task) for name in (atlas.train, atlas.validation)}
    splits[atlas.test] = run.prompts(datasets)
    return Material(
        run, task, datasets, Fixed(site, below, params), splits, {name: run.descriptors(split) for name, split in splits.items()}
    )


def _adapt_task(run: Adapting, task: str, groups: Sequence[Group], *, everything: bool) -> None:
    """The groups of one task: one pass over the thinker, then one group after the other."""
    atlas, settings = run.config.atlas, run.settings
    material = gather(run, task, [dataset for group in groups for dataset in group.datasets])
    bare = [group.name for group in groups if not material.modalities(group)]
    if bare and not everything:
        raise ValueError(
            f"no training sample of {', '.join(bare)} has a descriptor of {' or '.join(settings.modalities)}. Make them (python -m "
            "omnisapiens_jax.processing.descriptors), or leave these datasets out of config.bam.datasets"
        )
    if bare:
        console.print(f"left out, for want of descriptors: {', '.join(bare)}")
    if settings.cached:
        material = material.encoded()
    optimizer = bam.make_optimizer(settings, double_step=run.config.compat.adapter_steps == "twice")
    for group in groups:
        if group.name in bare:
            continue
        train, modalities = material.feed(atlas.train, group.datasets, train=True), material.modalities(group)
        console.print(f"{group.name}: {len(train.split.pipeline.planner.index)} training samples, descriptors of {', '.join(modalities)}")
        learner = make_learner(run, group, train, modalities)
        folder = run.workdir / "bam" / group.name
        if settings.epochs:
            validation = material.feed(atlas.validation, group.datasets)
            learner = bam.fit(settings, run.config.seed, folder, group, learner, material.fixed, train, validation, optimizer, run.mesh)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_behaviour(folder, learner.behaviour, learner.heads)
            if learner.heads is not None:
                write_labels(folder, HBA)
            if learner.tail is not None:
                write_tail(folder, run.classifier.thinker.config, learner.tail.block, learner.tail.lm_head)
        if task == "cls":
            _evaluate(run, group, folder, material.feed(atlas.test, group.datasets), *_by_heads(material, learner))
        else:
            _evaluate(run, group, folder, Feed(run.prompts(group.datasets), material.descriptors[atlas.test]), *_greedy(run, learner))


def _check_weights(run: Adapting, groups: Sequence[Group]) -> None:
    """Raises ValueError where the parts of the weights that a run begins with are not what its settings want."""
    settings, weights = run.settings, run.config.model.weights
    shapes = open_weights(weights).part_shapes if weights else None
    classified = [group.name for group in groups if group.task == "cls"]
    if classified and settings.stage == "adapters" and not (shapes and shapes.heads):
        raise ValueError(
            f"config.bam.stage adapters leaves the heads as they are, and {weights or 'random weights'} bring none: train them first "
            "(--config=sft), or choose adapters+heads"
        )
    if settings.stage == bam.LAST_BLOCK and run.config.model.lora.rank:
        raise ValueError(
            f"config.bam.stage {bam.LAST_BLOCK} trains weights that LoRA factors are added to: merge these first, and set "
            "config.model.lora.rank=0"
        )
    if shapes and shapes.adapters:
        if len(groups) > 1:
            raise ValueError(f"{weights} has the adapters of one dataset: name it in config.bam.datasets, not {len(groups)} of them")
        if settings.kind != "adapter":
            raise ValueError(f"{weights} has adapters, and config.bam.kind {settings.kind} would leave them out")
        for modality, found in shapes.adapters.items():
            if found != (asked := _shape(settings, modality)):
                raise ValueError(f"{weights} has a {modality} adapter {found}, config.bam asks for {asked}")


def _shape(settings: ml_collections.ConfigDict, modality: str) -> AdapterShape:
    return AdapterShape(bam.FEATURES[modality], settings.hidden[modality], settings.normed)


def make_learner(run: Adapting, group: Group, train: Feed, modalities: Sequence[str]) -> Learner:
    """A new learner on the mesh, with what the weights have of it. Raises ValueError: they have adapters for other modalities."""
    thinker, settings, weights = run.classifier.thinker, run.settings, run.config.model.weights
    behaviour = bam.make_behaviour(settings, thinker.config, modalities, group.task, nnx.Rngs(run.config.seed + 2))
    if isinstance(behaviour, BehaviourAttention):
        bam.set_statistics(behaviour, train.descriptors.statistics(train.split.pipeline.planner.index.ids))
    elif weights and (kept := open_weights(weights).part_shapes.adapters):
        if {*kept} != {*modalities}:
            raise ValueError(f"{weights} has adapters for {', '.join(kept)}, the descriptors of {group.name} are {', '.join(modalities)}")
        fill_parts(None, behaviour.adapters(), open_weights(weights).parts)
    learner = Learner(
        behaviour,
        nnx.clone(run.classifier.heads) if group.task == "cls" else None,
        Tail(thinker) if settings.stage == bam.LAST_BLOCK else None,
    )
    graph, state = nnx.split(learner)
    own = jax.tree.map(jnp.copy, state)  # the heads' and the tail's are the thinker's until then, and steps donate what they read
    return nnx.merge(graph, jax.device_put(own, shardings(own, run.mesh)))


def _evaluate(run: Adapting, group: Group, folder: Path, prompts: Feed, ask: Callable[[Source], Ask], params: nnx.State, how: str) -> None:
    """Held-out answers of every control and what they are worth; what a killed run has answered is not asked for again."""
    scores, split = {}, prompts.split
    for control in CONTROLS:
        path = folder / f"evaluation-{control}.json"
        if path.exists():
            answers = load_answers(path)
        else:
            asked, how_asked = dataclasses.replace(prompts, given=_given(split, control)), f"{how}, {control} descriptors"
            with Bar(f"{group.name}: answering {control} descriptors", total=split.steps_per_epoch) as bar:
                answers = answer_all(ask(split.source), params, asked, split.source, run.mesh, path, how=how_asked, progress=bar.reach)
        columns = ([getattr(one, name) for one in answers] for name in ("dataset", "gold", "prediction"))
        scores[control] = dataset_metrics(HBA, *columns)
    if jax.process_index() == 0:
        (folder / "scores.json").write_text(json.dumps(scores, indent=1))
    for dataset in group.datasets:
        metric = "accuracy" if group.task == "qa" else HBA.dataset(dataset).metric
        if dataset in scores["with"]:
            told = ", ".join(f"{scores[control][dataset][metric]:.3f} {control}" for control in CONTROLS)
            console.print(f"{dataset}: held-out {metric} {told} descriptors", soft_wrap=True)


def others(ids: np.ndarray, datasets: np.ndarray) -> np.ndarray:
    """For each of the samples `ids [N]` another one of its dataset (`datasets [N]`), all of them in turn: the control whose descriptors say
    nothing of the sample. A sample that is alone in its dataset keeps its own."""
    given = ids.copy()
    for dataset in np.unique(datasets):
        own = np.flatnonzero(datasets == dataset)
        order = np.random.default_rng(0).permutation(own)
        given[order] = ids[np.roll(order, 1)]
    return given


def _given(split: Split, control: str) -> dict[int, int]:
    """Whose descriptors the samples of a split get instead of their own, -1 for nobody's."""
    index = split.pipeline.planner.index
    if control == "with":
        return {}
    found = np.full_like(index.ids, -1) if control == "without" else others(index.ids, index.datasets)
    return dict(zip(index.ids.tolist(), found.tolist(), strict=True))


def _by_heads(material: Material, learner: Learner) -> tuple[Callable[[Source], Ask], nnx.State, str]:
    """What asks the heads, with which parameters, and its name."""
    graph, state = nnx.split(learner)
    fixed = material.fixed
    predict = functools.partial(_probabilities, (fixed.site, graph, fixed.graph), fixed.params)
    return functools.partial(by_heads, predict), state, "heads"


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(fixed: tuple[Site, nnx.GraphDef, nnx.GraphDef], params: nnx.State, state: nnx.State, batch: Batch) -> jax.Array:
    site, graph, below = fixed
    return jax.nn.softmax(nnx.merge(graph, state).logits(site, nnx.merge(below, params), batch), axis=-1)


def _greedy(run: Adapting, learner: Learner) -> tuple[Callable[[Source], Ask], nnx.State, str]:
    """What generates the likeliest answers, with which parameters, and its name."""
    thinker = run.classifier.thinker
    if learner.tail is not None:
        thinker = nnx.clone(thinker)
        learner.tail.put(thinker)
    policy = BehaviourThinker(thinker, learner.behaviour)
    generator = make_generator(run.config.generation, policy)
    ask = functools.partial(greedy, generator, tokenizer=run.atlas.tokenizer)
    return ask, generator.view(nnx.state(policy)), repr(generator.sampling)
