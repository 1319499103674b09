"""Judges of free-form answers: a language model with the benchmark's rubrics, an embedder with a threshold, and the words themselves.

    Exact        the same answer, white space and case aside
    TokenF1      overlap of the words, as SQuAD counts it: a verdict between 0 and 1
    Embedding    whether the meanings are near enough: cosine of the sentence embeddings, against a threshold
    Language     a language model behind an OpenAI- or Anthropic-compatible service (extra `judge`), asked once: answers are kept

A judge gives each item a verdict, or None where it could not; those are counted and belong to no score.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import importlib
import json
import os
import re
import string
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from omnisapiens_jax.atlas.labels import HBA, LabelScheme
from omnisapiens_jax.evaluation.answers import Answer
from omnisapiens_jax.rl.rewards import Similarity


@dataclasses.dataclass(frozen=True)
class Item:
    """What a judge looks at: an answer to a question, and the answer that is right. `question` is "" where nobody knows it."""

    dataset: str
    question: str
    candidate: str
    reference: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How right an answer is, from 0 to 1, and why."""

    score: float
    explanation: str = ""


class Judge(Protocol):
    """`name` says who judges and by what settings: only verdicts of the same name can be compared."""

    @property
    def name(self) -> str:
        """As above."""
        ...

    def __call__(self, items: Sequence[Item]) -> list[Verdict | None]:
        """A verdict on each item."""
        ...


class JudgeError(ValueError):
    """A judge that cannot work at all: no key, no such model, a library that is not installed."""


class Exact:
    """Right when the words are the same, white space and case aside."""

    name = "exact match"

    def __call__(self, items: Sequence[Item]) -> list[Verdict | None]:
        """Verdicts 0 or 1."""
        return [Verdict(float(item.candidate.strip().lower() == item.reference.strip().lower())) for item in items]


class TokenF1:
    """F1 of the words, punctuation and articles left out."""

    name = "token F1"

    def __call__(self, items: Sequence[Item]) -> list[Verdict | None]:
        """Verdicts from 0 to 1."""
        return [Verdict(_overlap(_words(item.candidate), _words(item.reference))) for item in items]


class Embedding:
    """Right when the cosine of the two embeddings reaches a threshold."""

    def __init__(self, similarity: Similarity, threshold: float) -> None:
        """`similarity` gives cosines, such as `rl.similarity.Similarity`."""
        self._similarity, self._threshold = similarity, threshold
        self.name = f"MiniLM cosine >= {threshold:g}"

    def __call__(self, items: Sequence[Item]) -> list[Verdict | None]:
        """Verdicts 0 or 1; the explanation is the cosine."""
        cosines = self._similarity([item.candidate for item in items], [item.reference for item in items]) if items else []
        return [Verdict(float(cosine >= self._threshold), f"cosine {cosine:.3f}") for cosine in cosines]


_GENERAL = (
    "You grade a short answer to a question about a clip, beside a reference answer. Decide whether the candidate is correct.\n"
    "- It must commit to one coherent main answer. Judge only the first clause that answers the question; ignore what follows, unless it "
    "contradicts it.\n"
    "- A wrong main subject or main object is incorrect, and so is an answer that contradicts itself or the reference.\n"
    "- Wording, length and order do not matter."
)
RUBRICS: Mapping[str, str] = {
    "mimeqa": "- The clips show mime. Be lenient: being in the right area is enough. Objects that are only acted out may be named where "
    "they fit the scene, but a story that nothing in the reference supports is incorrect.",
    "siq2": "- The questions are about social situations. The candidate has to mean the same as the reference; being about the same topic "
    "is not enough.",
    "intentqa": "- The questions are about why people do something. A plausible intent in the same area is enough, and additions that "
    "agree with it are allowed, but the core intent of the reference must not be missing.",
}
"""What is added for a dataset."""

_FORM = 'Reply with a JSON object alone: {"correct": true or false, "explanation": "one sentence"}.'
_SCHEMA = {
    "type": "object",
    "properties": {"correct": {"type": "boolean"}, "explanation": {"type": "string"}},
    "required": ["correct", "explanation"],
    "additionalProperties": False,
}

