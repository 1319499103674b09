"""The jobs a config can name: each one run from flags to report, stage by stage. A job started again goes on where it stopped."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from omnisapiens_jax import defaults, resources
from omnisapiens_jax.atlas.faults import Policy
from omnisapiens_jax.atlas.labels import SCHEMES
from omnisapiens_jax.atlas.plan import DROPOUTS, Index, Mode, PlanConfig
from omnisapiens_jax.atlas.recipe import Target, lower_answer, target_text
from omnisapiens_jax.atlas.sources import open_source
from omnisapiens_jax.convert.label_files import domains_of
from omnisapiens_jax.evaluation.answers import Answer, accuracy, evaluations, load_answers, save_answers
from omnisapiens_jax.evaluation.classify import Predict, by_heads
from omnisapiens_jax.evaluation.compare import compare, open_run
from omnisapiens_jax.evaluation.comparison import write_comparison
from omnisapiens_jax.evaluation.evaluate import MODALITIES, answer_all, greedy
from omnisapiens_jax.evaluation.report import paired, write_report
from omnisapiens_jax.generation.sampling import Generator
from omnisapiens_jax.models.classifier import class_probabilities
from omnisapiens_jax.models.layers import Remat
from omnisapiens_jax.parallel.mesh import make_mesh, on_mesh
from omnisapiens_jax.processing.chat import FORMAT_PROMPTS
from omnisapiens_jax.rl.loss import PolicyLossConfig
from omnisapiens_jax.rl.rewards import RewardConfig
from omnisapiens_jax.rl.similarity import Similarity
from omnisapiens_jax.training import bam, rl, sft
from omnisapiens_jax.training.adapt import adapt, described
from omnisapiens_jax.training.data import QUARANTINE, Atlas, NoRows, Rows, Split, rows_among, rows_of_datasets, rows_of_kind
from omnisapiens_jax.training.frozen import FrozenStates, Site, encode
from omnisapiens_jax.training.journal import Bar, Compilations, console, read_metrics
from omnisapiens_jax.training.losses import ANSWERS, CLASSES, SHARES, Objective
from omnisapiens_jax.training.selection import BY_LOSS, CRITERIA, Selection
from omnisapiens_jax.training.state import (
    TrainState,
    create_state,
    fresh_head,
    make_generator,
    make_optimizer,
    make_thinker,
    open_weights,
    parameters,
    thinker_config,
    thinker_of,
    trainable_filter,
)


def _third(index: Index) -> np.ndarray:
    return index.ids % 3 == 0


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a supervised stage teaches: the objective, the target behind the prompt, and the kind of rows that have it (all).

    Of these rows those of some `datasets` (of all).
    """

    objective: Objective
    target: Target | None
    kind: str | None
    datasets: tuple[str, ...] | None = None

    @property
    def by_heads(self) -> bool:
        """Whether heads answer; otherwise the language model does."""
        return self.objective is not ANSWERS

    def rows(self, rows: Rows | None = None) -> Rows | None:
        """Those of `rows` that are taught."""
        rows = rows if self.datasets is None else rows_of_datasets(self.datasets, rows)
        return rows if self.kind is None else rows_of_kind(self.kind, rows)


RESPONSES = Lesson(ANSWERS, target_text, None)
LABELS = Lesson(CLASSES, None, "cls")
RATERS = Lesson(SHARES, None, "cls")
FREE_FORM = Lesson(ANSWERS, lower_answer, "qa")

ROWS: dict[str, Rows | None] = {"all": None, "third": _third, "rest": lambda index: ~_third(index)}

_COUNTS = ("steps", "batch_size", "prompts", "rollouts", "updates", "micro_batches", "eval_every", "patience", "save_every")
_FREE = ("workers", "deadline", "worker_bytes", "cache_bytes")  # settings of `atlas` that say how to work, not what a run computes


