"""How well real texts are classified, as a table: `python -m benchmarks.real_text [--runs DIR] [--seeds 0 1 2] [--document FILE]`.

On the test split of `omnisapiens_jax.atlas.real_text`, beside the commonest class: TF-IDF and all-MiniLM-L6-v2 under a logistic regression
(tuned on the validation split), the rules and lexicon of VADER at their published thresholds, and our classifier from a small random
start, on labels and on what the raters said. It runs `configs/text.py` in DIR; a run that is finished is only read, one that was stopped
goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags, logging
from flax import nnx
from ml_collections import ConfigDict
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from benchmarks.learning import write_between_markers
from omnisapiens_jax.atlas import real_text
from omnisapiens_jax.atlas.labels import REAL_TEXT
from omnisapiens_jax.atlas.sources import SPLITS
from omnisapiens_jax.convert.huggingface import save_thinker
from omnisapiens_jax.evaluation.answers import load_answers
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.processing.chat import transcript_span
from omnisapiens_jax.resources import resource
from omnisapiens_jax.rl.similarity import Similarity
from omnisapiens_jax.training import jobs

MARKERS = "<!-- real text: written by benchmarks/real_text.py -->", "<!-- /real text -->"
TWEETS, SARCASM = (dataset.name for dataset in REAL_TEXT.datasets)
REPO = Path(__file__).resolve().parents[1]
# Of the random start.
VOCABULARY, WIDTH, LAYERS = 12_000, 64, 2
_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)  # of the logistic regression: inverse weights of its penalty


@dataclasses.dataclass(frozen=True)
class Texts:
    """One dataset of one split: its texts and, for each, the number of its label among the dataset's."""

    texts: tuple[str, ...]
    labels: np.ndarray


def load(folder: Path, dataset: str) -> dict[str, Texts]:
    """The splits of a dataset."""
    names, found = REAL_TEXT.dataset(dataset).labels, {}
    for split in SPLITS:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").split("\n") if line]
        own = [row for row in rows if row["dataset"] == dataset]
        spans = [transcript_span(row["problem"]) for row in own]
        texts = tuple(row["problem"][slice(*span)].strip() for row, span in zip(own, spans, strict=True) if span)
        found[split] = Texts(texts, np.array([names.index(row["answer"]) for row in own]))
    return found


def logistic(features: Iterable[dict[str, np.ndarray]], data: dict[str, Texts]) -> np.ndarray:
    """Test predictions of the logistic regression that is best on the validation split, over kinds of features by split and settings."""
    train, validation = data["train"].labels, data["validation"].labels
    best, score = None, -1.0
    for kind, strength, weights in itertools.product(features, _STRENGTHS, (None, "balanced")):
        model = LogisticRegression(C=strength, class_weight=weights, max_iter=2000).fit(kind["train"], train)
        found = f1_score(validation, model.predict(kind["validation"]), average="macro")
        if found > score:
            best, score = model.predict(kind["test"]), found
    assert best is not None
    return best


def tfidf(data: dict[str, Texts]) -> np.ndarray:
    """Words, with pairs of words and with punctuation or without."""

    def kinds() -> Iterable[dict[str, np.ndarray]]:
        for pattern, longest in itertools.product((r"\w\w+", r"\w+|[^\w\s]+"), (1, 2)):
            bag = TfidfVectorizer(sublinear_tf=True, token_pattern=pattern, ngram_range=(1, longest)).fit(data["train"].texts)
            yield {split: bag.transform(own.texts) for split, own in data.items()}

    return logistic(kinds(), data)


