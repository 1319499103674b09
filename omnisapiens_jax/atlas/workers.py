"""Decoding where it can do no harm: a crash, a hang or a flood of memory in a C library ends a worker process, not the run.

A `Decoder` reads rows and makes examples of them where it is called. An `IsolatedDecoder` has worker processes do the same: an interpreter
of their own each, started once, without jax. Whatever ends a worker costs the one sample it had; a new worker takes its place.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import mmap
import multiprocessing.connection
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import psutil

from omnisapiens_jax.atlas.recipe import Recipe
from omnisapiens_jax.atlas.schema import Sample, SampleError
from omnisapiens_jax.atlas.sources import Source
from omnisapiens_jax.processing.chat import WordDropout
from omnisapiens_jax.processing.example import Bucket, Example
from omnisapiens_jax.resources import give_back_memory

_T = TypeVar("_T")
Kinds = tuple[str, str, str]  # signature, dataset, task

DEADLINE = 60.0  # seconds of processor time
MEMORY = 2**32  # bytes

_TOO_LARGE = "needs more memory to be decoded than there is"
_SMALL = 2**16  # bytes of arrays up to which an answer goes through the socket
_ALIGNED = 64
_GLANCE = 0.5  # seconds between two looks whether the run has ended
_START = 60.0  # seconds of processor time to import what a worker needs, and to load a decoder
_PATIENCE = 10  # times its seconds of processor time that a worker may take by the wall clock


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Measures and builds the rows of a source in this process.

    `zero` puts silence and black in the place of media that cannot be used.
    """

    source: Source
    recipe: Recipe
    zero: bool = False

    def measure(self, row: int, told: Callable[[Sample], None] | None = None) -> tuple[Kinds, Bucket, int, list[SampleError]]:
        """(Signature, dataset, task), size and excess tokens of a row, as `Recipe.measure`, and the faults of media that were replaced.

        `told` is called with the sample before any medium is opened.

        Raises:
            SampleError: the row cannot be used.
        """
        sample, replaced = read_row(self.source, row, told), [] if self.zero else None
        size, excess = within_memory(sample, lambda: self.recipe.measure(sample, replaced))
        return (sample.modality_signature, sample.dataset, sample.task), size, excess, replaced or []

    def build(
        self,
        row: int,
        excess: int = 0,
        planned: Bucket | None = None,
        words: WordDropout | None = None,
        like: Example | None = None,
        told: Callable[[Sample], None] | None = None,
    ) -> tuple[Example, list[SampleError]]:
        """The example of a row that `measure` found `excess` tokens too long, without `words`, and the faults of media that were replaced.

        The media are those of `like`, where it is given.

        Raises:
            SampleError: the row cannot be used, or is larger than the `planned` size.
        """
        sample, replaced = read_row(self.source, row, told), [] if self.zero else None
        example = within_memory(sample, lambda: self.recipe.build(sample, excess, replaced, words, like))
        if planned is not None and not planned.holds(example.size()):
            reason = f"now gives {example.size()}, not the {planned} planned with: the file changed since it was measured"
            raise sample.error(f"{reason}; delete the length cache", kind="media", field="media")
        return example, replaced or []


class IsolatedDecoder:
    """A `Decoder` whose work is done by the processes of a pool. What ends one of them is a `SampleError` of kind `crash`, `timeout` or
    `memory`."""

    def __init__(self, decoder: Decoder, pool: WorkerPool) -> None:
        self._pool, self._payload, self._source = pool, pickle.dumps(decoder), decoder.source
        give_back_memory()  # a vocabulary of 150,000 leaves as much behind as it takes when it is read

    def measure(self, row: int) -> tuple[Kinds, Bucket, int, list[SampleError]]:
        """See `Decoder.measure`."""
        return self._pool.run(self._payload, self._source.file(row), "measure", row)

    def build(
        self,
        row: int,
        excess: int = 0,
        planned: Bucket | None = None,
        words: WordDropout | None = None,
        like: Example | None = None,
    ) -> tuple[Example, list[SampleError]]:
        """See `Decoder.build`. The arrays lie in memory that the worker filled: nothing is copied on the way."""
        return self._pool.run(self._payload, self._source.file(row), "build", row, excess, planned, words, like)


