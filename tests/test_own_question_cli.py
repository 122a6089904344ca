"""A question of one's own on the command line: it is trained, found again, and judges no claim."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from bnbench.cli.app import call
from tests.test_data_image_folder import write
from tests.tiny_study import call_here, statuses, verdicts_of, write_tiny

MINE = '''
from torch import nn

class MyNet(nn.Module):
    def __init__(self, in_shape, num_classes, norm_layer):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_shape[0], 8, 3), norm_layer(8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(8 * (in_shape[1] - 2) * (in_shape[2] - 2), num_classes)

    def forward(self, x):
        return self.head(self.body(x))
'''  # fmt: skip
ASKED = ("run", "tiny.py", "--data", "images", "--model", "mine:MyNet", "--norm", "group", "--seeds", "2")
NAME = "tiny on images with mine.MyNet, norm=group, 2 seeds"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a study has been run, and then asked of images, a model and a norm of one's own."""
    folder = tmp_path_factory.mktemp("question")
    changes = {
        "dropout=0.1": "weight_decay=0.001",
        "(0.01, 0.1, 1.0)": "(0.1, 1.0)",
        'Cell("long", steps=60)': "",
    }
    write_tiny(folder, **changes)
    (folder / "mine.py").write_text(MINE)
    for label, name in enumerate(("cat", "dog", "fish")):
        for number in range(40):
            write(folder / "images" / "train" / name / f"{number}.png", (8, 8), seed=100 * label + number)
    call_here("run", "tiny.py", "--preset", "quick", "--offline", folder=folder, data=folder / "data")
    shutil.copy(folder / "runs" / "report" / "verdicts.json", folder / "before.json")
    out, _ = call_here(*ASKED, folder=folder, data=folder / "data")
    (folder / "out.txt").write_text(out)
    return folder


def studies_in(text: str | bytes) -> dict[str, dict[str, Any]]:
    """The studies of a verdicts.json by name."""
    return {study["name"]: study for study in json.loads(text)["studies"]}


def test_a_question_is_trained_and_marked_exploratory(folder: Path) -> None:
    assert not statuses(folder / "runs").get("failed")
    assert "T.a in short: INCONCLUSIVE (exploratory)" in (folder / "out.txt").read_text()
    (verdict,) = studies_in(verdicts_of(folder / "runs"))[NAME]["verdicts"]
    assert (verdict["primary"], verdict["n"], verdict["cell"]) == (False, 2, "short")
    with sqlite3.connect(folder / "runs" / "bnbench.db") as db:
        rows = db.execute(
            "SELECT DISTINCT arm, json_extract(trial, '$.data'), json_extract(trial, '$.model'),"
            " coalesce(json_extract(trial, '$.norm'), 'batch') FROM members JOIN rows USING (key)"
            " JOIN studies ON studies.hash = study WHERE name = ? ORDER BY arm",
            (NAME,),
        ).fetchall()
    assert rows == [
        ("group", "image_folder", "mine:MyNet", "group"),
        ("none", "image_folder", "mine:MyNet", "none"),
    ]


def test_no_claim_and_no_verdict_of_another_study_changes(folder: Path) -> None:
    before = json.loads((folder / "before.json").read_text())
    # A study of a file is shown where the file is named.
    assert {c["claim"] for c in before["claims"] if c["n_cells"]} == {"C1"}
    paths = [str(folder / "tiny.py"), NAME]
    after = report(folder, *paths)
    assert after["claims"] == before["claims"]
    assert studies_in(json.dumps(after))["tiny"] == studies_in(json.dumps(before))["tiny"]
    assert set(studies_in(json.dumps(after))) == {"tiny", NAME}


def report(folder: Path, *words: str) -> dict[str, Any]:
    """What `bnbench report --format json` prints."""
    import contextlib
    import io

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.syspath_prepend(str(folder))
        assert call(["report", *words, "--format", "json", "--runs", str(folder / "runs")]) == 0
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def test_a_report_finds_the_question_without_a_word(folder: Path) -> None:
    assert NAME in studies_in(json.dumps(report(folder)))
    assert list(studies_in(json.dumps(report(folder, NAME)))) == [NAME]


def test_status_knows_the_question(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("COLUMNS", "200")
    assert call(["status", "--runs", str(folder / "runs")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if NAME in line]
    assert line.rstrip().endswith("1 of 1")


def test_it_has_an_experiment_of_its_own(folder: Path) -> None:
    with sqlite3.connect(folder / "runs" / "mlflow.db") as db:
        names = [name for (name,) in db.execute("SELECT name FROM experiments")]
    assert any(NAME in name for name in names)


@pytest.mark.parametrize("words", [ASKED, ("run", NAME, "--preset", "quick")])
def test_the_same_command_and_the_command_of_its_page_go_on(folder: Path, words: tuple[str, ...]) -> None:
    before = verdicts_of(folder / "runs")
    out, _ = call_here(*words, folder=folder, data=folder / "data")
    assert "nothing was trained" in out
    assert studies_in(verdicts_of(folder / "runs"))[NAME] == studies_in(before)[NAME]


def test_a_question_whose_images_are_gone_does_not_stop_a_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    shutil.copytree(folder / "runs", tmp_path / "runs")
    (path,) = (tmp_path / "runs" / "questions").rglob("*.json")
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "data_options": {"path": str(tmp_path / "gone")}}))
    arguments = ["report", str(folder / "tiny.py"), "--format", "json", "--runs", str(tmp_path / "runs")]
    assert call(arguments) == 0
    printed = capsys.readouterr()
    assert set(studies_in(printed.out)) == {"tiny"}
    assert printed.err.startswith("note: the question")
    assert "gone has no folder train/" in printed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tiny.py", "--norm", "gruop"), ("'gruop'", "did you mean 'group'")),
        (("tiny.py", "--data", "./imges"), ("./imges", "no such folder")),
        (("tiny.py", "--target", "0.9"), ("--target changes nothing", "'tiny'")),
        (("convergence", "--data", "images"), ("give --target",)),
        (("placement", "--data", "images", "--model", "mine:MyNet"), ("mine:MyNet does not read order",)),
        (("tiny.py", "--data", "images", "--set", "n_train=500"), ("n_train 500", "84 training samples")),
        (("regularization", "--data", "images", "--set", "n_train=84"), ("reference_size 256",)),
        (("tiny.py", "--data", "images", "--set", "batch_size=100"), ("batch_size 100", "84 training")),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_one_line_and_leaves_no_question(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    more = ["--runs", str(tmp_path / "runs"), "--data-folder", str(tmp_path / "data"), "--gpus", "none"]
    assert call(["run", *arguments, *more]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("bnbench: ")
    for word in words:
        assert word in err
    assert not (tmp_path / "runs" / "questions").exists()
