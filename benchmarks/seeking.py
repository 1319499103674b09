"""Four frames of a long clip, read in order and by seeking: `python benchmarks/seeking.py [--seconds 60]`.

Makes a clip of that length at 25 frames a second with a key frame every so many frames (x264's default is 250), times both ways of
`decode_video` in turn, and checks that they give the same frames.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable

import av
import numpy as np
from rich.console import Console
from rich.table import Table

from omnisapiens_jax.processing import media


def clip(seconds: int, group: int, width: int = 640, height: int = 360) -> bytes:
    """An MP4 of drifting noise."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height // 20, width // 20, 3), np.uint8).repeat(20, 0).repeat(20, 1)
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=25, options={"g": str(group), "preset": "ultrafast", "bf": "2"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(25 * seconds):
            picture = np.roll(noise, 4 * number, axis=1)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def in_order(source: bytes) -> np.ndarray:
    """The frames, without seeking."""
    with av.open(io.BytesIO(source), "r") as container:
        stream, packets = media._read_packets(container, "clip")
        stream.thread_count = 1
        wanted = media.frame_indices(len(packets), 4)
        kept = media._in_order(stream.codec_context, packets, wanted)
    return np.stack([kept[index] for index in wanted])


def best(work: Callable[[], np.ndarray], times: int) -> tuple[float, np.ndarray]:
    """CPU seconds of the fastest of several calls, and what it gave."""
    taken = []
    for _ in range(times):
        begun = time.process_time()
        made = work()
        taken.append(time.process_time() - begun)
    return min(taken), made


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    table = Table(
        "key frame every", "in order, CPU s", "decode_video, CPU s", "ratio", title=f"4 frames of {arguments.seconds} s at 640x360"
    )
    for group in (12, 50, 250, 1500):
        source = clip(arguments.seconds, group)
        slow, wanted = best(lambda source=source: in_order(source), arguments.times)
        fast, found = best(lambda source=source: media.decode_video(source, frames=4), arguments.times)
        if not np.array_equal(wanted, found):
            raise SystemExit(f"different frames with a key frame every {group}")
        table.add_row(str(group), f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
