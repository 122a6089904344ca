"""Tests of back ends: which rows of a study train in fleets, and that programs do not know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bnbench.cli.app import call
from bnbench.cli.run import _mixtures
from bnbench.engine import back_ends
from bnbench.engine.back_ends import back_ends_of, check_back_end, on_back_end, program_on
from bnbench.engine.conduct import train_row
from bnbench.engine.suite import prepare
from bnbench.engine.train import train_fleet
from bnbench.registry import BadInput
from bnbench.study import Arm, Cell, Design, Entry, Range, Result, Table, Trial
from bnbench.study.programs import planned_rows, programs_of
from tests.pilot_study import ARMS, design, drive, study
from tests.tiny_study import write_tiny

MODELS = tuple(Cell(model, model=model) for model in ("mlp", "cnn", "resnet8", "resnet20", "resnet50"))


@pytest.fixture
def every_norm_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(back_ends, "can_fleet", lambda trial: trial.world_size == 1)


@pytest.mark.parametrize(
    ("fleet", "on_gpu", "in_fleets"),
    [
        ("auto", False, {"mlp": "eager"}),
        ("auto", True, dict.fromkeys(("mlp", "cnn", "resnet8", "resnet20"), "eager")),
        ("off", True, {}),
        ("eager", False, dict.fromkeys((cell.name for cell in MODELS), "eager")),
        ("compiled", False, dict.fromkeys((cell.name for cell in MODELS), "compiled")),
    ],
)
@pytest.mark.usefixtures("every_norm_takes_part")
def test_small_models_train_in_fleets_unless_something_else_is_asked(
    fleet: str, on_gpu: bool, in_fleets: dict[str, str]
) -> None:
    found = back_ends_of(design(cells=MODELS), fleet, on_gpu)
    assert found == {cell.name: in_fleets.get(cell.name, "single") for cell in MODELS}


def one_cell(*arms: Arm, **changes: Any) -> Design:
    return design(cells=MODELS[:1], arms=arms or ARMS, **changes)


@pytest.mark.parametrize(
    "the_design",
    [
        one_cell(Arm("none", norm="none"), Arm("searched", space=(Range("lr", 0.1, 1.0),)), trials=2),
        one_cell(Arm("none", norm="none"), Arm("two", devices=2)),
        one_cell(Arm("none", norm="none"), Arm("another", model="resnet50")),
        one_cell(Arm("none", norm="none"), Arm("own", backend="single")),
        one_cell(Arm("none", norm="none"), Arm("own", backend="compiled")),
        one_cell(base=Trial(steps=8, backend="compiled")),
        design(cells=(Cell("mlp", backend="eager"),)),
    ],
)
@pytest.mark.usefixtures("every_norm_takes_part")
def test_one_arm_that_cannot_train_in_a_fleet_keeps_its_cell_out_of_them(the_design: Design) -> None:
    assert back_ends_of(one_cell(), "auto", on_gpu=False) == {"mlp": "eager"}
    assert back_ends_of(the_design, "auto", on_gpu=False) == {"mlp": "single"}


def test_a_norm_that_takes_no_part_keeps_its_cell_out_of_fleets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(back_ends, "can_fleet", lambda trial: trial.norm != "group")
    assert back_ends_of(one_cell(*ARMS), "eager", on_gpu=False) == {"mlp": "single"}
    assert back_ends_of(one_cell(*ARMS[:2]), "eager", on_gpu=False) == {"mlp": "eager"}


def test_a_real_dry_run_decides() -> None:
    assert back_ends_of(one_cell(), "auto", on_gpu=False) == {"mlp": "eager"}


@pytest.mark.parametrize(
    ("changes", "back_end", "trained"),
    [
        ({}, "single", "single"),
        ({}, "eager", "eager"),
        ({"score_on": "test", "curve_points": 3}, "compiled", "compiled"),
        ({"probes": {"rank": {}}}, "eager", "single"),
        ({"alone": True}, "eager", "single"),
        ({"devices": 2}, "eager", "single"),
        ({"backend": "compiled"}, "single", "compiled"),
        ({"backend": "compiled"}, "eager", "compiled"),
        ({"backend": "compiled", "probes": {"rank": {}}}, "single", "single"),
    ],
)
def test_a_row_trains_on_the_back_end_of_its_cell_unless_it_must_be_single(
    changes: dict[str, Any], back_end: str, trained: str
) -> None:
    row = Trial(**changes)
    assert on_back_end(row, back_end) == row.replace(backend=trained)


@pytest.mark.parametrize("tuning", ["per_replicate", "once"])
def test_a_program_chooses_the_same_on_every_back_end(tuning: str) -> None:
    """What the surroundings see is on the back end, with probes and lone rows as the only exceptions."""
    probed = design(tuning=tuning, timing_steps=4, probes={"rank": {}}, probed=1)

    def by_own_key(trial: Trial) -> Result:
        luck = int(trial.replace(backend="single").key, 16) % 9973 / 9973
        return Result("done", {"val/acc": luck, "val/loss": 1 - luck})

    def lines_of(wrap: Callable[[Any], Any]) -> tuple[list[Entry], list[list[Any]]]:
        return drive(wrap(programs_of(study(quick=probed), "quick")[0][1]), by_own_key)

    plain, asked = lines_of(lambda program: program)
    lines, in_fleets = lines_of(lambda program: program_on(program, "eager"))
    assert [[row.trial for row in rows] for rows in in_fleets] == [
        [on_back_end(row.trial, "eager") for row in rows] for rows in asked
    ]
    assert [(e.role, e.trial, e.result) for e in lines] == [
        (e.role, on_back_end(e.trial, "eager"), e.result) for e in plain
    ]
    single = [e for e in lines if e.trial.backend == "single"]
    assert single and all(e.trial.probes or e.trial.alone for e in single)
    assert {e.role for e in lines if e.trial.backend == "eager"} >= {
        "tune",
        "own" if tuning == "once" else "tune",
    }


@pytest.mark.usefixtures("every_norm_takes_part")
def test_a_job_lists_the_rows_that_are_trained_and_keeps_the_hash_of_its_study() -> None:
    plain, job = (prepare(study(), "quick", fleet) for fleet in ("off", "auto"))
    assert plain.study_hash == job.study_hash and len(plain.rows) == len(job.rows)
    assert plain.rows == tuple(planned_rows(study(), "quick"))
    assert set(job.back_ends.values()) == {"single", "eager"}
    trained = {(row.model, row.backend) for row in job.rows}
    assert trained == {("mlp", "eager"), ("cnn", "single")}


def test_a_row_that_no_fleet_takes_is_refused_with_its_place() -> None:
    with pytest.raises(BadInput, match=r"backend cannot be 'eager' for this row.*'single' can"):
        check_back_end(Trial(backend="eager", probes={"rank": {}}))
    check_back_end(Trial(probes={"rank": {}}))
    check_back_end(Trial(backend="compiled"))
    arms = (Arm("none", norm="none"), Arm("batch", alone=True, backend="eager"))
    with pytest.raises(BadInput, match="study 'pilot', cell 'mlp', arm 'batch': backend cannot be 'eager'"):
        prepare(study(quick=one_cell(*arms), hypotheses=()), "quick")


def test_a_comparison_that_mixes_back_ends_is_pointed_out() -> None:
    def table(*rows: tuple[int, str, dict[str, Any]]) -> Table:
        result = Result("done")
        return Table(
            tuple(Entry("mlp", "a", r, role, Trial(**changes), result) for r, role, changes in rows)  # type: ignore[arg-type]
        )

    eager, probed = {"backend": "eager"}, {"probes": {"rank": {}}}
    assert (
        _mixtures("mlp", table((0, "tune", eager), (0, "own", eager), (1, "own", {}), (1, "tune", {}))) == []
    )
    assert (
        _mixtures("mlp", table((0, "tune", eager), (0, "own", probed), (0, "timing", {"alone": True}))) == []
    )
    (line,) = _mixtures("mlp", table((0, "tune", eager), (0, "own", {})))
    assert "mlp" in line and "back ends" in line and "\n" not in line


def test_an_unknown_kind_of_fleet_is_refused_with_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("run", "plan"):
        assert call([verb, str(write_tiny(tmp_path)), "--fleet", "eagre", "--runs", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert "--fleet cannot be 'eagre'; did you mean 'eager'? Known: auto, compiled, eager, off" in said
        assert said.count("\n") == 1


def test_a_row_is_trained_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleets = []

    def watched(trials: Sequence[Trial], *places: Any) -> list[Result]:
        fleets.append(list(trials))
        return train_fleet(trials, *places)

    monkeypatch.setattr("bnbench.engine.train.train_fleet", watched)
    row = Trial(data="digits", steps=3, batch_size=8, precision="64-true")
    single, eager = (
        train_row(row.replace(backend=name).as_dict(), str(tmp_path), str(tmp_path))
        for name in ("single", "eager")
    )
    assert single.status == eager.status == "done"
    assert eager.metrics["val/loss"] == pytest.approx(single.metrics["val/loss"], rel=1e-10)
    assert fleets == [[row.replace(backend="eager")]]