def open_decoder(
    source: Source, recipe: Recipe, *, zero: bool = False, workers: int = 0, deadline: float = DEADLINE, memory: int = MEMORY
) -> Decoder | IsolatedDecoder:
    """A decoder that works in this process, or with `workers` in as many others. All decoders with the same three numbers share them.

    Args:
        source: the rows.
        recipe: how they become examples.
        zero: put silence and black in the place of media that cannot be used.
        workers: processes; 0 isolates nothing.
        deadline: seconds of processor time that a worker may take for a row, and ten times as many by the wall clock: a busy machine costs
            no sample, and what sleeps for ever is ended too.
        memory: bytes that a worker may allocate beyond what it needs to begin (on Linux).
    """
    decoder = Decoder(source, recipe, zero)
    return IsolatedDecoder(decoder, shared_pool(workers, deadline, memory)) if workers else decoder


class WorkerPool:
    """Worker processes that decode, one row at a time each. Safe to call from many threads."""

    def __init__(self, count: int, *, deadline: float = DEADLINE, memory: int = MEMORY) -> None:
        """See `open_decoder`; processes start when they are first needed."""
        # Linux ends a worker when the thread that started it ends, so that thread must live as long as the pool.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="starts workers")
        self._workers = [_Worker(self._starter, deadline, memory) for _ in range(count)]
        self._closed = False
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        weakref.finalize(self, _close, self._workers, self._starter)

    def run(self, decoder: bytes, file: str, task: str, row: int, *arguments: Any) -> Any:
        """The answer of a method of the pickled `decoder` about a row; `file` is where errors say that it is.

        Raises:
            SampleError: the row cannot be used, or a worker ended over it.
            RuntimeError: workers cannot be started, or the pool is closed.
        """
        if self._closed:
            raise RuntimeError("the worker pool was closed")
        worker = _waiting(lambda: self._idle.get(timeout=_GLANCE), queue.Empty)
        try:
            return worker.ask(decoder, file, task, row, *arguments)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the workers, also those that are at work. No new ones start: what asks them now gets a RuntimeError."""
        self._closed = True
        _close(self._workers, self._starter)


def _close(workers: Sequence[_Worker], starter: ThreadPoolExecutor) -> None:
    starter.shutdown(wait=False)  # first, or a thread that finds its worker gone has another one started
    for worker in workers:
        worker.end()


_shared_pools_lock = threading.Lock()


def shared_pool(count: int, deadline: float, memory: int) -> WorkerPool:
    """The pool of this process with these three numbers."""
    with _shared_pools_lock:
        return _make_shared_pool(count, deadline, memory)


@functools.cache
def _make_shared_pool(count: int, deadline: float, memory: int) -> WorkerPool:
    return WorkerPool(count, deadline=deadline, memory=memory)


def read_row(source: Source, row: int, told: Callable[[Sample], None] | None) -> Sample:
    """The sample of a row, once it has been `told` of. Raises a `SampleError` also where memory does not suffice to read it."""
    try:
        sample = source[row]
    except MemoryError:
        raise SampleError(_TOO_LARGE, kind="memory", file=source.file(row), row=row, dataset="?", field="(the row)") from None
    if told:
        told(sample)
    return sample


def within_memory(sample: Sample, work: Callable[[], _T]) -> _T:
    """What some work with a sample gives. Raises a `SampleError` where memory does not suffice for it."""
    try:
        return work()
    except MemoryError:
        raise sample.error(_TOO_LARGE, kind="memory", field="media") from None


def _waiting(attempt: Callable[[], Any], nothing: type[BaseException]) -> Any:
    """Repeats an attempt that times out with `nothing`, until the run has ended: an interpreter that exits waits for its threads."""
    while True:
        try:
            return attempt()
        except nothing:
            if not threading.main_thread().is_alive():
                raise RuntimeError("the run has ended") from None


class _Ended(Exception):
    """A worker ended, or had to be ended: `kind` and `reason` of the fault."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class _Limit:
    """How long a process may take from now on."""

    def __init__(self, pid: int, seconds: float) -> None:
        self._pid, self._seconds = pid, seconds
        self._worked, self._began = _processor_time(pid), time.monotonic()

    def check(self) -> None:
        """Raises `_Ended` when it has had its time."""
        if _processor_time(self._pid) - self._worked >= self._seconds:
            raise _Ended("timeout", f"was not decoded within {self._seconds:g} s of processor time, its worker process was ended")
        if time.monotonic() - self._began >= self._seconds * _PATIENCE:
            raise _Ended("timeout", f"was not decoded within {self._seconds * _PATIENCE:g} s, its worker process was ended")


