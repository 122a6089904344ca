"""What a question of one's own is called, and how its options are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnbench.cli.questions import question_of
from bnbench.registry import BadInput
from bnbench.study.checks import check_name
from bnbench.study.question import Question


def test_without_options_there_is_no_question() -> None:
    assert question_of(None, None, None, None, None, []) is None


@given(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1, max_size=90))
def test_a_name_is_always_one_for_a_folder(folder: str, model: str, value: str) -> None:
    question = Question("image_folder", {"path": folder}, model, changes={"augment": value})
    check_name("study", question.name_for("mine"))


def test_different_questions_have_different_names() -> None:
    long = [Question(model="a" * 100 + end).name_for("mine") for end in "xy"]
    assert len({len(name) for name in long}) == 1
    assert len(set(long)) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "digit"}, "no data set named 'digit'; did you mean 'digits'"),
        ({"data": "./nowhere"}, "--data ./nowhere: there is no such folder"),
        ({"data": "."}, "has no folder train/"),
        ({"model": "mpl"}, "no model named 'mpl'; did you mean 'mlp'"),
        ({"model": "nowhere:Net"}, "nowhere.*package.module:Class"),
        ({"norm": "gruop"}, "no norm named 'gruop'; did you mean 'group'"),
        ({"seeds": 0}, "the number of seeds must be a whole number of 1 or more"),
        ({"target": 90.0}, "share between 0 and 1, not 90"),
        ({"changes": ["stesp=3"]}, "no field 'stesp'; did you mean 'steps'"),
        ({"changes": ["steps"]}, "--set 'steps': write a field of the row and its value"),
        ({"changes": ["steps=many"]}, "steps must be int, not 'many'"),
        ({"changes": ["seed=3"]}, "cannot set 'seed'"),
    ],
)
def test_a_wrong_word_is_explained(
    options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "data": None,
        "model": None,
        "norm": None,
        "seeds": None,
        "target": None,
        "changes": (),
        **options,
    }
    with pytest.raises(BadInput) as error:
        question_of(**given)
    assert re.search(words, str(error.value))
    assert "\n" not in str(error.value)
