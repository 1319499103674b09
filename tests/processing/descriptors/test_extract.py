"""The extraction around its children: what is written, counted, kept and started again, with stand-ins for the packages that describe."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omnisapiens_jax.processing.descriptors.__main__ import main
from omnisapiens_jax.processing.descriptors.extract import ExtractionError, Job, Report, extract, find_jobs, packages
from omnisapiens_jax.processing.descriptors.read import read_audio_descriptor
from tests.oracle import REPO
from tests.processing.descriptors.clips import REAL, encode

# openSMILE's stand-in does what the first sample of a sound asks for.
OPENSMILE = """
import ctypes, os, time
import soundfile  # as the real one does, before any deadline runs
import numpy as np
__version__ = "0"

class FeatureLevel:
    LowLevelDescriptors = "lld"

class Frame:
    def __init__(self, values):
        self.values = np.asarray(values)
        self.index = self
    def to_numpy(self, dtype):
        return self.values.astype(dtype)
    def get_level_values(self, name):
        return Times(np.arange(len(self.values)) * 0.01 + (0.06 if name == "end" else 0))

class Times(np.ndarray):
    def __new__(cls, values):
        return values.view(cls)
    def total_seconds(self):
        return np.asarray(self)

class Smile:
    def __init__(self, feature_level=None):
        self.level = feature_level
    def process_signal(self, samples, rate):
        match round(float(samples[0, 0]) * 100):
            case 10:
                os.abort()
            case 20:
                ctypes.CDLL(None).sleep(1000)  # nothing that Python could interrupt
            case 30:
                raise RuntimeError("no such sound")
            case 40:
                return Frame(np.full((1, 6373), np.nan))
            case 50:
                bytearray(8 << 30)
            case 60:
                os.write(1, b"noise on stdout\\n")
            case 70:
                time.sleep(0.5)
        return Frame(np.full((5, 65), samples.mean()) if self.level else np.full((1, 6373), samples.mean()))
"""
ABORT, HANG, RAISE, NAN, MEMORY, NOISE, SLOW = 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An environment whose openSMILE is the stand-in, and which has no MediaPipe."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "opensmile.py").write_text(OPENSMILE)
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nPYTHONPATH={library} exec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    return interpreter


def sounds(folder: Path, **first: float) -> Path:
    """A folder of sounds of a tenth of a second, of one value each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in first.items():
        soundfile.write(folder / f"{name}.wav", np.full(1600, value, np.float32), 16_000, subtype="FLOAT")
    return folder


def run(python: Path, source: Path, target: Path, **options: float) -> Report:
    """Extracts the sounds of a folder."""
    options = {"workers": 2, "seconds": 60.0} | options
    return extract(find_jobs(source, target, ["audio"]), target, python=python, **options)  # pyright: ignore[reportArgumentType]


def test_every_file_is_described_but_those_that_cannot_be(tmp_path: Path, python: Path) -> None:
    """A crash, a hang in C, an exception, NaN and a lack of memory cost one file each, wherever they come."""
    bad = {"a_abort": ABORT, "c_hang": HANG, "d_raise": RAISE, "f_nan": NAN, "g_memory": MEMORY}
    source = sounds(tmp_path / "in" / "deep", **bad, b=0.01, e=0.02, h=NOISE, i=0.03)
    (source / "j.wav").write_bytes(b"RIFF" + bytes(100))
    (source / "k.wav").write_bytes(b"")
    (source / "notes.txt").write_text("no medium")
    target = tmp_path / "out"
    done: list[tuple[int, int]] = []
    report = extract(
        find_jobs(source.parent, target, ["audio"]),
        target,
        python=python,
        workers=2,
        seconds=5,
        memory=1 << 30,
        progress=lambda *told: done.append(told),
    )
    assert {file.name for file in (target / "opensmile" / "deep").iterdir()} == {f"{name}.wav.npz" for name in "behi"}
    assert report.written == 4 and report.faults == {"media, audio": 5, "crash, audio": 1, "deadline, audio": 1}
    why = {failure.job.source.stem: failure.why for failure in report.failures}
    assert "ended by SIGABRT" in why["a_abort"]
    assert why["c_hang"] == "it took more than 5 s"
    assert why["d_raise"] == "RuntimeError: no such sound"
    assert "6,373 of 6,373 features of these 0.100 s of sound" in why["f_nan"]
    assert why["g_memory"].startswith("MemoryError")
    listed = [json.loads(line) for line in (target / "failed.jsonl").read_text().splitlines()]
    assert {Path(row["source"]).stem: row["why"] for row in listed} == why
    assert [count for count, _ in done] == list(range(12)) and {total for _, total in done} == {11}
    found = read_audio_descriptor(target / "opensmile" / "deep" / "e.wav.npz")
    assert found is not None
    np.testing.assert_allclose(found.pooled, 0.02, rtol=1e-6)
    np.testing.assert_allclose(found.times, [0.03, 0.04, 0.05, 0.06, 0.07], atol=1e-6)


def test_a_second_run_keeps_what_is_there_and_tries_the_rest_again(tmp_path: Path, python: Path) -> None:
    source, target = sounds(tmp_path / "in", good=0.01, bad=RAISE), tmp_path / "out"
    run(python, source, target)
    written = target / "opensmile" / "good.wav.npz"
    before = written.stat().st_mtime_ns
    sounds(source, bad=0.05)
    report = run(python, source, target)
    assert (report.present, report.written, report.failures) == (1, 1, [])
    assert written.stat().st_mtime_ns == before and (target / "failed.jsonl").read_text() == ""
    assert run(Path("/no/interpreter"), source, target).present == 2  # nothing to do needs no environment


