"""Workers of a Ray cluster behind the Executor interface: Ray finds the place, a local pool does the work."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import version
from typing import Any

from bnbench import placement
from bnbench.engine.executors import LocalPool
from bnbench.registry import BadInput

#: A task that loses its node more often than this is treated as one that kills its worker.
LOST_NODES = 3
#: Seconds between two looks at the head, and how many in vain mean that it is gone.
LOOK, LOOKS = 2.0, 5

_Versions = Mapping[str, str] | None
_pools: dict[tuple[str, ...], LocalPool] = {}


def _versions() -> dict[str, str]:
    return {program: version(program) for program in ("bnbench", "torch")}


def _compare(coordinator: _Versions) -> None:
    """Raise BadInput where this node has other versions than the coordinator, if these are given."""
    if coordinator is not None and (here := _versions()) != coordinator:
        ours, theirs = (", ".join(map(" ".join, found.items())) for found in (here, coordinator))
        raise BadInput(
            f"the Ray node {socket.gethostname()} has {ours}, the coordinator {theirs}; their rows do not"
            " compare: install the same versions on every node, or pass --allow-mixed"
        )


def _work(coordinator: _Versions, on_gpus: bool, devices: int, task: Callable[[], Any]) -> Any:
    """Do a task in a process that is confined to what Ray gave: what a worker of Ray runs.

    Ray gives its worker another GPU for each task, but a process keeps the one with which CUDA started. So
    the worker itself never starts CUDA, and has a local pool for as long as the GPUs stay the same.
    """
    _compare(coordinator)
    gpus = placement.given_gpus() if on_gpus else ()
    if gpus not in _pools:
        while _pools:
            _pools.popitem()[1].shutdown()
        # Or each process of the pool would load Ray's own program again.
        sys.modules["__main__"].__file__ = None
        _pools[gpus] = LocalPool(placement.plan_workers(gpus, None if gpus else 1))
    return _pools[gpus].submit(task, devices=devices).result()


def _connect(address: str) -> None:
    """Raise OSError or ValueError where nobody listens at host:port."""
    host, port = address.rsplit(":", 1)
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def _join(address: str) -> Any:
    """Connect this process with a cluster and return the module `ray`, which then keeps quiet."""
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "^"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise BadInput('--ray needs Ray: pip install -c constraints.txt -e ".[ray]"') from None
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address != "auto":
            # Ray alone would try for minutes, and write of it.
            _connect(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f"--ray {address}: no Ray cluster answers on this machine ({said[0]}); start one with"
            " `ray start --head`, or give the command on one of its nodes"
        ) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)
    return ray


class RayPool(Executor):
    """The nodes of a Ray cluster: a task takes free cores, GPUs, or the `per_gpu`-th part of one GPU.

    A task that was lost with its node is done on another one; one that killed its worker raises
    BrokenProcessPool, as in a local pool. A head that is gone makes all tasks raise BadInput.

    Raises:
        BadInput: no Ray, no cluster there, nobody in it to train, or a node with other versions.
    """

    def __init__(
        self,
        address: str,
        *,
        gpus: str = "all",
        workers: int | None = None,
        per_gpu: int = 1,
        allow_mixed: bool = False,
    ) -> None:
        if gpus not in ("all", "none"):
            raise BadInput(f"--gpus {gpus}: Ray chooses the cards of its nodes; with --ray, give all or none")
        self._ray = _join(address)
        self._per_gpu = per_gpu
        self._coordinator = None if allow_mixed else _versions()
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        cards, cores = ([int(node["Resources"].get(kind, 0)) for node in nodes] for kind in ("GPU", "CPU"))
        #: How many GPUs one row can have; 0 where rows train on processors.
        self.gpus = max(cards) if gpus == "all" else 0
        self._cores = max(cores)
        places = [count * per_gpu for count in cards] if self.gpus else cores
        #: How many rows of one device train at a time.
        self.width = workers or sum(places)
        if not any(places):
            raise BadInput(f"--ray {address}: no node of the cluster offers a GPU or a processor")
        self._lock = threading.Lock()
        self._open: set[Future[Any]] = set()
        self._closed = threading.Event()
        self._gone = ""
        # A GPU task is no reason to end Ray's worker: that has not started CUDA.
        self._remote = self._ray.remote(max_calls=0, max_retries=0)(_work)
        try:
            self._compare_nodes([node["NodeID"] for node, count in zip(nodes, places, strict=True) if count])
        except BaseException:
            self._ray.shutdown()
            raise
        threading.Thread(target=self._watch_head, daemon=True).start()

    def _compare_nodes(self, nodes: list[str]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        compare = self._ray.remote(num_cpus=0)(_compare)
        asked = [
            compare.options(scheduling_strategy=On(node, soft=False)).remote(self._coordinator)
            for node in nodes
        ]
        try:
            self._ray.get(asked)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def submit(  # type: ignore[override]
        self, fn: Callable[..., Any], /, *args: Any, devices: int = 1
    ) -> Future[Any]:
        """Run `fn(*args)` where so many devices of one node are free.

        Raises:
            BadInput: more GPUs than any node has.
        """
        if self.gpus and devices > self.gpus:
            raise BadInput(f"a row on {devices} GPUs does not fit on a node, which has {self.gpus}")
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("the connection to Ray has been closed")
            self._open.add(future)
        self._send(partial(fn, *args), devices, future)
        return future

    def _send(self, task: Callable[[], Any], devices: int, future: Future[Any], losses: int = 0) -> None:
        if self._gone:
            return self._settle(future, error=BadInput(self._gone))
        if self.gpus:
            share = {"num_cpus": 0, "num_gpus": devices if devices > 1 else 1 / self._per_gpu}
        else:
            share = {"num_cpus": min(devices, self._cores)}
        there = self._remote.options(**share).remote(self._coordinator, self.gpus > 0, devices, task)

        def receive(answer: Future[Any]) -> None:
            error = answer.exception()
            faults = self._ray.exceptions
            if error is None:
                self._settle(future, answer.result())
            elif isinstance(error, faults.NodeDiedError) and losses < LOST_NODES:
                self._send(task, devices, future, losses + 1)
            elif isinstance(error, faults.RayTaskError):
                self._settle(future, error=error.cause)
            else:
                said = str(error).strip().splitlines() or [""]
                self._settle(future, error=BrokenProcessPool(f"{type(error).__name__}: {said[0]}"))

        there.future().add_done_callback(receive)
        return None

    def _settle(self, future: Future[Any], result: Any = None, error: BaseException | None = None) -> None:
        with self._lock:
            if future not in self._open:
                return
            self._open.remove(future)
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def _watch_head(self) -> None:
        """Fail all tasks when the head is gone; Ray itself would end this process after a minute."""
        head = self._ray.get_runtime_context().gcs_address
        missed = 0
        while missed < LOOKS:
            if self._closed.wait(LOOK):
                return
            try:
                _connect(head)
                missed = 0
            except OSError:
                missed += 1
        self._gone = (
            f"the head of the Ray cluster at {head} is gone; what is recorded is kept: start a cluster, and"
            " the same command goes on"
        )
        for future in list(self._open):
            self._settle(future, error=BadInput(self._gone))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster, which ends this coordinator's tasks; their futures raise BrokenProcessPool."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        if not self._gone:
            self._ray.shutdown()
        for future in list(self._open):
            self._settle(future, error=BrokenProcessPool("the connection to Ray was closed"))