def _processor_time(pid: int) -> float:
    """Seconds that a process of ours has worked, all its threads together; 0 of one that is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


class _Worker:
    """One worker as its pool sees it. Used by one thread at a time; only `end` may be called beside it."""

    def __init__(self, starter: ThreadPoolExecutor, deadline: float, memory: int) -> None:
        self._starter, self._deadline, self._memory = starter, deadline, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._known: dict[bytes, int] = {}

    def ask(self, decoder: bytes, file: str, task: str, row: int, *arguments: Any) -> Any:
        """See `WorkerPool.run`."""
        dataset = "?"
        try:
            if self._process is None or self._process.poll() is not None:
                self._starter.submit(self._start).result()
            new = None if decoder in self._known else decoder
            number = self._known.setdefault(decoder, len(self._known))
            limit = self._limit(self._deadline if new is None else _START)
            try:
                send(self._connection, (number, new, task, row, arguments), _START * _PATIENCE)
            except TimeoutError:
                raise _Ended("timeout", f"was not taken up by a worker process within {_START * _PATIENCE:g} s") from None
            except OSError:
                raise self._obituary() from None
            while True:
                what, answer = self._receive(limit)
                if what == "loaded":
                    limit = self._limit(self._deadline)
                elif what == "dataset":
                    dataset = answer
                elif what == "answer":
                    return answer
                elif what == "fault":
                    if answer.kind == "memory":
                        self.end()  # what is left of its heap is nothing to go on with
                    raise answer
                else:
                    raise answer
        except _Ended as ended:
            self.end()
            raise SampleError(ended.reason, kind=ended.kind, file=file, row=row, dataset=dataset, field="media") from None
        except SampleError:
            raise
        except BaseException:
            self.end()  # whatever it answers now is no longer asked for
            raise

    @property
    def _connection(self) -> socket.socket:
        assert self._socket is not None
        return self._socket

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        call = f"from omnisapiens_jax.atlas.workers import _serve; _serve({theirs.fileno()}, {self._memory}, {os.getpid()})"
        # Rows are what is worked on in parallel. Arrow's own allocator takes a gigabyte at once, which the bound would count.
        changed: dict[str, str] = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
        changed["ARROW_DEFAULT_MEMORY_POOL"] = "system"
        changed["GLIBC_TUNABLES"] = ""  # a heap that is kept suits the run's own process: a worker gives memory back
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {call}"],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=os.environ | changed,
            )
        self._socket, self._known = ours, {}
        try:
            self._receive(self._limit(_START))
        except _Ended as ended:
            self.end()
            raise RuntimeError(f"a worker process could not start ({ended.reason}); what it said stands above") from None

    def _limit(self, seconds: float) -> _Limit:
        assert self._process is not None
        return _Limit(self._process.pid, seconds)

    def _receive(self, limit: _Limit) -> tuple[str, Any]:
        def look() -> None:
            limit.check()
            if not multiprocessing.connection.wait([self._connection], _GLANCE):
                raise TimeoutError

        _waiting(look, TimeoutError)
        try:
            message = receive(self._connection)
        except OSError:
            message = None
        if message is None:
            raise self._obituary()
        return message

    def _obituary(self) -> _Ended:
        if (process := self._process) is None:
            raise RuntimeError("the worker pool was closed while it was at work")
        status = process.wait()
        if status == -signal.SIGKILL:  # not by us: the kernel does that when the machine is out of memory
            return _Ended("memory", "was being decoded when the system ended the worker process, as it does when memory runs out")
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return _Ended("crash", f"was being decoded when the worker process ended with {how}")

    def end(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        if self._socket is not None:
            self._socket.close()


_HEADER = struct.Struct("!QQ")  # bytes of the pickle, arrays


def send(connection: socket.socket, message: Any, timeout: float | None = None) -> None:
    """Sends what `receive` gets at the other end: a header, a pickle, and large arrays in a memory file that goes with the header."""
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> None:
        buffers.append(buffer.raw())

    data = pickle.dumps(message, protocol=5, buffer_callback=keep)
    connection.settimeout(timeout)
    if sum(buffer.nbytes for buffer in buffers) <= _SMALL:
        data = pickle.dumps(message, protocol=5) if buffers else data
        connection.sendall(_HEADER.pack(len(data), 0) + data)
        return
    file = _memory_file()
    try:
        for buffer in buffers:
            _write(file, buffer)
            _write(file, memoryview(bytes(-buffer.nbytes % _ALIGNED)))
        sizes = struct.pack(f"!{len(buffers)}Q", *(buffer.nbytes for buffer in buffers))
        socket.send_fds(connection, [_HEADER.pack(len(data), len(buffers))], [file])
        connection.sendall(sizes + data)
    finally:
        os.close(file)


def _memory_file() -> int:
    if sys.platform == "linux":
        return os.memfd_create("example")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write(file: int, data: memoryview) -> None:
    while data.nbytes:
        data = data[os.write(file, data) :]


def receive(connection: socket.socket) -> Any:
    """The next message, or None at the end. Its arrays lie in the memory that the sender filled."""
    header, files, _, _ = socket.recv_fds(connection, _HEADER.size, 1)
    if not header:
        return None
    length, count = _HEADER.unpack(header)
    if not count:
        return pickle.loads(_read(connection, length))
    try:
        sizes = struct.unpack(f"!{count}Q", _read(connection, 8 * count))
        data = _read(connection, length)
        memory = memoryview(mmap.mmap(files[0], 0))
    finally:
        for file in files:
            os.close(file)
    buffers, start = [], 0
    for size in sizes:
        buffers.append(memory[start : start + size])
        start += size + -size % _ALIGNED
    return pickle.loads(data, buffers=buffers)


def _read(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view.nbytes:
        got = connection.recv_into(view)
        if not got:
            raise ConnectionResetError
        view = view[got:]
    return data


def _serve(file: int, memory: int, parent: int) -> None:
    """What a worker does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the run's to handle
    _end_with(parent)
    connection, decoders = socket.socket(fileno=file), {}
    send(connection, ("ready", None))
    while (request := receive(connection)) is not None:
        number, new, task, row, arguments = request
        try:
            if new is not None:
                decoders[number] = pickle.loads(new)
                give_back_memory()
                _bound(memory)
                send(connection, ("loaded", None))
            tell = lambda sample: send(connection, ("dataset", sample.dataset))  # noqa: E731
            answer = "answer", getattr(decoders[number], task)(row, *arguments, told=tell)
        except SampleError as fault:
            answer = "fault", fault
        except Exception as error:  # a mistake of ours, not of the row's: the run must stop with it
            error.add_note(f"In a worker process, at row {row}:\n{traceback.format_exc()}")
            answer = "error", error
        send(connection, answer)
        del answer


def _end_with(parent: int) -> None:
    """Has the system end this process when its parent ends, even while a library hangs. Elsewhere the closed socket ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _bound(memory: int) -> None:
    """Bounds what this process may allocate from now on; a C library then sees malloc fail."""
    if sys.platform == "linux":
        import resource

        with open("/proc/self/status") as status:
            used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (used + memory, hard))
