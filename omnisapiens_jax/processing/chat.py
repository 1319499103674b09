"""From a problem to the ids of its prompt: tags, messages, the published chat template, placeholders expanded to exact counts."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

TAGS: Mapping[str, str] = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
PLACEHOLDERS: Mapping[str, str] = {
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
}
PLAIN_SYSTEM = "You are a helpful assistant."  # what the template inserts when no system message is given
OMNI_SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and visual inputs, "
    "as well as generating text and speech."
)
if hashlib.sha256(OMNI_SYSTEM.encode()).hexdigest() != "bc6a4e9906415f08930cbe9f543a281112f3fd112e28f439a94fce0da306ef73":
    raise AssertionError("OMNI_SYSTEM was edited: the published model is trained with exactly the official sentence")

# Instructions appended to a problem, with nothing in between. `think` is the reference's default (EasyR1's `math`, Apache 2.0).
FORMAT_PROMPTS: Mapping[str, str] = {
    "none": "",
    "think": (
        "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
        "The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
    ),
}

_TRANSCRIPT = re.compile(r"Transcript:[ \t]*(?P<words>[^\n]*)")


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a message: `kind` is "text", or "audio", "video" or "image" for the place of one medium (then `text` is empty)."""

    kind: str
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    parts: tuple[Part, ...]


def build_messages(
    problem: str, counts: Mapping[str, int], *, modalities: Sequence[str], format_prompt: str = "", system: str = "always"
) -> tuple[Message, ...]:
    """The messages of a problem with so many media (`counts`), as the reference builds them.

    Tags that the problem lacks are put in front: image, then video, then audio, each before what is there, so audio comes first in the
    end. Tags of modalities that are not enabled stay text. With audio enabled the official system sentence comes first, whether the row
    has audio or not; with `system="with_audio"` only if it has. Raises ValueError when the problem holds more tags than there are media.
    """
    text = problem + format_prompt
    enabled = {kind: tag for kind, tag in TAGS.items() if kind in modalities}
    for kind, tag in enabled.items():
        present, wanted = text.count(tag), counts.get(kind, 0)
        if present > wanted:
            raise ValueError(f"more placeholders than media: the problem holds {present} {tag}, the row {wanted} {kind} item(s)")
        text = tag * (wanted - present) + text
    pieces = re.split("(" + "|".join(map(re.escape, enabled.values())) + ")", text) if enabled else [text]
    kinds = {tag: kind for kind, tag in enabled.items()}
    parts = tuple(Part(kinds[piece]) if piece in kinds else Part("text", piece) for piece in pieces if piece)
    official = "audio" in modalities and (system == "always" or counts.get("audio", 0) > 0)
    return (*((Message("system", (Part("text", OMNI_SYSTEM),)),) if official else ()), Message("user", parts))


def render(messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
    """The published chat template: one placeholder a medium, not yet expanded."""
    turns = list(messages)
    if turns and turns[0].role != "system":
        turns.insert(0, Message("system", (Part("text", PLAIN_SYSTEM),)))
    text = "".join(
        f"<|im_start|>{turn.role}\n{''.join(p.text if p.kind == 'text' else PLACEHOLDERS[p.kind] for p in turn.parts)}<|im_end|>\n"
        for turn in turns
    )
    return text + ("<|im_start|>assistant\n" if generation_prompt else "")


def media_order(messages: Sequence[Message]) -> tuple[str, ...]:
    """The kind of every medium in reading order."""
    return tuple(part.kind for message in messages for part in message.parts if part.kind != "text")


def transcript_span(problem: str) -> tuple[int, int] | None:
    """Where the words of the transcript stand in `problem`: what follows "Transcript:" in its line.

    None where there is no transcript, where a media tag stands in its line, and where nothing follows that line: then the question may be
    part of it, and no one can tell them apart.
    """
    found = _TRANSCRIPT.search(problem)
    if found is None or not problem[found.end() :].strip() or any(tag in found["words"] for tag in TAGS.values()):
        return None
    return found.span("words")


@dataclasses.dataclass(frozen=True)
class WordDropout:
    """Leaves out words of a transcript, each with probability `odds`, as `seed` has it."""

    odds: float
    seed: int

    def __call__(self, problem: str) -> str:
        """`problem` without these words, each with the white space before it.

        One word stays at least. Only words that `transcript_span` finds go: media, question and options stay whole.
        """
        begin, end = transcript_span(problem) or (0, 0)
        words = re.findall(r"\s*\S+", problem[begin:end])
        if not words:
            return problem
        luck = np.random.default_rng(self.seed).random(len(words))
        kept = [word for word, own in zip(words, luck, strict=True) if own >= min(self.odds, luck.max())]
        return problem[:begin] + "".join(kept).lstrip() + problem[end:]


def shorten_transcript(problem: str, excess_tokens: int, encode: Callable[[str], list[int]]) -> str | None:
    """`problem` with its transcript cut after a word so that at least `excess_tokens` fewer tokens remain; None if that cannot be.

    Only what `transcript_span` finds is cut: media, question and options stay whole. An ellipsis marks the cut. `encode` gives the ids of
    a text.
    """
    if excess_tokens <= 0:
        return problem
    span = transcript_span(problem)
    if span is None:
        return None
    begin, end = span
    words = re.findall(r"\s*\S+", problem[begin:end])
    goal = len(encode(problem)) - excess_tokens

    def cut(kept: int) -> str:
        return problem[:begin] + "".join(words[:kept]) + " …" + problem[end:]

    low, high = 0, len(words) - 1  # the largest number of words that fits lies in [low, high]; kept = 0 may not fit either
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(encode(cut(middle))) <= goal else (low, middle - 1)
    return cut(low) if words and len(encode(cut(low))) <= goal else None
