"""How much each modality of the miniature atlas tells a plain classifier: `python benchmarks/atlas_baselines.py [ATLAS_FOLDER]`.

Every dataset gets its own classifiers, fitted on a third and on all of its training rows and scored on the test split, whose voices,
persons, templates and content words are new. Audio: mean and spread of log band energies of three parts of the clip; video:
28x28 grey pictures of the start and the end; text: words, word beginnings and punctuation. "late" multiplies the modalities'
probabilities; "joint" is a kernel machine over all features at once, which the datasets that live on a relation between
modalities need.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import av
import numpy as np
import soundfile
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC

from omnisapiens_jax.atlas.miniature.generate import atlas
from omnisapiens_jax.atlas.miniature.script import DATASETS


def audio_features(path: Path) -> np.ndarray:
    """Mean and spread of 40 log band energies in each third of a clip, `[240]`."""
    wave, _ = soundfile.read(path, dtype="float32")
    frames = np.lib.stride_tricks.sliding_window_view(wave, 400)[::160] * np.hanning(400)
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges = np.unique(np.geomspace(2, 200, 41).astype(int))
    bands = np.log10(np.maximum(np.add.reduceat(power, edges[:-1], axis=1), 1e-8))
    thirds = np.array_split(bands, 3)
    return np.concatenate([f(part, axis=0) for part in thirds for f in (np.mean, np.std)])


def video_features(path: Path) -> np.ndarray:
    """28x28 grey pictures, averaged over the first and over the second half of a clip, `[1568]`."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="gray8") for frame in container.decode(video=0)])
    small = frames.reshape(len(frames), 28, 4, 28, 4).mean(axis=(2, 4)) / 255
    halves = np.array_split(small, 2)
    return np.concatenate([half.mean(axis=0).ravel() for half in halves])


def load(folder: Path, split: str) -> dict[str, dict[str, np.ndarray]]:
    """Features and answers of one split, by dataset."""
    tables: dict[str, dict[str, list]] = {name: {"text": [], "audio": [], "video": [], "answer": []} for name in DATASETS}
    for line in (folder / f"{split}.jsonl").read_text().splitlines():
        row = json.loads(line)
        table = tables[row["dataset"]]
        table["answer"].append(row["answer"])
        if "Transcript: " in row["problem"]:  # a mime says nothing
            table["text"].append(row["problem"].split("Transcript: ")[1].split("\n")[0])
        for name in row["audios"]:
            table["audio"].append(audio_features(folder / name))
        for name in row["videos"]:
            table["video"].append(video_features(folder / name))
    return {dataset: {name: np.array(values) for name, values in table.items() if values} for dataset, table in tables.items()}


def _bag() -> CountVectorizer:
    return CountVectorizer(token_pattern=r"\w+|[^\w\s]+", binary=True)


def _models() -> dict[str, Pipeline]:
    dense = FunctionTransformer(lambda x: np.asarray(x.todense()), accept_sparse=True)
    return {
        "text": make_pipeline(_bag(), dense, LogisticRegression(C=1.0, max_iter=2000)),
        "audio": make_pipeline(StandardScaler(), PCA(0.97), LogisticRegression(C=0.1, max_iter=2000)),
        "video": make_pipeline(PCA(0.95), StandardScaler(), LogisticRegression(C=0.03, max_iter=2000)),
    }


def score(train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Right or wrong, one boolean a test row, for each modality alone and for the two fusions."""
    right: dict[str, np.ndarray] = {}
    logs: list[np.ndarray] = []
    joint: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    classes = np.unique(train["answer"])  # the order of every classifier's columns
    for name, model in _models().items():
        if name not in train:
            continue
        model.fit(train[name], train["answer"])
        log = np.log(model.predict_proba(test[name]) + 1e-3)
        logs.append(log)
        right[name] = classes[log.argmax(axis=1)] == test["answer"]
        for split, table in (("train", train), ("test", test)):
            part = model[:-1].transform(table[name])
            joint[split].append(part / np.sqrt(np.var(model[:-1].transform(train[name]), axis=0).sum()))
    right["late"] = classes[np.sum(logs, axis=0).argmax(axis=1)] == test["answer"]
    machine = SVC(C=4.0, gamma="scale").fit(np.hstack(joint["train"]), train["answer"])
    right["joint"] = machine.predict(np.hstack(joint["test"])) == test["answer"]
    return right


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="How much each modality of the miniature atlas tells a plain classifier.")
    parser.add_argument("folder", type=Path, nargs="?", help="an atlas; made (and kept) with the defaults if absent")
    folder = parser.parse_args().folder or atlas()
    train, test = load(folder, "train"), load(folder, "test")
    columns = ("text", "audio", "video", "late", "joint")
    print("| dataset | test rows | chance | train | " + " | ".join(columns) + " | best fusion |\n|---" + "|---" * (len(columns) + 4) + "|")
    totals: dict[int, list[np.ndarray]] = {3: [], 1: []}
    for dataset, table in train.items():
        for part in (3, 1):
            result = score({name: values[::part] for name, values in table.items()}, test[dataset])
            best = max(result["late"], result["joint"], key=np.mean)
            totals[part].append(best)
            cells = [f"{result[name].mean():.2f}" if name in result else "" for name in columns]
            count = len(table["answer"][::part])
            chance = 1 / len(DATASETS[dataset].answers)
            print(f"| {dataset} | {len(best)} | {chance:.2f} | {count} | " + " | ".join(cells) + f" | {best.mean():.2f} |")
    for part in (3, 1):
        count = sum(len(table["answer"][::part]) for table in train.values())
        right = np.concatenate(totals[part])
        print(f"| all | {len(right)} | | {count} | " + " | " * len(columns) + f" {right.mean():.3f} |")


if __name__ == "__main__":
    main()
