"""Tests of what rows will cost: shapes that share a cost, and seconds that add up."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from bnbench.engine.cost import (
    Cost,
    known_costs,
    measure_costs,
    occupied_seconds,
    reference_cost,
    seconds_of,
    shape_of,
)
from bnbench.engine.fleet import FLEET_SIZE
from bnbench.record import Record
from bnbench.study import Result, Trial


def took(trial: Trial, step: float, beside: float, evaluated: int = 0) -> Result:
    """The result of a row whose evaluated samples cost 30 % of what one more trained sample costs.

    A step costs as 64 samples and its own.
    """
    total = beside + trial.steps * step + 0.3 * evaluated * step / (64 + trial.batch_size)
    return Result("done", {"time/step_ms": 1000 * step, "time/total_s": total})


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    record = Record(tmp_path / "bnbench.db")
    yield record
    record.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 1.0, "seed": 3, "data_seed": 3, "steps": 9, "score_on": "test", "curve_points": 4},
        {"schedule": "constant", "warmup": 0.1, "momentum": 0.0, "weight_decay": 0.1, "decay_norm": True},
        {"init": "xavier", "init_scale": 2.0, "label_noise": 0.2, "label_smoothing": 0.1},
        {"order": "act-norm", "dropout": 0.2, "dropout_at": "last", "norm_options": {"gamma_init": 3.0}},
        {"bias_init": 0.1, "logit_scale": 2.0, "gamma_decay": 0.1, "last_norm_options": {"gamma_init": 3.0}},
        {"repeat": 1, "alone": True, "until_train_nll": 0.1},
    ],
)
def test_what_changes_no_amount_of_work_changes_no_shape(changes: dict[str, Any]) -> None:
    assert shape_of(Trial(**changes)) == shape_of(Trial())


@pytest.mark.parametrize(
    "changes", [{"batch_size": 32}, {"norm": "none"}, {"model": "cnn"}, {"devices": 2}, {"n_train": 100},
                {"backend": "eager"}, {"backend": "compiled"},
                {"norm": "ghost_batch", "norm_options": {"ghost_size": 4}}],
)  # fmt: skip
def test_what_changes_the_work_changes_the_shape(changes: dict[str, Any]) -> None:
    assert shape_of(Trial(**changes)) != shape_of(Trial())


def test_a_recorded_shape_costs_what_it_took(record: Record) -> None:
    tuned = Trial(steps=100)
    confirmed = Trial(steps=300, score_on="test", curve_points=10)
    record.append([(tuned, took(tuned, 0.001, 0.5))])
    record.append([(confirmed, took(confirmed, 0.003, 0.7, evaluated=12000 + 10 * 1512))])
    record.append([(Trial(steps=7), Result("failed"))])
    (cost,) = known_costs(record).values()
    assert cost.step == pytest.approx(0.002)
    assert cost.beside == pytest.approx(0.6)


def test_the_seconds_of_a_row_are_its_steps_its_evaluations_and_the_rest() -> None:
    trial = Trial(steps=100, batch_size=50)
    costs = {shape_of(trial): Cost(0.01, 0.5)}
    assert seconds_of(trial, costs) == pytest.approx(1.5)
    assert seconds_of(trial.replace(curve_points=2), costs) == pytest.approx(1.5 + 0.3 * 3024 / 114 * 0.01)
    assert seconds_of(trial.replace(score_on="test"), costs) == pytest.approx(1.5 + 0.3 * 12000 / 114 * 0.01)
    until = trial.replace(until_train_nll=0.1)  # looks after 3, 6, ... 99 steps
    assert seconds_of(until, costs) == pytest.approx(1.5 + 0.3 * 33 * 1536 / 114 * 0.01)


def test_a_row_that_stopped_early_costs_what_its_steps_took(record: Record) -> None:
    trial = Trial(steps=1000, until_train_nll=0.1, batch_size=1472)
    looks = 39
    result = Result(
        "done", {"time/step_ms": 2.0, "train/steps": 100.0, "time/total_s": 0.2 + 0.5 + looks * 0.3 * 0.002}
    )
    record.append([(trial, result)])
    (cost,) = known_costs(record).values()
    assert (cost.step, cost.beside) == (pytest.approx(0.002), pytest.approx(0.5))


def test_an_unmeasured_shape_costs_what_it_took_on_the_machine_of_reference() -> None:
    assert seconds_of(Trial(norm="none", steps=1000), {}) == pytest.approx(0.40 + 0.020)
    assert seconds_of(Trial(norm="layer", steps=1000), {}) == pytest.approx(0.56 + 0.020)
    cnn = Trial(model="cnn", model_options={"channels": 16}, norm="none", steps=1000)
    assert seconds_of(cnn, {}) == pytest.approx(1.0 + 0.020)
    assert reference_cost(Trial(model_options={"depth": 12})).step == pytest.approx(3 * 0.56e-3)
    steps = [reference_cost(Trial(batch_size=size)).step for size in (16, 64, 256)]
    assert steps[0] < steps[1] < steps[2] < 4 * steps[1]
    alone, joined, synchronized = (
        reference_cost(Trial(norm=norm, devices=devices))
        for norm, devices in (("batch", 1), ("batch", 2), ("sync_batch", 2))
    )
    assert alone.step < joined.step < synchronized.step and alone.beside < joined.beside
    in_fleets = [reference_cost(Trial(backend=name)) for name in ("eager", "compiled")]
    assert in_fleets[0].step <= alone.step and in_fleets[0] == in_fleets[1]


def test_a_row_that_trains_alone_occupies_every_worker() -> None:
    trial = Trial(steps=100)
    costs = {shape_of(trial): Cost(0.01, 0.5)}
    assert occupied_seconds(trial, costs, 4) == seconds_of(trial, costs)
    assert occupied_seconds(trial.replace(alone=True), costs, 4) == pytest.approx(4 * 1.5)
    wide = trial.replace(devices=2, alone=True)
    assert occupied_seconds(wide, {shape_of(wide): Cost(0.01, 0.5)}, 4) == pytest.approx(4 * 1.5)


def test_a_row_on_two_devices_costs_both() -> None:
    trial = Trial(steps=100, devices=2)
    assert seconds_of(trial, {shape_of(trial): Cost(0.01, 0.5)}) == pytest.approx(3.0)


class Told:
    """An executor that trains nothing: every row takes the same."""

    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, Any], int]] = []

    def submit(
        self, fn: object, rows: list[dict[str, Any]], *places: str, devices: int
    ) -> Future[list[Result]]:
        self.asked += [(values, devices) for values in rows]
        future: Future[list[Result]] = Future()
        future.set_result([self.train(Trial(**values)) for values in rows])
        return future

    def train(self, trial: Trial) -> Result:
        # Of a fleet, the second half of the rows takes twice as long as the first.
        step = 0.001 * (1 + (trial.seed >= FLEET_SIZE / 2)) if trial.backend == "eager" else 0.004
        return Result("failed") if trial.norm == "group" else took(trial, step, 0.3)


def test_unknown_shapes_are_tried_twice_and_briefly(tmp_path: Path) -> None:
    executor = Told()
    known = Trial(norm="none")
    rows = [Trial(lr=lr, steps=500) for lr in (0.1, 0.2)]
    rows += [known, Trial(norm="group"), Trial(devices=2, data="cifar10"), Trial(norm="layer", steps=2)]
    given = {shape_of(known): Cost(1.0, 1.0)}
    costs = measure_costs(rows, given, executor, tmp_path, tmp_path)  # type: ignore[arg-type]
    assert len(executor.asked) == 6
    assert {values["backend"] for values, _ in executor.asked} == {"single"}
    assert {values["steps"] for values, _ in executor.asked} == {24}
    assert {devices for values, devices in executor.asked if values["data"] == "cifar10"} == {2}
    assert all(values["data_options"] for values, _ in executor.asked if values["data"] == "cifar10")
    assert costs[shape_of(known)] == Cost(1.0, 1.0)
    assert costs[shape_of(rows[0])].step == pytest.approx(0.004)
    assert costs[shape_of(rows[0])].beside == pytest.approx(0.3)
    # One that fails, and one that is hardly longer than the trial, are guessed.
    assert shape_of(Trial(norm="group")) not in costs
    assert shape_of(Trial(norm="layer")) not in costs


@pytest.mark.parametrize("back_end", ["eager", "compiled"])
def test_a_shape_that_trains_in_fleets_is_tried_in_one(tmp_path: Path, back_end: str) -> None:
    executor = Told()
    rows = [Trial(lr=lr, steps=500, backend=back_end) for lr in (0.1, 0.2)]
    costs = measure_costs(rows, {}, executor, tmp_path, tmp_path)  # type: ignore[arg-type]
    assert len({Trial(**values) for values, _ in executor.asked}) == len(executor.asked) == FLEET_SIZE
    assert {(values["steps"], values["backend"]) for values, _ in executor.asked} == {(24, "eager")}
    assert costs == {shape_of(rows[0]): Cost(pytest.approx(0.0015), pytest.approx(0.3))}
    assert seconds_of(rows[1], costs) == pytest.approx(0.3 + 500 * 0.0015)
