"""Train one row: from a trial to its result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bnbench.data import Arrays, Split, augmentation, load_split, load_test, seed_of, shape_of
from bnbench.data.batches import eval_batches
from bnbench.engine.checkpoint import EVERY, LEAST, Checkpoint, Progress, changing_tensors
from bnbench.engine.chunked import Blocks, ChunkedClassifier
from bnbench.engine.distributed import (
    TIMEOUT,
    check_started,
    cluster_environment,
    join_group,
    launcher,
    quiet_lightning,
    trainer_for,
)
from bnbench.engine.evaluate import calibration_error, finite_or_worst, logits_of, scores, worst_scores
from bnbench.engine.provenance import provenance
from bnbench.engine.ranks import RankFailed, run_ranks
from bnbench.lit import check_model
from bnbench.norms import normalization_batch_size
from bnbench.norms.recalibrate import precise_statistics
from bnbench.registry import BadInput
from bnbench.study.table import Result, Status
from bnbench.study.trial import Trial
from bnbench.tracking.live import LiveLog

CURVE_RATIO = 1.15
CURVE_SAMPLES = 1000
RECALIBRATION_SAMPLES = 512
TRAIN_SAMPLES = 1024


@dataclass(frozen=True)
class Place:
    """Where a row is trained: the device, the folder of data and the `runs/` folder."""

    data: Path
    runs: Path
    device: str = "cpu"


def module_arguments(trial: Trial) -> dict[str, Any]:
    """The arguments of NormClassifier for a row, as plain values."""
    in_shape, num_classes = shape_of(trial.data, **trial.data_options)
    same = (
        "model model_options norm norm_options reparam order activation dropout dropout_at init init_scale"
        " bias_init lr momentum weight_decay decay_norm schedule warmup label_smoothing steps"
    )
    row = trial.as_dict()
    return {
        **{name: row[name] for name in same.split()},
        "in_shape": list(in_shape),
        "num_classes": num_classes,
        "seed": seed_of(trial.seed, trial.score_on),
    }


@functools.lru_cache(maxsize=4096)
def _check_shape(text: str) -> None:
    """Build the row's module on the meta device; rows that differ in seed or learning rate share it."""
    trial = Trial(**json.loads(text))
    arguments = module_arguments(trial)
    check_model(arguments.pop("model"), arguments.pop("norm"), **arguments)
    augmentation(trial.augment, tuple(arguments["in_shape"]))
    normalized_together(trial)


def normalized_together(trial: Trial) -> int | None:
    """How many samples share one set of statistics in training; None without batch statistics."""
    size = trial.global_batch if trial.norm == "sync_batch" else trial.batch_size
    return normalization_batch_size(trial.norm, size, **trial.norm_options)


def check_trial(trial: Trial) -> None:
    """Raise BadInput where a row cannot train: unknown names, groups that do not divide, and the like."""
    if trial.num_nodes > 1 and launcher() is None:
        raise BadInput(
            f"num_nodes is {trial.num_nodes}: start the row on all nodes at once, by torchrun (--nnodes"
            f" {trial.num_nodes} --nproc-per-node {trial.devices} -m bnbench.cli train trial.json) or by srun"
            f" (--nodes {trial.num_nodes} --ntasks-per-node {trial.devices} bnbench train trial.json)"
        )
    shape = trial.replace(lr=0.1, data_seed=0, seed=0, score_on="val", curve_points=0)
    _check_shape(json.dumps(shape.changed(), sort_keys=True))


def curve_steps(steps: int, points: int) -> list[int]:
    """Up to `points` steps that end at `steps` and grow by a ratio of 1.15, rounded to whole steps."""
    return sorted({max(1, round(steps / CURVE_RATIO**back)) for back in range(points)})


@functools.lru_cache(maxsize=2)
def _split(
    name: str, seed: int, n_train: int | None, noise: float, options: str, folder: Path, device: str
) -> Split:
    split = load_split(name, seed, folder=folder, n_train=n_train, label_noise=noise, **json.loads(options))
    return dataclasses.replace(
        split,
        train=split.train.to(device),
        train_clean_y=split.train_clean_y.to(device),
        val=split.val.to(device),
    )