def test_a_killed_run_leaves_no_half_file_and_goes_on(tmp_path: Path, python: Path) -> None:
    values = {f"s{number}": SLOW + number / 1000 for number in range(4)}
    source, target = sounds(tmp_path / "in", **values), tmp_path / "out"
    command = [sys.executable, "-m", "omnisapiens_jax.processing.descriptors", source, target, "--python", python, "--workers", "1"]
    killed = subprocess.Popen(command, cwd=REPO, stderr=subprocess.DEVNULL)
    folder = target / "opensmile"
    while killed.poll() is None and not (folder.exists() and any(folder.iterdir())):
        time.sleep(0.02)
    with pytest.raises(ExtractionError, match="another run is writing"):
        run(python, source, target)
    killed.kill()
    killed.wait()
    present = len(list(folder.iterdir()))
    assert 1 <= present < 4
    report = run(python, source, target)
    assert (report.present, report.written) == (present, 4 - present)
    for name, value in values.items():  # none is another's, though the killed run's child may have been at work still
        found = read_audio_descriptor(folder / f"{name}.wav.npz")
        assert found is not None
        np.testing.assert_allclose(found.pooled, value, rtol=1e-6)
    assert not list(target.glob(".drafts*"))


def test_an_interrupt_ends_the_children_and_loses_nothing(tmp_path: Path, python: Path) -> None:
    source, target = sounds(tmp_path / "in", a=0.01, b=HANG), tmp_path / "out"
    # A shell's background job ignores interrupts, and what it starts does too.
    heard = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; runpy.run_module('omnisapiens_jax.processing.descriptors', run_name='__main__')"
    command = [sys.executable, "-c", code, source, target, "--python", python, "--workers", "2"]
    stopped = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)
    while stopped.poll() is None and not (target / "opensmile" / "a.wav.npz").exists():
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=30)
    assert stopped.returncode == 1 and "the same command goes on where this one stopped" in said
    assert (target / "failed.jsonl").read_text() == "" and not list(target.glob(".drafts*"))
    children = [name for name in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(name)]
    assert not children


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def test_what_cannot_be_written_stops_the_run(tmp_path: Path, python: Path) -> None:
    """A disk that is full is not the fault of every file after it."""
    source, target = sounds(tmp_path / "in", a=0.01, b=0.02), tmp_path / "out"
    small = tmp_path / "small"
    small.write_text(python.read_text().replace("PYTHONPATH", "ulimit -f 0; trap '' XFSZ; PYTHONPATH"))
    small.chmod(0o755)
    with pytest.raises(ExtractionError, match=r"\.wav\.npz cannot be written \(.*File too large"):
        run(small, source, target)
    assert not (target / "opensmile").exists()


def test_an_environment_that_is_not_there_is_told(tmp_path: Path, python: Path) -> None:
    source, target = sounds(tmp_path / "in", a=0.01), tmp_path / "out"
    with pytest.raises(ExtractionError, match=r"nowhere cannot be run \(No such file.*make descriptors-env"):
        run(tmp_path / "nowhere", source, target)
    assert packages(python) == {"mediapipe": None, "opensmile": "0"}
    with pytest.raises(ExtractionError, match="has no mediapipe; `make descriptors-env`"):
        extract([Job("video", source / "a.wav", target / "a.npz")], target, python=python)
    (tmp_path / "library" / "opensmile.py").write_text("raise OSError('libSMILEapi.so: cannot open shared object file')")
    with pytest.raises(ExtractionError, match="cannot run child.py: .*libSMILEapi.so"):
        run(python, source, target)


def test_the_command_line_says_what_became_of_the_files(
    tmp_path: Path, python: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sounds alone where MediaPipe is not there; the licence; 1 when nothing could be done, 2 when a file could not."""
    source, target = sounds(tmp_path / "in", a=0.01, b=RAISE), tmp_path / "out"
    monkeypatch.setenv("OMNISAPIENS_DESCRIPTORS_PYTHON", str(python))
    assert main([str(source), str(target), "--workers", "1"]) == 2
    said = capsys.readouterr().err
    assert "has no mediapipe, so there will be no pose/" in said and "research licence" in said
    assert "1 written, 0 there already, 0 videos without sound, 1 not described" in said and "media, audio: 1" in said
    (source / "b.wav").unlink()
    assert main([str(source), str(target)]) == 0
    assert main([str(tmp_path / "nowhere"), str(target)]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert main([str(python.parent / "library"), str(target)]) == 1
    assert "holds no media" in capsys.readouterr().err
    (python.parent / "library" / "opensmile.py").unlink()
    assert main([str(source), str(target)]) == 1
    assert "has neither package; `make descriptors-env`" in capsys.readouterr().err


def test_the_sound_of_a_video_is_described_too(tmp_path: Path, python: Path) -> None:
    """Through 16 kHz mono of 16 bits; a video without sound is counted apart."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "speech.mp4").write_bytes((REAL / "obama_speech.mp4").read_bytes())
    (source / "silent.mp4").write_bytes(encode(np.full((4, 64, 64, 3), 128, np.uint8)))
    report = run(python, source, target)
    assert (report.written, report.nothing, report.failures) == (1, 1, [])
    found = read_audio_descriptor(target / "opensmile" / "speech.mp4.npz")
    assert found is not None
    wave, _ = soundfile.read(REAL / "obama_speech.wav", dtype="float32")
    np.testing.assert_allclose(found.pooled, wave.mean(), atol=1e-4)
