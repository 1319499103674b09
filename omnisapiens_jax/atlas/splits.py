"""Split report: how many rows of each dataset and class every split has, and what leaked from one split into another.

python -m omnisapiens_jax.atlas.splits FOLDER [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omnisapiens_jax.atlas.faults import FaultLog
from omnisapiens_jax.atlas.labels import HBA, LabelScheme
from omnisapiens_jax.atlas.schema import MEDIA_FIELDS, Sample, SampleError
from omnisapiens_jax.atlas.sources import Source, open_splits
from omnisapiens_jax.processing.chat import transcript_span
from omnisapiens_jax.processing.descriptors.read import DescriptorError, read_content

FREE_TEXT = "(free text)"

# Who speaks, as the datasets' own file names tell it. MELD numbers its dialogues anew in each folder, so there the folder belongs to it.
SPEAKERS = {
    "cremad": r"(?:^|/)(?P<actor>1\d{3})_[A-Z]{3}_[A-Z]{3}_",
    "tess": r"(?:^|/)(?P<talker>OAF|YAF)_",
    "meld_emotion": r"(?P<dialogue>(?:^|.*/)dia\d+)_utt\d+",
    "meld_senti": r"(?P<dialogue>(?:^|.*/)dia\d+)_utt\d+",
    "daicwoz": r"(?:^|/)(?P<participant>\d{3})_(?:AUDIO|P)\b",
}

INTERVIEWS = ("mmpsy_anxiety", "mmpsy_depression")  # names do not tell who speaks, what was said does
_TELLING = 20  # words: fewer, such as a greeting, are said by more than one

Row = tuple[str, int, str]  # split, row, dataset
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Leak:
    """Rows of more than one split that share something.

    Attributes:
        kind: `media` (a file with the same bytes), `prompt` (the same words, in rows without media), `transcript` (the same interview,
            whatever is asked of it) or `speaker`.
        what: SHA-256 of the file or the words, or dataset and name of the speaker or dialogue.
        rows: (split, row, dataset) of all that share it.
    """

    kind: str
    what: str
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """What `split_report` found.

    Attributes:
        splits: their names.
        counts: (dataset, class) -> split -> rows; the class of free-form answers is `FREE_TEXT`.
        leaks: of every kind, in the order media, prompt, transcript, speaker.
        faults: rows that could not be read, and rows whose answer is no class of their dataset.
        known: rows whose speaker (or dialogue) the names of their media tell.
    """

    splits: tuple[str, ...]
    counts: Mapping[tuple[str, str], Mapping[str, int]]
    leaks: tuple[Leak, ...]
    faults: FaultLog
    known: int

    @property
    def rows(self) -> Counter[str]:
        """Rows that were counted, by split."""
        return sum((Counter(by_split) for by_split in self.counts.values()), Counter())

    def text(self, scheme: LabelScheme = HBA) -> str:
        """Tables for people: counts, then leaks."""
        header = ["task", "dataset", "class", *self.splits, "all", "paper"]
        table = [header]
        for name in _in_order(scheme, {dataset for dataset, _ in self.counts}):
            known = next((dataset for dataset in scheme.datasets if dataset.name == name), None)
            classes = [label for dataset, label in self.counts if dataset == name]
            order = {label: i for i, label in enumerate(known.labels)} if known else {}
            for label in sorted(classes, key=lambda label: (order.get(label, len(order)), label)):
                by_split = self.counts[name, label]
                table.append(["", name, label, *(f"{by_split.get(s, 0):,}" for s in self.splits), f"{sum(by_split.values()):,}", ""])
            sums = [sum(self.counts[name, label].get(split, 0) for label in classes) for split in self.splits]
            paper = f"{known.samples:,}" if known and known.samples else "?"
            table.append([known.benchmark if known else "?", name, "all", *(f"{n:,}" for n in sums), f"{sum(sums):,}", paper])
        rows = self.rows
        table.append(["", "all", "", *(f"{rows[split]:,}" for split in self.splits), f"{rows.total():,}", ""])
        lines = [_aligned(table, left=3), ""]
        if not self.leaks:
            lines.append("nothing was found in more than one split")
        for (kind, datasets, splits), (shared, leaked) in sorted(self._leaked().items()):
            lines.append(f"leak, {kind}: {shared:,} shared by {leaked:,} rows of {' and '.join(datasets)} in {', '.join(splits)}")
        telling = sum(sum(by_split.values()) for (name, _), by_split in self.counts.items() if name in SPEAKERS)
        lines.append(
            f"speakers: names of files tell them of {self.known:,} of {telling:,} rows of {', '.join(SPEAKERS)}; of no other dataset"
        )
        if self.faults:
            lines.append(self.faults.report())
        return "\n".join(lines)

    def plain(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        return {
            "splits": list(self.splits),
            "counts": [{"dataset": name, "class": label, **by_split} for (name, label), by_split in self.counts.items()],
            "leaks": [dataclasses.asdict(leak) for leak in self.leaks],
            "faults": [vars(fault) for fault in self.faults],
            "known": self.known,
        }

    def _leaked(self) -> dict[tuple[str, tuple[str, ...], tuple[str, ...]], tuple[int, int]]:
        """(kind, datasets, splits) -> things shared, rows that share them."""
        shared: Counter[Any] = Counter()
        rows: dict[Any, set[Row]] = defaultdict(set)
        for leak in self.leaks:
            key = leak.kind, tuple(sorted({d for _, _, d in leak.rows})), tuple(s for s in self.splits if s in {s for s, _, _ in leak.rows})
            shared[key] += 1
            rows[key] |= {*leak.rows}
        return {key: (count, len(rows[key])) for key, count in shared.items()}


def split_report(splits: Mapping[str, Source], *, threads: int = 2, progress: Progress | None = None) -> SplitReport:
    """Reads every row of every split once, media and all.

    Args:
        splits: name -> rows, as `open_splits` gives them.
        threads: rows read at once.
        progress: called with (rows done, rows in all).
    """
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    holders: dict[tuple[str, str], dict[Row, None]] = defaultdict(dict)
    faults, known, done = FaultLog(), 0, 0
    total = sum(len(source) for source in splits.values())
    for split, source in splits.items():
        with ThreadPoolExecutor(threads) as pool:
            for i, seen in enumerate(pool.map(lambda i, source=source: _look(source, i), range(len(source)))):
                done += 1
                if progress:
                    progress(done, total)
                faults_of_row, counted = seen
                for fault in faults_of_row:
                    faults.add(fault)
                if counted is None:
                    continue
                dataset, label, keys = counted
                counts[dataset, label][split] += 1
                known += any(kind == "speaker" for kind, _ in keys)
                for key in keys:
                    holders[key][split, i, dataset] = None
    kinds = ("media", "prompt", "transcript", "speaker")
    leaks = [Leak(*key, tuple(rows)) for key, rows in holders.items() if len({split for split, _, _ in rows}) > 1]
    leaks.sort(key=lambda leak: (kinds.index(leak.kind), leak.what))
    return SplitReport(tuple(splits), {key: dict(value) for key, value in counts.items()}, tuple(leaks), faults, known)


def speaker(dataset: str, name: str) -> str | None:
    """Who speaks in a medium of that name (path), as `"{dataset's family} {role} {name}"`; None where the name does not tell."""
    below = re.sub(r"^(images|videos|audios)/", "", name)  # one dialogue, not one to see and one to hear
    found = re.search(SPEAKERS[dataset], below) if dataset in SPEAKERS else None
    if not found:
        return None
    ((role, who),) = found.groupdict().items()
    return f"{dataset.split('_')[0]} {role} {who}"


_Counted = tuple[str, str, set[tuple[str, str]]]  # dataset, class, what may leak


def _look(source: Source, i: int) -> tuple[list[SampleError], _Counted | None]:
    try:
        sample = source[i]
    except SampleError as error:
        return [error], None
    faults: list[SampleError] = []
    try:
        HBA.check(sample)
    except SampleError as error:
        faults.append(error)
    names = _names(sample) if sample.dataset in SPEAKERS else ()
    keys = {("speaker", who) for name in names if (who := speaker(sample.dataset, name))}
    for field in MEDIA_FIELDS:
        for item in getattr(sample, field):
            try:
                keys.add(("media", _sha256(item)))
            except OSError as reason:
                faults.append(sample.error(f"{item} cannot be read ({reason.strerror})", kind="media", field=field))
    if (words := _interview(sample)) is not None:
        keys.add(("transcript", hashlib.sha256(words.encode()).hexdigest()))
    elif not any(getattr(sample, field) for field in MEDIA_FIELDS):
        keys.add(("prompt", hashlib.sha256(sample.problem.encode()).hexdigest()))
    return faults, (sample.dataset, _class(sample), keys)


def _interview(sample: Sample) -> str | None:
    """The words of an interview, None of other rows. Elsewhere many say the same: CREMA-D has twelve sentences."""
    if sample.dataset not in INTERVIEWS or (span := transcript_span(sample.problem)) is None:
        return None
    words = sample.problem[slice(*span)].split()
    return " ".join(words) if len(words) >= _TELLING else None


def _names(sample: Sample) -> tuple[str, ...]:
    """Paths of a row's media. Parquet drops them, but a descriptor says what file it is of."""
    if sample.names:
        return sample.names
    for items, key in ((sample.ext_video_feats, "video_path"), (sample.ext_audio_feats, "file_path")):
        if items and isinstance(items[0], bytes):
            try:
                _, content = read_content(items[0], "descriptor")
            except DescriptorError:  # told of when the atlas is prepared
                continue
            if isinstance(content.get(key), str):
                return (content[key],)
    return ()


def _class(sample: Sample) -> str:
    return FREE_TEXT if sample.kind == "qa" else sample.answer.strip().lower()


def _sha256(item: bytes | Path) -> str:
    if isinstance(item, bytes):
        return hashlib.sha256(item).hexdigest()
    with item.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_order(scheme: LabelScheme, names: set[str]) -> list[str]:
    known = [dataset.name for dataset in scheme.datasets if dataset.name in names]
    return known + sorted(names - {*known})


def _aligned(table: Sequence[Sequence[str]], *, left: int) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in table
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m omnisapiens_jax.atlas.splits", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="an atlas: a release in any form, or a prepared one")
    parser.add_argument("--json", type=Path, help="also write all of it there, every leaked row named")
    arguments = parser.parse_args(argv)

    def tell(done: int, total: int) -> None:
        if done % 500 == 0 or done == total:
            print(f"\r{done:,} of {total:,} rows", end="" if done < total else "\n", file=sys.stderr, flush=True)

    try:
        report = split_report(open_splits(arguments.folder), progress=tell)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(str(error))
    print(report.text())
    if arguments.json:
        arguments.json.write_text(json.dumps(report.plain(), indent=1) + "\n")


if __name__ == "__main__":
    main()
