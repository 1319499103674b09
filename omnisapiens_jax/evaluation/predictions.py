"""Prediction files of the original, read and written: its classifiers' numbers, its policies' texts, and its lists of free-form answers.

{"predictions": [7, 3], "ground_truths": [7, 2], "datasets": ["cremad", "mosei_senti"]}        heads: global class indices
{"predictions": ["...\\boxed{sad}"], "ground_truths": ["sad"], "datasets": ["cremad"]}          whole responses
[{"dataset": "siq2", "pred": "she is shy", "gold": "shyness"}]                                 free-form answers
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from omnisapiens_jax.atlas.labels import HBA, LabelScheme
from omnisapiens_jax.evaluation.answers import Answer, extract_answer, load_answers

Form = Literal["classes", "texts", "qa"]
FORMS = get_args(Form)
_COLUMNS = ("predictions", "ground_truths", "datasets")
_SHOWN = 5


def read_predictions(path: Path, scheme: LabelScheme = HBA) -> list[Answer]:
    """The answers of a file: one of ours (`evaluation-NAME.json`), or one of the original's, whose rows get their places as ids.

    A prediction that is no label is read as it is, and is wrong; a gold answer has to be right.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, its columns differ in length, or it has unknown datasets or gold labels (they are counted).
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            rows = _from_columns(content, scheme)
        elif not isinstance(content, list) or not content:
            raise ValueError("it holds no rows")
        elif "pred" in content[0]:
            rows = [_free_form(i, row) for i, row in enumerate(content)]
        else:
            rows = load_answers(path)
    except (ValueError, TypeError, KeyError, IndexError) as reason:
        what = f"has no {reason}" if isinstance(reason, KeyError) else str(reason)
        raise ValueError(
            f"{path} is not a file of answers ({what}): expected one that an evaluation wrote, an object of {', '.join(_COLUMNS)}, or a "
            "list of objects with dataset, pred and gold"
        ) from None
    _check(path, rows, scheme)
    return rows


def write_predictions(path: Path, answers: Sequence[Answer], form: Form, scheme: LabelScheme = HBA) -> int:
    """Writes answers as the original does; returns how many rows have no place in that form and were left out.

    `classes` has the classification rows as global class indices (-1 for what is no label), `texts` every row with its whole response,
    `qa` the free-form rows, with the question and the verdict if a judge has seen them.
    """
    free = [scheme.dataset(answer.dataset).domain is None for answer in answers]
    kept = [answer for answer, is_free in zip(answers, free, strict=True) if form == "texts" or is_free == (form == "qa")]
    if form == "qa":
        content: Any = [_as_free_form(answer) for answer in kept]
    else:
        if form == "classes":
            said = [scheme.prediction(answer.dataset, answer.prediction) for answer in kept]
            golds = [scheme.index(answer.dataset, answer.gold) for answer in kept]
        else:
            said, golds = [answer.text or answer.prediction for answer in kept], [answer.gold for answer in kept]
        content = dict(zip(_COLUMNS, (said, golds, [answer.dataset for answer in kept]), strict=True))
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    draft.replace(path)
    return len(answers) - len(kept)


def _from_columns(content: dict[str, Any], scheme: LabelScheme) -> list[Answer]:
    predictions, golds, datasets = (content[name] for name in _COLUMNS)
    if not len(predictions) == len(golds) == len(datasets):
        lengths = ", ".join(f"{len(content[name])} {name}" for name in _COLUMNS)
        raise ValueError(f"its columns differ in length: {lengths}")
    if not golds:
        raise ValueError("it holds no rows")
    rows = []
    for i, (prediction, gold, dataset) in enumerate(zip(predictions, golds, datasets, strict=True)):
        if isinstance(prediction, str):
            text, said = prediction, extract_answer(prediction)
        else:
            text, said = "", _label(prediction, dataset, scheme)
        rows.append(Answer(i, dataset, gold if isinstance(gold, str) else _label(gold, dataset, scheme), said, text))
    return rows


def _label(index: Any, dataset: str, scheme: LabelScheme) -> str:
    """The label of a global class index; of a number outside the dataset's domain something that is no label."""
    if isinstance(index, bool) or not isinstance(index, int):
        raise ValueError(f"{index!r} is neither a class index nor a text")
    try:
        known = scheme.head_classes(scheme.head(dataset))
    except KeyError:
        known = range(0)
    return scheme.classes[index][1] if index in known else f"class {index}"


def _free_form(i: int, row: dict[str, Any]) -> Answer:
    answer = Answer(i, row["dataset"], row["gold"], extract_answer(row["pred"]), row["pred"], question=row.get("question", ""))
    if "graded_result" not in row:
        return answer
    why = row.get("graded_result_explanation", "")
    return dataclasses.replace(answer, verdict=float(row["graded_result"]), judge="its file", explanation=why)


def _as_free_form(answer: Answer) -> dict[str, Any]:
    row: dict[str, Any] = {"dataset": answer.dataset, "pred": answer.prediction, "gold": answer.gold}
    if answer.question:
        row["question"] = answer.question
    if answer.verdict is not None:
        row |= {"graded_result": answer.verdict >= 0.5, "graded_result_explanation": answer.explanation}
    return row


def _check(path: Path, rows: Sequence[Answer], scheme: LabelScheme) -> None:
    """Raises `ValueError` that counts the rows of unknown datasets and gold labels, and shows the first."""
    faults, places = Counter[str](), {}
    for answer in rows:
        try:
            if scheme.dataset(answer.dataset).domain is not None:
                scheme.index(answer.dataset, answer.gold)
        except KeyError as reason:
            faults[reason.args[0]] += 1
            places.setdefault(reason.args[0], answer.id)
    if faults:
        shown = [f"  {count} rows, the first is row {places[fault]}: {fault}" for fault, count in faults.most_common(_SHOWN)]
        more = [f"  ... and {len(faults) - _SHOWN} other kinds"] if len(faults) > _SHOWN else []
        raise ValueError("\n".join([f"{path}: {faults.total()} of {len(rows)} rows do not fit the label scheme", *shown, *more]))
