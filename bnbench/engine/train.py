"""Train one row, or the rows of a fleet: from trials to their results."""

from __future__ import annotations

import dataclasses
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from bnbench.engine.checkpoint import EVERY, LEAST
from bnbench.engine.chunked import Blocks
from bnbench.engine.distributed import (
    TIMEOUT,
    check_started,
    cluster_environment,
    join_group,
    launcher,
    quiet_lightning,
    trainer_for,
)
from bnbench.engine.fleet import FleetClassifier
from bnbench.engine.provenance import provenance
from bnbench.engine.ranks import RankFailed, run_ranks
from bnbench.engine.replica import Place, Replica, checkpoint_of
from bnbench.engine.rows import check_trial, normalized_together, probes_of
from bnbench.registry import BadInput
from bnbench.study.table import Result
from bnbench.study.trial import Trial


def train(
    trial: Trial,
    place: Place,
    *,
    save_every: float = EVERY,
    save_least: float = LEAST,
    timeout: float = TIMEOUT,
) -> Result:
    """Train a row and measure it.

    A non-finite loss, or a final training loss above the initial one, makes the result "diverged", with the
    scores that such a run is given. An error in the row's own code makes it "failed", with the traceback.
    A training that takes longer is saved every `save_every` seconds, and when it is stopped after
    `save_least` seconds.

    A row of several devices trains in as many processes, which are started here, unless torchrun or srun has
    started this one as one of them. Where one of these dies, or waits `timeout` seconds for another, the
    result is "failed" and names it.
    Raises BadInput where the row cannot be trained here at all (its data is missing, say).
    """
    if trial.world_size > 1 and launcher() is None and not dist.is_initialized():
        return _train_in_ranks(trial, place, save_every, save_least, timeout)
    check_started(trial)
    started = time.time()
    clock = time.perf_counter()
    if place.device == "cuda":
        if trial.world_size > 1:
            torch.cuda.set_device(cluster_environment().local_rank())
        torch.cuda.reset_peak_memory_stats()
    replica = None
    try:
        check_trial(trial)
        probes = probes_of(trial)
        trainer = trainer_for(trial, place.device, timeout, probes)
        group = join_group(trainer, trial)
        replica = Replica(
            trial, place, started, every=save_every, least=save_least, group=group, probes=probes
        )
        _train_alone(replica, trainer)
        result = replica.measure()
    except Exception as error:
        if replica is None and isinstance(error, BadInput):
            raise
        traces = {name: probe.trace for name, probe in replica.probes.items()} if replica is not None else {}
        result = Result("failed", reason=traceback.format_exc(), traces=traces)
    return _signed(result, trial, place, started, time.perf_counter() - clock)


def _train_alone(replica: Replica, trainer: L.Trainer) -> None:
    """Do all steps of a row."""
    module = replica.module
    blocks = replica.begin()
    clock = time.perf_counter()

    def after_block(step: int) -> None:
        nonlocal clock
        replica.advance(step, module.ended - max(clock, module.began))
        if replica.can_be_saved():
            replica.checkpoint.maybe_save(replica.model, replica.optimizer, replica.progress)
        clock = time.perf_counter()

    module.after_block = after_block
    with replica.checkpoint.during():
        _fit(trainer, module, blocks, replica.place)
    if replica.place.device != "cpu":
        module.to(replica.place.device)  # Lightning has taken it to the processor.


def _fit(trainer: L.Trainer, module: L.LightningModule, blocks: Blocks, place: Place) -> None:
    devices = [torch.cuda.current_device()] if place.device == "cuda" else []
    with quiet_lightning(), torch.random.fork_rng(devices):
        trainer.fit(module, train_dataloaders=blocks)


def train_fleet(
    trials: Sequence[Trial],
    place: Place,
    *,
    save_every: float = EVERY,
    save_least: float = LEAST,
) -> list[Result]:
    """Train rows of one shape together (:mod:`bnbench.engine.fleet`); each result is what `train` would give.

    The results come in the order of the rows. Their times are shares of those of the fleet. A row that ends
    early (it diverged, or is where it was to get) leaves the others as they are. Rows that go on from
    checkpoints at different steps train one group after the other.
    Raises BadInput where a row cannot be trained here at all, and whatever the code of a row raises.
    """
    started = time.time()
    clock = time.perf_counter()
    if place.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    replicas = [Replica(trial, place, started, every=save_every, least=save_least) for trial in trials]
    blocks = [replica.begin() for replica in replicas]
    going = [i for i, replica in enumerate(replicas) if not replica.has_ended()]
    for step in sorted({replicas[i].progress.step for i in going}):
        together = [i for i in going if replicas[i].progress.step == step]
        _train_together([replicas[i] for i in together], blocks[together[0]])
    results = [replica.measure() for replica in replicas]
    share = (time.perf_counter() - clock) / len(trials)
    return [
        _signed(result, trial, place, started, share) for result, trial in zip(results, trials, strict=True)
    ]


def _train_together(replicas: Sequence[Replica], blocks: Blocks) -> None:
    """Do all steps of rows that have the same blocks before them."""
    first = replicas[0]
    fleet = FleetClassifier([replica.module for replica in replicas], first.trial.backend == "compiled")

    def after_block(step: int, seconds: float) -> None:
        going = [replica for replica in replicas if replica.module in fleet.members]
        for replica in going:
            replica.advance(step, seconds / len(going))
        if step in first.edges and first.checkpoint.is_due():
            for replica in going:
                if replica.can_be_saved():
                    replica.checkpoint.save(replica.model, replica.optimizer, replica.progress)
            first.checkpoint.end_if_asked()
        fleet.keep([replica.module for replica in going if not replica.has_ended()])

    fleet.after_block = after_block
    blocks.ended = lambda: not fleet.members
    with first.checkpoint.during():
        _fit(trainer_for(first.trial, first.place.device), fleet, blocks, first.place)
    fleet.keep([])


def _signed(result: Result, trial: Trial, place: Place, started: float, seconds: float) -> Result:
    """The result with its time, its memory and where it is from."""
    metrics = {**result.metrics, "time/total_s": seconds, "memory/peak_mib": _peak_memory(place.device)}
    return dataclasses.replace(result, metrics=metrics, provenance=_where(trial, place, started))


def _train_in_ranks(
    trial: Trial, place: Place, save_every: float, save_least: float, timeout: float
) -> Result:
    """Train a row in processes of its own; the result is rank 0's, and its time that of all this."""
    check_trial(trial)
    started = time.time()
    clock = time.perf_counter()
    arguments = {"save_every": save_every, "save_least": save_least, "timeout": timeout}
    # Here it only hears that this process is to end, and is asked whether rank 0 has anything to save.
    checkpoint = checkpoint_of(trial, place, save_every, save_least)
    with checkpoint.during():
        try:
            result = run_ranks(
                train,
                {"trial": trial, "place": place, **arguments},
                trial.devices,
                device=place.device,
                timeout=timeout,
                failure=lambda answer: answer.reason if answer.status == "failed" else "",
                asked=lambda: checkpoint.asked,
            )
        except RankFailed as failed:
            result = Result("failed", reason=str(failed), provenance=_where(trial, place, started))
    return dataclasses.replace(
        result, metrics={**result.metrics, "time/total_s": time.perf_counter() - clock}
    )


def _where(trial: Trial, place: Place, started: float) -> dict[str, Any]:
    """The provenance of a result, with the sizes of the group."""
    sizes = {"world_size": trial.world_size, "global_batch": trial.global_batch}
    return {**provenance(place.device, started), **sizes, "nbs": normalized_together(trial)}


def _peak_memory(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
