"""Feeding the model: our pipeline against a torch `DataLoader` around transformers' Omni processor, on the same files.

    python benchmarks/throughput.py [--pairs 5] [--samples 96] [--shot 3] [--python PYTHON]
    python benchmarks/throughput.py --soak 50000

The files are made first: speech-like sound of 5 to 10 s (16 kHz WAV) and clips of 640x360 at 25 frames a second (H.264, x264's defaults
for key frames: one a shot, `--shot` seconds long on average, 0 for a single shot). Each side has two worker processes and batches of
eight, and stays alive; runs alternate, so that whatever else the machine does falls on all. Prompts, sound and patches of both are compared
before anything is timed. A ratio is of neighbouring runs (above 1 we are faster), its median is given with the least and the greatest.
Memory is the greatest sum over a side's processes of what each owns or shares (PSS) in a run of its own.

The other side needs an environment of its own, where `benchmarks/throughput-requirements.txt` is installed.

`--soak N` feeds N cheap samples and prints memory as it goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import soundfile

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from throughput_ours import pipeline  # noqa: E402

from omnisapiens_jax.atlas.recipe import Recipe  # noqa: E402
from omnisapiens_jax.atlas.sources import open_source  # noqa: E402
from omnisapiens_jax.atlas.workers import Decoder, receive, send  # noqa: E402
from omnisapiens_jax.models.config import PIXEL_MEAN, PIXEL_STD, ThinkerConfig  # noqa: E402
from omnisapiens_jax.processing import chat, example, media, vision  # noqa: E402
from omnisapiens_jax.processing.audio import layout_audio, log_mel  # noqa: E402
from omnisapiens_jax.processing.options import REFERENCE  # noqa: E402
from omnisapiens_jax.processing.tokenizers import QwenTokenizer  # noqa: E402
from tests.qwen_vocabulary import qwen_tokenizer  # noqa: E402

WORKERS, BATCH = 2, 8
SPEED, MEMORY = 2.0, 0.5  # the bars: samples a second, theirs = 1; peak memory, theirs = 1
OPTIONS = """\
Given to the other side: WhisperFeatureExtractor pads to 10 s instead of 300; 4 frames a clip, chosen as ours are, 147,456 pixels each;
torchvision's video processor on tensors; the fast tokenizer; prompts rendered beforehand; sound read by libsndfile; one thread a worker;
whole batches processed at once in the worker, forked, prefetch_factor 2. `theirs`: clips read by transformers' load_video (PyAV).
`ours`: clips and sound read by our decoders."""


def main() -> int:
    """Runs the race or the soak; status 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side (default: 5)")
    parser.add_argument("--samples", type=int, default=96, help="samples of a run (default: 96)")
    parser.add_argument("--shot", type=float, default=3.0, help="mean seconds between cuts; 0 = none (default: 3)")
    parser.add_argument("--clips", type=int, default=12, help="different clips; every one is in two rows (default: 12)")
    parser.add_argument("--python", default=str(HERE.parent / ".venv-throughput" / "bin" / "python"), help="the other side's interpreter")
    parser.add_argument("--soak", type=int, default=0, help="feed so many cheap samples instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
        folder = Path(scratch)
        if options.soak:
            return soak(folder, options.soak)
        if not Path(options.python).exists():
            parser.error(f"no interpreter at {options.python}: `make throughput` builds one")
        tokenizer = qwen_tokenizer()
        make_files(folder, options.clips, options.shot)
        print(f"{OPTIONS}\n\nLoad of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
        print(stages(folder, QwenTokenizer(tokenizer)), flush=True)
        return race(folder, tokenizer, options.python, options.pairs, options.samples)


def make_files(folder: Path, clips: int, shot: float) -> None:
    """`rows.jsonl` as our source reads it, `prompts.jsonl` with rendered prompts, and the media of both."""
    random = np.random.default_rng(0)
    words = ["well", "I", "never", "thought", "that", "it", "would", "matter", "so", "much", "to", "them", "really", "you", "know"]
    rows, prompts = [], []
    for number in range(clips):
        seconds = float(random.uniform(5, 10))
        soundfile.write(folder / f"{number}.wav", _speech(random, seconds), 16_000)
        _write_clip(folder / f"{number}.mp4", random, seconds, shot)
    for number in range(2 * clips):
        said = " ".join(random.choice(words, random.integers(15, 120)))
        problem = (
            f"<video>\n<audio>\nTranscript: {said}\nThe above is a video and audio recording of a conversation, with its transcript. "
            "Which emotion does the speaker show? Choose from: anger, disgust, fear, happy, neutral, sad, surprise"
        )
        files = {"audio": f"{number % clips}.wav", "video": f"{number % clips}.mp4"}
        rows.append(
            {
                "problem": problem,
                "answer": "happy",
                "dataset": "meld_emotion",
                "modality_signature": "text_video_audio",
                "task": "emotion_cls",
                "audios": [files["audio"]],
                "videos": [files["video"]],
            }
        )
        messages = chat.build_messages(problem, {"audio": 1, "video": 1}, modalities=REFERENCE.modalities)
        prompts.append({"text": chat.render(messages), **files})
    for name, lines in (("rows", rows), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _speech(random: np.random.Generator, seconds: float) -> np.ndarray:
    time_ = np.arange(round(seconds * 16_000)) / 16_000
    pitch = 2 * np.pi * np.cumsum(140 + 30 * np.sin(2 * np.pi * 0.7 * time_)) / 16_000
    voice = sum(np.sin(k * pitch) / k for k in range(1, 12)) * np.clip(np.sin(2 * np.pi * 2.3 * time_), 0, 1)
    return 0.1 * voice + 0.005 * random.standard_normal(len(time_))


def _write_clip(path: Path, random: np.random.Generator, seconds: float, shot: float, width: int = 640, height: int = 360) -> None:
    """A textured background that drifts, something bright that moves before it, film grain, and cuts."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        grain = random.normal(0, 3, (8, height, width, 1))
        background, cut = np.zeros(0), 0
        for number in range(round(seconds * 25)):
            if number >= cut:
                coarse = random.uniform(20, 230, (height // 40 + 2, width // 40 + 2, 3))
                background = coarse.repeat(40, 0).repeat(40, 1)[:height, :width] + random.normal(0, 8, (height, width, 1))
                cut = number + round(25 * shot * random.uniform(0.5, 1.5)) if shot else 10**9
            picture = np.roll(background, number // 4, 1) + grain[number % 8]
            y, x = height // 2 + round(40 * np.sin(number / 9)), width // 2 + round(90 * np.cos(number / 14))
            picture[y - 70 : y + 70, x - 50 : x + 50] = (205, 165, 140) + 15 * np.sin(number / 3) + grain[number % 8, :140, :100]
            frame = av.VideoFrame.from_ndarray(np.clip(picture, 0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def stages(folder: Path, tokenizer: QwenTokenizer) -> str:
    """CPU milliseconds of each stage of a sample, as a Markdown table."""
    config = ThinkerConfig.preset("7b")
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    spent: dict[str, list[float]] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        begun = time.process_time()
        done = work()
        spent.setdefault(stage, []).append(1000 * (time.process_time() - begun))
        return done

    def layouts(mel: np.ndarray, patches: tuple[np.ndarray, tuple[int, int, int]]) -> None:
        layout_audio([mel], config.audio)
        vision.layout_vision([patches], config.vision)

    def carry(message: Any) -> Any:
        send(sender, message)
        return receive(receiver)

    sender, receiver = socket.socketpair()
    decoder = Decoder(open_source(folder / "rows.jsonl"), Recipe(tokenizer, config, REFERENCE, max_tokens=4096))
    bounds = {"min_pixels": REFERENCE.video_min_pixels, "max_pixels": REFERENCE.video_max_pixels}
    for number, row in enumerate(prompts):
        waveform = timed("decode audio", lambda row=row: media.decode_audio(folder / row["audio"], seconds=REFERENCE.audio_seconds))
        mel = timed("log-mel", lambda waveform=waveform: log_mel(waveform))
        frames = timed("decode video", lambda row=row: media.decode_video(folder / row["video"], frames=REFERENCE.video_frames))
        patches = timed("resize, patches", lambda frames=frames: vision.patchify(frames, config.vision, **bounds))
        timed("layouts", lambda mel=mel, patches=patches: layouts(mel, patches))
        timed("tokenise", lambda row=row: tokenizer.encode(row["text"]))
        made, _ = timed("whole sample", lambda number=number: decoder.build(number))
        arrived = timed("transport", lambda made=made: carry(made))
        timed("collate", lambda arrived=arrived: example.collate([arrived], arrived.size(), config))
    lines = [f"| {stage} | {statistics.mean(times):.1f} |" for stage, times in spent.items()]
    return "\n".join(["| stage | CPU ms a sample |", "|---|---|", *lines, ""])


@dataclasses.dataclass
class Side:
    """A process with its workers, and the pipe to it."""

    name: str
    process: subprocess.Popen[str]

    def run(self, samples: int) -> dict[str, float]:
        """Samples a second and CPU seconds a sample of a run."""
        before = self._cpu()
        told = self._ask(samples)
        return {"rate": told["samples"] / told["seconds"], "cpu": (self._cpu() - before) / told["samples"]}

    def peak(self, samples: int) -> float:
        """Greatest memory in GB of a run, which looking so often slows down."""
        seen, done = [0.0], threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                seen.append(pss(self.process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self._ask(samples)
        finally:
            done.set()
            watcher.join()
        return max(seen) / 1e9

    def _ask(self, samples: int) -> dict[str, float]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"samples": samples}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}; what it said stands above")
        return json.loads(line)

    def _cpu(self) -> float:
        """CPU seconds of all its processes, also of those that have ended."""
        total = 0.0
        for process in tree(self.process.pid):
            try:
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
            except psutil.Error:
                continue
        return total


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def pss(pid: int) -> float:
    """Bytes of a process and all below it, what they share counted once."""
    total = 0.0
    for process in tree(pid):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def race(folder: Path, tokenizer: Path, python: str, pairs: int, samples: int) -> int:
    """Runs all sides in turn and prints the table; status 1 when a bar is missed."""
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
    plain |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    arguments = [str(folder), str(tokenizer), str(BATCH), str(WORKERS)]
    commands = {
        "ours": [sys.executable, str(HERE / "throughput_ours.py"), *arguments],
        "theirs": [python, str(HERE / "throughput_torch.py"), *arguments, "theirs"],
        "theirs, our decoders": [python, str(HERE / "throughput_torch.py"), *arguments, "ours"],
    }
    sides = [
        Side(name, subprocess.Popen(command, env=plain, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for name, command in commands.items()
    ]
    try:
        for side in sides:
            side.run(BATCH)  # warm
        compare(folder)
        runs: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
        for _ in range(pairs):
            for side in sides:
                runs[side.name].append(side.run(samples))
        peaks = {side.name: side.peak(samples) for side in sides}
    finally:
        for side in sides:
            for process in reversed(tree(side.process.pid)):
                process.kill()
    print("| side | samples/s | CPU ms a sample | peak PSS GB | samples/s, ours / theirs | CPU, theirs / ours | memory, ours / theirs |")
    print("|---|---|---|---|---|---|---|")
    ours = runs["ours"]
    for name, theirs in runs.items():
        cells = [f"{statistics.median(run['rate'] for run in theirs):.2f}", f"{1000 * statistics.median(run['cpu'] for run in theirs):.0f}"]
        cells.append(f"{peaks[name]:.2f}")
        if name != "ours":
            cells += [_ratio(ours, theirs, "rate"), _ratio(theirs, ours, "cpu"), f"{peaks['ours'] / peaks[name]:.2f}"]
        print(f"| {name} | {' | '.join(cells + [''] * (6 - len(cells)))} |")
    print(f"\nLoad of the machine at the end: {os.getloadavg()[0]:.1f}")
    rate = statistics.median(a["rate"] / b["rate"] for a, b in zip(ours, runs["theirs"], strict=True))
    return int(rate < SPEED or peaks["ours"] / peaks["theirs"] > MEMORY)


def _ratio(above: Sequence[dict[str, float]], below: Sequence[dict[str, float]], what: str) -> str:
    ratios = sorted(a[what] / b[what] for a, b in zip(above, below, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def compare(folder: Path) -> None:
    """Raises AssertionError when the sides do not feed the same: same ids, log-mel to 1e-3, patches as near as two bicubics are."""
    with np.load(folder / "ours.npz") as ours:
        for decoder in ("theirs", "ours"):
            with np.load(folder / f"torch-{decoder}.npz") as theirs:
                np.testing.assert_array_equal(ours["tokens"][ours["segment_ids"] > 0], theirs["input_ids"][0])
                mel = ours["audio_chunks"].reshape(-1, 128).T[:, : theirs["feature_attention_mask"].sum()]
                np.testing.assert_allclose(mel, theirs["input_features"][0][:, : mel.shape[1]], atol=1e-3)
                pixels = ours["patches"][ours["patch_mask"]]
                patches = ((pixels.reshape(len(pixels), 3, -1) / 255 - PIXEL_MEAN[:, None]) / PIXEL_STD[:, None]).reshape(pixels.shape)
                # Ours lie window by window, so that only what does not depend on the order is compared.
                assert patches.shape == theirs["pixel_values_videos"].shape
                np.testing.assert_allclose(np.sort(patches.mean(1)), np.sort(theirs["pixel_values_videos"].mean(1)), atol=0.02)


def soak(folder: Path, samples: int) -> int:
    """Feeds many small samples and prints memory every twentieth of the way; status 1 when it ends a tenth above what it was early on."""
    from tests.atlas.toys import write_atlas

    write_atlas(folder, count=30).rename(folder / "rows.jsonl")
    made = pipeline(folder, qwen_tokenizer(), 32, WORKERS)
    done, seen, told = 0, [], 0
    for _, batch in made.batches(0, samples):
        done += int(batch["row_mask"].sum())
        if done >= told:
            # Not PSS, which grows when somebody else who shares our libraries ends.
            seen.append(sum(process.memory_info().rss for process in tree(os.getpid())) / 1e6)
            print(f"{done:>7} samples: {seen[-1]:.0f} MB", flush=True)
            told += samples // 20
        if done >= samples:
            break
    return int(seen[-1] > 1.1 * seen[2])


if __name__ == "__main__":
    sys.exit(main())
