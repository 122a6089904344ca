"""A user's own question on the command line, and the ones that a folder of runs has been asked."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnbench.data import DATASETS, shape_of
from bnbench.engine.rows import check_trial
from bnbench.lit import own_model_class
from bnbench.models import MODELS, ORDERS
from bnbench.norms import NORMS
from bnbench.registry import BadInput
from bnbench.study.load import load_study
from bnbench.study.own_question import ask
from bnbench.study.question import Question
from bnbench.study.spec import Study
from bnbench.study.trial import Trial

#: What a class of one's own does not read: it draws its weights itself, and the rest comes by its slot.
_DRAWN = ("init", "init_scale", "bias_init")
_OF_THE_SLOT = ("order", "activation", "dropout", "dropout_at", "reparam")


def question_of(
    data: str | None,
    model: str | None,
    norm: str | None,
    seeds: int | None,
    target: float | None,
    changes: Sequence[str],
) -> Question | None:
    """The question that options ask, or None where none is given. Raises BadInput for an unknown name."""
    named = dict(map(_change, changes))
    if all(value is None for value in (data, model, norm, seeds, target)) and not named:
        return None
    options: dict[str, Any] = {}
    if data is not None:
        data, options = _data(data)
        more = named.get("data_options", {})
        shape_of(data, **{**options, **(more if isinstance(more, dict) else {})})
    if model is not None:
        _ = own_model_class(model) if ":" in model else MODELS[model]
    if norm is not None:
        _ = NORMS[norm]
    return Question(data, options, model, norm, seeds, target, named)


def _change(text: str) -> tuple[str, Any]:
    """The field and the value of `--set`; a value that is no JSON is a word."""
    name, found, value = text.partition("=")
    if not found:
        raise BadInput(f"--set {text!r}: write a field of the row and its value, as in steps=300")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value.strip()


def _data(word: str) -> tuple[str, dict[str, Any]]:
    """A data set's name with its options: that of a folder is `image_folder`."""
    path = Path(word).expanduser()
    if word in DATASETS or not (os.sep in word or path.is_dir()):
        _ = DATASETS[word]
        return word, {}
    if not path.is_dir():
        raise BadInput(f"--data {word}: there is no such folder")
    # The same folder from wherever the question is asked again.
    return "image_folder", {"path": str(path.resolve())}


def asked_in(study: Study, question: Question, preset: str) -> tuple[Study, tuple[str, ...]]:
    """The study that asks a question, with notes on what was left out."""
    check = check_trial if question.model is None or ":" not in question.model else _check_own
    return ask(study, question, preset, check=check, ignored=_not_read(question.model))


def _check_own(row: Trial) -> None:
    """As of any row; besides, `slot.build` takes every other order for the first one."""
    if row.order not in ORDERS[:2]:
        raise BadInput(f"a class of one's own offers the orders {' and '.join(ORDERS[:2])} only")
    check_trial(row)


def _not_read(model: str | None) -> frozenset[str]:
    if model is None or ":" not in model:
        return frozenset()
    _, parameters = own_model_class(model)
    if "slot" in parameters:
        return frozenset(_DRAWN)
    return frozenset(
        (*_DRAWN, *_OF_THE_SLOT, *(() if "norm_layer" in parameters else ("norm", "norm_options")))
    )


def write_question(runs: Path, word: str, study: Study, preset: str, question: Question) -> None:
    """Write a question down below `runs/questions/`, where reports find it; `word` named the study."""
    path = runs / "questions" / preset / f"{study.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = str(Path(word).resolve()) if word.endswith(".py") else word
    text = json.dumps({"study": file, **dataclasses.asdict(question)}, indent=1, ensure_ascii=False)
    fresh = path.with_suffix(".new")
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(path)


def read_questions(runs: Path) -> dict[tuple[str, str], Study]:
    """The studies that ask a folder's questions, by name and preset.

    One that cannot be asked here, since its images or its model are gone, is left out with a note on stderr.
    """
    found: dict[tuple[str, str], Study] = {}
    for path in sorted((runs / "questions").glob("*/*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            word = values.pop("study")
            study, _ = asked_in(load_study(word), Question(**values), path.parent.name)
        except Exception as error:  # A model of one's own may raise anything.
            reason = " ".join(f"{error}".split())
            print(f"note: the question {path} is left out: {reason}", file=sys.stderr)
        else:
            found[study.name, path.parent.name] = study
    return found
