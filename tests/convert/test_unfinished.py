"""A directory that appears whole or not at all, and work that goes on where a killed process stopped."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnisapiens_jax.convert import unfinished
from omnisapiens_jax.convert.unfinished import JOURNAL, Journal, whole_or_nothing
from omnisapiens_jax.processing.tensors import ConversionError

REPO = Path(__file__).resolve().parents[2]
FACTS = {"source": "here", "sizes": [1, 2]}
KEYS = ("one", "two", "three", "four")


def work(target: Path, facts: Any = FACTS, *, stop: Callable[[str], None] = lambda key: None) -> list[str]:
    """Writes a file for each key; returns those that were not there yet."""
    made = []
    with whole_or_nothing(target, facts) as (folder, journal):
        for key in KEYS:
            if key not in journal.done:
                (folder / key).write_text(f"content of {key}")
                made.append(key)
                stop(key)
                journal.add(key, {"length": len(key)})
        assert journal.done == {key: {"length": len(key)} for key in KEYS}
    return made


def kill(key: str) -> None:
    if key == "three":
        os.kill(os.getpid(), signal.SIGKILL)


Killed = Callable[[Path], Path]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """What a process leaves that SIGKILL stops after the third file is written, before it is in the journal."""
    first = tmp_path_factory.mktemp("killed") / "here"
    program = f"from pathlib import Path; from {__name__} import kill, work; work(Path({str(first)!r}), stop=kill)"
    child = subprocess.run([sys.executable, "-c", program], cwd=REPO, check=False)
    assert child.returncode == -signal.SIGKILL and not first.exists()

    def left(target: Path) -> Path:
        folder = target.with_name(f".{target.name}.unfinished")
        shutil.copytree(first.with_name(".here.unfinished"), folder)
        return folder

    return left


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_it_appears_when_all_of_it_is_there_and_nothing_else_beside_it(tmp_path: Path) -> None:
    assert work(tmp_path / "made" / "here", stop=lambda _: pytest.fail("too early") if (tmp_path / "made" / "here").exists() else None) == [
        *KEYS
    ]
    assert content(tmp_path / "made" / "here") == {key: f"content of {key}" for key in KEYS}
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["here"]


def test_work_that_was_killed_goes_on(tmp_path: Path, killed: Killed) -> None:
    left = killed(tmp_path / "here")
    assert {path.name for path in left.iterdir()} == {"one", "two", "three", JOURNAL}
    assert work(tmp_path / "here") == ["three", "four"]
    assert content(tmp_path / "here") == {key: f"content of {key}" for key in KEYS}
    assert not left.exists()


@pytest.mark.parametrize("lost", range(1, 40, 3))
def test_a_line_of_the_journal_that_was_not_finished_counts_for_nothing(tmp_path: Path, lost: int, killed: Killed) -> None:
    left = killed(tmp_path / "here")
    journal = (left / JOURNAL).read_bytes()
    (left / JOURNAL).write_bytes(journal[:-lost])
    assert work(tmp_path / "here") == ["two", "three", "four"]
    assert content(tmp_path / "here") == {key: f"content of {key}" for key in KEYS}


def test_a_journal_that_cannot_be_read_begins_anew(tmp_path: Path, killed: Killed) -> None:
    left = killed(tmp_path / "here")
    (left / JOURNAL).write_bytes(b"\0" * 100 + b"\n")
    assert work(tmp_path / "here") == [*KEYS]


def test_other_work_in_the_same_place_begins_anew(tmp_path: Path, killed: Killed) -> None:
    left = killed(tmp_path / "here")
    (left / "tree").mkdir()
    (left / "tree" / "leaf").write_text("of the other work")
    assert work(tmp_path / "here", {"source": "elsewhere"}) == [*KEYS]
    assert content(tmp_path / "here") == {key: f"content of {key}" for key in KEYS}


def test_what_other_work_left_is_never_taken_for_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: Killed) -> None:
    """Killed while it clears the place: the journal goes first, so whoever comes next clears the rest."""
    left = killed(tmp_path / "here")
    unlink, removed = Path.unlink, []

    def once(self: Path, **options: Any) -> None:
        removed.append(self.name)
        if len(removed) == 2:
            raise KeyboardInterrupt
        unlink(self, **options)

    monkeypatch.setattr(Path, "unlink", once)
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "here", {"source": "elsewhere"})
    monkeypatch.undo()
    assert removed[0] == JOURNAL and {path.name for path in left.iterdir()} == {"one", "two", "three"}
    assert work(tmp_path / "here", {"source": "elsewhere"}) == [*KEYS]


def test_a_second_process_is_told(tmp_path: Path) -> None:
    with whole_or_nothing(tmp_path / "here", FACTS) as (folder, journal):
        journal.add("one", {})
        for facts in (FACTS, {"source": "elsewhere"}, None):
            with pytest.raises(ConversionError, match=r"here is being written by another process"):
                work(tmp_path / "here", facts)
        assert list(content(folder)) == [JOURNAL]
    assert (tmp_path / "here").is_dir()


def test_what_is_there_already_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(FileExistsError, match=r"here exists; remove it or name another directory"):
        work(tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_source_that_is_wrong_leaves_nothing(tmp_path: Path) -> None:
    def wrong(key: str) -> None:
        raise ConversionError(f"{key} is wrong")

    with pytest.raises(ConversionError, match="one is wrong"):
        work(tmp_path / "here", stop=wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_what_to_do_and_the_work_goes_on(tmp_path: Path) -> None:
    def full(key: str) -> None:
        if key == "two":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device") as told:
        work(tmp_path / "here", stop=full)
    (note,) = told.value.__notes__
    assert note == f"What is done is kept in {tmp_path / '.here.unfinished'}: the same command goes on from there, another begins anew"
    assert not (tmp_path / "here").exists()
    assert work(tmp_path / "here") == ["two", "three", "four"]


def test_work_that_nobody_can_begin_again_leaves_nothing(tmp_path: Path, killed: Killed) -> None:
    def full(key: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        work(tmp_path / "here", None, stop=full)
    assert list(tmp_path.iterdir()) == []
    left = killed(tmp_path / "here")
    assert left.exists() and work(tmp_path / "here", None) == [*KEYS]


def test_all_of_it_is_on_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine that stops could leave a directory that looks whole, with empty files in it."""
    flushed: list[Path] = []
    rename, flush = Path.rename, unfinished.flush
    monkeypatch.setattr(unfinished, "flush", lambda path: (flushed.append(path), flush(path)))
    monkeypatch.setattr(Path, "rename", lambda self, target: (flushed.append(target), rename(self, target)))
    with whole_or_nothing(tmp_path / "here", FACTS) as (folder, _):
        (folder / "tree").mkdir()
        for name in ("top", "tree/leaf"):
            (folder / name).write_text("content")
    inside = {folder / "top", folder / "tree" / "leaf", folder / "tree", folder}
    assert set(flushed[:4]) == inside and flushed[4:] == [tmp_path / "here", tmp_path]


def test_a_journal_keeps_what_json_keeps(tmp_path: Path) -> None:
    facts = {"tuple": (1, 2), "path": "ünïcode \n"}
    journal = Journal(tmp_path / JOURNAL, facts)
    assert journal.fresh
    journal.begin()
    journal.add("key", [{"deep": None}])
    again = Journal(tmp_path / JOURNAL, facts)
    assert not again.fresh and again.done == {"key": [{"deep": None}]}
    assert Journal(tmp_path / JOURNAL, facts | {"more": 1}).fresh
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 2
