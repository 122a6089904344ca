"""Workers on this machine: one process a slot, each confined to its device, behind the Executor interface."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from types import FrameType
from typing import Any

from bnbench import placement

#: Seconds between SIGTERM and SIGKILL: all workers are gone ten seconds after they were told to end.
GRACE = 9.0

_Places = tuple[placement.Slot, ...]


@dataclass(eq=False)
class _Task:
    """A call that waits for its places, or has them."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    places: int
    future: Future[Any] = field(default_factory=Future)


def _work(places: _Places, pipe: Connection) -> None:
    """Answer tasks until the coordinator hangs up: what a worker process runs."""
    signal.signal(signal.SIGTERM, end_on_sigterm)
    # The coordinator ends its daemons when it exits, however that comes. But a daemon may start no process,
    # and a row over several devices needs one for each: so only the coordinator takes this for a daemon.
    multiprocessing.current_process().daemon = False
    threading.Thread(target=end_with_parent, daemon=True).start()
    placement.enter(*places)
    while True:
        task: Any = None
        answer: tuple[Any, Exception | None]
        try:
            task = pipe.recv()
        except EOFError:
            return
        except Exception as error:  # a function that cannot be found here
            answer = (None, error)
        pipe.send("begun")  # from here on, the worker's death is this task's fault
        if task is not None:
            answer = _run(*task)
        try:
            pipe.send(answer)
        except Exception as error:  # a result that cannot be sent
            pipe.send((None, RuntimeError(f"{type(error).__name__}: {error}")))


def _run(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    try:
        return fn(*args), None
    except Exception as error:
        return None, error


def end_on_sigterm(signum: int, frame: FrameType | None) -> None:
    """Let a long training write its checkpoint first; anything else ends at once."""
    from bnbench.engine.checkpoint import Checkpoint

    if not Checkpoint.ask():
        os._exit(143)


def end_with_parent() -> None:
    """Wait for the death of the process that started this one, and follow it.

    A worker's own parent is the fork server; multiprocessing knows who asked for the worker.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """What is started here never sees Ctrl-C: the coordinator alone decides what it means."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """A process in its place, and the pipe to it."""

    def __init__(self, process: ForkServerProcess, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe

    def take(self, task: _Task) -> bool:
        """Hand over a task; False where the worker was dead before it began."""
        try:
            self.pipe.send((task.fn, task.args))
            self.pipe.recv()
        except (EOFError, OSError):
            return False
        return True


class LocalPool(Executor):
    """One process a slot, so that a worker's death is the fault of exactly one task.

    That task's future raises BrokenProcessPool; the slot gets a new process, and the others go on. A task
    that the worker had not begun when it died is given to the next one. (When a worker of the standard
    library's pool dies, every task fails, and none is known to have begun.)

    Tasks begin in the order in which they were submitted. One that needs several devices waits until so many
    places are free, and gets a process of its own that sees them all and ends with it.
    """

    def __init__(self, slots: Sequence[placement.Slot], grace: float = GRACE) -> None:
        # A worker forked from a server that has torch loaded starts in milliseconds instead of seconds.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["bnbench.engine.train"])
        self._grace = grace
        self._slots = tuple(slots)
        self._free = list(slots)
        self._waiting: deque[_Task] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self._workers: dict[_Places, _Worker] = {}
        self._threads: set[threading.Thread] = set()

    @property
    def width(self) -> int:
        """How many rows of one device train at a time."""
        return len(self._slots)

    @property
    def gpus(self) -> int:
        """How many GPUs one row can have; 0 where rows train on processors."""
        return placement.most_gpus(self._slots)

    def submit(  # type: ignore[override]
        self, fn: Callable[..., Any], /, *args: Any, devices: int = 1
    ) -> Future[Any]:
        """Run `fn(*args)` where so many devices are free: distinct GPUs, or cores where there are no GPUs.

        More devices than there are cores share them.

        Raises:
            BadInput: more GPUs than there are.
        """
        task = _Task(fn, args, placement.count_places(self._slots, devices))
        with self._lock:
            if self._closed:
                raise RuntimeError("the workers have been stopped")
            self._waiting.append(task)
            self._begin()
        return task.future

    def _begin(self) -> None:
        """Begin tasks for as long as the next one finds its places; the caller has the lock."""
        while self._waiting and (places := placement.pick_places(self._free, self._waiting[0].places)):
            task = self._waiting.popleft()
            if task.future.set_running_or_notify_cancel():
                self._free = [slot for slot in self._free if slot not in places]
                thread = threading.Thread(target=self._serve, args=(task, places), daemon=True)
                self._threads.add(thread)
                thread.start()

    def _serve(self, task: _Task, places: _Places) -> None:
        """See a task through to its result, and give its places to the next one."""
        if len(places) > 1:
            # Idle workers hold memory of the devices that are now another's.
            for slot in places:
                self._dismiss((slot,))
        try:
            result, error = self._ask(task, places)
        except Exception as fault:
            result, error = None, fault
        if len(places) > 1:
            self._dismiss(places)
        if error is None:
            task.future.set_result(result)
        else:
            task.future.set_exception(error)
        with self._lock:
            self._free = sorted([*self._free, *places], key=lambda slot: slot.index)
            self._threads.discard(threading.current_thread())
            self._begin()

    def _ask(self, task: _Task, places: _Places) -> tuple[Any, Exception | None]:
        worker = self._workers.get(places) or self._hire(places)
        if not worker.take(task):
            # An idle worker was killed: nobody's task is to blame.
            worker = self._hire(places)
            if not worker.take(task):
                raise BrokenProcessPool("a new worker died before it began")
        try:
            answer: tuple[Any, Exception | None] = worker.pipe.recv()
        except (EOFError, OSError):
            raise BrokenProcessPool("the worker died in the middle of its task") from None
        return answer

    def _hire(self, places: _Places) -> _Worker:
        """Start the first worker of a place, or the next one after a death."""
        resource_tracker.ensure_running()  # its start would let interrupts through again
        with self._lock:
            if self._closed:
                raise BrokenProcessPool("the workers were stopped")
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(places, theirs), daemon=True)
            with _without_interrupts():
                process.start()
            theirs.close()
            worker = self._workers[places] = _Worker(process, ours)
            return worker

    def _dismiss(self, places: _Places) -> None:
        """Wait for the end of a worker that no task will follow, so that its devices are free."""
        with self._lock:
            worker = None if self._closed else self._workers.pop(places, None)
        if worker is not None:
            worker.pipe.close()
            worker.process.join(self._grace)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def worker_pids(self) -> list[int]:
        """Process numbers of the workers that are alive."""
        with self._lock:
            processes = [worker.process for worker in self._workers.values()]
        return [process.pid for process in processes if process.pid is not None and process.is_alive()]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop all workers, whatever they do: SIGTERM first, SIGKILL after `grace` seconds.

        Tasks that wait are cancelled; the futures of running ones raise BrokenProcessPool.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            workers = list(self._workers.values())
            threads = list(self._threads)
            waiting, self._waiting = self._waiting, deque()
        for task in waiting:
            task.future.cancel()
        for worker in workers:
            worker.process.terminate()
        deadline = time.monotonic() + self._grace
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
        for thread in threads:
            thread.join(1.0)
        for worker in workers:
            worker.process.join()
            worker.pipe.close()
