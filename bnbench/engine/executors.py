"""Workers on this machine: one process a slot, each confined to its device, behind the Executor interface."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from bnbench import placement

#: Seconds between SIGTERM and SIGKILL: all workers are gone ten seconds after they were told to end.
GRACE = 9.0

_Task = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


def _work(slot: placement.Slot, pipe: Connection) -> None:
    """Answer tasks until the coordinator hangs up: what a worker process runs."""
    signal.signal(signal.SIGTERM, _end_worker)
    threading.Thread(target=_end_with_coordinator, daemon=True).start()
    placement.enter(slot)
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
            answer = _run(slot.device, *task)
        try:
            pipe.send(answer)
        except Exception as error:  # a result that cannot be sent
            pipe.send((None, RuntimeError(f"{type(error).__name__}: {error}")))


def _run(device: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    try:
        return fn(device, *args), None
    except Exception as error:
        return None, error


def _end_worker(signum: int, frame: FrameType | None) -> None:
    """Let a long training write its checkpoint first; anything else ends at once."""
    from bnbench.engine.checkpoint import Checkpoint

    if not Checkpoint.ask():
        os._exit(143)


def _end_with_coordinator() -> None:
    """Wait for the death of the coordinator, and follow it. The worker's own parent is the fork server."""
    coordinator = multiprocessing.parent_process()
    assert coordinator is not None
    coordinator.join()
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
    """A process of one slot, and the pipe to it."""

    def __init__(self, process: ForkServerProcess, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe

    def take(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        """Hand over a task; False where the worker was dead before it began."""
        try:
            self.pipe.send((fn, args))
            self.pipe.recv()
        except (EOFError, OSError):
            return False
        return True


class LocalPool(Executor):
    """One process a slot, so that a worker's death is the fault of exactly one task.

    That task's future raises BrokenProcessPool; the slot gets a new process, and the others go on. A task
    that the worker had not begun when it died is given to the next one. (When a worker of the standard
    library's pool dies, every task fails, and none is known to have begun.)
    """

    def __init__(self, slots: Sequence[placement.Slot], grace: float = GRACE) -> None:
        # A worker forked from a server that has torch loaded starts in milliseconds instead of seconds.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["bnbench.engine.train"])
        self._grace = grace
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._workers: dict[int, _Worker] = {}
        self._threads = [threading.Thread(target=self._serve, args=(slot,), daemon=True) for slot in slots]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(device, *args)` on the next free slot, whose device is "cpu" or "cuda"."""
        if kwargs:
            raise TypeError("a task takes positional arguments only")
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the workers have been stopped")
            self._tasks.put((future, fn, args))
        return future

    def _serve(self, slot: placement.Slot) -> None:
        """Give tasks to the slot's worker, one at a time; the slot's own thread runs this."""
        while (task := self._tasks.get()) is not None:
            future, fn, args = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result, error = self._ask(slot, fn, args)
            except Exception as fault:
                result, error = None, fault
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    def _ask(
        self, slot: placement.Slot, fn: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[Any, Exception | None]:
        worker = self._workers.get(slot.index) or self._hire(slot)
        if not worker.take(fn, args):
            # An idle worker was killed: nobody's task is to blame.
            worker = self._hire(slot)
            if not worker.take(fn, args):
                raise BrokenProcessPool("a new worker died before it began")
        try:
            answer: tuple[Any, Exception | None] = worker.pipe.recv()
        except (EOFError, OSError):
            raise BrokenProcessPool("the worker died in the middle of its task") from None
        return answer

    def _hire(self, slot: placement.Slot) -> _Worker:
        """Start the slot's first worker, or the next one after a death."""
        resource_tracker.ensure_running()  # its start would let interrupts through again
        with self._lock:
            if self._closed:
                raise BrokenProcessPool("the workers were stopped")
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(slot, theirs), daemon=True)
            with _without_interrupts():
                process.start()
            theirs.close()
            worker = self._workers[slot.index] = _Worker(process, ours)
            return worker

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
        with contextlib.suppress(Empty):
            while task := self._tasks.get_nowait():
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for worker in workers:
            worker.process.terminate()
        deadline = time.monotonic() + self._grace
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
        for thread in self._threads:
            thread.join(1.0)
        for worker in workers:
            worker.process.join()
            worker.pipe.close()