def _first(arrays: Arrays, count: int) -> Arrays:
    return Arrays(arrays.x[:count], arrays.y[:count])


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
    status: Status
    metrics: dict[str, float] = {}
    curve: dict[str, tuple[float, ...]] = {}
    run = None
    try:
        run = _Run(trial, place, save_every, save_least, timeout, started)
        metrics, curve, status, reason = run.measure()
    except Exception as error:
        if run is None and isinstance(error, BadInput):
            raise
        status, reason = "failed", traceback.format_exc()
    metrics["time/total_s"] = time.perf_counter() - clock
    metrics["memory/peak_mib"] = _peak_memory(place.device)
    return Result(status, metrics, curve, reason, _where(trial, place, started))


def _train_in_ranks(
    trial: Trial, place: Place, save_every: float, save_least: float, timeout: float
) -> Result:
    """Train a row in processes of its own; the result is rank 0's, and its time that of all this."""
    check_trial(trial)
    started = time.time()
    clock = time.perf_counter()
    arguments = {"save_every": save_every, "save_least": save_least, "timeout": timeout}
    # Here it only hears that this process is to end, and is asked whether rank 0 has anything to save.
    checkpoint = _checkpoint(trial, place, save_every, save_least)
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


def _checkpoint(trial: Trial, place: Place, every: float, least: float) -> Checkpoint:
    return Checkpoint(place.runs / "checkpoints" / f"{trial.key}.pt", every, least)


