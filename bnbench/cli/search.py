"""`bnbench search`: a user's own question as a study file, which is then run like any other."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

from bnbench.cli.run import Request, run
from bnbench.data import DATASETS
from bnbench.lit import own_model_class
from bnbench.models import MODELS
from bnbench.models.base import ORDERS
from bnbench.norms import NORMS
from bnbench.registry import BadInput, nearest
from bnbench.study.recipes import NAMES

#: Of a model of one's own, what a search can only change through a `slot` that the model takes.
_NEED_A_SLOT = ("placement", "dropout")
#: The batch size that `--steps` counts for; other sizes read the same number of examples.
_BATCH = 64


@dataclass(frozen=True)
class Question:
    """What `bnbench search` was asked: models, norms and dimensions by name, sizes as numbers."""

    model: str
    data: str
    norms: tuple[str, ...]
    space: tuple[str, ...] = ()
    trials: int = 30
    steps: int = 500
    searches: int = 1
    replicates: int = 10
    batch: int = 8
    lr_alone: bool = True
    n_train: int | None = None
    model_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    data_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""


def ask(question: Question, request: Request) -> int:
    """Write the study file below the folder of runs, and run it; exit codes as those of `bnbench run`."""
    text = study_text(question)
    path = request.runs / "searches" / f"{study_name(question)}.py"
    if path.exists() and path.read_text() != text:
        raise BadInput(
            f"{path} holds another search; give this one a --name, remove the file, or go on with it:"
            f" bnbench run {path}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return run(dataclasses.replace(request, words=(str(path),), preset="quick"))


def study_name(question: Question) -> str:
    """The name of the study: the one that was given, or one of model and data."""
    return question.name or re.sub(r"[^\w.+-]+", ".", f"search-{question.model}-{question.data}")


def study_text(question: Question) -> str:
    """The study as the text of a file. Raises BadInput for a name that is not known."""
    for norm in question.norms:
        NORMS[norm]
    DATASETS[question.data]
    if len(set(question.norms)) < len(question.norms) or not question.norms:
        raise BadInput(f"--norm {','.join(question.norms)!r}: give some norms, each once, as in batch,group")
    for name in question.space:
        if name not in NAMES:
            raise BadInput(f"--space: no dimension named {name!r}{nearest(name, NAMES)}")
    names, orders = _searched(question)
    lr_alone = _LR_ALONE if question.lr_alone else ""
    hypotheses = "".join(
        _HYPOTHESIS.format(better=better, other=other, sentence=sentence)
        for better, other, sentence in _comparisons(question)
    )
    return _FILE.format(
        title=f"Which recipe suits {question.model} on {question.data}?",
        name=study_name(question),
        cell=re.sub(r"^search-", "", study_name(question)),
        command=_command(question),
        model=question.model,
        data=question.data,
        n_train=question.n_train,
        model_options=question.model_options,
        data_options=question.data_options,
        steps=question.steps,
        batch_size=_BATCH,
        norms=question.norms,
        names=names,
        examples=question.steps * _BATCH,
        orders=orders,
        lr_alone=lr_alone,
        replicates=question.replicates,
        trials=question.trials,
        batch=question.batch,
        searches=question.searches,
        first=question.norms[0],
        hypotheses=hypotheses,
    )


def _searched(question: Question) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The dimensions that are searched, and the orders that the model offers."""
    if ":" not in question.model:
        return question.space or NAMES, MODELS[question.model].orders
    _, parameters = own_model_class(question.model)
    if "slot" in parameters:
        return question.space or NAMES, ORDERS[:2]
    for name in question.space:
        if name in _NEED_A_SLOT:
            raise BadInput(
                f"--space {name}: {question.model} takes no `slot`, so nothing can change it there;"
                " take one (bnbench.models.Slot) or leave it out"
            )
    return question.space or tuple(name for name in NAMES if name not in _NEED_A_SLOT), ORDERS[:1]


def _comparisons(question: Question) -> list[tuple[str, str, str]]:
    """Better arm, other arm and sentence of what the report compares besides."""
    first = question.norms[0]
    pairs = [
        (norm, first, f"At its best recipe, {norm} is more accurate on test data than {first} at its own.")
        for norm in question.norms[1:]
    ]
    if question.lr_alone:
        pairs += [
            (
                norm,
                f"{norm}, lr alone",
                f"With {norm}, the whole recipe pays more than the learning rate alone.",
            )
            for norm in question.norms
        ]
    return pairs


def _command(question: Question) -> str:
    """The command line that asks the question again."""
    words = [f"--model {question.model} --data {question.data} --norm {','.join(question.norms)}"]
    for field in dataclasses.fields(Question):
        value = getattr(question, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name in ("model", "data", "norms") or value == default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "lr_alone":
            words.append("--no-lr-alone")
        elif isinstance(value, tuple):
            words.append(f"{flag} {','.join(value)}")
        elif isinstance(value, dict):
            words.append(f"{flag} '{json.dumps(value)}'")
        else:
            words.append(f"{flag} {value}")
    return " ".join(["bnbench search", *words])


def options(flag: str, text: str) -> dict[str, Any]:
    """Options from JSON. Raises BadInput where they are none."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BadInput(
            f"{flag} {text!r} is no JSON object of option names and values, as in '{{\"depth\": 4}}'"
        )
    return found


def words(text: str) -> tuple[str, ...]:
    """The words of a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


_LR_ALONE = """
        # The same number of trials, spent on the learning rate alone.
        *(Arm(f"{norm}, lr alone", norm=norm, space=LR_ALONE) for norm in NORMS),"""

_HYPOTHESIS = """
        Hypothesis(
            name="{better} over {other}",
            claim="C5",
            sentence="{sentence}",
            estimand=partial(accuracy_difference, better="{better}", other="{other}"),
            delta=1.0,
            better=("{better}",),
            other=("{other}",),
            unit="pp",
            primary=False,
        ),"""

_FILE = '''"""{title}

Written by: {command}
Edit it as you like; `bnbench run` and `bnbench report` take this file.
"""

from functools import partial

from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import accuracy_difference
from bnbench.study.recipes import recipe_space, recipe_start

NORMS = {norms!r}
NAMES = {names!r}
ORDERS = {orders!r}
EXAMPLES = {examples}
LR_ALONE = recipe_space([], norm="none", examples=EXAMPLES)

DESIGN = Design(
    base=Trial(
        model={model!r},
        model_options={model_options!r},
        data={data!r},
        data_options={data_options!r},
        n_train={n_train!r},
        batch_size={batch_size},
        steps={steps},
        warmup=0.05,
    ),
    cells=(Cell({cell!r}, data={data!r}),),
    arms=(
        *(
            Arm(
                norm,
                norm=norm,
                norm_options=recipe_start(norm),
                space=recipe_space(NAMES, norm=norm, examples=EXAMPLES, orders=ORDERS),
            )
            for norm in NORMS
        ),{lr_alone}
    ),
    lr=(0.1,),
    replicates={replicates},
    tuning="once",
    curve_points=0,
    trials={trials},
    batch={batch},
    searches={searches},
)

STUDY = Study(
    name={name!r},
    question={title!r},
    baseline={first!r},
    hypotheses=({hypotheses}
    ),
    quick=DESIGN,
    full=DESIGN,
)
'''
