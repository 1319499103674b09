"""What a model answered, row by row, and the files it is kept in. Everything that is measured, tested or judged is measured on these."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

# Names of evaluations, the one that a run is judged by first.
FINAL = ("after", "generative", "sft", "qa", "transfer", "checkpoint", "before")

_BOXED = re.compile(r"\\boxed\{([^{}]+)\}")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One evaluated sample.

    Attributes:
        id: the row of the split, or its place in a prediction file that has no ids.
        dataset: its dataset.
        gold: the right answer.
        prediction: the answer that was given, without what stood around it.
        text: the whole response; "" of a head, which gives none.
        signature: modality signature of the row.
        question: what was asked, of a free-form row (a judge needs it).
        likelihood: probability of the whole response under the model that gave it, None where nobody kept it.
        probabilities: of the labels of the dataset's domain in the scheme's order, () where there are none.
        verdict: what a judge says of a free-form answer, from 0 (wrong) to 1 (right); None where none was asked or none could say.
        judge: who that is, "" where none was asked.
        explanation: the judge's.
    """

    id: int
    dataset: str
    gold: str
    prediction: str
    text: str
    signature: str = ""
    question: str = ""
    likelihood: float | None = None
    probabilities: tuple[float, ...] = ()
    verdict: float | None = None
    judge: str = ""
    explanation: str = ""

    @property
    def correct(self) -> bool:
        """Whether the prediction is the gold answer, white space and case aside."""
        return self.prediction.strip().lower() == self.gold.strip().lower()

    @property
    def confidence(self) -> float | None:
        """How sure the model was: the probability of the likeliest label, or that of the whole response."""
        return max(self.probabilities) if self.probabilities else self.likelihood


def extract_answer(text: str) -> str:
    r"""The answer that a response gives, in lower case: what is `\boxed{...}`, else in `<answer>...</answer>`, else all of it.

    An empty box does not count, nor one with braces inside. This is how the benchmark reads responses to score them. What its reward reads
    out of them is another thing, `rl.rewards.extract_prediction`: there an empty box is an answer, `[...]` counts where there is no box, an
    answer ends with its line, and white space around marks is deleted first. Trained by the one and scored by the other, as published.
    """
    match = _BOXED.search(text) or _ANSWER.search(text)
    return (match[1] if match else text).strip().lower()


def accuracy(answers: Sequence[Answer]) -> float:
    """Share of correct answers."""
    return float(np.mean([answer.correct for answer in answers]))


def save_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Writes answers as JSON, whole or not at all."""
    draft = path.with_suffix(".part")
    with draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps([_row(answer) for answer in answers], indent=1, ensure_ascii=False))
        os.fsync(file.fileno())
    draft.replace(path)


def load_answers(path: Path) -> list[Answer]:
    """Reads what `save_answers` wrote."""
    return [_answer(row) for row in json.loads(path.read_text(encoding="utf-8"))]


class AnswerLog:
    """Answers as they come, a line for each batch, each on disk before the next is asked for: a kill loses the batch it falls into.

    The first line names the plan that the batches are of; `finish` makes a file of `save_answers` of it all. Of several processes the
    first writes, all read.
    """

    def __init__(self, path: Path, plan: str, *, writes: bool = True) -> None:
        """Opens the log of the answers that are to be in `path`, and reads what a killed run has left of it.

        Args:
            path: where `finish` puts the answers; the log lies beside it.
            plan: says which rows are in which batch.
            writes: False for a process that only reads.

        Raises:
            ValueError: the log is of another plan, or broken before its end.
        """
        self.path, self.log = path, path.with_suffix(".partial.jsonl")
        self.batches: list[list[Answer]] = []
        self._writes = writes
        whole, _, _ = self.log.read_bytes().rpartition(b"\n") if self.log.exists() else (b"", b"", b"")
        lines = whole.split(b"\n") if whole else []
        try:
            rows = [json.loads(line) for line in lines]
            found = rows[0]["plan"] if rows else plan
            self.batches = [[_answer(row) for row in batch] for batch in rows[1:]]
        except (ValueError, TypeError, KeyError) as reason:
            raise ValueError(f"{self.log} is broken ({reason}): delete it, and its answers are asked for anew") from None
        if found != plan:
            raise ValueError(
                f"{self.log} holds {sum(map(len, self.batches))} answers of another evaluation (other rows, batches, settings or weights): "
                "name another --workdir, or delete it to begin anew"
            )
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.log.open("ab")
            self._file.truncate(len(whole) + bool(whole))  # what follows was cut off by a kill
            if not lines:
                self._write({"plan": plan})

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writes:
            self._file.close()

    def append(self, answers: Sequence[Answer]) -> None:
        """Adds the answers of the next batch; they are on disk when this returns."""
        self.batches.append(list(answers))
        if self._writes:
            self._write([_row(answer) for answer in answers])

    def finish(self) -> list[Answer]:
        """All answers in the order of their ids, which are now in `path`."""
        answers = sorted((answer for batch in self.batches for answer in batch), key=lambda answer: answer.id)
        if self._writes:
            save_answers(self.path, answers)
            self.log.unlink()
        return answers

    def _write(self, content: Any) -> None:
        self._file.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def evaluations(workdir: Path) -> dict[str, Path]:
    """The finished evaluations of a run by name; `NAME-without-MODALITY`, with a modality blanked, come after `NAME`."""
    found = sorted(workdir.glob("evaluation-*.json"), key=lambda path: path.stem)
    return {path.stem.removeprefix("evaluation-"): path for path in found}


def _row(answer: Answer) -> dict[str, Any]:
    """As plain data, what is not known left out."""
    defaults = {field.name: field.default for field in dataclasses.fields(Answer)}
    return {name: value for name, value in dataclasses.asdict(answer).items() if value != defaults[name]}


def _answer(row: Mapping[str, Any]) -> Answer:
    return Answer(**{**row, "probabilities": tuple(row.get("probabilities", ()))})
