"""What preflight tries in a worker, beside the known step: data, compiler, MLflow, two steps of a row."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bnbench.data import load_split
from bnbench.engine.conduct import train_rows
from bnbench.engine.cost import rows_like
from bnbench.placement import device_here
from bnbench.study.table import Result
from bnbench.study.trial import trial_from
from bnbench.tracking import open_store

_EXPERIMENT = "bnbench/preflight"


def load(name: str, options: Mapping[str, Any], folder: str) -> None:
    """Load a data set as a row does. Raises BadInput where it is missing or damaged."""
    load_split(name, 0, folder=Path(folder), **options)


def compile_function(path: str, cache: str) -> float:
    """Compile a small function for the device of this worker; how far its result is off.

    `path` is where programs are looked for, and `cache` an empty folder, so that nothing is found compiled.
    Raises RuntimeError that says in short why nothing was compiled.
    """
    os.environ |= {"PATH": path, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # The lock of tqdm, which torch makes, would outlive this worker under the method by which workers start.
    multiprocessing.set_start_method("fork", force=True)
    compiled: Any = torch.compile(_some_function)
    x = torch.linspace(-1, 1, 1024, device=device_here())
    try:
        return abs(float(compiled(x)) - float(_some_function(x)))
    except Exception as error:
        # What follows the first paragraph is for those who work on torch.
        raise RuntimeError(str(error).partition("\n\n")[0][:200]) from None


def _some_function(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(2 * x + 1).mean()


def write_run(uri: str, runs: str) -> None:
    """Let an MLflow store take a run with a number and a file, and delete it again.

    The experiment stays, deleted, since MLflow gives no name a second time. Raises BadInput where the store
    cannot be used.
    """
    store = open_store(uri, Path(runs))
    client = store.client
    there = client.get_experiment_by_name(_EXPERIMENT)
    if there is None:
        experiment = client.create_experiment(_EXPERIMENT, artifact_location=store.artifacts)
    else:
        experiment = there.experiment_id
        if there.lifecycle_stage == "deleted":
            client.restore_experiment(experiment)
    run = client.create_run(experiment).info.run_id
    client.log_metric(run, "value", 1.0)
    client.log_text(run, "A file can be stored here.\n", "preflight.txt")
    client.delete_run(run)
    client.delete_experiment(experiment)


def train_twice(values: Mapping[str, Any], data: str, runs: str) -> Result:
    """Train a row, and again in its fleet, if it has one, since the first time includes the warming up."""
    rows = [row.as_dict() for row in rows_like(trial_from(values))]
    (first,) = train_rows(rows[:1], data, runs)
    return first if first.status == "failed" else train_rows(rows, data, runs)[0]
