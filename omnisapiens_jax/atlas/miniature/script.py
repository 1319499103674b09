"""What every row of the miniature atlas says and shows, decided from a seed before any media are made.

Each modality carries the row's label with probability `CARRIES`, drawn independently, and else shows neutral: one modality alone
cannot be right always, all together nearly can. Five datasets are different: in `mmsd` words and delivery agree (sincere) or
disagree (sarcastic), each cue alone being balanced; in `urfunny` a laugh comes after the words (humour) or before (none); in
`siq2` the face hides what the voice tells, or not; in `mimeqa` nobody speaks and the face alone tells; `mmpsy_anxiety` is a
written questionnaire.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from omnisapiens_jax.atlas.miniature import words

CARRIES = 0.75
_INTERJECTED = 0.8  # of the sentences open with an interjection
_PUNCTUATED = 0.5  # of the sentences end with the mark of what they say, the others with a full stop
_TAGLESS = 0.3  # of the rows leave the media tags out of the problem

EMOTIONS = ("anger", "disgust", "fear", "happy", "neutral", "sad")
_HIDEABLE = ("anger", "fear", "sad")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One source of the atlas: its share of all rows, its wording, and its answers."""

    share: float
    task: str
    signature: str
    opener: str
    question: str
    answers: tuple[str, ...]


