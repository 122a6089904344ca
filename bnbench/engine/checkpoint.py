"""Checkpoints of long trials: weights, momentum and curve, from which a run goes on bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from bnbench.engine.chunked import FusedSGD

EVERY = 300.0  # seconds between two checkpoints
LEAST = 30.0  # seconds; a training that is stopped sooner is repeated rather than resumed


@dataclass
class Progress:
    """How far a training is: steps, curve, last finite loss, seconds spent on the steps, target reached.

    `probes` has the state of each probe by name.
    """

    step: int = 0
    curve: dict[str, list[float]] = field(default_factory=dict)
    last_loss: float = float("inf")
    trained_s: float = 0.0
    reached: bool = False
    probes: dict[str, Any] = field(default_factory=dict)


class Checkpoint:
    """One file for one row. There is no random state in it: every draw is a function of seed and step.

    A signal handler calls `ask`: then a training that has lasted `least` seconds is saved at the end of its
    block, and its process ends with the exit code of SIGTERM. Otherwise a checkpoint is written every
    `every` seconds.
    """

    _current: ClassVar[Checkpoint | None] = None

    def __init__(self, path: Path, every: float = EVERY, least: float = LEAST) -> None:
        self.path, self.every, self.least = path, every, least
        self.begun = self.saved = time.monotonic()
        self.process = os.getpid()
        self.asked = False

    @classmethod
    def ask(cls) -> bool:
        """Ask the training under way to save itself and end; False where nothing is worth saving."""
        current = cls._current
        if current is None or time.monotonic() - current.begun < current.least:
            return False
        if current.process != os.getpid():
            return False  # it is the parent's, whose memory this process has a copy of
        current.asked = True
        return True

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """Heed `ask` while a `with` block trains; what was asked is done at its end at the latest."""
        Checkpoint._current = self
        try:
            yield
        finally:
            Checkpoint._current = None
            self.end_if_asked()

    def restore(self, model: nn.Module, optimizer: FusedSGD) -> Progress:
        """Load what is there, and say how far it was; a broken file or one of another torch is ignored."""
        if not self.path.exists():
            return Progress()
        mine = changing_tensors(model, optimizer)
        try:
            state = torch.load(self.path, weights_only=True, map_location="cpu")
            theirs = state["tensors"]
            progress = Progress(**state["progress"])
            fits = state["torch"] == str(torch.__version__) and [t.shape for t in theirs] == [
                t.shape for t in mine
            ]
        except Exception:  # torch.load raises many kinds of errors; any of them means that it cannot be used
            return Progress()
        if not fits:
            return Progress()
        with torch.no_grad():
            for tensor, saved in zip(mine, theirs, strict=True):
                tensor.copy_(saved)
        return progress

    def maybe_save(self, model: nn.Module, optimizer: FusedSGD, progress: Progress) -> None:
        """Save where it is time, or where it was asked for; in that case the process ends here."""
        if self.is_due():
            self.save(model, optimizer, progress)
        self.end_if_asked()

    def is_due(self) -> bool:
        """Whether it is time to save, or someone has asked for it."""
        return self.asked or time.monotonic() - self.saved >= self.every

    def end_if_asked(self) -> None:
        """End the process with the exit code of SIGTERM, if that was asked for."""
        if self.asked:
            os._exit(143)

    def save(self, model: nn.Module, optimizer: FusedSGD, progress: Progress) -> None:
        """Write the file; a disk that is full does not stop the training."""
        with contextlib.suppress(OSError, RuntimeError):
            self._write(model, optimizer, progress)
        self.saved = time.monotonic()

    def _write(self, model: nn.Module, optimizer: FusedSGD, progress: Progress) -> None:
        state = {
            "torch": str(torch.__version__),
            "tensors": changing_tensors(model, optimizer),
            "progress": dataclasses.asdict(progress),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_suffix(f".{os.getpid()}")
        torch.save(state, half)
        half.replace(self.path)

    def remove(self) -> None:
        """Remove the checkpoint of a row that is done, and what a killed process left half written."""
        folder = self.path.parent
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.name.startswith(f"{self.path.stem}."):
                file.unlink(missing_ok=True)


def changing_tensors(model: nn.Module, optimizer: FusedSGD) -> list[torch.Tensor]:
    """All that training changes: parameters, buffers and momentum."""
    momentum = [buffer for buffers in optimizer.buffers for buffer in buffers]
    return [*(p.detach() for p in model.parameters()), *model.buffers(), *momentum]