def minilm(data: dict[str, Texts], embed: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
    """Embeddings of all-MiniLM-L6-v2."""
    return logistic([{split: embed(own.texts) for split, own in data.items()}], data)


def rules(data: dict[str, Texts]) -> np.ndarray:
    """VADER's compound score, neutral within its published 0.05 of zero."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # of the extra `test`; nothing else here needs it

    analyser = SentimentIntensityAnalyzer()
    scores = np.array([analyser.polarity_scores(text)["compound"] for text in data["test"].texts])
    return np.where(scores <= -0.05, 0, np.where(scores >= 0.05, 2, 1))


def commonest(data: dict[str, Texts]) -> np.ndarray:
    """The commonest class of the training split."""
    return np.full(len(data["test"].labels), np.bincount(data["train"].labels).argmax())


def start(runs: Path, seed: int, texts: Path) -> Path:
    """A small thinker of random weights with a vocabulary of the training texts, as a checkpoint."""
    folder, vocabulary = runs / f"start-{seed}", runs / "tokenizer.model"
    runs.mkdir(parents=True, exist_ok=True)
    if not vocabulary.exists():
        tool = [sys.executable, str(REPO / "tools" / "train_tokenizer.py"), str(texts / "train.jsonl"), str(vocabulary)]
        subprocess.run([*tool, "--vocab-size", str(VOCABULARY), "--fold-case"], check=True)
    mini = ThinkerConfig.preset("mini")
    decoder = dataclasses.replace(
        mini.text,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        head_dim=WIDTH // mini.text.num_heads,
        intermediate_size=3 * WIDTH,
        mrope_section=(WIDTH // 8 - 2 * (WIDTH // 24), WIDTH // 24, WIDTH // 24),
    )
    config = dataclasses.replace(
        mini,
        text=decoder,
        audio=dataclasses.replace(mini.audio, output_dim=WIDTH),
        vision=dataclasses.replace(mini.vision, out_hidden_size=WIDTH),
    )
    if not folder.exists():
        save_thinker(nnx.to_pure_dict(nnx.state(Thinker(config, rngs=nnx.Rngs(seed)), nnx.Param)), config, folder)
    shutil.copyfile(vocabulary, folder / vocabulary.name)
    return folder


def config(weights: Path, texts: Path, seed: int, labels: str) -> ConfigDict:
    """`configs/text.py` with that start, seed and kind of labels."""
    made = runpy.run_path(str(resource("configs/text.py")))["get_config"]()
    made.model.weights, made.atlas.path, made.seed, made.sft.labels = str(weights), str(texts), seed, labels
    return made


def ours(runs: Path, seed: int, labels: str, texts: Path) -> dict[str, np.ndarray]:
    """Test predictions by dataset of our classifier, which is trained as far as it is not."""
    workdir, settings = runs / f"{labels}-{seed}", config(start(runs, seed, texts), texts, seed, labels)
    jobs.claim(workdir, settings)
    path = workdir / "evaluation-sft.json"
    if not path.exists():
        jobs.run(settings, workdir)
        jax.clear_caches()
    answers = load_answers(path)
    return {
        dataset.name: np.array([dataset.labels.index(answer.prediction) for answer in answers if answer.dataset == dataset.name])
        for dataset in REAL_TEXT.datasets
    }


@dataclasses.dataclass(frozen=True)
class Resampled:
    """Macro-F1 and accuracy `[2]` on the test split, and on each of its bootstrap resamples `[R, 2]`; means over seeds."""

    value: np.ndarray
    draws: np.ndarray

    def interval(self, other: Resampled | None = None) -> np.ndarray:
        """The 95 % interval `[2, 2]` (low and high; macro-F1 and accuracy), of the paired difference to `other` where it is given."""
        return np.quantile(self.draws if other is None else self.draws - other.draws, [0.025, 0.975], axis=0)


def resampled(golds: np.ndarray, predictions: Sequence[np.ndarray], *, resamples: int = 10_000) -> Resampled:
    """Scores of the predictions `[N]` of each seed. Resamples are the same for all that is scored on the same rows."""
    classes, count = int(golds.max()) + 1, len(golds)
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=resamples)
    weights = np.concatenate([np.ones((1, count), int), weights])

    def scores(found: np.ndarray) -> np.ndarray:
        cells = np.eye(classes * classes)[golds * classes + found]
        table = (weights @ cells).reshape(-1, classes, classes)
        hits, support, claimed = np.diagonal(table, axis1=1, axis2=2), table.sum(2), table.sum(1)
        f1 = 2 * hits / np.maximum(support + claimed, 1)
        return np.stack([f1.sum(1) / np.maximum((support > 0).sum(1), 1), hits.sum(1) / count], axis=1)

    mean = np.mean([scores(found) for found in predictions], axis=0)
    return Resampled(mean[0], mean[1:])


def table(dataset: str, golds: np.ndarray, found: dict[str, list[np.ndarray]]) -> str:
    """The Markdown table of a dataset: a line for each model, from the predictions of its seeds."""
    scored = {name: resampled(golds, predictions) for name, predictions in found.items()}
    least, words = scored["commonest class"], scored["TF-IDF + logistic regression"]
    head = ["model", "seeds", "macro-F1", "accuracy", "macro-F1 above the commonest class", "of TF-IDF's macro-F1"]
    lines = [head, ["---"] * len(head)]
    for name, result in scored.items():
        (low, high), (less, more) = result.interval(), result.interval(least)
        cells = [f"{result.value[i]:.3f} [{low[i]:.3f}, {high[i]:.3f}]" for i in range(2)]
        gain = f"{result.value[0] - least.value[0]:+.3f} [{less[0]:+.3f}, {more[0]:+.3f}]"
        lines.append([name, str(len(found[name])), *cells, gain, f"{result.value[0] / words.value[0]:.2f}"])
    labels = REAL_TEXT.dataset(dataset).labels
    counts = ", ".join(f"{count} {label}" for label, count in zip(labels, np.bincount(golds, minlength=len(labels)), strict=True))
    return f"`{dataset}`, {len(golds)} test rows ({counts}):\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/real_text"), help="where the runs lie (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--document", type=Path, help="a Markdown file to write the tables into, between their markers")
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # grain reads a flag
    logging.set_verbosity(logging.WARNING)
    folder, embed = real_text.atlas(), Similarity.load().embed
    trained = {
        name: [ours(arguments.runs, seed, labels, folder) for seed in arguments.seeds]
        for name, labels in (("ours, labels", "answers"), ("ours, raters' shares", "raters"))
    }
    tables = []
    for dataset in (TWEETS, SARCASM):
        data = load(folder, dataset)
        found = {"commonest class": [commonest(data)], "TF-IDF + logistic regression": [tfidf(data)]}
        found["MiniLM + logistic regression"] = [minilm(data, embed)]
        if dataset == TWEETS:
            found["VADER rules and lexicon"] = [rules(data)]
        found |= {name: [predictions[dataset] for predictions in seeds] for name, seeds in trained.items()}
        tables.append(table(dataset, data["test"].labels, found))
    text = "\n".join(tables) + "\nIn brackets the 95 % interval of the bootstrap over test rows, paired for differences.\n"
    print(text)
    if arguments.document:
        write_between_markers(arguments.document, f"\n{text}\n", MARKERS)


if __name__ == "__main__":
    main()
