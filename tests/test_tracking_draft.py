"""What a run of MLflow holds, as pure functions say it."""

from __future__ import annotations

import dataclasses
import json

from bnbench.study.table import Entry
from bnbench.study.trial import Trial
from bnbench.tracking.draft import METRICS, Definition, training_draft, trial_params
from tests.tracking_records import definition, result

CELL, ARM = "cnn-mnist1d", "batch"
DEFINITION = Definition("0123456789abcdef", 1.7e9, definition((CELL,), (ARM,)))
TRIAL = Trial(
    model="cnn",
    steps=500,
    score_on="test",
    last_norm_options={"gamma_init": 0.5},
    logit_scale=0.5,
    gamma_decay=0.01,
    until_train_nll=0.2,
    repeat=2,
)


def test_a_training_shows_what_its_row_changes_and_no_default_of_a_rare_field() -> None:
    params = trial_params(TRIAL)
    rare = {
        "last_norm_options": '{"gamma_init": 0.5}',
        "logit_scale": "0.5",
        "gamma_decay": "0.01",
        "until_train_nll": "0.2",
        "repeat": "2",
    }
    assert params.items() >= rare.items()
    assert not rare.keys() & trial_params(Trial(model="cnn")).keys()


def test_a_training_that_stopped_early_has_its_final_metrics_at_its_last_step() -> None:
    found = {"train/steps": 60.0, "train/reached": 1.0, "test/gap_calibrated": 0.1, "norm/gamma": 0.9}
    curve = {"step": (20.0, 60.0), "val/loss": (1.5, 0.7), "val/acc": (0.4, 0.7)}
    outcome = result(TRIAL, curve=curve)
    outcome = dataclasses.replace(outcome, metrics={**outcome.metrics, **found})
    draft = training_draft(DEFINITION, Entry(CELL, ARM, 0, "own", TRIAL, outcome))
    final = {point.key: point for point in draft.points if point.time == draft.end}
    assert {point.step for point in final.values()} == {60}
    assert final["norm/gamma"].value == 0.9
    assert final["test/gap_calibrated"].value == 0.1
    on_the_way = [(p.step, p.value) for p in draft.points if p.key == "val/loss" and p.time < draft.end]
    assert on_the_way == [(20, 1.5), (60, 0.7)]
    everything = json.loads(str(draft.files["result.json"]))["metrics"]
    assert everything.items() >= found.items()


def test_a_training_shows_at_most_15_metrics() -> None:
    assert len(METRICS) <= 15
    values = dict.fromkeys(METRICS, 1.0) | {"train/reached": 1.0, "val/temperature": 1.2}
    outcome = dataclasses.replace(result(TRIAL), metrics=values)
    draft = training_draft(DEFINITION, Entry(CELL, ARM, 0, "own", TRIAL, outcome))
    assert {point.key for point in draft.points} == set(METRICS)