DATASETS: dict[str, Dataset] = {
    "cremad": Dataset(0.13, "emotion_cls", "text_audio", "A speech clip.", "Which emotion does the speaker express?", EMOTIONS),
    "meld_emotion": Dataset(
        0.15, "emotion_cls", "text_video_audio", "A conversation clip.", "Which emotion does the speaker express?", EMOTIONS
    ),
    "meld_senti": Dataset(
        0.12, "sentiment_cls", "text_video_audio", "A conversation clip.", "Which sentiment does the speaker express?",
        ("negative", "neutral", "positive"),
    ),
    "mmsd": Dataset(
        0.1, "sarcasm_cls", "text_video_audio", "A show clip.", "Is the speaker sarcastic?", ("not sarcasm", "sarcasm")
    ),
    "urfunny": Dataset(0.08, "humour_cls", "text_video_audio", "A talk clip.", "Is this humour?", ("not humour", "humour")),
    "daicwoz": Dataset(
        0.08, "depression_cls", "text_audio", "A clinical interview.", "Does the speaker sound depressed?", ("no depression", "depression")
    ),
    "mmpsy_anxiety": Dataset(0.08, "anxiety_cls", "text", "A questionnaire.", "Is the writer anxious?", ("no anxiety", "anxiety")),
    "siq2": Dataset(
        0.06, "social_qa", "text_video_audio", "A social clip.", "What does the speaker feel, and is it hidden?",
        tuple(f"{feeling}, {how}" for feeling in _HIDEABLE for how in ("shown", "hidden")),
    ),
    "mimeqa": Dataset(0.2, "nvc_qa", "text_video_audio", "A mime.", "What does the mime act out?", EMOTIONS),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """Everything that decides one row; `voice`, `face`, `words` name what each modality shows ("" where it has none)."""

    split: str
    index: int
    dataset: str
    answer: str
    speaker: int  # in words.SPEAKERS[split]; also decides the drawn person
    template: str
    content: tuple[str, ...]  # the open-class words said
    transcript: str
    voice: str
    face: str
    words: str
    laugh: str  # "", "before" or "after" the words
    tagged: bool

    @property
    def name(self) -> str:
        """The stem of the row's media files, with the speaker in it."""
        return f"{self.dataset}_s{self.speaker:02d}_{self.index:05d}"

    @property
    def problem(self) -> str:
        """The prompt of the row, in the benchmark's shape."""
        dataset = DATASETS[self.dataset]
        lines = [dataset.opener]
        if self.tagged:
            lines += [tag for name, tag in (("video", "<video>"), ("audio", "<audio>")) if name in dataset.signature]
        if self.transcript:
            lines.append(f"Transcript: {self.transcript}")
        lines.append(dataset.question)
        if not dataset.task.endswith("_qa"):
            lines[-1] += f" Choose one: {', '.join(dataset.answers)}."
        return "\n".join(lines)

    @property
    def rationale(self) -> str:
        """One line naming what each modality shows."""
        shown = [("face", self.face), ("voice", self.voice), ("words", self.words)]
        if self.laugh:
            shown = [("laugh", f"{self.laugh} the words")]
        return " ".join(f"{modality}: {what}." for modality, what in shown if what)


def split_sizes(samples: int) -> dict[str, int]:
    """Rows of each split: 70 % train, a twelfth validation, the rest test."""
    train, validation = round(samples * 0.7), round(samples / 12)
    return {"train": train, "validation": validation, "test": samples - train - validation}


def write_script(samples: int, seed: int) -> dict[str, list[Row]]:
    """All rows of the three splits. Within a dataset of a split, answers are as even as the count allows."""
    if samples < 3 * len(DATASETS) * 4:
        raise ValueError(f"samples is {samples}; the miniature atlas needs at least {3 * len(DATASETS) * 4}")
    return {
        split: _write_split(split, size, np.random.default_rng([seed, number]))
        for number, (split, size) in enumerate(split_sizes(samples).items())
    }


def _write_split(split: str, size: int, rng: np.random.Generator) -> list[Row]:
    edges = np.round(np.cumsum([0.0, *(d.share for d in DATASETS.values())]) * size).astype(int)
    drafts: list[tuple[str, int]] = []
    for (name, dataset), first, last in zip(DATASETS.items(), edges[:-1], edges[1:], strict=True):
        # `cell` runs over twice the answers, so that each answer's two decoy halves are even as well
        cells = 2 * len(dataset.answers)
        drafts += [(name, int(cell % cells)) for cell in range(last - first)]
    order = rng.permutation(len(drafts))
    return [_write_row(split, index, *drafts[int(draft)], rng) for index, draft in enumerate(order)]


def _write_row(split: str, index: int, name: str, cell: int, rng: np.random.Generator) -> Row:
    """One row; `cell` counts through the answers, and through them again for the other half of the decoys."""
    dataset = DATASETS[name]
    answer = dataset.answers[cell % len(dataset.answers)]
    half = cell // len(dataset.answers)

    def carried(style: str) -> str:
        return style if rng.random() < CARRIES else "neutral"

    laugh = ""
    if name == "mmsd":
        said = "happy" if half else "disgust"
        delivery = "happy" if (answer == "not sarcasm") == (said == "happy") else "flat"
        voice, face = carried(delivery), carried(delivery)
    elif name == "urfunny":
        said, voice, face, laugh = "joke", "neutral", carried("happy"), "after" if answer == "humour" else "before"
    elif name == "siq2":
        said = "neutral"
        voice, how = answer.split(", ")
        face = "happy" if how == "hidden" else voice
    elif name == "mimeqa":
        said, voice, face = "", "", answer
    elif name == "mmpsy_anxiety":
        said, voice, face = ("high" if answer == "anxiety" else "low"), "", ""
    else:
        if name == "meld_senti":
            negative = str(rng.choice(["anger", "sad", "disgust"]))
            style = {"negative": negative, "neutral": "neutral", "positive": "happy"}[answer]
        elif name == "daicwoz":
            style = "sad" if answer == "depression" else "neutral"
        else:
            style = answer
        voice, face, said = carried(style), carried(style), carried(style)
    if "video" not in dataset.signature:
        face = ""
    template, content, transcript = _say(split, name, said, rng)
    return Row(
        split=split,
        index=index,
        dataset=name,
        answer=answer,
        speaker=int(rng.integers(len(words.SPEAKERS[split]))),
        template=template,
        content=content,
        transcript=transcript,
        voice=voice,
        face=face,
        words=said,
        laugh=laugh,
        tagged=bool(rng.random() >= _TAGLESS),
    )


def _say(split: str, dataset: str, said: str, rng: np.random.Generator) -> tuple[str, tuple[str, ...], str]:
    """Template, content words and the finished sentence."""

    def pick(pool: tuple[str, ...]) -> str:
        return str(pool[int(rng.integers(len(pool)))])

    if not said:
        return "", (), ""
    if dataset == "mmpsy_anxiety":
        template = pick(words.QUESTIONNAIRE[split])
        worries = tuple(str(w) for w in rng.choice(words.WORRIES[split], 3, replace=False))
        other = {"high": "low", "low": "high"}[said]
        answers = [pick(words.FREQUENCIES[said if rng.random() < CARRIES else other]) for _ in worries]
        filled = template.format(*(piece for pair in zip(worries, answers, strict=True) for piece in pair))
        return template, worries, filled
    if said == "joke":
        template = pick(words.JOKES[split])
        content = (pick(words.JOKE_NOUNS[split]), pick(words.JOKE_ADJECTIVES[split]))
        return template, content, _sentence(template.format(noun=content[0], adj=content[1]), "", ".")
    adjective = pick(words.ADJECTIVES[said][split])
    interjection = pick(words.INTERJECTIONS[said]) if dataset == "mmsd" or rng.random() < _INTERJECTED else ""
    if dataset == "daicwoz":
        template, content = pick(words.CLINIC[split]), (adjective,)
        text = template.format(adj=adjective)
    else:
        template, content = pick(words.TEMPLATES[split]), (pick(words.NOUNS[split]), adjective)
        text = template.format(noun=content[0], adj=adjective)
    return template, content, _sentence(text, interjection, words.PUNCTUATION[said] if rng.random() < _PUNCTUATED else ".")


def _sentence(text: str, interjection: str, punctuation: str) -> str:
    text = f"{interjection}, {text}" if interjection else text
    return text[0].upper() + text[1:] + punctuation
