"""Answers on disk: what a kill leaves, and what is read out of a response."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisapiens_jax.evaluation.answers import Answer, AnswerLog, extract_answer, load_answers, save_answers

BATCHES = [[Answer(4 * b + i, "siq2", "é|\n", "x", "y" * 50, likelihood=0.1 * i) for i in reversed(range(4))] for b in range(5)]
ALL = sorted((answer for batch in BATCHES for answer in batch), key=lambda answer: answer.id)

# Appends forever, until it is killed: batch n holds the answer n.
WRITER = """
import sys
from pathlib import Path
from omnisapiens_jax.evaluation.answers import Answer, AnswerLog
with AnswerLog(Path(sys.argv[1]), "plan") as log:
    print("ready", flush=True)
    while True:
        n = len(log.batches)
        log.append([Answer(n, "siq2", "g" * (n * 7919 % 5000), "p", "t")])
        print(n, flush=True)
"""


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [Answer(1, "cremad", "sad", "sad", "", "text_audio", probabilities=(0.25, 0.75)), Answer(2, "siq2", "a", "b", "b", verdict=0.0)]
    save_answers(tmp_path / "evaluation-x.json", rows)
    assert load_answers(tmp_path / "evaluation-x.json") == rows
    assert [row.confidence for row in rows] == [0.75, None] and [row.correct for row in rows] == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation-x.json"]


@settings(deadline=None, max_examples=40)
@given(cut=st.floats(0, 1))
def test_a_log_cut_anywhere_loses_at_most_the_batch_it_was_at(cut: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("log") / "evaluation-x.json"
    with AnswerLog(path, "plan") as log:
        for batch in BATCHES:
            log.append(batch)
    content = log.log.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    kept = content[: round(cut * len(content))]
    log.log.write_bytes(kept)
    with AnswerLog(path, "plan") as again:
        assert len(again.batches) == max(sum(end <= len(kept) for end in ends) - 1, 0)
        for batch in BATCHES[len(again.batches) :]:
            again.append(batch)
        assert again.finish() == ALL == load_answers(path)
    assert not again.log.exists()


def test_a_process_that_is_killed_loses_nothing_it_has_told_of(tmp_path: Path) -> None:
    path, told = tmp_path / "evaluation-x.json", -1
    for moment in (0.0, 0.005, 0.02, 0.05):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        last = max([told, *(int(line) for line in process.stdout.read().split("\n")[:-1])])
        assert process.wait() == -signal.SIGKILL
        with AnswerLog(path, "plan", writes=False) as log:
            assert [batch[0].id for batch in log.batches] == list(range(len(log.batches)))
            assert last + 1 <= len(log.batches) <= last + 2  # the one more was on disk, but it could not tell any more
            told = len(log.batches) - 1
    assert told > 5


def test_a_log_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evaluation-x.json"
    with AnswerLog(path, "plan") as log:
        log.append(BATCHES[0])
    with pytest.raises(ValueError, match="holds 4 answers of another evaluation"):
        AnswerLog(path, "other plan")
    log.log.write_text('{"plan": "plan"}\nrubbish\n{}\n')
    with pytest.raises(ValueError, match="is broken .*: delete it"):
        AnswerLog(path, "plan")


def test_a_process_that_only_reads_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "evaluation-x.json"
    with AnswerLog(path, "plan", writes=False) as log:
        log.append(BATCHES[0])
        assert log.finish() == sorted(BATCHES[0], key=lambda answer: answer.id)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<think>\boxed{} hm</think> \boxed{ Sad } or \boxed{happy}", "sad"),  # an empty box does not count
        (r"\boxed{\text{sad}} <answer>happy</answer>", "happy"),  # nor one with braces inside
        ("<answer>\nHigh-\nly </answer>", "high-\nly"),
        ("  [1] Neutral\n", "[1] neutral"),
        ("", ""),
    ],
)
def test_what_a_response_answers(text: str, answer: str) -> None:
    assert extract_answer(text) == answer