def _peak_memory(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class _Run:
    """One training in progress: the module, its data, and what has been measured so far."""

    def __init__(
        self, trial: Trial, place: Place, every: float, least: float, timeout: float, started: float
    ) -> None:
        check_trial(trial)
        self.trial, self.place = trial, place
        self.trainer = trainer_for(trial, place.device, timeout)
        self.group = join_group(self.trainer, trial)
        #: All ranks compute the same; one of them writes.
        self.writes = self.group.rank == 0
        self.live = LiveLog(place.runs, trial.key, started)
        self.checkpoint = _checkpoint(trial, place, every if self.writes else math.inf, least)
        options = json.dumps(dict(trial.data_options), sort_keys=True)
        self.split = _split(
            trial.data, trial.data_seed, trial.n_train, trial.label_noise, options, place.data, place.device
        )
        self.module = ChunkedClassifier(
            train=self.arrays(self.split.train),
            batch_size=trial.batch_size,
            training_seed=(trial.seed, trial.score_on),
            augment=trial.augment,
            clip_norm=trial.clip_norm,
            after_block=self.after_block,
            group=self.group,
            **module_arguments(trial),
        )
        if trial.precision == "64-true":
            self.module.double()
        if len(self.split.in_shape) == 3:
            self.module.to(memory_format=torch.channels_last)
        self.module.to(place.device)
        self.model = self.module.model
        self.optimizer = self.module.prepare()
        self.cuts = curve_steps(trial.steps, trial.curve_points)
        self.progress = Progress()
        self.clock = time.perf_counter()

    def arrays(self, arrays: Arrays) -> Arrays:
        return Arrays(arrays.x.double(), arrays.y) if self.trial.precision == "64-true" else arrays

    def precise(self) -> contextlib.AbstractContextManager[Any]:
        """Population statistics from 512 training samples, put back afterwards."""
        size = self.trial.global_batch
        full = max(RECALIBRATION_SAMPLES, size) // size * size
        sample = self.arrays(_first(self.split.train, full))
        batches = eval_batches(_first(sample, len(sample) // size * size), size)
        return precise_statistics(self.model, (self.group.share_of(x) for x, _ in batches))

    def fit(self) -> None:
        self.group.check_equal([*self.model.parameters(), *self.model.buffers()], "initial weights")
        if self.writes:
            self.progress = self.checkpoint.restore(self.model, self.optimizer)
        self.progress = self.group.tell(self.progress)
        if self.progress.step:
            self.group.follow_first(changing_tensors(self.model, self.optimizer))
        for at in range(len(self.progress.curve.get("step", ()))):
            self.show(at)
        blocks = Blocks(self.progress.step, self.trial.steps, self.cuts, lambda: self.module.diverged)
        self.clock = time.perf_counter()
        devices = [torch.cuda.current_device()] if self.place.device == "cuda" else []
        with quiet_lightning(), torch.random.fork_rng(devices), self.checkpoint.during():
            self.trainer.fit(self.module, train_dataloaders=blocks)
        self.module.to(self.place.device)

    def after_block(self, step: int) -> None:
        losses = self.module.last_losses
        self.progress.step = step
        self.progress.last_loss = ([self.progress.last_loss] + [x for x in losses if math.isfinite(x)])[-1]
        self.progress.trained_s += time.perf_counter() - self.clock
        if not self.module.diverged:
            if step in self.cuts:
                self.draw(step, sum(losses) / len(losses))
            self.checkpoint.maybe_save(self.model, self.optimizer, self.progress)
        self.clock = time.perf_counter()

    def draw(self, step: int, train_loss: float) -> None:
        """Add a point to the curve, measured with precise statistics."""
        sample = self.arrays(_first(self.split.val, CURVE_SAMPLES))
        with self.precise():
            point = self.finite(scores(logits_of(self.model, sample), sample.y))
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

    def train_scores(self) -> dict[str, float]:
        """Scores on training samples, against noisy and clean labels."""
        sample = self.arrays(_first(self.split.train, TRAIN_SAMPLES))
        logits = logits_of(self.model, sample)
        found = scores(logits, sample.y)
        if self.trial.label_noise:
            clean = scores(logits, self.split.train_clean_y[: len(sample)])
            found |= {f"{name}_clean": value for name, value in clean.items()}
        return found

    def measure(self) -> tuple[dict[str, float], dict[str, tuple[float, ...]], Status, str]:
        trial = self.trial
        with self.precise():
            initial = self.finite(self.train_scores())
        self.fit()
        parts = ("val", "test") if trial.score_on == "test" else ("val",)
        with self.precise():
            final = self.train_scores()
            reason = self.why_diverged(initial, final)
            evaluated = {} if reason else {part: self.arrays(self.load(part)) for part in parts}
            precise = {part: logits_of(self.model, arrays) for part, arrays in evaluated.items()}
        metrics = {
            "chance": 1 / self.split.num_classes,
            "train/loss_initial": initial["loss"],
            "time/step_ms": 1000 * self.progress.trained_s / self.progress.step,
        }
        if reason:
            for name, value in worst_scores(self.split.num_classes, self.progress.last_loss).items():
                metrics |= {f"train/{measured}": value for measured in final if measured.startswith(name)}
                metrics |= {f"{part}/{name}{kind}": value for part in parts for kind in ("", "_precise")}
        else:
            metrics |= {f"train/{name}": value for name, value in final.items()}
            for part, arrays in evaluated.items():
                metrics |= self.final_scores(part, arrays, precise[part])
        if trial.score_on == "test":
            metrics["test/gap"] = metrics["test/loss_precise"] - metrics["train/loss"]
            if self.writes and not reason:
                self.keep_weights()
        self.checkpoint.remove()
        curve = {name: tuple(series) for name, series in self.progress.curve.items()}
        return metrics, curve, "diverged" if reason else "done", reason

    def why_diverged(self, initial: dict[str, float], final: dict[str, float]) -> str:
        if self.module.diverged or not all(map(math.isfinite, final.values())):
            return "the loss became infinite or NaN"
        if final["loss"] > initial["loss"]:
            self.progress.last_loss = final["loss"]
            return "the training loss ended above where it began"
        return ""

    def final_scores(self, part: str, arrays: Arrays, precise: Tensor) -> dict[str, float]:
        """Scores of the trained model: as its running statistics give them, and with precise ones."""
        chosen = precise if self.trial.recalibration == "precise" else logits_of(self.model, arrays)
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
        return arrays.to(self.place.device)

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
