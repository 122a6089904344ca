"""From an MLflow run back to its row."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from bnbench.registry import BadInput
from bnbench.study.trial import Trial, trial_from
from bnbench.tracking.store import Store, one_line


def trial_of_run(store: Store, run_id: str) -> Trial:
    """The row that a training's run holds as `trial.json`.

    Raises BadInput where there is no such run, or where it is none of one training.
    """
    from mlflow.exceptions import MlflowException

    try:
        store.client.get_run(run_id)
    except MlflowException:
        raise BadInput(
            f"{run_id!r} is no run of {store.shown}, no key of a recorded row and no .json file;"
            " give one of these, or another store with --tracking-uri"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = store.client.download_artifacts(run_id, "trial.json", folder)
        except (MlflowException, OSError) as error:
            raise BadInput(
                f"run {run_id} has no trial.json, so it is not one training ({one_line(error, store.uri)});"
                " give the run of a single training"
            ) from None
        return trial_from(json.loads(Path(path).read_text()), f"run {run_id}")