@dataclasses.dataclass(frozen=True)
class Run:
    """What every stage of a job needs."""

    config: ml_collections.ConfigDict
    workdir: Path
    mesh: Mesh
    atlas: Atlas
    graph: nnx.GraphDef

    def fit(self, stage: ml_collections.ConfigDict, folder: str, state: TrainState, lesson: Lesson = RESPONSES) -> TrainState:
        """Supervised training on the rows the stage names."""
        train, validation = self.splits(stage, state, lesson)
        lora, dropout = self.config.model.lora, None
        if lora.dropout and lora.rank and self.config.model.trains == "thinker":
            dropout = sft.Dropout(lora.dropout, self.config.seed)
        selection = Selection(stage.best) if lesson.by_heads else BY_LOSS
        state = sft.fit(stage, self.workdir / folder, self.graph, state, train, validation, self.mesh, lesson.objective, dropout, selection)
        for part in (train, validation):
            part.tell_faults()
        return state

    def splits(self, stage: ml_collections.ConfigDict, state: TrainState, lesson: Lesson) -> tuple[Split, Split]:
        """What a stage is trained and validated on, with what frozen towers give where it is to be kept."""
        atlas = self.config.atlas
        split = functools.partial(self.atlas.split, target=lesson.target, packs=True, rated=lesson.objective is SHARES)
        parts = []
        for name, size, shuffle, rows in (
            (atlas.train, stage.batch_size, True, lesson.rows(ROWS[stage.rows])),
            (atlas.validation, self.config.eval_batch, False, lesson.rows()),
        ):
            make = functools.partial(split, name, batch_size=size, shuffle=shuffle)
            part = make(rows=rows)
            if stage.cached:
                again = functools.partial(split, name, batch_size=self.config.eval_batch, shuffle=False)
                kept = self._embeddings(state, part, lambda ids, again=again, rows=rows: again(rows=rows_among(ids, rows)))
                whole = len(kept.ids) == len(part.pipeline.planner.index)
                part = dataclasses.replace(part if whole else make(rows=rows_among(kept.ids, rows)), kept=kept)
            parts.append(part)
        return parts[0], parts[1]

    def _embeddings(self, state: TrainState, split: Split, again: Callable[[np.ndarray], Split]) -> FrozenStates:
        """What the decoder reads of a split's samples: frozen towers are run over each of them once; see `encode`."""
        thinker = thinker_of(nnx.merge(self.graph, parameters(state)))
        site = Site("embeddings", 0, thinker.config.text.hidden_size, np.dtype(thinker.decoder.dtype))
        return encode(site, *nnx.split(thinker), split, again, self.mesh, resources.cache() / "states")

    def generator(self, rollouts: int, temperature: float) -> Generator:
        """A sampler for this run's thinker."""
        thinker = nnx.eval_shape(lambda: make_thinker(self.config.model, self.config.seed))
        return make_generator(self.config.generation, thinker, rollouts=rollouts, temperature=temperature)

    @functools.cached_property
    def greedy(self) -> Generator:
        """One likeliest response a prompt; made once, so that a second evaluation compiles nothing."""
        return self.generator(1, 0.0)

    @functools.cached_property
    def predict(self) -> Predict:
        """How likely the heads find each class; compiled once."""
        return jax.jit(lambda params, batch: class_probabilities(nnx.merge(self.graph, params), batch))

    def held_out(self, lesson: Lesson = RESPONSES, *, transcripts: bool = True) -> Split:
        """The prompts of the held-out split that a lesson is for, in its order; without the words of transcripts that are to be blanked."""
        return self.atlas.split(
            self.config.atlas.test,
            batch_size=self.config.eval_batch,
            target=None,
            shuffle=False,
            rows=lesson.rows(),
            transcripts=transcripts,
            packs=lesson.by_heads,
        )

    def evaluate(self, name: str, state: TrainState, split: Split, lesson: Lesson = RESPONSES, without: str = "") -> list[Answer]:
        """What heads say of the rows that a lesson is for, or greedy answers to them, one modality taken out or none.

        Kept in `evaluation-NAME.json`, and made only once. A run that was killed meanwhile goes on with the first batch that it lacks.
        """
        path = self.workdir / f"evaluation-{name}.json"
        told = name if lesson.kind is None else f"{name} ({'labels' if lesson.by_heads else 'free-form answers'})"
        if not path.exists():
            source, params = split.source, parameters(state)
            if lesson.by_heads:
                ask, view, how = by_heads(self.predict, source, self.atlas.scheme), params, "heads"
            else:
                thinker = params["thinker"] if self.config.model.heads else params
                ask, view = greedy(self.greedy, source, self.atlas.tokenizer), self.greedy.view(thinker)
                how = repr(self.greedy.sampling)
            with Bar(f"evaluating {told}", total=split.steps_per_epoch) as bar:
                answers = answer_all(ask, view, split.pipeline, source, self.mesh, path, how=how, without=without, progress=bar.reach)
            split.tell_faults()
        else:
            answers = load_answers(path)
        bad = f"; {len(split.pipeline.faults)} rows could not be used" if split.pipeline.faults and not split.zero else ""
        console.print(f"held-out accuracy {told}: {accuracy(answers):.3f} on {len(answers)} samples{bad}")
        return answers

    def ablations(self, name: str, state: TrainState, held_out: Split, lesson: Lesson = RESPONSES) -> None:
        """Evaluates once more without each of the modalities that are to be blanked."""
        for modality in self.config.blanked:
            split = self.held_out(lesson, transcripts=False) if modality == "text" else held_out
            self.evaluate(f"{name}-without-{modality}", state, split, lesson, modality)

    def compare(self) -> None:
        """Writes `comparison.html`, with the tables of the evaluation and of what it becomes without a modality."""
        if jax.process_index() == 0:
            scheme = self.atlas.scheme
            found = compare([open_run(f"{name}={path}", scheme) for name, path in evaluations(self.workdir).items()], scheme=scheme)
            path = write_comparison(self.workdir, found, source=self.atlas.source(self.config.atlas.test))
            console.print(f"The tables are in {path.absolute()}, and as .md and .json beside it", soft_wrap=True)

    def report(self, folders: Sequence[str] | None = None) -> None:
        """Writes `report.html`, with the curves of the stages that lie in some folders (by default each in that of its name)."""
        if jax.process_index() == 0:
            curves = {stage: read_metrics(self.workdir / stage / "metrics.jsonl") for stage in folders or STAGES}
            atlas = self.config.atlas
            path = write_report(
                self.workdir, curves, test=self.atlas.source(atlas.test), train=self.atlas.source(atlas.train), scheme=self.atlas.scheme
            )
            console.print(f"The report is {path.absolute()}", soft_wrap=True)


