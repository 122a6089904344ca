"""Tests of finding studies: by name, by file, and what is said about a file that is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnbench.registry import BadInput
from bnbench.study.load import load_claims, load_studies, load_study, studies_folder

GOOD = '''"""Does it help?"""

from functools import partial

from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import accuracy_difference

DESIGN = Design(
    base=Trial(steps=8),
    cells=(Cell("mlp", constants={"target": 0.5}), Cell("größe 小", model="cnn")),
    arms=(Arm("none", norm="none"), Arm("batch")),
    lr=(0.1, 1.0),
    replicates=5,
)

STUDY = Study(
    name="mine",
    question="Does it help?",
    hypotheses=(
        Hypothesis(
            name="H1",
            claim="C1",
            sentence="It helps.",
            estimand=partial(accuracy_difference, better="batch", other="none"),
            delta=1.0,
            better=("batch",),
            other=("none",),
        ),
    ),
    quick=DESIGN,
    full=DESIGN,
    baseline="none",
)
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.py"


def refusal(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        load_study(str(path))
    said = str(caught.value)
    assert "\n" not in said and str(path) in said
    return said


def test_a_study_of_ones_own_is_loaded_from_its_file(file: Path) -> None:
    file.write_text(GOOD)
    study = load_study(str(file))
    assert study.name == "mine"
    assert [cell.name for cell in study.quick.cells] == ["mlp", "größe 小"]
    assert [path.name for path in file.parent.iterdir()] == ["mine.py"]


def test_the_relative_name_of_a_file_will_do(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(GOOD.replace("lr=(0.1, 1.0)", "lr=0.1"))
    monkeypatch.chdir(file.parent)
    with pytest.raises(BadInput, match=r"^mine.py:8: lr must be a tuple"):
        load_study("mine.py")


def test_an_edited_file_is_read_anew(file: Path) -> None:
    file.write_text(GOOD)
    before = load_study(str(file)).hash("quick")
    file.write_text(GOOD.replace("replicates=5", "replicates=6"))
    assert load_study(str(file)).quick.replicates == 6
    file.write_text(GOOD)
    assert load_study(str(file)).hash("quick") == before


def test_an_estimand_of_the_file_counts_by_its_source(file: Path) -> None:
    def hash_with(estimand: str, bound: str = "") -> str:
        text = GOOD.replace("DESIGN =", estimand + "\n\nDESIGN =", 1)
        old = 'partial(accuracy_difference, better="batch", other="none")'
        file.write_text(text.replace(old, f"partial(mine{bound})"))
        return load_study(str(file)).hash("quick")

    one = hash_with("def mine(replicate, share=1):\n    return 1.0")
    assert one == hash_with("def mine(replicate, share=1):\n    return 1.0")
    two = hash_with("def mine(replicate, share=1):\n    return 2.0")
    three = hash_with("def mine(replicate, share=1):\n    return 1.0", ", share=2")
    assert len({one, two, three}) == 3


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('Arm("batch")', 'Arm("batch", nrom="x")', ":11: arm 'batch' has no field 'nrom'; did you mean"),
        ('Arm("batch")', 'Arm("none")', ":8: arm 'none' is declared twice"),
        ('(Arm("none", norm="none"), Arm("batch"))', "()", ":8: arms is empty"),
        ('(Arm("none", norm="none"), Arm("batch"))', '(Arm("none"))', ":8: arms must be a tuple"),
        ('"größe 小"', '"../x"', ":10: cell name '../x' cannot be used for a folder"),
        ('"größe 小"', '"a/b"', ":10: cell name 'a/b' cannot be used for a folder"),
        ("lr=(0.1, 1.0)", "lr=()", ":8: lr is empty"),
        ("lr=(0.1, 1.0)", "l_r=(0.1, 1.0)", ":8: Design has no field 'l_r'; did you mean 'lr'?"),
        ("    lr=(0.1, 1.0),\n", "", ":8: Design needs 'lr'"),
        ("replicates=5", 'replicates="5"', ":8: replicates must be a whole number of 1 or more, not '5'"),
        ("steps=8", "stesp=8", ":9: Trial has no field 'stesp'; did you mean 'steps'?"),
        ("steps=8", "steps=8.5", ":9: steps must be int, not 8.5"),
        ('better=("batch",)', 'better=("bacth",)',
         ":16: study 'mine': quick reads in hypothesis 'H1' and cell 'mlp' an arm 'bacth'"),
        ("delta=1.0", 'delta="target"',
         ":16: study 'mine': quick reads in hypothesis 'H1' and cell 'größe 小' a constant 'target'"),
        ("delta=1.0", "dleta=1.0", ":20: Hypothesis has no field 'dleta'; did you mean 'delta'?"),
        ('baseline="none"', "baseline=None",
         ":16: study 'mine': quick reads as its baseline in cell 'mlp' an arm None"),
        ("STUDY =", "STUDIE =", ": a study file assigns a Study to STUDY; here there is no STUDY"),
        ("STUDY =", "STUDY = 3 #", ":17: SyntaxError: unexpected indent"),
        ("quick=DESIGN", "quick=DESING", ":30: NameError: name 'DESING' is not defined"),
        ("from functools", "from funktools", ":3: ModuleNotFoundError: No module named 'funktools'"),
        ("replicates=5,\n)", "replicates=5,\n", ":8: SyntaxError: '(' was never closed"),
        ("DESIGN =", "raise SystemExit('bye')\nDESIGN =", ":8: SystemExit: bye"),
        ("DESIGN =", "raise ValueError('one\\ntwo')\nDESIGN =", ":8: ValueError: one two"),
        ("Does it help?", "Does \0 help?", ": "),
    ],
)  # fmt: skip
def test_a_wrong_file_is_explained_with_its_line(file: Path, old: str, new: str, said: str) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    assert refusal(file, text).startswith(f"{file}{said}")


def test_a_study_that_is_something_else_is_refused(file: Path) -> None:
    assert "STUDY is 3" in refusal(file, "STUDY = 3")
    file.write_bytes(b"\xff\xfe = 1")
    with pytest.raises(BadInput, match=f"^{file}"):
        load_study(str(file))


def test_an_unknown_norm_is_found_when_the_study_is_prepared(file: Path) -> None:
    from bnbench.engine.suite import prepare

    file.write_text(GOOD.replace('Arm("batch")', 'Arm("batch", norm="bacth")'))
    with pytest.raises(
        BadInput, match="cell 'mlp', arm 'batch': no norm named 'bacth'; did you mean 'batch'"
    ):
        prepare(load_study(str(file)), "quick")


words = st.sampled_from(
    ['"batch"', "0.1", "()", "None", "Arm", "norm", "=", ",", "(", ")", "#", "'", "\n", "\\", "é", "{}"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(st.data())
def test_a_file_with_anything_in_it_is_loaded_or_explained(file: Path, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(GOOD)))
    cut = data.draw(st.integers(0, 12))
    text = GOOD[:at] + data.draw(words) + GOOD[at + cut :]
    file.write_text(text)
    try:
        load_study(str(file))
    except BadInput as error:
        assert "\n" not in str(error) and str(file) in str(error)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("convergense", "no study named 'convergense'; did you mean 'convergence'?"),
        ("article", "no study named 'article'"),
        ("", "no study named ''"),
        ("..", "no study named '..'"),
        ("nowhere.py", "no study file 'nowhere.py'"),
        ("studies/", "no study file 'studies/'"),
    ],
)
def test_a_study_that_is_not_there_is_explained(word: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_study(word)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_and_a_file_of_the_project_are_one_study() -> None:
    suite = load_studies()
    path = studies_folder() / "convergence.py"
    assert load_study("convergence") is load_study(str(path)) is suite["convergence"]


def test_a_file_elsewhere_may_build_on_a_study_of_the_project(file: Path) -> None:
    file.write_text("from studies.convergence import STUDY as OTHER\nSTUDY = OTHER\n")
    assert load_study(str(file)) is load_study("convergence")


def test_claims_come_by_id() -> None:
    claims = load_claims()
    assert claims["C1"].id == "C1" and claims["C1"].sentence


def test_loading_studies_needs_no_torch() -> None:
    code = "import sys, bnbench.study.load as at; at.load_studies(); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"
