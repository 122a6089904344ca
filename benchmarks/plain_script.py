"""What one writes from the tutorials of Lightning, Optuna and MLflow to ask what batch normalization brings.

    python benchmarks/plain_script.py --net mlp --data mnist1d --steps 600
    python benchmarks/plain_script.py --net cnn --data digits --steps 200 --jobs 2

A grid of learning rates is tried for both networks on three seeds each, by Optuna; the best rate of each is
then trained on further seeds and tested. Every training is a run of MLflow, whose store is in the folder, as
Optuna's is. With `--jobs 2` two processes share the trials, over one SQLite storage. It trains what the study
of `studies.py` trains: the same networks, data, steps and numbers of trainings.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import lightning as L
import optuna
import torch
from lightning.pytorch.loggers import MLFlowLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from bnbench.data import default_folder, load_split, load_test

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*does not have many workers.*")

NORMS = ("none", "batch")
TUNING_SEEDS = (1000, 1001, 1002)
BATCH_SIZE = 64


def build_mlp(inputs: int, norm: str) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(4):
        layers.append(nn.Linear(inputs, 128, bias=norm == "none"))
        if norm == "batch":
            layers.append(nn.BatchNorm1d(128))
        layers.append(nn.ReLU())
        inputs = 128
    return nn.Sequential(*layers, nn.Linear(128, 10))


def build_cnn(norm: str) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 1
    for kernel, stride in ((5, 1), (3, 2), (3, 1)):
        layers.append(nn.Conv2d(inputs, 16, kernel, stride, padding=kernel // 2, bias=norm == "none"))
        if norm == "batch":
            layers.append(nn.BatchNorm2d(16))
        layers.append(nn.ReLU())
        inputs = 16
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def build(net: str, inputs: int, norm: str) -> nn.Module:
    model = build_mlp(inputs, norm) if net == "mlp" else build_cnn(norm)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class Classifier(L.LightningModule):
    def __init__(self, net: str, inputs: int, norm: str, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = build(net, inputs, norm)
        self.train_accuracy = MulticlassAccuracy(10, average="micro")
        self.val_accuracy = MulticlassAccuracy(10, average="micro")
        self.test_accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        self.train_accuracy(logits, y)
        self.log("train_loss", loss)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.evaluate("val", self.val_accuracy, batch)

    def test_step(self, batch, batch_idx):
        self.evaluate("test", self.test_accuracy, batch)

    def evaluate(self, part, accuracy, batch):
        x, y = batch
        logits = self.model(x)
        accuracy(logits, y)
        self.log(f"{part}_loss", F.cross_entropy(logits, y))
        self.log(f"{part}_accuracy", accuracy)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


class Experiment:
    """The data, and where results go."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        data = default_folder()
        split = load_split(arguments.data, 0, folder=data)
        test = load_test(arguments.data, 0, folder=data)
        self.inputs = split.train.x[0].numel()
        train, val = TensorDataset(split.train.x, split.train.y), TensorDataset(split.val.x, split.val.y)
        self.train = DataLoader(train, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
        self.val = DataLoader(val, batch_size=BATCH_SIZE)
        self.test = DataLoader(TensorDataset(test.x, test.y), batch_size=BATCH_SIZE)

    def fit(self, norm: str, lr: float, seed: int, run_name: str) -> tuple[L.Trainer, Classifier]:
        L.seed_everything(seed)
        model = Classifier(self.arguments.net, self.inputs, norm, lr)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=self.arguments.steps,
            logger=MLFlowLogger("plain", run_name, tracking_uri=tracking_uri(self.arguments.folder)),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, self.train, self.val)
        return trainer, model

    def objective(self, trial: optuna.Trial) -> float:
        norm = trial.suggest_categorical("norm", NORMS)
        lr = trial.suggest_float("lr", min(self.arguments.lr), max(self.arguments.lr), log=True)
        seed = trial.suggest_categorical("seed", TUNING_SEEDS)
        trainer, _ = self.fit(norm, lr, seed, f"trial-{trial.number}")
        return trainer.callback_metrics["val_accuracy"].item()

    def confirm(self, norm: str, lr: float, seed: int) -> float:
        trainer, model = self.fit(norm, lr, seed, f"{norm}-{seed}")
        (scores,) = trainer.test(model, self.test, verbose=False)
        return scores["test_accuracy"]


def tracking_uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def open_study(arguments: argparse.Namespace) -> optuna.Study:
    return optuna.create_study(
        study_name="plain",
        storage=f"sqlite:///{arguments.folder / 'optuna.db'}",
        sampler=optuna.samplers.GridSampler(
            {"norm": NORMS, "lr": arguments.lr, "seed": TUNING_SEEDS}, seed=0
        ),
        direction="maximize",
        load_if_exists=True,
    )


def best_rate(study: optuna.Study, norm: str) -> float:
    scores: dict[float, list[float]] = {}
    for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        if trial.params["norm"] == norm:
            scores.setdefault(trial.params["lr"], []).append(trial.value)
    return max(scores, key=lambda lr: statistics.fmean(scores[lr]))


def tune(arguments: argparse.Namespace, job: int) -> float:
    """A process's share of the grid; the sampler sees in the storage which points are left."""
    grid = len(NORMS) * len(arguments.lr) * len(TUNING_SEEDS)
    experiment = Experiment(arguments)
    study = open_study(arguments)
    began = time.perf_counter()
    study.optimize(experiment.objective, n_trials=len(range(job, grid, arguments.jobs)))
    return time.perf_counter() - began


def confirm(arguments: argparse.Namespace, job: int) -> float:
    """A process's share of the confirmations; what they score is printed and in MLflow."""
    experiment = Experiment(arguments)
    study = open_study(arguments)
    rates = {norm: best_rate(study, norm) for norm in NORMS}
    began = time.perf_counter()
    for number in range(job, arguments.tests, arguments.jobs):
        # The norms take turns, and every seed is one of each.
        norm, seed = NORMS[number % len(NORMS)], number // len(NORMS)
        score = experiment.confirm(norm, rates[norm], seed)
        print(f"{norm:6} lr {rates[norm]:.3g}  test accuracy {score:.3f}", flush=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--data", choices=("mnist1d", "digits"), default="mnist1d")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--tests", type=int, default=20, help="trainings at the best rates, of both networks")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "plain")
    arguments = parser.parse_args()

    # Both stores are made here, before there are two processes that could make them at the same time.
    arguments.folder.mkdir(parents=True, exist_ok=True)
    open_study(arguments)
    _ = MLFlowLogger("plain", tracking_uri=tracking_uri(arguments.folder)).experiment
    if arguments.jobs == 1:
        seconds = tune(arguments, 0) + confirm(arguments, 0)
    else:
        jobs, same = range(arguments.jobs), [arguments] * arguments.jobs
        with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
            seconds = max(pool.map(tune, same, jobs)) + max(pool.map(confirm, same, jobs))
    trainings = len(NORMS) * len(arguments.lr) * len(TUNING_SEEDS) + arguments.tests
    print(f"{trainings} trainings in {seconds:.2f} s")


if __name__ == "__main__":
    main()
