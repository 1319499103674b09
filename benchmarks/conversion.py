"""A full-size conversion beside `cp` and `sha256sum`: `python benchmarks/conversion.py SCRATCH [--preset 7b]`.

Makes a thinker directory of random bfloat16 tensors in SCRATCH (18 GB for 7b), copies it with `cp` and hashes it with `sha256sum`, imports
it, and exports it again, each step from a cold cache and flushed to disk; prints seconds, speed and peak memory, and compares the hashes of
the exported files with those of the first. Each directory is removed when it has been read, so that SCRATCH takes twice the checkpoint;
it is removed at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from omnisapiens_jax.convert.huggingface import INDEX
from omnisapiens_jax.convert.names import mappings
from omnisapiens_jax.models.config import PRESETS, ThinkerConfig
from omnisapiens_jax.processing.tensors import SafetensorsWriter, blocks

TOOL = Path(__file__).resolve().parents[1] / "tools" / "convert_weights.py"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def make(folder: Path, config: ThinkerConfig, shards: int) -> int:
    """Writes the random checkpoint; returns its bytes."""
    folder.mkdir()
    shapes = {name: row.their_shape for row in mappings(config) for name in row.their_names}
    total = 2 * sum(map(math.prod, shapes.values()))
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if filled > total / shards:
            files.append({})
            filled = 0
        files[-1][name] = shape
        filled += 2 * math.prod(shape)
    random, where = np.random.default_rng(0), {}
    for number, held in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with SafetensorsWriter(folder / file, {name: (BFLOAT16, shape) for name, shape in held.items()}, {"format": "pt"}) as writer:
            for name in writer.order:
                for start, stop in blocks(held[name], 2, 64 << 20):
                    count = (stop - start) * math.prod(held[name][1:])
                    bits = np.frombuffer(random.bytes(2 * count), np.uint16) & 0xBFFF  # without the exponent's highest bit: all finite
                    writer.write(bits.view(BFLOAT16))
        where |= dict.fromkeys(held, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return total


def forget(folder: Path) -> None:
    """Drops the files of a directory from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def timed(*commands: list[str]) -> tuple[float, float, str]:
    """Seconds of commands and of the flush after them, the largest resident memory of any of them in GiB, and what they printed."""
    begin = time.monotonic()
    peak, printed = 0.0, ""
    for command in commands:
        with tempfile.TemporaryFile("w+") as out:
            process = subprocess.Popen(command, stdout=out)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"{' '.join(command)} failed")
            out.seek(0)
            printed += out.read()
        peak = max(peak, usage.ru_maxrss / (1 << 20))
    os.sync()
    return time.monotonic() - begin, peak, printed


def sha256sum(folder: Path) -> list[str]:
    """The command that hashes all files of weights."""
    return ["sha256sum", *map(str, sorted(folder.glob("*.safetensors")))]


def hashes(printed: str) -> dict[str, str]:
    """What it says, by the names of the files."""
    return {Path(file).name: digest for digest, file in map(str.split, printed.splitlines())}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a directory to make, with room for twice the checkpoint")
    parser.add_argument("--preset", choices=PRESETS, default="7b")
    parser.add_argument("--layers", type=int, help="of the decoder, to try it with a smaller model (default: all)")
    parser.add_argument("--shards", type=int, default=5)
    options = parser.parse_args()
    config = ThinkerConfig.preset(options.preset)
    if options.layers:
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=options.layers))
    options.scratch.mkdir(parents=True)
    source, copy, ours, back = (options.scratch / name for name in ("source", "copy", "ours", "back"))
    try:
        size = make(source, config, options.shards)
        print(f"{size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} files, {os.cpu_count()} cores", flush=True)
        tool = [sys.executable, str(TOOL)]
        plain = 0.0

        def step(name: str, *commands: list[str]) -> str:
            nonlocal plain
            forget(options.scratch)
            seconds, peak, printed = timed(*commands)
            plain = plain or seconds
            figures = f"{seconds:7.1f} s {size / 1e6 / seconds:6.0f} MB/s = {plain / seconds:.2f} x cp+sha256sum, peak {peak:.2f} GiB"
            print(f"{name:20} {figures}", flush=True)
            return printed

        wanted = hashes(step("cp, then sha256sum", ["cp", "-r", str(source), str(copy)], sha256sum(source)))
        shutil.rmtree(copy)
        step("import", [*tool, "import", str(source), str(ours)])
        shutil.rmtree(source)
        step("export", [*tool, "export", str(ours), str(back)])
        same = hashes(timed(sha256sum(back))[2]) == wanted
        print(f"files exported are{'' if same else ' NOT'} bit-identical to those imported")
    finally:
        shutil.rmtree(options.scratch)
    sys.exit(not same)


if __name__ == "__main__":
    main()
