"""Several processes that train one row together: who they are, and what they tell each other."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from unittest.mock import patch

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.trainer.connectors import callback_connector
from lightning.pytorch.utilities import argparse as environment_defaults
from torch import Tensor

from bnbench.registry import BadInput
from bnbench.study.trial import Trial

#: Seconds that a rank waits for the others before the training fails.
TIMEOUT = 300.0

Plain = TypeVar("Plain")


def launcher(environ: Mapping[str, str] = os.environ) -> str | None:
    """Who started this process as one of several: "torchrun", "srun", or None where nobody did.

    The variables of a job (SLURM_NTASKS, SLURM_JOB_ID) say nothing: a batch script has them too. Those of a
    job step are srun's.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    return "srun" if tasks.isdecimal() and int(tasks) > 1 else None


def cluster_environment() -> ClusterEnvironment:
    """The environment that every Trainer is given, so that Lightning never guesses one.

    By itself it takes a batch job of SLURM for a step of one task, trains a row of two devices on one without
    a word, and installs a handler that puts the job into the queue again.
    Raises BadInput where srun was not told how many tasks a node gets.
    """
    started_by = launcher()
    if started_by == "torchrun":
        return TorchElasticEnvironment()
    if started_by == "srun":
        try:
            return SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:
            raise BadInput(" ".join(str(error).split())) from None
    return LightningEnvironment()


def check_started(trial: Trial) -> None:
    """Raise BadInput unless as many processes have been started as a row has devices."""
    if launcher() is not None:
        started = cluster_environment().world_size()
    else:
        started = dist.get_world_size() if dist.is_initialized() else 1
    if started != trial.world_size:
        raise BadInput(
            f"the row trains on {_devices(trial)}, but {launcher() or 'this program'} has started"
            f" {started} processes; start one a device"
        )


def _devices(trial: Trial) -> str:
    return (
        f"{trial.devices} devices" if trial.num_nodes == 1 else f"{trial.num_nodes} x {trial.devices} devices"
    )


@dataclass(frozen=True)
class Group:
    """The processes that train one row, each on its share of every batch, and which of them this is."""

    rank: int = 0
    size: int = 1

    def share_of(self, batch: Tensor, dim: int = 0) -> Tensor:
        """This rank's samples of a global batch, whose length is a multiple of the group's size."""
        return batch.chunk(self.size, dim)[self.rank]

    def average(
        self, loss: Tensor, gradients: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The means over the group of a loss and its gradients; the buffers become those of rank 0.

        All in one message: to the sum of the buffers the other ranks add nothing.
        """
        if self.size == 1:
            return loss, gradients
        averaged = [loss, *gradients]
        followed = list(buffers) if self.rank == 0 else [torch.zeros_like(buffer) for buffer in buffers]
        message = torch.cat([values.reshape(-1) for values in averaged + followed])
        dist.all_reduce(message)
        message[: sum(values.numel() for values in averaged)] /= self.size
        parts = torch.split(message, [values.numel() for values in averaged + followed])
        means = [part.view(v.shape).to(v.dtype) for part, v in zip(parts, averaged, strict=False)]
        for buffer, part in zip(buffers, parts[len(averaged) :], strict=True):
            buffer.copy_(part.view(buffer.shape))
        return means[0], means[1:]

    def check_equal(self, tensors: Sequence[Tensor], what: str) -> None:
        """Raise BadInput unless the sum of each tensor is the same on all ranks."""
        if self.size == 1:
            return
        sums = torch.stack([tensor.detach().double().sum() for tensor in tensors]).nan_to_num()
        extremes = torch.stack([sums, -sums])
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        if not torch.equal(extremes[0], -extremes[1]):
            raise BadInput(f"the ranks have different {what}; draw them with torch alone, which is seeded")

    @torch.no_grad()
    def follow_first(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors those of rank 0."""
        for tensor in tensors if self.size > 1 else ():
            values = tensor.detach().contiguous()
            dist.broadcast(values, 0)
            tensor.copy_(values)

    def tell(self, value: Plain) -> Plain:
        """The value of rank 0."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, 0)
        return told[0]


class OwnReduction(DDPStrategy):
    """Lightning's DDP without torch's wrapper around the module.

    The wrapper waits for gradients that `backward` leaves in `.grad`; the engine's trainer takes them from
    `torch.autograd.grad` and averages them itself (:meth:`Group.average`).
    """

    def __init__(self, device: str, timeout: float = TIMEOUT) -> None:
        super().__init__(process_group_backend=backend_of(device), timeout=timedelta(seconds=timeout))

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def setup(self, trainer: L.Trainer) -> None:
        """Remember what SIGTERM does before Lightning changes it."""
        self._on_sigterm = signal.getsignal(signal.SIGTERM)
        super().setup(trainer)

    def on_train_start(self) -> None:
        """Let SIGTERM do that again: Lightning's handler broadcasts, which in mid-step hangs all ranks."""
        if signal.getsignal(signal.SIGTERM) is not self._on_sigterm:
            signal.signal(signal.SIGTERM, self._on_sigterm)


def backend_of(device: str) -> str:
    """The back end of a process group whose tensors are on "cuda" or "cpu"."""
    return "nccl" if device == "cuda" else "gloo"


def trainer_for(
    trial: Trial, device: str, timeout: float = TIMEOUT, callbacks: Sequence[L.Callback] = ()
) -> L.Trainer:
    """The Trainer of a row on "cuda" or "cpu", with nothing in it that would cost time but these callbacks.

    Callbacks that other installed packages offer to every Trainer stay out, and so do arguments from the
    environment (PL_TRAINER_MAX_STEPS and the like): they could change what a row trains, and to look for
    them takes longer than a small row's evaluation.
    """
    with (
        quiet_lightning(),
        patch.object(callback_connector, "_load_external_callbacks", lambda group: []),
        patch.object(environment_defaults, "_parse_env_variables", lambda cls: Namespace()),
    ):
        return L.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=trial.devices,
            num_nodes=trial.num_nodes,
            strategy=OwnReduction(device, timeout) if trial.world_size > 1 else "auto",
            precision="bf16-mixed" if trial.precision == "bf16-mixed" else None,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            plugins=[cluster_environment()],
            callbacks=list(callbacks),
        )


def join_group(trainer: L.Trainer, trial: Trial) -> Group:
    """Become a member of the group of a Trainer. Raises BadInput where it is not as large as asked for."""
    if trial.world_size == 1:
        return Group()
    if trainer.strategy.root_device.type == "cuda" and torch.cuda.device_count() < trial.devices:
        raise BadInput(
            f"the row trains on {_devices(trial)}, but this process sees {torch.cuda.device_count()} GPUs;"
            " start it so that each task sees all GPUs of its node"
        )
    with quiet_lightning():
        trainer.strategy.setup_environment()
    counted, there = trainer.world_size, dist.get_world_size()
    if not counted == there == trial.world_size:
        raise BadInput(
            f"the row trains on {_devices(trial)}, but of {there} processes Lightning counts {counted}"
        )
    return Group(dist.get_rank(), there)


def leave_group() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning from telling what it does."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    # A change of level empties the caches of all loggers there are, so within this context it is left alone.
    loggers = [logger for logger in loggers if logger.level != logging.ERROR]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
