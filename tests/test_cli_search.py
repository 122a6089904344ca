"""`bnbench search`: a question becomes a study file, which runs, goes on, and is reported like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bnbench.cli.app import call
from bnbench.cli.search import Question, study_text
from bnbench.registry import BadInput
from bnbench.study.load import load_study
from tests.tiny_study import call_here, statuses, verdicts_of

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
ASKED = "search --model mine:MyNet --data digits --norm batch,group --trials 3 --steps 8 --replicates 2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of one's own, for which a search has been run."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "mine.py").write_text(MINE)
    call_here(*ASKED.split(), folder=folder, data=folder / "data")
    return folder


def test_a_model_of_ones_own_is_searched_confirmed_and_compared(folder: Path) -> None:
    assert not statuses(folder / "runs").get("failed")
    report = json.loads(verdicts_of(folder / "runs"))
    verdicts = [v for study in report["studies"] for v in study["verdicts"]]
    assert {v["hypothesis"] for v in verdicts} == {
        "group over batch", "batch over batch, lr alone", "group over group, lr alone"
    }  # fmt: skip
    assert all(not v["primary"] and v["n"] == 2 for v in verdicts)


def test_the_same_question_trains_nothing_new_and_its_file_is_a_study(folder: Path) -> None:
    before = verdicts_of(folder / "runs")
    out, _ = call_here(*ASKED.split(), folder=folder, data=folder / "data")
    assert "nothing was trained" in out
    assert verdicts_of(folder / "runs") == before
    path = folder / "runs" / "searches" / "search-mine.MyNet-digits.py"
    out, _ = call_here(
        "run", path.relative_to(folder), "--preset", "quick", folder=folder, data=folder / "data"
    )
    assert "nothing was trained" in out
    assert " ".join(ASKED.split()) in path.read_text()


def test_another_question_of_the_same_name_is_refused(folder: Path) -> None:
    asked = ASKED.replace("--trials 3", "--trials 4").split()
    _, err = call_here(*asked, folder=folder, data=folder / "data", expect=2)
    assert "holds another search" in err
    assert "--name" in err
    assert err.count("\n") == 1


def test_what_is_searched_is_what_was_named(tmp_path: Path) -> None:
    question = Question("resnet20", "digits", ("batch",), ("placement", "dropout"), trials=7, lr_alone=False)
    path = tmp_path / "mine.py"
    path.write_text(study_text(question))
    study = load_study(str(path))
    assert [arm.name for arm in study.quick.arms] == ["batch"]
    space = study.quick.arms[0].space_in(study.quick.cells[0].name)
    assert [d.name for d in space] == ["lr", "placement", "dropout"]
    assert study.quick.trials == 7
    (placement,) = [d for d in space if d.name == "placement"]
    orders = [changes["order"] for changes in placement.levels.values()]  # type: ignore[union-attr]
    assert orders == ["norm-act", "act-norm", "pre-act", "post-add"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "mpl", "--data", "digits"), ("mpl", "did you mean 'mlp'")),
        (("--model", "mlp", "--data", "digit"), ("digit", "did you mean 'digits'")),
        (("--model", "mlp", "--data", "digits", "--norm", "batch,gruop"), ("gruop", "did you mean 'group'")),
        (("--model", "mlp", "--data", "digits", "--norm", "batch,batch"), ("each once",)),
        (("--model", "mlp", "--data", "digits", "--space", "dropuot"), ("did you mean 'dropout'",)),
        (("--model", "mlp", "--data", "digits", "--trials", "0"), ("trials", "1 or more")),
        (("--model", "mlp", "--data", "digits", "--searches", "4"), ("searches must be 3 at most",)),
        (("--model", "nowhere:Net", "--data", "digits"), ("nowhere", "package.module:Class")),
        (("--model", "mlp", "--data", "digits", "--model-options", "depth=4"), ("--model-options", "JSON")),
        (("--model", "mlp", "--data", "digits", "--model-options", '{"dept": 4}'), ("did you mean 'depth'",)),
        (("--model", f"{__name__}:Plain", "--data", "digits", "--space", "placement"), ("no `slot`",)),
    ],
)  # fmt: skip
def test_a_wrong_question_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(["search", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err


class Plain:
    """A model that takes no slot."""

    def __init__(self, in_shape: object, num_classes: int) -> None: ...


def test_an_unknown_dimension_names_the_nearest() -> None:
    with pytest.raises(BadInput, match="did you mean 'weight_decay'"):
        study_text(Question("mlp", "digits", ("batch",), ("weight_deccay",)))
