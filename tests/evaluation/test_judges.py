"""Judges of free-form answers; the language model's against a service on this machine that answers well, badly, late or not at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnisapiens_jax.evaluation.answers import Answer
from omnisapiens_jax.evaluation.judges import Embedding, Exact, Item, JudgeError, Language, Service, TokenF1, judged

KINDS = ("openai", "anthropic")


class Company:
    """A service that speaks both interfaces. The candidate's text says how it reacts."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.over = threading.Event()
        company = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                company.asked.append((self.path, body, {name.lower(): value for name, value in self.headers.items()}))
                prompt = body["messages"][-1]["content"]
                candidate = prompt.rpartition("Candidate answer: ")[2]
                times = sum(prompt == other["messages"][-1]["content"] for _, other, _ in company.asked)
                if candidate == "hangs":
                    company.over.wait(20)
                    return
                status = {"busy once": 429, "broken once": 500}.get(candidate, 200) if times == 1 else 200
                status = {"always broken": 503, "refused": 400, "no key": 401}.get(candidate, status)
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if candidate == "page" else "application/json")
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(b"<html>true" if candidate == "page" else json.dumps(self.reply(candidate)).encode())

            def reply(self, candidate: str) -> Any:
                right = json.dumps({"correct": candidate != "wrong", "explanation": f"about {candidate}"})
                text = {
                    "nonsense": "I would say it is True.",
                    "nonsense, no": "cannot say",
                    "in a block": f"```json\n{right}\n```",
                    "silent": "",
                    "no verdict": '{"correct": "maybe"}',
                }.get(candidate, right)
                if candidate == "other json":
                    return {"detail": "ok"}
                if self.path.endswith("/chat/completions"):
                    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
                    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
                message = {"id": "x", "type": "message", "role": "assistant", "model": "m", "content": [{"type": "text", "text": text}]}
                return message | {"stop_reason": "end_turn", "stop_sequence": None, "usage": {"input_tokens": 100, "output_tokens": 10}}

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def company(monkeypatch: pytest.MonkeyPatch) -> Iterator[Company]:
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "a key")
    made = Company()
    yield made
    made.over.set()
    made.server.shutdown()
    made.server.server_close()


def judge(company: Company, cache: Path, kind: str = "openai", **changes: Any) -> Language:
    return Language(Service(kind, base_url=company.url, **({"tries": 2, "timeout": 5.0, "prices": (1.0, 10.0)} | changes)), cache)


def items(*candidates: str, dataset: str = "siq2") -> list[Item]:
    return [Item(dataset, "Why?", candidate, "because") for candidate in candidates]


