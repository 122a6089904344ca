"""`bnbench probe`: readings at initialization and after training, and one line for what cannot be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from bnbench.cli import probe as command
from bnbench.cli.app import call
from bnbench.engine.rows import module_arguments
from bnbench.lit import NormClassifier
from bnbench.probes import PROBES, Trace
from bnbench.study.table import Result
from bnbench.study.trial import Trial, trial_from

MINE = '''
from torch import nn

def make_model(in_shape, num_classes, norm_layer):
    return nn.Sequential(
        nn.Conv2d(in_shape[0], 8, 3), norm_layer(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, num_classes)
    )

def make_mine():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
'''  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two models of one's own, from which the commands are called."""
    (tmp_path / "own_models.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("BNBENCH_DATA", str(tmp_path / "data"))
    return tmp_path


def answering(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Trial], Result]) -> list[tuple[str, ...]]:
    """Train nothing, and answer to each row; the list gets the probes of each row that was to be trained."""
    asked: list[tuple[str, ...]] = []

    def train_once(trial: Trial, gpus: str, data: Path) -> Result:
        asked.append(tuple(trial.probes))
        return answer(trial)

    monkeypatch.setattr(command, "train_once", train_once)
    return asked


def traces_of(trial: Trial) -> dict[str, Trace]:
    """A made-up trace for each probe of a row."""
    value, series = (1.25, math.nan), ((1.0, 2.0), (3.0, 4.5))
    trace = Trace("layer", ("body.0", "body.3"), (0, trial.steps), {"size": value}, {"sizes": series})
    return dict.fromkeys(trial.probes, trace)


def test_what_is_read_is_of_the_model_as_it_begins_and_as_it_is_trained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (
        "probe own_models:make_model --data digits --norm group --steps 30 --seed 3 --gpus none --json"
    )
    assert call([*arguments.split(), "--probes", "weights,generalization_gap,calibration"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["status"] == "done"
    traces = {name: Trace.from_json(trace) for name, trace in said["traces"].items()}
    assert {trace.steps for trace in traces.values()} == {(0, 30)}
    module = NormClassifier(**module_arguments(trial_from(said["trial"])))
    assert type(module.model[1]).__name__ == "GroupNorm"  # type: ignore[index]
    squares = [layer.weight.double().square().sum().item() for layer in (module.model[0], module.model[4])]  # type: ignore[index,union-attr,operator]
    assert traces["weights"].at(0).values["norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)
    assert traces["weights"].index == ("model.0", "model.4")
    before, after = (traces["calibration"].at(step).values["nll"] for step in (0, 30))
    assert after < 0.6 * before
    assert (
        traces["calibration"].at(0).values["accuracy"] < 0.4 < traces["calibration"].at(30).values["accuracy"]
    )


def test_all_probes_read_a_model_that_has_its_own_norms(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["probe", "own_models:make_mine", "--steps", "2", "--gpus", "none", "--layers"]) == 0
    out = capsys.readouterr().out
    note, head = out.splitlines()[:2]
    assert note.startswith("note: own_models:make_mine takes neither")
    assert head == "own_models:make_mine, on digits: 2 steps of 64 samples at lr 0.1, seed 0"
    first_words = {line.split()[0] for line in out.splitlines() if line and not line.startswith(" ")}
    assert set(PROBES) <= first_words
    assert "at initialization" in out and "after 2 steps" in out


def test_the_table_has_both_readings_and_a_dash_for_what_could_not_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(monkeypatch, lambda row: Result("done", traces=traces_of(row)))
    assert call(["probe", "mlp", "--probes", "rank,drift", "--steps", "7"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:4] == ["mlp,", "norm", "batch,", "on"]
    assert lines[2:] == [["rank", "size", "1.25", "–"], ["drift", "size", "1.25", "–"]]
    assert call(["probe", "mlp", "--probes", "rank", "--steps", "7", "--layers"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[-2:] == [
        ["rank", "sizes", "layer", "body.0", "1", "3"],
        ["layer", "body.3", "2", "4.5"],
    ]


def test_a_probe_that_refuses_the_network_is_left_out_unless_it_was_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(trial: Trial) -> Result:
        if "hessian" in trial.probes:
            why = (
                "Traceback (most recent call last):\nbnbench.registry.BadInput: probe 'hessian': no second\n"
            )
            return Result("failed", reason=why)
        return Result("done", traces=traces_of(trial))

    asked = answering(monkeypatch, refuse)
    assert call(["probe", "mlp", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == "note: left out: probe 'hessian': no second\n"
    assert asked == [tuple(PROBES), tuple(name for name in PROBES if name != "hessian")]
    assert set(json.loads(said.out)["traces"]) == set(PROBES) - {"hessian"}
    for words in (["--probes", "hessian,rank"], ["--probe-options", '{"hessian": {"count": 1}}']):
        assert call(["probe", "mlp", *words]) == 2
        assert capsys.readouterr().err == "bnbench: probe 'hessian': no second\n"


def test_an_error_in_the_models_own_code_is_shown_and_is_no_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    why = 'Traceback (most recent call last):\n  File "mine.py", line 3, in forward\nRuntimeError: a: b\n'
    answering(monkeypatch, lambda row: Result("failed", reason=why))
    assert call(["probe", "mlp", "--probes", "rank"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == why


def test_a_training_that_diverges_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(
        monkeypatch, lambda row: Result("diverged", reason="the loss became NaN", traces=traces_of(row))
    )
    assert call(["probe", "mlp", "--probes", "rank"]) == 0
    assert "note: the training diverged: the loss became NaN\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("mlp --probes rnak", ("no probe named 'rnak'", "did you mean 'rank'")),
        ("mpl", ("no model named 'mpl'", "did you mean 'mlp'")),
        ("own_models:mine", ("'own_models:mine' cannot be had",)),
        ("nowhere:mine", ("'nowhere:mine' cannot be had",)),
        ("mlp --data digit", ("digit", "did you mean 'digits'")),
        ("mlp --norm bacth", ("bacth", "did you mean 'batch'")),
        ("mlp --norm-options eps", ("--norm-options 'eps' is no JSON object",)),
        ("mlp --steps 0", ("steps must be", "1 or more")),
        ('mlp --probe-options {"rank":3}', ("--probe-options", "'rank'", "JSON object")),
        ('mlp --probe-options {"rank":{"every":3}}', ("--probe-options", "'rank'", "without `every`")),
        ('mlp --probe-options {"rank":{"exmaples":3}}', ("'rank' has no option 'exmaples'", "'examples'")),
        ('mlp --probes rank --probe-options {"hessian":{}}', ("no probe 'hessian' is asked for", "rank")),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: str, words: tuple[str, ...]
) -> None:
    assert call(["probe", *arguments.split(), "--gpus", "none"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("bnbench: ") and said.err.count("\n") == 1
    for word in words:
        assert word in said.err


def test_the_probes_are_listed_with_options_and_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["probes", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert sorted(rows) == sorted(PROBES)
    assert rows["hessian"]["options"] == {"count": 3, "iterations": 20}
    assert rows["landscape"]["paper"] == "arXiv:1805.11604"
    assert all(row["about"] and ":" not in row["about"] and row["every"] >= 20 for row in rows.values())
    assert call(["probes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(PROBES)
    (line,) = [line for line in lines if line.startswith("hessian")]
    assert line.endswith("(count=3, iterations=20)")
