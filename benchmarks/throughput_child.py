"""What both sides of `throughput.py` share: the loop that answers over a pipe. Imported in both environments, so it needs nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator


def serve(batches: Callable[[int], Iterator[int]]) -> None:
    """Answers each line `{"samples": n}` with how long `batches(n)`, which yields the samples of each batch, took to give so many."""
    for line in sys.stdin:
        wanted, got, begun = json.loads(line)["samples"], 0, time.perf_counter()
        for count in batches(wanted):
            got += count
        print(json.dumps({"samples": got, "seconds": time.perf_counter() - begun}), flush=True)
