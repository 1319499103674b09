"""What may go wrong while a sample is decoded costs that sample, not the run."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from omnisapiens_jax.atlas.bucketing import SlotCost, choose_buckets
from omnisapiens_jax.atlas.faults import FaultLog, Quarantine, quarantined_rows
from omnisapiens_jax.atlas.lengths import length_index
from omnisapiens_jax.atlas.pipeline import Pipeline, PipelineConfig
from omnisapiens_jax.atlas.plan import MASKED, PlanConfig, Planner
from omnisapiens_jax.atlas.schema import SampleError
from omnisapiens_jax.atlas.sources import JsonlSource, open_source
from omnisapiens_jax.atlas.workers import Decoder, IsolatedDecoder, WorkerPool
from tests.atlas.planted import Deadly, planted
from tests.atlas.toys import CONFIG, recipe, write_atlas

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    return write_atlas(tmp_path_factory.mktemp("atlas"), count=9)


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(1, deadline=1.5, memory=2**29)
    yield pool
    pool.close()


def started(work):
    """The processes that some work starts."""
    before = set(psutil.Process().children())
    work()
    return set(psutil.Process().children()) - before


def test_an_example_that_was_built_elsewhere_is_the_same(atlas, pool):
    here = Decoder(open_source(atlas), recipe())
    there = IsolatedDecoder(here, pool)
    for row in range(9):
        assert there.measure(row) == here.measure(row)
        (mine, _), (theirs, _) = here.build(row), there.build(row)
        for name, value in vars(mine).items():
            np.testing.assert_array_equal(getattr(theirs, name), value, err_msg=name, strict=True)
    theirs.patches[:] = 0  # as much ours as if it had been built here


DEEDS = [
    ("crash", "crash", "SIGSEGV"),
    ("quit", "crash", "status 3"),
    ("hang", "timeout", "within 1.5 s of processor time|within 15 s,"),  # the latter on a machine that has other work
    ("hang_with_the_lock", "timeout", "within 15 s,"),  # it sleeps
    ("flood", "memory", "more memory"),
]


@pytest.mark.parametrize(("deed", "kind", "phrase"), DEEDS)
def test_what_ends_a_worker_is_one_samples_fault(atlas, pool, deed, kind, phrase):
    decoder = IsolatedDecoder(Decoder(open_source(atlas), planted(**{deed: 4})), pool)
    for call in (decoder.build, decoder.measure) if deed == "crash" else (decoder.build,):
        with pytest.raises(SampleError, match=phrase) as caught:
            call(4)
        fault = caught.value
        assert (fault.kind, fault.file, fault.row, fault.dataset) == (kind, str(atlas), 4, "cremad")
    assert decoder.build(5)[0].patch_mask.any()


def test_a_worker_that_the_machine_gives_no_time_to_is_waited_for(atlas):
    """Stopped for longer than the deadline, as on a machine that has other work."""
    pool = WorkerPool(1, deadline=1.0)
    decoder = IsolatedDecoder(Decoder(open_source(atlas), planted(doze=4)), pool)
    (child,) = started(lambda: decoder.build(0))
    child.suspend()
    threading.Timer(2.5, child.resume).start()
    decoder.build(4)
    assert child.is_running()
    pool.close()


def test_a_row_that_ends_its_worker_before_it_is_read_can_be_listed_and_left_out(atlas, pool, tmp_path):
    source: Any = Deadly.of(JsonlSource(atlas), crash=4)
    with pytest.raises(SampleError, match="SIGSEGV") as caught:
        IsolatedDecoder(Decoder(source, recipe()), pool).build(4)
    FaultLog([caught.value], quarantine=Quarantine(tmp_path / "quarantine.jsonl", source.fingerprint()))
    assert quarantined_rows(tmp_path / "quarantine.jsonl", source) == {4}  # and nobody reads it for that


def test_a_worker_killed_while_idle_is_replaced(atlas):
    pool = WorkerPool(1)
    decoder = IsolatedDecoder(Decoder(open_source(atlas), recipe()), pool)
    (child,) = started(lambda: decoder.build(1))
    child.kill()
    child.wait()
    decoder.build(1)
    pool.close()


def test_a_mistake_of_ours_stops_the_run_and_says_where(atlas, pool):
    decoder = IsolatedDecoder(Decoder(open_source(atlas), planted(mistake=4)), pool)
    with pytest.raises(KeyError, match="a mistake of ours") as caught:
        decoder.build(4)
    assert "planted.py" in caught.value.__notes__[0] and "row 4" in caught.value.__notes__[0]


def test_rows_that_end_workers_are_counted_and_masked_and_the_rest_of_the_epoch_is_fed(atlas):
    source, how, config = open_source(atlas), planted(crash=4, flood=2), PlanConfig(batch_size=2)
    index, faults = length_index(source, recipe(), on_error="raise")  # measured before the files went bad
    planner = Planner(index, choose_buckets(index, config, SlotCost.of(CONFIG)), config)
    pipeline = Pipeline(source, how, planner, PipelineConfig("skip", workers=2, memory=2**29), faults=faults)
    fed, told = [], {}
    for _, batch in pipeline.batches(0, planner.steps_per_epoch):
        fed += [i for i in batch["index"].tolist() if i != MASKED]
        told |= pipeline.fault_metrics()
    assert sorted(fed) == [0, 1, 3, 5, 6, 7, 8]
    assert told == {"faults/cremad/crash": 1, "faults/meld_emotion/memory": 1}
    assert dict(pipeline.faults.counts()) == {("cremad", "crash"): 1, ("meld_emotion", "memory"): 1}

    index, faults = length_index(source, how, on_error="skip", workers=2, memory=2**29)
    assert index.ids.tolist() == [0, 1, 3, 5, 6, 7, 8] and {fault.kind for fault in faults} == {"crash", "memory"}


def test_many_threads_share_few_workers(atlas):
    pool = WorkerPool(2)
    decoder = IsolatedDecoder(Decoder(open_source(atlas), recipe()), pool)
    with ThreadPoolExecutor(8) as threads:
        built = [*threads.map(decoder.build, [*range(9)] * 4)]
    for row, (example, _) in zip([*range(9)] * 4, built, strict=True):
        np.testing.assert_array_equal(example.tokens, Decoder(open_source(atlas), recipe()).build(row)[0].tokens)
    pool.close()


def test_a_closed_pool_leaves_no_process_and_no_waiting_thread(atlas):
    pool = WorkerPool(1)
    decoder = IsolatedDecoder(Decoder(open_source(atlas), planted(hang=4)), pool)
    (child,) = started(lambda: decoder.build(0))
    ended = []

    def wait():
        with pytest.raises(RuntimeError, match="closed"):
            decoder.build(4)
        ended.append(True)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    pool.close()
    waiting.join(5)
    assert ended and not child.is_running()


def test_a_closed_pool_starts_no_process(atlas):
    pool = WorkerPool(1)
    pool.close()

    def ask():
        with pytest.raises(RuntimeError, match="closed"):
            IsolatedDecoder(Decoder(open_source(atlas), recipe()), pool).build(0)

    assert not started(ask)


RUN = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores interrupts, and what it starts does too
from omnisapiens_jax.atlas.sources import JsonlSource, open_source
from omnisapiens_jax.atlas.workers import Decoder, open_decoder
from tests.atlas.planted import Deadly, planted
decoder = open_decoder(open_source(sys.argv[1]), planted(hang_with_the_lock=4), workers=1)
decoder.build(0)
print("ready", flush=True)
sys.stdin.readline()
"""
ENDS = {
    "killed": (RUN + "decoder.build(4)", signal.SIGKILL, -signal.SIGKILL),
    "interrupted": (RUN + "decoder.build(4)", signal.SIGINT, -signal.SIGINT),
    "through, a thread still waiting": (RUN + "threading.Thread(target=decoder.build, args=(4,)).start()", None, 0),
}


@pytest.mark.parametrize("end", ENDS)
def test_workers_end_with_the_run_even_while_they_hang(atlas, end):
    code, sent, status = ENDS[end]
    pipe = subprocess.PIPE
    run = subprocess.Popen([sys.executable, "-c", code, atlas], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, cwd=REPO)
    assert run.stdin is not None and run.stdout is not None and run.stdout.readline() == b"ready\n"
    children = psutil.Process(run.pid).children(recursive=True)
    assert len(children) == 1
    run.stdin.write(b"on\n")
    run.stdin.flush()
    if sent:
        time.sleep(0.5)
        os.kill(run.pid, sent)
    assert run.wait(timeout=15) == status
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_a_worker_does_not_load_jax(atlas):
    pool = WorkerPool(1)
    (child,) = started(lambda: IsolatedDecoder(Decoder(open_source(atlas), recipe()), pool).build(2))
    loaded = {Path(file.path).name for file in child.memory_maps()}
    pool.close()
    assert not [name for name in loaded if "jaxlib" in name or "xla" in name]