MODELS: Mapping[str, str] = {"openai": "gpt-5-nano-2025-08-07", "anthropic": "claude-3-5-haiku-20241022"}
"""The judges of the benchmark."""

PRICES: Mapping[str, tuple[float, float]] = {MODELS["openai"]: (0.05, 0.40), MODELS["anthropic"]: (0.80, 4.00)}
"""US dollars for a million tokens in and out, as they were listed when the models came out."""

_KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
_TOKENS = 2048  # of a reply
_HOPELESS = (401, 403, 404)  # asking again, or about something else, changes nothing
_PATIENCE = 4  # times the concurrency: items in a row without a verdict, after which there is no use in going on
_REPEATED = (408, 409, 429)  # and 500 and above: what the libraries ask again after


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a service said, and the tokens it counted."""

    text: str
    tokens_in: int
    tokens_out: int


@dataclasses.dataclass(frozen=True)
class Service:
    """How a language model is reached.

    Attributes:
        kind: `openai` or `anthropic`: whose interface it speaks.
        model: its name there ("" takes the benchmark's judge).
        base_url: of a compatible service; None is the company's own.
        timeout: seconds that one try may take.
        tries: of one question; the waits between them grow exponentially, and follow what the service asks for.
        concurrency: questions under way at the same time.
        prices: US dollars for a million tokens in and out, None where they are not known.
    """

    kind: str
    model: str = ""
    base_url: str | None = None
    timeout: float = 60.0
    tries: int = 8
    concurrency: int = 16
    prices: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in MODELS:
            raise ValueError(f"unknown service {self.kind!r}; known: {', '.join(MODELS)}")
        if self.tries < 1 or self.concurrency < 1 or self.timeout <= 0:
            raise ValueError(f"tries {self.tries} and concurrency {self.concurrency} must be at least 1, timeout {self.timeout} above 0")
        model = self.model or MODELS[self.kind]
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "prices", self.prices or PRICES.get(model))


class Language:
    """A language model that judges by the benchmark's rubrics.

    A reply is kept in the file of the cache as soon as it is there, so that no question is paid for twice. A reply that is not the JSON it
    should be counts as right if it holds the word "true" (the benchmark does so), and is counted. A question that gets no reply in all its
    tries has no verdict.
    """

    def __init__(self, service: Service, cache: Path) -> None:
        """Reads the key from `OPENAI_API_KEY` or `ANTHROPIC_API_KEY`.

        Raises:
            JudgeError: there is no key, or the library is not installed.
            ValueError: the cache is no such file.
        """
        self.service, self.name = service, service.model
        self.counts: collections.Counter[str] = collections.Counter()
        self._sdk, self._client = _connect(service)
        self._ask = {"openai": self._ask_openai, "anthropic": self._ask_anthropic}[service.kind]
        self._kept = _Kept(cache)
        self._lock = threading.Lock()
        self._in_a_row = 0  # items without a verdict
        self._ended = False

    def __call__(self, items: Sequence[Item]) -> list[Verdict | None]:
        """Verdicts 0 or 1; what one item says is asked once, however often it comes.

        Raises:
            JudgeError: the service refuses the key, does not know the model, or has ended.
        """
        asked = list(dict.fromkeys(item for item in items if item.question and self._key(item) not in self._kept))
        with ThreadPoolExecutor(self.service.concurrency, thread_name_prefix="judge") as pool:
            futures = [pool.submit(self._judge, item) for item in asked]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self.counts["items"] += len(items)
        self.counts["asked"] += len(asked)
        self.counts["without a question"] += sum(not item.question for item in items)
        self.counts["known from before"] += len({item for item in items if item.question} - set(asked))
        verdicts = [self._kept.get(self._key(item)) if item.question else None for item in items]
        self.counts["dropped"] += sum(verdict is None for verdict in verdicts)
        return verdicts

    @property
    def cost(self) -> float | None:
        """US dollars of what this process has asked, None where the prices are not known."""
        if self.service.prices is None:
            return None
        return sum(self.counts[f"tokens {way}"] * price for way, price in zip(("in", "out"), self.service.prices, strict=True)) / 1e6

    def told(self) -> str:
        """What was asked, what became of it, and what it cost."""
        c = self.counts
        cost = "at unknown prices" if self.cost is None else f"{self.cost:.4f} US dollars"
        known = ("items", "asked", "known from before", "retries", "malformed", "dropped", "replies", "tokens in", "tokens out")
        lost = {name: count for name, count in sorted(c.items()) if name not in known and count}
        why = f" ({', '.join(f'{count} {name}' for name, count in lost.items())})" if lost else ""
        return (
            f"{self.name}: {c['items']} answers, {c['asked']} questions asked, {c['known from before']} known from before, {c['retries']} "
            f"tries repeated, {c['malformed']} replies malformed, {c['dropped']} answers dropped{why}; {c['tokens in']} tokens in, "
            f"{c['tokens out']} out, {cost}"
        )

    def _judge(self, item: Item) -> None:
        """Asks and keeps the verdict; without a reply the loss is counted."""
        if self._ended:
            return
        rubric = "\n".join(filter(None, (_GENERAL, RUBRICS.get(item.dataset), _FORM)))
        prompt = f"Question: {item.question}\nReference answer: {item.reference}\nCandidate answer: {item.candidate}"
        repeated = self.service.tries - 1
        try:
            raw = self._ask(rubric, prompt)
            reply, repeated = self._read(raw.parse()), raw.retries_taken
        except self._sdk.APITimeoutError:
            return self._lost("timed out", repeated)
        except self._sdk.APIConnectionError as reason:
            if not self.counts["replies"]:
                raise self._end(f"is not reached at {self._client.base_url} ({reason})") from None
            return self._lost("not reached", repeated)
        except self._sdk.APIStatusError as reason:
            if reason.status_code in _HOPELESS:
                raise self._end(f"refuses to judge with {self.service.model} ({reason})") from None
            final = 400 <= reason.status_code < 500 and reason.status_code not in _REPEATED
            return self._lost(f"refused with status {reason.status_code}", 0 if final else repeated)
        except (ValueError, TypeError, AttributeError, IndexError):
            return self._lost("answered with something else", 0)
        verdict, malformed = _parse(reply.text)
        self._kept.put(self._key(item), verdict, reply.text)
        self._in_a_row = 0
        counts = {"malformed": int(malformed), "retries": repeated, "tokens in": reply.tokens_in, "tokens out": reply.tokens_out}
        self._count({"replies": 1, **counts})

    def _lost(self, why: str, repeated: int) -> None:
        """Counts an item without a verdict; so many in a row that the service must have ended are an error."""
        self._count({why: 1, "retries": repeated})
        self._in_a_row += 1
        if self._in_a_row >= _PATIENCE * self.service.concurrency:
            raise self._end(
                f"gave no verdict {self._in_a_row} times in a row, last: {why}. The replies so far are kept: when it "
                "answers again, the same command goes on"
            )

    def _end(self, why: str) -> JudgeError:
        """Nothing more is asked."""
        self._ended = True
        return JudgeError(f"{self.service.kind} {why}")

    def _count(self, counts: Mapping[str, int]) -> None:
        with self._lock:
            self.counts.update(counts)

    def _key(self, item: Item) -> str:
        parts = [self.service.kind, self.service.model, _GENERAL, RUBRICS.get(item.dataset, ""), *dataclasses.astuple(item)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _ask_openai(self, rubric: str, prompt: str) -> Any:
        return self._client.chat.completions.with_raw_response.create(
            model=self.service.model,
            messages=[{"role": "user", "content": rubric}, {"role": "user", "content": prompt}],
            response_format={"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": _SCHEMA}},
            max_completion_tokens=_TOKENS,
        )

    def _ask_anthropic(self, rubric: str, prompt: str) -> Any:
        return self._client.messages.with_raw_response.create(
            model=self.service.model, system=rubric, messages=[{"role": "user", "content": prompt}], max_tokens=_TOKENS
        )

    def _read(self, said: Any) -> Reply:
        used = said.usage  # some compatible services do not count
        if self.service.kind == "openai":
            return Reply(said.choices[0].message.content or "", *((used.prompt_tokens, used.completion_tokens) if used else (0, 0)))
        text = "".join(part.text for part in said.content if part.type == "text")
        return Reply(text, *((used.input_tokens, used.output_tokens) if used else (0, 0)))


def judged(
    answers: Sequence[Answer], judge: Judge, scheme: LabelScheme = HBA, *, questions: Mapping[str, str] | None = None
) -> list[Answer]:
    """The answers with the judge's verdicts on the free-form ones; the others as they are.

    `questions` finds the question of an answer that has none by its gold answer in lower case, as the benchmark does (where several
    questions have the same answer, by the last).
    """
    places = [i for i, answer in enumerate(answers) if scheme.dataset(answer.dataset).domain is None]
    found = {i: answers[i].question or (questions or {}).get(answers[i].gold.strip().lower(), "") for i in places}
    items = [Item(answers[i].dataset, found[i], answers[i].prediction, answers[i].gold.strip().lower()) for i in places]
    result = list(answers)
    for i, verdict in zip(places, judge(items), strict=True):
        score, why = (None, "") if verdict is None else (verdict.score, verdict.explanation)
        result[i] = dataclasses.replace(answers[i], question=found[i], verdict=score, judge=judge.name, explanation=why)
    return result


def _connect(service: Service) -> tuple[Any, Any]:
    """The library of a service and a client. Both companies' libraries are made alike, and retry by themselves."""
    try:
        sdk = importlib.import_module(service.kind)
    except ImportError as reason:
        raise JudgeError(f"this judge needs the extra `judge`: pip install 'omnisapiens-jax[judge]' ({reason})") from reason
    key = os.environ.get(_KEYS[service.kind])
    if not key:
        raise JudgeError(f"this judge needs a key: set {_KEYS[service.kind]} (any text for a service of your own that wants none)")
    make = sdk.OpenAI if service.kind == "openai" else sdk.Anthropic
    return sdk, make(api_key=key, base_url=service.base_url, timeout=service.timeout, max_retries=service.tries - 1)


class _Kept:
    """Replies on disk by the digest of what was asked, a line each; a line that a kill cut off is asked for again."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._verdicts: dict[str, Verdict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole, _, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                row = json.loads(line)
                self._verdicts[row["asked"]] = _parse(row["reply"])[0]
            except (ValueError, KeyError, TypeError) as reason:
                raise ValueError(f"{path}, line {number}: not a kept reply of a judge ({reason}); name another --cache") from None
        self._file = path.open("ab")
        self._file.truncate(len(whole) + bool(whole))

    def __contains__(self, key: str) -> bool:
        return key in self._verdicts

    def get(self, key: str) -> Verdict | None:
        return self._verdicts.get(key)

    def put(self, key: str, verdict: Verdict, reply: str) -> None:
        with self._lock:
            self._verdicts[key] = verdict
            self._file.write(json.dumps({"asked": key, "reply": reply}, ensure_ascii=False).encode() + b"\n")
            self._file.flush()


def _parse(reply: str) -> tuple[Verdict, bool]:
    """The verdict of a reply, and whether it is not the JSON that it should be."""
    try:
        said = json.loads(reply[reply.index("{") : reply.rindex("}") + 1])  # some put it into a code block
        if isinstance(said["correct"], bool):
            return Verdict(float(said["correct"]), str(said.get("explanation", ""))), False
    except (ValueError, KeyError):
        pass
    return Verdict(float("true" in reply.lower()), reply), True


def _words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _overlap(candidate: Sequence[str], reference: Sequence[str]) -> float:
    common = (collections.Counter(candidate) & collections.Counter(reference)).total()
    if not candidate or not reference:
        return float(candidate == reference)
    return 2 * common / (len(candidate) + len(reference))
