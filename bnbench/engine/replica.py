"""One row in training: its module and data, how far it is, and what has been measured of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnbench.data import Arrays, Split, load_split, load_test
from bnbench.data.batches import eval_batches
from bnbench.engine.checkpoint import EVERY, LEAST, Checkpoint, Progress, changing_tensors
from bnbench.engine.chunked import Blocks
from bnbench.engine.distributed import Group
from bnbench.engine.evaluate import (
    calibrated_losses,
    calibration_error,
    finite_or_worst,
    logits_of,
    saved_for_backward,
    scale_of_norms,
    scores,
    worst_scores,
)
from bnbench.engine.rows import check_trial, classifier_of, curve_steps, look_steps
from bnbench.norms.recalibrate import buffers_restored, has_moments, recalibrate
from bnbench.probes.base import Probe
from bnbench.study.table import Result
from bnbench.study.trial import Trial
from bnbench.tracking.live import LiveLog

CURVE_SAMPLES = 1000
RECALIBRATION_SAMPLES = 512
INITIAL_SAMPLES = 64
TRAIN_SAMPLES = 1024


@dataclass(frozen=True)
class Place:
    """Where a row is trained: the device, the folder of data and the `runs/` folder."""

    data: Path
    runs: Path
    device: str = "cpu"


#: Splits that were used last: two, and of small data so many as fit in so many bytes.
_kept: dict[tuple[Any, ...], Split] = {}
_KEPT_BYTES = 64 * 2**20


def _split(*key: Any) -> Split:
    name, seed, n_train, noise, options, folder, device = key
    split = _kept.pop(key, None)
    if split is None:
        split = load_split(
            name, seed, folder=folder, n_train=n_train, label_noise=noise, **json.loads(options)
        )
        split = dataclasses.replace(
            split,
            train=split.train.to(device),
            train_clean_y=split.train_clean_y.to(device),
            val=split.val.to(device),
        )
    _kept[key] = split
    while len(_kept) > 2 and sum(s.train.x.nbytes + s.val.x.nbytes for s in _kept.values()) > _KEPT_BYTES:
        del _kept[next(iter(_kept))]
    return split


def checkpoint_of(trial: Trial, place: Place, every: float = EVERY, least: float = LEAST) -> Checkpoint:
    """The checkpoint of a row, which need not be there."""
    return Checkpoint(place.runs / "checkpoints" / f"{trial.key}.pt", every, least)


def _first(arrays: Arrays, count: int | None) -> Arrays:
    return Arrays(arrays.x[:count], arrays.y[:count])


class Replica:
    """One training in progress: the module, its data, and what has been measured so far.

    `begin` comes before the first step, `advance` after each block of steps, `measure` after the last.
    A training that takes longer is saved every `every` seconds, and when it is stopped after `least` seconds.
    """

    def __init__(
        self,
        trial: Trial,
        place: Place,
        started: float,
        *,
        every: float = EVERY,
        least: float = LEAST,
        group: Group = Group(),  # noqa: B008 (it is frozen)
        probes: Sequence[Probe] = (),
    ) -> None:
        check_trial(trial)
        self.trial, self.place, self.group = trial, place, group
        self.probes = {probe.name: probe for probe in probes}
        #: All ranks compute the same; one of them writes.
        self.writes = group.rank == 0
        self.live = LiveLog(place.runs, trial.key, started)
        self.checkpoint = checkpoint_of(trial, place, every if self.writes else math.inf, least)
        options = json.dumps(dict(trial.data_options), sort_keys=True)
        split = _split(
            trial.data, trial.data_seed, trial.n_train, trial.label_noise, options, place.data, place.device
        )
        self.split = dataclasses.replace(split, val=_first(split.val, trial.n_eval))
        self.module = classifier_of(trial, self.arrays(self.split.train), group)
        if trial.precision == "64-true":
            self.module.double()
        if len(self.split.in_shape) == 3:
            self.module.to(memory_format=torch.channels_last)
        self.module.held_out = self.arrays(self.split.val) if self.probes else None
        if place.device != "cpu":
            self.module.to(place.device)
        self.model = self.module.model
        self.optimizer = self.module.prepare()
        self.drawn = curve_steps(trial.steps, trial.curve_points)
        self.looks = look_steps(trial)
        self.probed = {step for probe in self.probes.values() for step in probe.due_steps(trial.steps)}
        self.progress = Progress()
        #: The losses of the block so far, which a probe may split.
        self.block_losses: list[float] = []
        self.initial: dict[str, float] = {}
        self.edges: set[int] = set()
        #: The step and number of samples of the last precise statistics, and the buffers with them.
        self._precise_at: tuple[int, int] | None = None
        self._precise: list[Tensor] = []

    def arrays(self, arrays: Arrays) -> Arrays:
        """The same samples in the type that the row computes in."""
        return Arrays(arrays.x.double(), arrays.y) if self.trial.precision == "64-true" else arrays

    @contextlib.contextmanager
    def precise(self, samples: int = RECALIBRATION_SAMPLES) -> Iterator[None]:
        """Population statistics from 512 training samples, or so many, put back afterwards."""
        with buffers_restored(self.model):
            if self._precise_at == (self.progress.step, samples):
                for buffer, value in zip(self.model.buffers(), self._precise, strict=True):
                    buffer.copy_(value)
            else:
                self.recalibrate(samples)
                self._precise_at = (self.progress.step, samples)
                self._precise = [buffer.clone() for buffer in self.model.buffers()]
            yield

    def recalibrate(self, samples: int) -> None:
        """Set the running statistics to those of so many training samples."""
        size = self.trial.global_batch
        full = max(samples, size) // size * size
        sample = self.arrays(_first(self.split.train, full))
        batches = eval_batches(_first(sample, len(sample) // size * size), size)
        recalibrate(self.model, (self.group.share_of(x) for x, _ in batches))

    def begin(self) -> Blocks:
        """Measure the initial loss, take up a checkpoint that is there, and say which blocks are left."""
        # So few are enough to say whether the training ends above where it began.
        with self.precise(INITIAL_SAMPLES):
            self.initial = self.finite(self.train_scores(self.train_logits()))
        self.group.check_equal([*self.model.parameters(), *self.model.buffers()], "initial weights")
        if self.writes:
            self.progress = self.checkpoint.restore(self.model, self.optimizer)
        self.progress = self.group.tell(self.progress)
        if self.progress.step:
            self.group.follow_first(changing_tensors(self.model, self.optimizer))
            for name, state in self.progress.probes.items():
                self.probes[name].load_state_dict(state)
            self.module.bring_up_to_date(self.progress.step)
        for at in range(len(self.progress.curve.get("step", ()))):
            self.show(at)
        stop = self.progress.step if self.progress.reached else self.trial.steps
        cuts = sorted({*self.drawn, *self.looks})
        blocks = Blocks(self.progress.step, stop, cuts, self.has_ended, self.probed)
        self.edges = blocks.edges
        return blocks

    def has_ended(self) -> bool:
        """Whether the training is over before its last step."""
        return self.module.diverged or self.progress.reached

    def advance(self, step: int, seconds: float) -> None:
        """Take note of a block that ended at this step and took so long, and look at the model if it is time.

        Probes cut blocks further; a checkpoint comes at the ends that the blocks have without them, since a
        training that goes on elsewhere would cut other blocks, and so average other losses.
        """
        losses = self.module.last_losses
        self.block_losses += losses
        self.progress.step = step
        self.progress.last_loss = ([self.progress.last_loss] + [x for x in losses if math.isfinite(x)])[-1]
        self.progress.trained_s += seconds
        if not self.module.diverged:
            if step in self.looks:
                self.look()
            if step in self.drawn or (self.drawn and self.progress.reached):
                self.draw(step, sum(self.block_losses) / len(self.block_losses))
            if step in self.probed:
                self.progress.probes = {name: probe.state_dict() for name, probe in self.probes.items()}
        if step in self.edges:
            self.block_losses = []

    def can_be_saved(self) -> bool:
        """Whether this is the end of a whole block, and there is something to go on from."""
        return self.progress.step in self.edges and not self.module.diverged

    def look(self) -> None:
        """See whether the training NLL is low enough to stop; rank 0's decision is that of all."""
        with self.precise():
            loss = self.train_scores(self.train_logits())["loss"]
        self.progress.reached = self.group.tell(self.is_reached(loss))

    def is_reached(self, loss: float) -> bool:
        return self.trial.until_train_nll is not None and loss <= self.trial.until_train_nll

    def draw(self, step: int, train_loss: float) -> None:
        """Add a point to the curve, measured with precise statistics."""
        sample = self.arrays(_first(self.split.val, CURVE_SAMPLES))
        with self.precise():
            point = self.finite(scores(logits_of(self.module, sample), sample.y))
        values = {"step": step, "val/acc": point["acc"], "val/loss": point["loss"], "train/loss": train_loss}
        for name, value in values.items():
            self.progress.curve.setdefault(name, []).append(value)
        self.show(-1)

    def show(self, at: int) -> None:
        """Tell a point of the curve to whoever watches."""
        point = {name: series[at] for name, series in self.progress.curve.items()}
        if self.writes:
            self.live.write(int(point.pop("step")), point)

    def finite(self, values: dict[str, float]) -> dict[str, float]:
        return finite_or_worst(values, self.split.num_classes, self.progress.last_loss)

    def train_logits(self) -> Tensor:
        return logits_of(self.module, self.arrays(_first(self.split.train, TRAIN_SAMPLES)))

    def train_scores(self, logits: Tensor) -> dict[str, float]:
        """Scores on training samples, against noisy and clean labels."""
        found = scores(logits, self.split.train.y[: len(logits)])
        if self.trial.label_noise:
            clean = scores(logits, self.split.train_clean_y[: len(logits)])
            found |= {f"{name}_clean": value for name, value in clean.items()}
        return found

    def measure(self) -> Result:
        """Measure the trained model; the time of the whole and the provenance are the caller's to add."""
        trial, initial = self.trial, self.initial
        parts = ("val", "test") if trial.score_on == "test" else ("val",)
        with self.precise():
            seen = self.train_logits()
            final = self.train_scores(seen)
            reason = self.why_diverged(initial, final)
            evaluated = {} if reason else {part: self.arrays(self.load(part)) for part in parts}
            precise = {part: logits_of(self.module, arrays) for part, arrays in evaluated.items()}
        metrics = {
            "chance": 1 / self.split.num_classes,
            "train/loss_initial": initial["loss"],
            "time/step_ms": 1000 * self.progress.trained_s / self.progress.step,
        }
        if trial.until_train_nll is not None:
            reached = not reason and self.group.tell(self.is_reached(final["loss"]))
            # A diverged training counts as one that has used its budget.
            steps = trial.steps if reason else self.progress.step
            metrics |= {"train/reached": float(reached), "train/steps": float(steps)}
        if reason:
            for name, value in worst_scores(self.split.num_classes, self.progress.last_loss).items():
                metrics |= {f"train/{measured}": value for measured in final if measured.startswith(name)}
                metrics |= {f"{part}/{name}{kind}": value for part in parts for kind in ("", "_precise")}
        else:
            metrics |= {f"train/{name}": value for name, value in final.items()}
            for part, arrays in evaluated.items():
                metrics |= self.final_scores(part, arrays, precise[part])
        if trial.score_on == "test":
            labels = {"train": self.split.train.y[: len(seen)], **{p: a.y for p, a in evaluated.items()}}
            metrics |= self.calibrated({"train": seen, **precise}, labels)
            metrics["test/gap"] = metrics["test/loss_precise"] - metrics["train/loss"]
            calibrated = metrics["train/loss_calibrated"], metrics["test/loss_calibrated"]
            metrics["test/gap_calibrated"] = calibrated[1] - calibrated[0]
            metrics |= scale_of_norms(self.model)
            if self.writes and not reason:
                self.keep_weights()
        if trial.alone:
            metrics["memory/saved_mib"] = self.memory_of_step()
        self.checkpoint.remove()
        curve = {name: tuple(series) for name, series in self.progress.curve.items()}
        traces = {name: probe.trace for name, probe in self.probes.items()}
        return Result("diverged" if reason else "done", metrics, curve, reason, traces=traces)

    def memory_of_step(self) -> float:
        """The MiB that a training step keeps for its backward pass, beside weights and buffers."""
        module, device = self.module, self.place.device
        # Copies: a part of the training data would count as the whole of them.
        x, y = (
            part[: self.trial.batch_size].clone() for part in (module.train_arrays.x, module.train_arrays.y)
        )
        autocast = torch.autocast(device, torch.bfloat16, enabled=self.trial.precision == "bf16-mixed")
        devices = [torch.cuda.current_device()] if device == "cuda" else []
        module.train()
        with buffers_restored(self.model), torch.random.fork_rng(devices), autocast:
            own = [*self.model.parameters(), *self.model.buffers()]
            return saved_for_backward(lambda: module.loss(module.run_training_batch(x), y), own)

    def why_diverged(self, initial: dict[str, float], final: dict[str, float]) -> str:
        if self.module.diverged or not all(map(math.isfinite, final.values())):
            return "the loss became infinite or NaN"
        if final["loss"] > initial["loss"]:
            self.progress.last_loss = final["loss"]
            return "the training loss ended above where it began"
        return ""

    def calibrated(self, logits: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
        """Losses at the temperature that suits the validation data; a diverged run has no logits of it."""
        if "val" in logits:
            found = calibrated_losses(**{part: (logits[part], y) for part, y in labels.items()})
            if all(map(math.isfinite, found.values())):
                return found
        worst = worst_scores(self.split.num_classes, self.progress.last_loss)["loss"]
        return {"val/temperature": 1.0, "train/loss_calibrated": worst, "test/loss_calibrated": worst}

    def final_scores(self, part: str, arrays: Arrays, precise: Tensor) -> dict[str, float]:
        """Scores of the trained model: as its running statistics give them, and with precise ones."""
        same = self.trial.recalibration == "precise" or not has_moments(self.model)
        chosen = precise if same else logits_of(self.module, arrays)
        found: dict[str, float] = {}
        for kind, logits in (("", chosen), ("_precise", precise)):
            exact = self.finite(scores(logits, arrays.y))
            found |= {f"{part}/{name}{kind}": value for name, value in exact.items()}
        if part == "test" and chosen.isfinite().all():
            found["test/ece"] = calibration_error(chosen, arrays.y)
        return found

    def load(self, part: str) -> Arrays:
        """Validation data, or test data: read here, once, for a confirmed row that has been trained."""
        trial = self.trial
        if part == "val":
            return self.split.val
        arrays = load_test(trial.data, trial.data_seed, folder=self.place.data, **trial.data_options)
        return _first(arrays, trial.n_eval).to(self.place.device)

    def keep_weights(self) -> None:
        """Write the weights of a confirmed row; a study keeps the best of each cell and arm."""
        from safetensors.torch import save_file

        folder = self.place.runs / "weights"
        folder.mkdir(parents=True, exist_ok=True)
        half = folder / f".{self.trial.key}.{os.getpid()}"
        # Copies, since the format takes neither channels_last nor tensors that share memory.
        state = self.model.state_dict()
        save_file({name: v.clone(memory_format=torch.contiguous_format) for name, v in state.items()}, half)
        half.replace(folder / f"{self.trial.key}.safetensors")