@pytest.mark.parametrize("kind", KINDS)
def test_good_bad_and_broken_replies(kind: str, company: Company, tmp_path: Path) -> None:
    candidates = ["right", "wrong", "right", "nonsense", "nonsense, no", "silent", "no verdict", "in a block", "busy once", "broken once"]
    made = judge(company, tmp_path / "cache.jsonl", kind)
    verdicts = made(items(*candidates))
    assert [verdict and verdict.score for verdict in verdicts] == [1, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert verdicts[0] and verdicts[0].explanation == "about right"
    assert made.counts["asked"] == 9 and len(company.asked) == 11  # one came twice; two were asked again
    assert made.counts["malformed"] == 4 and made.counts["retries"] == 2 and made.counts["dropped"] == 0
    assert made.counts["tokens in"] == 900 and made.counts["tokens out"] == 90
    assert made.cost == pytest.approx((900 * 1 + 90 * 10) / 1e6)
    assert "9 questions asked, 0 known from before, 2 tries repeated, 4 replies malformed, 0 answers dropped" in made.told()


@pytest.mark.parametrize("kind", KINDS)
def test_what_gets_no_reply_is_dropped_and_counted(kind: str, company: Company, tmp_path: Path) -> None:
    made = judge(company, tmp_path / "cache.jsonl", kind, timeout=0.3)
    rows = [*items("right", "hangs", "always broken", "refused", "page", "other json"), Item("siq2", "", "right", "because")]
    verdicts = made(rows)
    assert [verdict and verdict.score for verdict in verdicts] == [1.0, None, None, None, None, None, None]
    told = made.told()
    for loss in ("1 timed out", "1 refused with status 503", "1 refused with status 400", "2 answered with something else"):
        assert loss in told
    assert "6 answers dropped" in told and "1 without a question" in told
    again = judge(company, tmp_path / "cache.jsonl", kind, timeout=0.3)
    assert again(items("right", "refused"))[1] is None and again.counts["asked"] == 1  # what was lost is asked again, the rest is known


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_asks_nothing(kind: str, company: Company, tmp_path: Path) -> None:
    cache = tmp_path / "kept" / "cache.jsonl"
    first = judge(company, cache, kind)(items("right", "wrong", "nonsense"))
    with cache.open("ab") as file:
        file.write(b'{"asked": "cut off by a ki')
    before, again = len(company.asked), judge(company, cache, kind)
    assert again(items("right", "wrong", "nonsense")) == first and len(company.asked) == before
    assert again.counts["known from before"] == 3 and again.cost == 0
    for other in (items("right", dataset="mimeqa"), [Item("siq2", "How?", "right", "because")]):  # another rubric, another question
        again(other)
    assert len(company.asked) == before + 2
    assert judge(company, cache, kind, model="other")(items("right")) and len(company.asked) == before + 3
    assert len(cache.read_text().splitlines()) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked(kind: str, company: Company, tmp_path: Path) -> None:
    judge(company, tmp_path / "cache.jsonl", kind)([Item("mimeqa", "What is it?", "a rope", "pulling a rope")])
    ((path, body, headers),) = company.asked
    assert body["messages"][-1] == {
        "role": "user",
        "content": "Question: What is it?\nReference answer: pulling a rope\nCandidate answer: a rope",
    }
    rubric = body["system"] if kind == "anthropic" else body["messages"][0]["content"]
    assert "mime" in rubric and "JSON" in rubric
    assert any(value.endswith("a key") for value in headers.values())
    if kind == "anthropic":
        assert (path, body["max_tokens"], body["model"]) == ("/v1/messages", 2048, "claude-3-5-haiku-20241022")
    else:
        assert (path, body["max_completion_tokens"], body["model"]) == ("/chat/completions", 2048, "gpt-5-nano-2025-08-07")
        assert body["response_format"]["json_schema"]["strict"] is True
        assert body["messages"][0]["role"] == "user"


def test_a_judge_that_cannot_work_says_so_at_once(company: Company, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JudgeError, match="openai refuses to judge with gpt-5-nano"):
        judge(company, tmp_path / "a.jsonl", concurrency=1)(items("no key", *map(str, range(50))))
    assert len(company.asked) < 10
    with pytest.raises(JudgeError, match=r"openai is not reached at http://127\.0\.0\.1:9 "):
        Language(Service("openai", base_url="http://127.0.0.1:9", tries=1), tmp_path / "b.jsonl")(items("x"))
    company.asked.clear()
    with pytest.raises(JudgeError, match="gave no verdict 4 times in a row, last: refused with status 503. The replies so far are kept"):
        judge(company, tmp_path / "e.jsonl", concurrency=1, tries=1)([Item("siq2", f"Why {i}?", "always broken", "x") for i in range(50)])
    assert len(company.asked) < 10
    (tmp_path / "c.jsonl").write_text("rubbish\n")
    with pytest.raises(ValueError, match="c.jsonl, line 1: not a kept reply of a judge"):
        judge(company, tmp_path / "c.jsonl")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(JudgeError, match="needs a key: set OPENAI_API_KEY"):
        judge(company, tmp_path / "d.jsonl")
    with pytest.raises(ValueError, match="unknown service 'oracle'; known: openai, anthropic"):
        Service("oracle")


def test_words_and_meanings() -> None:
    pairs = [Item("siq2", "", "The man is shy.", "a Shy man"), Item("siq2", "", "angry", "he is sad"), Item("siq2", "", "", "x")]
    assert [verdict and verdict.score for verdict in TokenF1()(pairs)] == [pytest.approx(2 * 2 / 5), 0, 0]
    assert [verdict and verdict.score for verdict in Exact()([Item("siq2", "", " Shy", "shy"), *pairs])] == [1, 0, 0, 0]

    def similarity(predictions: Any, golds: Any) -> np.ndarray:
        return np.array([0.8, 0.7, 0.1])

    near = Embedding(similarity, 0.7)
    assert [(verdict.score, verdict.explanation) for verdict in near(pairs) if verdict] == [
        (1, "cosine 0.800"),
        (1, "cosine 0.700"),
        (0, "cosine 0.100"),
    ]
    assert near.name == "MiniLM cosine >= 0.7" and near([]) == []


def test_only_free_form_answers_are_judged_and_lost_questions_are_found() -> None:
    rows = [
        Answer(0, "cremad", "sad", "sad", "sad"),
        Answer(1, "siq2", "He is shy", "he is shy", "x", question="How is he?"),
        Answer(2, "siq2", "Because", "no", "x"),
        Answer(3, "siq2", "Nobody knows", "no", "x"),
    ]
    seen: list[Item] = []

    class Listening(Exact):
        def __call__(self, items: Any) -> Any:
            seen.extend(items)
            return [verdict if item.question else None for item, verdict in zip(items, super().__call__(items), strict=True)]

    found = judged(rows, Listening(), questions={"because": "Why?"})
    assert found[0] == rows[0]
    assert [(row.question, row.verdict, row.judge) for row in found[1:]] == [
        ("How is he?", 1.0, "exact match"),
        ("Why?", 0.0, "exact match"),
        ("", None, "exact match"),
    ]
    assert [item.reference for item in seen] == ["he is shy", "because", "nobody knows"]
