"""The processes of one row on this machine: started together, watched, and ended together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from bnbench.engine.distributed import TIMEOUT, backend_of, leave_group
from bnbench.engine.executors import end_on_sigterm, end_with_parent
from bnbench.engine.provenance import cuda_has_started
from bnbench.registry import BadInput

Answer = TypeVar("Answer")

#: Seconds that ranks get to leave once all have answered.
LEAVE = 5.0
_LOADED_IN = os.getpid()


class RankFailed(Exception):
    """A rank died, hung or raised; the message names it and says how."""


def run_ranks(
    function: Callable[..., Answer],
    arguments: Mapping[str, Any],
    count: int,
    *,
    device: str,
    timeout: float = TIMEOUT,
    failure: Callable[[Answer], str] = lambda answer: "",
    asked: Callable[[], bool] = lambda: False,
) -> Answer:
    """Call `function(**arguments)` in `count` new processes that form a process group; rank 0's answer.

    The group uses NCCL for the device "cuda" and gloo for "cpu"; a process that waits `timeout` seconds for
    another one fails. The first that dies, raises, or gives an answer in which `failure` finds a reason ends
    all at once. When `asked` says so, rank 0 is sent SIGTERM. No process is left, however this ends.

    Raises BadInput where a rank does, else RankFailed.
    """
    ranks: list[tuple[BaseProcess, Connection]] = []
    # Bound here, so that the port is surely free, and on the loopback address, so that nobody else hears.
    with socket.create_server(("127.0.0.1", 0)) as door:
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(door.getsockname()[1]),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "NODE_RANK": "0",
            **_loopback(),
        }
        try:
            for rank in range(count):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                member = _Member({**environment, **place}, torch.get_num_threads(), device, timeout)
                ranks.append(_start(member, door if rank == 0 else None, function, arguments))
            answers = _watch(ranks, timeout, failure, asked)
        finally:
            for process, pipe in ranks:
                process.kill()
                process.join()
                pipe.close()
    answer: Answer = answers[0]
    return answer


class _Member:
    """What a rank needs to know before it can join its group."""

    def __init__(self, environment: dict[str, str], threads: int, device: str, timeout: float) -> None:
        self.environment, self.threads, self.device = environment, threads, device
        self.timeout = timedelta(seconds=timeout)

    def enter(self, door: socket.socket | None) -> None:
        """Make this process that rank; rank 0 opens the door at which the others meet."""
        os.environ.update(self.environment)
        torch.set_num_threads(self.threads)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        here = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.device == "cuda" else None
        if here is not None:
            torch.cuda.set_device(here)
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            size,
            is_master=rank == 0,
            timeout=self.timeout,
            wait_for_workers=False,
            master_listen_fd=None if door is None else door.detach(),
        )
        dist.init_process_group(
            backend_of(self.device),
            store=store,
            rank=rank,
            world_size=size,
            timeout=self.timeout,
            device_id=here,
        )


def _loopback() -> dict[str, str]:
    """Where gloo's ranks of one machine talk: on the loopback interface, whatever the host's name is."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {"GLOO_SOCKET_IFNAME": names[0]} if names else {}


def _start(
    member: _Member, door: socket.socket | None, function: Callable[..., Any], arguments: Mapping[str, Any]
) -> tuple[BaseProcess, Connection]:
    # A child of the server that has torch loaded, as every worker is, can be forked as the server itself:
    # a server of its own would first load torch for seconds. CUDA does not survive a fork.
    forks = os.getppid() == _LOADED_IN and not cuda_has_started()
    context = multiprocessing.get_context("fork" if forks else "forkserver")
    context.set_forkserver_preload(["bnbench.engine.train"])
    ours, theirs = context.Pipe()
    process = context.Process(  # type: ignore[attr-defined]
        target=_be_rank, args=(member, door, theirs, function, dict(arguments)), daemon=True
    )
    process.start()
    theirs.close()
    return process, ours


def _be_rank(
    member: _Member,
    door: socket.socket | None,
    pipe: Connection,
    function: Callable[..., Any],
    arguments: dict[str, Any],
) -> None:
    """Do the work, tell what came of it, and stay until all are done: who leaves looks dead to the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_on_sigterm)
    threading.Thread(target=end_with_parent, daemon=True).start()
    answer: tuple[Any, Exception | None]
    try:
        member.enter(door)
        answer = function(**arguments), None
    except BadInput as error:
        answer = None, error
    except Exception:
        answer = None, RankFailed(traceback.format_exc())
    pipe.send(answer)
    pipe.recv()
    leave_group()


def _watch(
    ranks: list[tuple[BaseProcess, Connection]],
    timeout: float,
    failure: Callable[[Any], str],
    asked: Callable[[], bool],
) -> list[Any]:
    """Wait for all answers, and raise as soon as one cannot come or is none."""
    answers: dict[int, Any] = {}
    told = False
    deadline = float("inf")
    while len(answers) < len(ranks):
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks) if rank not in answers}
        heard = wait(list(waiting), timeout=0.1)
        ready = [rank for pipe, rank in waiting.items() if pipe in heard]
        received = {rank: _receive(ranks[rank][1]) for rank in ready}
        # A death comes first: what else has failed at the same time has failed because of it.
        for rank, answer in sorted(received.items(), key=lambda item: item[1] is not None):
            if answer is None:
                raise RankFailed(f"rank {rank} of {len(ranks)} {_end_of(ranks[rank][0])}")
            value, error = answer
            if isinstance(error, BadInput):
                raise error
            if reason := failure(value) if error is None else str(error):
                raise RankFailed(_in_rank(reason, rank, len(ranks)))
            answers[rank] = value
        if answers:
            deadline = min(deadline, time.monotonic() + timeout)
        if time.monotonic() > deadline and len(answers) < len(ranks):
            late = min(waiting.values() - answers.keys())
            raise RankFailed(f"rank {late} of {len(ranks)} was not done {timeout:g} s after another one")
        if not told and asked():
            told = True
            ranks[0][0].terminate()
    for _, pipe in ranks:
        pipe.send("done")
    for process, _ in ranks:
        process.join(LEAVE)
    return [answers[rank] for rank in range(len(ranks))]


def _receive(pipe: Connection) -> tuple[Any, Exception | None] | None:
    try:
        answer: tuple[Any, Exception | None] = pipe.recv()
    except (EOFError, OSError):
        return None
    return answer


def _end_of(process: BaseProcess) -> str:
    process.join(LEAVE)
    code = process.exitcode
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    return f"was ended by {signal.Signals(-code).name} (out of memory?)"


def _in_rank(reason: str, rank: int, count: int) -> str:
    """The reason with the rank: in the first line of a traceback, which stays one."""
    opening = "Traceback (most recent call last)"
    named = f"Traceback (rank {rank} of {count}; most recent call last)"
    return reason.replace(opening, named, 1) if opening in reason else f"rank {rank} of {count}: {reason}"
