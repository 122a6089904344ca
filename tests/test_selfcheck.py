"""`bnbench selfcheck`: a sound suite passes, and one whose judge or whose trainings are doctored does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

from bnbench.cli import selfcheck
from bnbench.cli.app import call
from bnbench.cli.selfcheck import STUDY, check
from bnbench.data import default_folder
from bnbench.study import claims
from bnbench.study.error_rates import LEVEL, MISSES, Promise, Rate, World, measure_rates, pool_twice
from bnbench.study.load import load_study

FEW = (
    Promise(World(cells=2), MISSES, LEVEL),
    Promise(World((2.0,), cells=2), "share of cells SUPPORTED", 0.9, "at least"),
)


class Here(Executor):
    """Does the work at once and in this process, where a test has doctored the judge."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the rates in the process of the test."""
    monkeypatch.setattr(selfcheck, "LocalPool", lambda _: Here())


SMALL = {
    'model="mlp", steps=60': 'model="mlp", model_options={"depth": 2, "width": 32}, steps=30',
    "lr=(0.001, 0.03, 0.1, 3.0)": "lr=(0.001, 0.1, 10.0)",
    "replicates=10": "replicates=5",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that all tests share, so that each row is trained once."""
    return tmp_path_factory.mktemp("selfcheck")


def write(folder: Path, **replaced: str) -> Path:
    """Write the study of known answer at its smallest size, with some pieces of its text replaced."""
    text = STUDY.read_text()
    for old, new in (SMALL | replaced).items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "twins.py"
    path.write_text(text)
    return path


def said(capsys: pytest.CaptureFixture[str], folder: Path, study: Path, code: int) -> dict[str, Any]:
    """What a small self-check says as JSON, when it ends with this code."""
    arguments = {"promises": FEW, "study": study, "as_json": True}
    assert check(40, "none", 2, folder / "runs", default_folder(), **arguments) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_sound_suite_finds_what_is_planted_and_nothing_else(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    found = said(capsys, folder, write(folder), 0)
    assert found["faults"] == []
    assert [rate["truth"].split(",")[0] for rate in found["rates"]] == ["A/A", "effect 2δ", "A/A"]
    twins, planted, denied = found["verdicts"]
    assert twins["low"] < 0 < twins["high"]
    assert len(set(twins["values"])) > 1
    assert (planted["decision"], denied["decision"]) == ("SUPPORTED", "REFUTED")
    assert not (folder / "runs" / "mlflow.db").exists()


def test_an_eager_judge_is_found_out(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_this_process: None,
) -> None:
    monkeypatch.setattr(claims, "ALPHA", 0.5)
    faults = said(capsys, folder, write(folder), 1)["faults"]
    assert faults[0].startswith("A/A, normal")
    assert "at most 0.1534 was to be seen" in faults[0]


def test_a_blind_judge_is_found_out(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_this_process: None,
) -> None:
    monkeypatch.setattr(claims, "decide", lambda *_: ("INCONCLUSIVE", ""))
    faults = said(capsys, folder, write(folder), 1)["faults"]
    assert len(faults) == 3
    assert faults[0].startswith("effect 2δ")
    assert faults[1].startswith("what was planted was missed: planted in mlp-digits: INCONCLUSIVE")
    assert faults[2].endswith("REFUTED is right")


def test_twins_that_are_trained_only_once_are_found_out(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    study = write(folder, **{'Arm("batch again", repeat=1)': 'Arm("batch again", repeat=0)'})
    (fault,) = said(capsys, folder, study, 1)["faults"]
    assert fault.startswith("the same arm was not trained a second time")


def test_twins_that_are_none_and_a_plant_that_is_missed_are_found_out(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    exchanged = {
        'Arm("batch again", repeat=1)': 'Arm("batch again", label_noise=0.4)',
        'Arm("wrong labels", label_noise=0.4)': 'Arm("wrong labels", repeat=1)',
    }
    faults = said(capsys, folder, write(folder, **exchanged), 1)["faults"]
    assert faults[0].startswith("the same arm twice shows a difference: same arm twice in mlp-digits")
    assert faults[1].startswith("what was planted was missed")


def test_too_few_tables_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["selfcheck", "--tables", "5"]) == 2
    assert "--tables 5 cannot show a rate; give 20 or more" in capsys.readouterr().err


def test_the_twins_differ_in_nothing_but_their_repetition() -> None:
    design = load_study(str(STUDY)).quick
    (cell,) = design.cells
    one, two, wrong = (design.trial(cell, arm, 3) for arm in design.arms)
    assert one.replace(repeat=1) == two
    assert one.key != two.key
    assert one.replace(label_noise=0.4) == wrong
    assert design.replicates == 10


def test_a_border_allows_for_three_standard_errors_of_the_rate() -> None:
    few, many = (Rate("t", "e", 0.06, tables, 0.05, "at most") for tables in (100, 10_000))
    assert few.border == pytest.approx(0.05 + 3 * 0.0218, abs=1e-4)
    assert few.is_kept
    assert not many.is_kept
    assert Rate("t", "e", 0.89, 1000, 0.9, "at least").is_kept
    assert not Rate("t", "e", 0.86, 1000, 0.9, "at least").is_kept


def test_rates_count_tables_and_are_pooled_over_all_twins() -> None:
    promises = (*FEW, Promise(World(cells=1), MISSES, LEVEL))
    rates = measure_rates(promises, 50)
    assert rates == measure_rates(promises, 50)
    assert [rate.rate * 50 % 1 for rate in rates if rate.event == MISSES] == [0, 0]
    pooled = pool_twice(rates)
    assert pooled.tables == 100
    assert pooled.rate == pytest.approx((rates[0].rate + rates[2].rate) / 2)


@pytest.mark.slow
def test_the_command_passes_in_a_folder_that_it_removes(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["selfcheck", "--tables", "200", "--gpus", "none"]) == 0
    out = capsys.readouterr().out
    assert "A/A, all of these tables" in out
    assert "No fault was found." in out