def run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job that `config.job` names in `workdir`.

    Raises:
      ValueError: a setting is none of those there are, or `workdir` holds a run of another config.
    """
    mesh, config = make_mesh(**config.mesh), of_checkpoint(defaults.with_compat(config))
    check(config, mesh)
    if jax.process_index() == 0:
        claim(workdir, config)
    else:
        console.quiet = True
    Compilations.watch()
    atlas = Atlas(config, thinker_config(config.model), workdir)
    with on_mesh(mesh):
        graph, state = create_state(config.model, config.seed, mesh)
        size = sum(leaf.size for leaf in jax.tree.leaves(parameters(state)))
        trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
        console.print(f"{size:,} parameters, {trained:,} trained, on {mesh.size} {jax.default_backend()} device(s) {dict(mesh.shape)}")
        JOBS[config.job](Run(config, workdir, mesh, atlas, graph), state)


def _rl(run: Run, state: TrainState) -> None:
    config = run.config
    # Before the long work: what may have to be fetched, and rows that cannot be used.
    similarity = Similarity.load() if config.rl.reward.similarity else None
    prompts = run.atlas.split(config.atlas.train, batch_size=config.rl.prompts, target=None, shuffle=True, rows=ROWS[config.rl.rows])
    held_out = run.held_out()
    if config.warm_start.rows != "none":
        state = run.fit(config.warm_start, "warm_start", state)
    run.evaluate("before", state, held_out)
    generator = run.generator(config.rl.rollouts, config.rl.temperature)
    if similarity is not None:
        similarity.warm_up()
    state = rl.improve(
        config.rl, config.seed, run.workdir / "rl", run.graph, state, generator, prompts, run.atlas.tokenizer, similarity, run.mesh
    )
    prompts.tell_faults()
    run.evaluate("after", state, held_out)
    run.ablations("after", state, held_out)
    run.report()


def _supervised(run: Run, state: TrainState, *, lesson: Lesson) -> None:
    job = run.config.job
    held_out = run.held_out(lesson)  # before the long work: a row that cannot be used is told now
    taught = RATERS if job == "sft" and run.config.sft.labels == "raters" else lesson
    state = run.fit(run.config[job], job, state, taught)
    run.evaluate(job, state, held_out, lesson)
    run.ablations(job, state, held_out, lesson)
    run.report()


def _evaluate(run: Run, state: TrainState) -> None:
    """Heads answer the rows that have a label, the language model all others; without heads it answers all of them."""
    splits: dict[Lesson, Split] = {}
    for lesson in (LABELS, FREE_FORM) if run.config.model.heads else (RESPONSES,):
        try:
            splits[lesson] = run.held_out(lesson)
        except NoRows:
            if lesson is not LABELS and not splits:
                raise
    parts = [run if len(splits) == 1 else dataclasses.replace(run, workdir=run.workdir / str(lesson.kind)) for lesson in splits]
    for part, (lesson, held_out) in zip(parts, splits.items(), strict=True):
        part.evaluate("checkpoint", state, held_out, lesson)
        part.ablations("checkpoint", state, held_out, lesson)
    if len(parts) > 1 and jax.process_index() == 0:
        for path in evaluations(parts[0].workdir).values():
            if not (joined := run.workdir / path.name).exists():  # it may have been judged since
                answers = [answer for part in parts for answer in load_answers(part.workdir / path.name)]
                save_answers(joined, sorted(answers, key=lambda answer: answer.id))
    run.compare()


def _bam(run: Run, state: TrainState) -> None:
    adapt(run.config, run.workdir, run.mesh, run.atlas, run.graph, parameters(state))


CELLS = ("scratch", "transfer")  # where a fine-tuning begins: the base, and the base trained on all other datasets
DESCRIBED = "descriptors"  # of a cell once more, its answers with adapters


def _transfer(run: Run, state: TrainState) -> None:
    """One dataset is learnt from the base and from what all the others have taught, each without and with its descriptors."""
    config, name = run.config, run.config.transfer.dataset
    datasets = run.atlas.scheme.datasets
    lesson = dataclasses.replace(LABELS, datasets=(name,))
    others = dataclasses.replace(LABELS, datasets=tuple(dataset.name for dataset in datasets if dataset.name != name))
    for split in (config.atlas.train, config.atlas.validation, config.atlas.test):  # before the long work
        if name not in open_source(run.atlas.root / split).datasets():
            raise ValueError(f"{split} has no rows of {name}, which config.transfer.dataset names")
    held_out = run.held_out(lesson)
    has_descriptors = described(config, run.workdir, run.mesh, run.atlas, run.graph, parameters(state))
    if not has_descriptors:
        console.print(f"{name}: no training sample has descriptors, so nothing is learnt of them")
    answers: dict[str, list[Answer]] = {}
    for cell in CELLS:
        folder = f"finetune-{cell}"
        if cell == "transfer":
            _, state = create_state(config.model, config.seed, run.mesh)  # the steps of the first cell took the base's place
            state = run.fit(config.pretrain, "pretrain", state, others)
        state = fresh_head(state, config.model, config.seed, run.atlas.scheme.head(name), run.mesh)
        state = run.fit(config.finetune, folder, state, lesson)
        answers[cell] = run.evaluate(cell, state, held_out, lesson)
        if has_descriptors:
            adapting = config.copy_and_resolve_references()
            adapting.model.weights = str(run.workdir / folder)  # they have heads, and no adapters
            adapt(adapting, run.workdir / cell, run.mesh, run.atlas, run.graph, parameters(state))
            with_adapters = f"{cell}-{DESCRIBED}"
            answers[with_adapters] = load_answers(run.workdir / cell / "bam" / name / "evaluation-with.json")
            if jax.process_index() == 0:
                save_answers(run.workdir / f"evaluation-{with_adapters}.json", answers[with_adapters])
    for first, second in zip(*([key for key in answers if key.startswith(cell)] for cell in CELLS), strict=True):
        gain = paired(answers[first], answers[second])
        console.print(f"{second} beside {first}: {100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] points of accuracy")
    run.compare()
    run.report(("pretrain", *(f"finetune-{cell}" for cell in CELLS)))


_LESSONS = {"generative": RESPONSES, "sft": LABELS, "qa": FREE_FORM}
JOBS: dict[str, Callable[[Run, TrainState], None]] = {
    "rl": _rl,
    "bam": _bam,
    "transfer": _transfer,
    **{job: functools.partial(_supervised, lesson=lesson) for job, lesson in _LESSONS.items()},
    "evaluate": _evaluate,
}
STAGES = ("warm_start", *_LESSONS, "pretrain", "finetune", "rl")


def of_checkpoint(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A config whose evaluation has the heads and LoRA factors of its checkpoint, and the prompts that go with them; any other as it is.

    Raises:
      ValueError: there is no checkpoint to evaluate.
      ConversionError: it is none.
    """
    if config.job != "evaluate":
        return config
    if not config.model.weights:
        raise ValueError("config.model.weights is empty: name the checkpoint to evaluate, such as the stage runs/rl/rl of a run")
    config, source = config.copy_and_resolve_references(), open_weights(config.model.weights)
    config.model.heads = source.part_shapes.heads
    if source.lora:
        lora, made = config.model.lora, source.lora.config
        lora.rank, lora.alpha, lora.stabilised = made.rank, float(made.alpha), made.stabilised
        lora.targets.update({tower: made.targets.get(tower, ()) for tower in lora.targets})
    if not config.processing.format_prompt:
        config.processing.format_prompt = "none" if config.model.heads else "think"
    return config


