"""Tests of declarations: what they refuse, in which words, and what their hash depends on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnbench.registry import BadInput
from bnbench.study import Arm, Cell, Claim, Design, Estimate, Factor, Hypothesis, Study, Trial, cross
from bnbench.study.estimands import accuracy_difference
from tests.pilot_study import ARMS, CELLS, design, hypothesis, study


def refusal(make: Callable[[], Any]) -> str:
    with pytest.raises(BadInput) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Arm("a", nrom="batch"), "arm 'a' has no field 'nrom'; did you mean 'norm'?"),
        (lambda: Arm("a", lr=0.1), "arm 'a' cannot set 'lr': the design does"),
        (lambda: Arm("a", score_on="test"), "arm 'a' cannot set 'score_on'"),
        (lambda: Arm("a", batch_size="64"), "arm 'a': batch_size must be int, not '64'"),
        (lambda: Arm(3), "arm name 3 cannot be used for a folder"),
        (lambda: Cell("c", constants={"target": "x"}),
         "cell 'c': constants 'target' must be a finite number"),
        (lambda: Cell("c", constants={"target": True}), "must be a finite number, not True"),
        (lambda: Cell("c", constants={"target": float("nan")}), "must be a finite number, not nan"),
        (lambda: Cell("c", replicates=0), "cell 'c': replicates must be a whole number of 1 or more, not 0"),
        (lambda: Cell("c", replicates=2.0), "cell 'c': replicates must be a whole number of 1 or more"),
        (lambda: Cell("c", replicates=True), "cell 'c': replicates must be a whole number of 1 or more"),
        (lambda: Cell("c", constants=0.5), "cell 'c': constants must be numbers by name"),
        (lambda: Cell("c", constants={1: 0.5}), "cell 'c': constants must be numbers by name"),
        (lambda: Cell("c", constnats={"target": 0.5}), "no field 'constnats'; did you mean 'constants'?"),
        (lambda: Factor("batchsize", (2,)), "a factor has no field 'batchsize'; did you mean 'batch_size'?"),
        (lambda: Factor(["norm"], ("batch",)), "a factor has no field ['norm']"),
        (lambda: Factor("batch_size", ()), "factor 'batch_size': levels is empty"),
        (lambda: Factor("norm", "batch"), "factor 'norm': levels must be a tuple"),
        (lambda: Factor("batch_size", (2, "8")), "factor 'batch_size': batch_size must be int, not '8'"),
        (lambda: Factor("seed", (1, 2)), "factor 'seed' cannot set 'seed'"),
        (lambda: Estimate(1.0, "suport"), "did you mean 'support'?"),
        (lambda: Claim("C1", None), "claim 'C1': sentence must be a text, not None"),
        (lambda: Claim("C1", "It helps.", ("one",)[0]), "claim 'C1': literature must be a tuple"),
        (lambda: Claim(1, "It helps."), "claim id must be a text, not 1"),
        (lambda: hypothesis(kind="graeter"), "hypothesis 'C1.a': kind is 'graeter'; did you mean 'greater'?"),
        (lambda: hypothesis(delta=0), "hypothesis 'C1.a': delta must be a finite number above 0, not 0"),
        (lambda: hypothesis(delta=True), "delta must be a finite number above 0, not True"),
        (lambda: hypothesis(delta=None), "delta must be a finite number above 0, not None"),
        (lambda: hypothesis(better="batch"), "better must be a tuple, such as (a, b) or (a,), not 'batch'"),
        (lambda: hypothesis(better=()), "hypothesis 'C1.a': better is empty"),
        (lambda: hypothesis(other=(Arm("none"),)), "hypothesis 'C1.a': other must hold str only"),
        (lambda: hypothesis(cells="mlp"), "hypothesis 'C1.a': cells must be a tuple"),
        (lambda: hypothesis(cells=()), "hypothesis 'C1.a': cells is empty"),
        (lambda: hypothesis(half_width=0.5), "half_width must be numbers by name"),
        (lambda: hypothesis(half_width={"mlp": 0}), "half_width 'mlp' must be a finite number above 0"),
        (lambda: hypothesis(primary="yes"), "primary must be True or False"),
        (lambda: hypothesis(claim=None), "hypothesis 'C1.a': claim must be a text, not None"),
        (lambda: hypothesis(estimand="test/acc"), "estimand must be a function of a replicate"),
        (lambda: hypothesis(estimand=abs), "estimand must be a function whose source can be read"),
        (lambda: hypothesis(estimand=partial(accuracy_difference, better=Arm("a"))),
         "with plain values bound"),
        (lambda: design(base="mlp"), "base must be a Trial, not 'mlp'"),
        (lambda: design(base=Trial(score_on="test")), "base reads test data"),
        (lambda: design(arms=()), "arms is empty; give at least one"),
        (lambda: design(arms="batch"), "arms must be a tuple, such as (a, b) or (a,), not 'batch'"),
        (lambda: design(arms=Arm("batch")), "arms must be a tuple"),
        (lambda: design(arms=(Arm("a"), "b")), "arms must hold Arm only, not 'b'"),
        (lambda: design(arms=(Arm("a"), Arm("a", norm="none"))), "arm 'a' is declared twice"),
        (lambda: design(cells=None), "cells must be a tuple"),
        (lambda: design(cells=(*CELLS, CELLS[0])), "cell 'mlp' is declared twice"),
        (lambda: design(lr=0.1), "lr must be a tuple"),
        (lambda: design(lr=()), "lr is empty"),
        (lambda: design(lr=(0.1, "1")), "lr must be a finite number above 0, not '1'"),
        (lambda: design(lr=(0.0, 0.1)), "lr must be a finite number above 0, not 0.0"),
        (lambda: design(lr=(0.3, 0.1)), "lr must be a rising grid"),
        (lambda: design(lr=(0.1, 0.1)), "lr must be a rising grid"),
        (lambda: design(replicates="10"), "replicates must be a whole number of 1 or more, not '10'"),
        (lambda: design(replicates=0), "replicates must be a whole number of 1 or more, not 0"),
        (lambda: design(curve_points=2.5), "curve_points must be a whole number of 0 or more"),
        (lambda: design(tuning="one"), "tuning is 'one'; did you mean 'once'?"),
        (lambda: design(smoke=1), "smoke must be True or False"),
        (lambda: design(common=None), "common must be True or False, not None"),
        (lambda: design(timed=0), "timed, the replicates with a timed row, must be a whole number of 1"),
        (lambda: study(ranked="yes"), "study 'pilot': ranked must be True or False"),
        (lambda: study(ranked=True, program="sweep"), "ranked must be True or False, and False in a sweep"),
        (lambda: study(tried="quick"), "study 'pilot': tried must be a Design, not 'quick'"),
        (lambda: study(name="../x"), "study name '../x' cannot be used for a folder"),
        (lambda: study(question=None), "study 'pilot': question must be a text"),
        (lambda: study(program="serach"), "study 'pilot': program is 'serach'; did you mean 'search'?"),
        (lambda: study(hypotheses=None), "study 'pilot': hypotheses must be a tuple"),
        (lambda: study(hypotheses=hypothesis()), "study 'pilot': hypotheses must be a tuple"),
        (lambda: study(hypotheses=(hypothesis(), hypothesis())), "hypothesis 'C1.a' is declared twice"),
        (lambda: study(quick=None), "study 'pilot': quick must be a Design, not None"),
        (lambda: study(baseline="nnoe"),
         "as its baseline in cell 'mlp' an arm 'nnoe' that is not declared; did you mean 'none'"),
        (lambda: study(baseline=None), "as its baseline in cell 'mlp' an arm None that is not declared"),
        (lambda: study(hypotheses=(hypothesis(better=("bacth",)),)),
         "quick reads in hypothesis 'C1.a' and cell 'mlp' an arm 'bacth' that is not declared; did you"),
        (lambda: study(quick=design(arms=(ARMS[0], Arm("batch", cells=("cnn",)), ARMS[2]))),
         "quick reads in hypothesis 'C1.a' and cell 'mlp' an arm 'batch' that is not declared"),
        (lambda: study(quick=design(arms=(Arm("none", norm="none", cells=("cnn",)), *ARMS[1:]))),
         "quick reads as its baseline in cell 'mlp' an arm 'none' that is not declared"),
        (lambda: design(arms=(Arm("batch", cells=("cn",)),)),
         "arm 'batch' names a cell 'cn' that is not declared; did you mean 'cnn'?"),
        (lambda: Arm("batch", cells="cnn"), "arm 'batch': cells must be a tuple"),
        (lambda: study(hypotheses=(hypothesis(cells=("mpl",)),)),
         "hypothesis 'C1.a' names a cell 'mpl' that is not declared; did you mean 'mlp'?"),
        (lambda: study(hypotheses=(hypothesis(half_width={"cn": 1.0}),)),
         "names a cell 'cn' that is not declared"),
        (lambda: study(hypotheses=(hypothesis(delta="traget"),)),
         "cell 'mlp' a constant 'traget' that is not declared; did you mean 'target'?"),
        (lambda: study(hypotheses=(hypothesis(delta="d"),),
                       quick=design(cells=(Cell("c", constants={"d": 0.0}),))),
         "must be a finite number above 0, not 0.0"),
        (lambda: study().design("fll"), "no preset named 'fll'; did you mean 'full'?"),
        (lambda: design().cell("mpl"), "a cell 'mpl' that is not declared; did you mean 'mlp'?"),
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_refused_in_one_line(make: Callable[[], Any], said: str) -> None:
    assert said in refusal(make)


@pytest.mark.parametrize(
    "name", ["größe", "层 归一化", "λ=0.5", "B 64, NBS 16", "a", "नॉर्म", "cnn · B=8", "Ä × Ä"]
)
def test_names_may_be_written_in_any_script(name: str) -> None:
    assert Arm(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a/b",
        "..",
        "a..b",
        ".a",
        "a.",
        "a\\b",
        "a\n",
        "a\0b",
        "a:b",
        "-a",
        "a" * 81,
        "🙂",
        None,
        ("a",),
    ],
)
def test_names_that_no_folder_can_have_are_refused(name: Any) -> None:
    assert "cannot be used for a folder" in refusal(lambda: Arm(name))


@given(st.text(max_size=12))
def test_any_text_is_a_name_for_a_folder_or_refused(text: str) -> None:
    try:
        Cell(text)
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        assert not set(text) & set('/\\:*?"<>|\0\n') and text.strip(" .") == text and ".." not in text


ANYTHING = (
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=3) | st.just(ARMS)
    | st.just(CELLS) | st.lists(st.text(max_size=2), max_size=2) | st.just({"a": None}) | st.just({1: 2})
    | st.just(Trial()) | st.just(object)
)  # fmt: skip


@pytest.mark.parametrize("kind", [Arm, Cell, Factor, Hypothesis, Claim, Design, Study, Estimate])
@settings(max_examples=40)
@given(data=st.data())
def test_any_value_anywhere_is_taken_or_explained(kind: type, data: st.DataObject) -> None:
    good: dict[type, dict[str, Any]] = {
        Arm: {"name": "a", "norm": "none"},
        Cell: {"name": "c", "constants": {}, "model": "cnn"},
        Factor: {"field": "norm", "levels": ("batch",)},
        Hypothesis: {f.name: getattr(hypothesis(), f.name) for f in dataclasses.fields(Hypothesis)},
        Claim: {"id": "C", "sentence": "s", "literature": ()},
        Design: {f.name: getattr(design(), f.name) for f in dataclasses.fields(Design)},
        Study: {f.name: getattr(study(), f.name) for f in dataclasses.fields(Study)},
        Estimate: {"value": 1.0},
    }
    field = data.draw(st.sampled_from(sorted(good[kind])))
    try:
        made = kind(**{**good[kind], field: data.draw(ANYTHING)})
        if kind is Study:
            for preset in ("quick", "full", "smoke"):
                made.hash(preset)
    except BadInput as error:
        assert "\n" not in str(error)


def test_lists_are_taken_as_tuples_and_whole_rates_as_floats() -> None:
    made = design(arms=list(ARMS), lr=[1, 3])
    assert made.arms == ARMS and made.lr == (1.0, 3.0)
    assert type(made.lr[0]) is float


def test_factors_are_crossed_with_cells() -> None:
    crossed = cross(CELLS, Factor("batch_size", (8, 32)), Factor("norm", ("none",)))
    assert [cell.name for cell in crossed] == [
        f"{model} · batch_size={size} · norm=none" for model in ("mlp", "cnn") for size in (8, 32)
    ]
    assert crossed[3].changes == {"model": "cnn", "batch_size": 32, "norm": "none"}
    assert crossed[3].constants == {"target": 0.6}


def test_a_cell_may_have_replicates_of_its_own() -> None:
    cells = (Cell("mlp", replicates=5), Cell("cnn", model="cnn"))
    made = design(cells=cross(cells, Factor("batch_size", (8, 32))))
    counts = {cell.name: made.replicates_in(cell.name) for cell in made.cells}
    assert counts == {f"{name} · batch_size={size}": count
                      for name, count in (("mlp", 5), ("cnn", 2)) for size in (8, 32)}  # fmt: skip
    smoke = study(full=made, hypotheses=()).design("smoke")
    assert {smoke.replicates_in(cell.name) for cell in smoke.cells} == {1}


def test_a_definition_says_only_where_a_cell_has_other_replicates_than_its_design() -> None:
    def cells_of(replicates: int | None, preset: str = "quick") -> Any:
        own = design(cells=(Cell("mlp", replicates=replicates), CELLS[1]))
        return study(quick=own, full=own).definition(preset)["cells"]

    assert [cell.get("replicates") for cell in cells_of(5).values()] == [5, None]
    assert cells_of(None) == cells_of(2) and "replicates" not in cells_of(None)["mlp"]
    assert cells_of(5, "smoke") == cells_of(None, "smoke")


def test_a_row_is_the_base_changed_by_cell_arm_and_point() -> None:
    base = Trial(steps=8, norm="none", batch_size=16)
    made = design(
        base=base, cells=(Cell("c", batch_size=8, steps=4),), arms=(Arm("a", batch_size=4),), lr=(0.1,)
    )
    row = made.trial(made.cells[0], made.arms[0], 3, lr=0.5)
    assert row == Trial(steps=4, norm="none", batch_size=4, lr=0.5, data_seed=3, seed=3)


def test_smoke_is_the_full_design_for_two_steps_at_one_learning_rate() -> None:
    smoke = study(full=design(tuning="once", replicates=7, timing_steps=50)).design("smoke")
    assert (smoke.lr, smoke.replicates, smoke.tuning) == ((0.01,), 1, "per_replicate")
    assert (smoke.curve_points, smoke.timing_steps) == (1, 2)
    assert smoke.trial(smoke.cells[1], smoke.arms[0], 0).steps == 2
    none = study(full=design(curve_points=0)).design("smoke")
    assert (none.curve_points, none.timing_steps) == (0, 0)
    cifar = study(full=design(base=Trial(data="cifar10"))).design("smoke")
    assert cifar.trial(cifar.cells[0], cifar.arms[0], 0).data_options == {"synthetic": True}
    assert study(full=design(lr=(0.1,))).design("smoke").lr == (0.1,)


def test_a_hypothesis_may_speak_of_cells_and_arms_of_one_preset_only() -> None:
    small = design(cells=CELLS[:1], arms=ARMS[:2])
    made = study(quick=small, hypotheses=(hypothesis(better=("group",), cells=("cnn",)),))
    assert made.cells_of(made.hypotheses[0], "quick") == ()
    assert [cell.name for cell in made.cells_of(made.hypotheses[0], "full")] == ["cnn"]


def test_delta_may_be_a_constant() -> None:
    made = study(hypotheses=(hypothesis(delta="target"),))
    assert made.hypotheses[0].delta_in(made.full.cells[1]) == 0.6


def test_another_design_than_the_full_one_may_be_tried() -> None:
    tried = design(cells=CELLS[1:], replicates=7)
    smoke = study(tried=tried).design("smoke")
    assert [cell.name for cell in smoke.cells] == ["cnn"]
    assert (smoke.replicates, smoke.smoke) == (1, True)
    assert study(tried=tried).hash("full") == study().hash("full")
    with pytest.raises(BadInput, match="tried reads as its baseline in cell 'cnn' an arm 'none'"):
        study(tried=design(cells=CELLS[1:], arms=ARMS[1:]))


def half(replicate: Any, share: float = 0.5) -> float:
    return share


CHANGES: dict[str, Callable[[], Study]] = {
    "an arm": lambda: study(quick=design(arms=(*ARMS[:2], Arm("group", norm="group")))),
    "an arm's name": lambda: study(quick=design(arms=(*ARMS[:2], Arm("Group", **ARMS[2].changes)))),
    "the base": lambda: study(quick=design(base=Trial(steps=9))),
    "a constant": lambda: study(
        quick=design(cells=(CELLS[0], Cell("cnn", model="cnn", constants={"target": 1})))
    ),
    "the grid": lambda: study(quick=design(lr=(0.01, 0.1, 1.1))),
    "a cell's replicates": lambda: study(
        quick=design(cells=(Cell("mlp", replicates=3, constants=CELLS[0].constants), CELLS[1]))
    ),
    "the replicates": lambda: study(quick=design(replicates=3)),
    "the tuning": lambda: study(quick=design(tuning="once")),
    "the timed steps": lambda: study(quick=design(timing_steps=50)),
    "the replicates that are timed": lambda: study(quick=design(timed=1)),
    "that nothing is confirmed at the common rate": lambda: study(quick=design(common=False)),
    "that arms are ranked": lambda: study(ranked=True),
    "the curve": lambda: study(quick=design(curve_points=25)),
    "the program": lambda: study(program="sweep"),
    "the baseline": lambda: study(baseline="group"),
    "a delta": lambda: study(hypotheses=(hypothesis(delta=1.1),)),
    "a kind": lambda: study(hypotheses=(hypothesis(kind="equivalent"),)),
    "primary": lambda: study(hypotheses=(hypothesis(primary=False),)),
    "an estimand": lambda: study(hypotheses=(hypothesis(estimand=half),)),
    "a bound argument": lambda: study(
        hypotheses=(hypothesis(estimand=partial(accuracy_difference, better="group", other="none")),)
    ),
    "the cells read": lambda: study(hypotheses=(hypothesis(cells=("mlp",)),)),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_the_hash_changes_with(what: str) -> None:
    assert CHANGES[what]().hash("quick") != study().hash("quick")
    assert len(study().hash("quick")) == 12


@pytest.mark.parametrize("version", ["ANALYSIS_VERSION", "ROW_VERSION"])
def test_the_hash_changes_with_the_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = study().hash("quick")
    monkeypatch.setattr(f"bnbench.study.spec.{version}", 99)
    assert study().hash("quick") != before


def test_bound_arguments_of_an_estimand_are_told_apart() -> None:
    def hash_of(estimand: Any) -> str:
        return study(hypotheses=(hypothesis(estimand=estimand),)).hash("quick")

    assert len({hash_of(half), hash_of(partial(half, share=0.5)), hash_of(partial(half, share=0.6))}) == 3


def test_the_hash_does_not_depend_on_the_order_of_options() -> None:
    one = design(arms=(*ARMS[:2], Arm("x", model_options={"width": 8, "depth": 2}, norm="none")))
    two = design(arms=(*ARMS[:2], Arm("x", norm="none", model_options={"depth": 2, "width": 8.0})))
    assert study(quick=one).hash("quick") == study(quick=two).hash("quick")
    assert study(quick=one).hash("full") == study().hash("full")


def test_a_definition_is_plain_json() -> None:
    definition = study(hypotheses=(hypothesis(half_width={"mlp": 0.7}),)).definition("smoke")
    assert json.loads(json.dumps(definition, allow_nan=False)) == definition
    assert definition["cells"]["cnn"]["arms"]["group"]["norm_options"] == {"num_groups": 4}
    assert definition["hypotheses"]["C1.a"]["estimand"][0].startswith("def accuracy_difference(")