def check(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Looks at the settings that are first read when a run has begun, some of them hours later.

    Raises:
      ValueError: one has a value that it cannot have; names those it can.
    """
    wanted = [("job", config.job, JOBS), *(("blanked", modality, MODALITIES) for modality in config.blanked)]
    wanted += [
        ("model.remat", config.model.remat, get_args(Remat)),
        ("processing.format_prompt", config.processing.format_prompt, FORMAT_PROMPTS),
        ("atlas.on_error", config.atlas.on_error, get_args(Policy)),
        ("atlas.batches", config.atlas.batches, get_args(Mode)),
        ("atlas.scheme", config.atlas.scheme, SCHEMES),
    ]
    counts = ["eval_batch", "atlas.buckets", "generation.chunk", "generation.max_tokens"]
    stages = [name for name in STAGES if name in config]
    batches = [("eval_batch", config.eval_batch, 1, 1)]
    for name in stages:
        wanted.append((f"{name}.rows", config[name].rows, (*ROWS, "none") if name == "warm_start" else ROWS))
        counts += [f"{name}.{count}" for count in _COUNTS if count in config[name]]
        rows, updates = ("prompts", config.rl.updates) if name == "rl" else ("batch_size", 1)
        if config[name].rows != "none":
            batches.append((f"{name}.{rows}", config[name][rows], updates, config[name].micro_batches))
    dropped = [f"config.atlas.training.{name}" for name in DROPOUTS if config.atlas.training[name]]
    if config.job == "transfer":
        datasets, name = {dataset.name: dataset for dataset in SCHEMES[config.atlas.scheme].datasets}, config.transfer.dataset
        if name not in datasets or datasets[name].kind != "cls":
            known = ", ".join(key for key, dataset in datasets.items() if dataset.kind == "cls")
            told = "has free-form answers, which no head gives" if name in datasets else "is no dataset of the atlas"
            raise ValueError(f"config.transfer.dataset {name!r} {told}: name one of {known}")
        wanted += [(f"{stage}.best", config[stage].best, CRITERIA) for stage in ("pretrain", "finetune")]
    if "bam" in config:
        bam.check(config.bam, thinker_config(config.model))
        batches.append(("bam.batch_size", config.bam.batch_size, 1, config.bam.micro_batches))
        if config.atlas.batches == "packed":
            raise ValueError("config.atlas.batches packed is not for bam: descriptors belong to a row; choose homogeneous or mixed")
        if config.bam.cached and dropped:
            raise ValueError(f"{dropped[0]} draws anew each epoch, but states are computed once: set config.bam.cached=False")
    if cached := [name for name in stages if name != "rl" and config[name].cached]:
        lora, trained = config.model.lora, ""
        if config.model.trains != "lm_head":
            trained = "every parameter" if not lora.rank else ", ".join(tower for tower in ("audio", "vision") if lora.targets[tower])
        if trained:
            raise ValueError(
                f"config.{cached[0]}.cached keeps what frozen towers give, but {trained} is trained: it is for LoRA on the decoder alone"
            )
        if dropped:
            raise ValueError(f"{dropped[0]} draws anew each epoch, but rows are encoded once: set config.{cached[0]}.cached=False")
        if config.atlas.batches == "packed":
            raise ValueError(f"config.{cached[0]}.cached keeps rows of one sample: config.atlas.batches homogeneous or mixed, not packed")
    if config.job == "sft":
        wanted += [("sft.labels", config.sft.labels, ("answers", "raters")), ("sft.best", config.sft.best, CRITERIA)]
    for name, value, known in wanted:
        if value not in known:
            raise ValueError(f"unknown config.{name} {value!r}; known: {', '.join(known)}")
    settings = config.to_dict()
    for name in counts:
        value = functools.reduce(lambda part, key: part[key], name.split("."), settings)
        if value < 1:
            raise ValueError(f"config.{name} {value} must be at least 1")
    for stage in stages:
        make_optimizer(config[stage].optim, config[stage].steps)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, rows, updates, parts in batches:
        if rows % (updates * ways) or rows % (updates * parts):
            raise ValueError(
                f"config.{name} {rows} does not divide over the {updates} updates it is cut into and, in each, the {ways} ways of the mesh "
                f"(data x fsdp) or the {parts} micro-batches: make it a multiple of {updates * math.lcm(ways, parts)}"
            )
    PlanConfig(batch_size=1, **config.atlas.training)
    trainable_filter(config.model)
    if not 0 <= config.model.lora.dropout < 1:
        raise ValueError(f"config.model.lora.dropout {config.model.lora.dropout} is a probability, from 0 to less than 1")
    labels = tuple(len(domain.labels) for domain in SCHEMES[config.atlas.scheme].domains)
    heads = labels if config.job in ("sft", "bam", "transfer") or (config.job == "evaluate" and config.model.heads) else ()
    if tuple(config.model.heads) != heads:
        where = f"a run of the job {config.job} with config.atlas.scheme {config.atlas.scheme}"
        raise ValueError(f"config.model.heads {tuple(config.model.heads)} must be {heads} in {where}")
    if heads and config.model.weights:
        theirs = domains_of(open_weights(config.model.weights))
        if theirs not in (None, SCHEMES[config.atlas.scheme].domains):
            told = "; ".join(f"{domain.name}: {', '.join(domain.labels)}" for domain in theirs or ())
            raise ValueError(
                f"the heads of {config.model.weights} are for other classes, or in another order, than those of config.atlas.scheme "
                f"{config.atlas.scheme}: they are for {told}"
            )
    if config.job in ("bam", "transfer") and config.blanked:
        raise ValueError(f"config.blanked is not for {config.job}, whose answers are compared with and without descriptors")
    if (config.model.trains == "lm_head") != (config.job == "qa"):
        raise ValueError(f"config.model.trains {config.model.trains}: the job qa trains the lm_head, and no other does")
    if config.job == "qa" and not config.model.weights:
        raise ValueError("the job qa trains the LM head of a thinker that is there: name it, --config.model.weights=runs/sft/sft")
    if "rl" in config:
        if config.atlas.batches == "packed":
            raise ValueError(
                "config.atlas.batches packed is for supervised training: a sampler takes one prompt a row; choose homogeneous or mixed"
            )
        PolicyLossConfig(**config.rl.loss)
        RewardConfig(**config.rl.reward)
        if config.rl.temperature <= 0:
            raise ValueError(f"config.rl.temperature {config.rl.temperature} must be above 0: greedy responses are all alike")


def claim(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes the config into `workdir`, or checks that the run found there has the same one.

    A run that ended before it made anything leaves nothing but its config and its list of bad rows, and the place free. Settings that
    change nothing a run computes (`_FREE`) may differ, and so may `atlas.on_error` of a run that has raised nothing yet.
    """
    path, text = workdir / "config.json", config.to_json_best_effort(indent=2)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists() and not {*workdir.iterdir()} <= {path, workdir / QUARANTINE}:
            old, new = (json.loads(content) for content in (path.read_text(), text))
            free = (*_FREE, "on_error") if old["atlas"]["on_error"] == "raise" else _FREE
            for settings in (old, new):
                settings["atlas"] = {name: value for name, value in settings["atlas"].items() if name not in free}
            differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
            if differing:
                raise ValueError(f"{workdir} holds a run with another config (differs in {', '.join(differing)}): name another --workdir")
        draft = path.with_suffix(".part")
        draft.write_text(text)
        draft.replace(path)
    except OSError as reason:
        raise ValueError(f"{workdir} cannot be written to ({reason.strerror}): name another --workdir") from reason
