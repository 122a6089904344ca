"""A study's design with data, model and norm of one's own: what becomes of cells, arms and hypotheses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from torch import nn

from bnbench.cli.questions import asked_in
from bnbench.engine.suite import prepare
from bnbench.registry import BadInput
from bnbench.study import Arm, Cell, Choice, Design, Hypothesis, Range, Study, Trial
from bnbench.study.estimands import accuracy_difference, log_steps_ratio, metric_slope
from bnbench.study.load import load_studies
from bnbench.study.question import Question
from bnbench.study.reading import constants_read


class TakesNorm(nn.Module):
    """A network of one's own that takes a norm and nothing else."""

    def __init__(self, in_shape: tuple[int, ...], num_classes: int, norm_layer: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, num_classes)


class TakesSlot(nn.Module):
    """A network of one's own that takes a slot."""

    def __init__(self, in_shape: tuple[int, ...], num_classes: int, slot: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), slot.build(8, 0, 0, 1))
        self.head = nn.Linear(8, num_classes)


class TakesImages(TakesNorm):
    """A network of one's own for images only."""

    def __init__(self, in_shape: tuple[int, ...], num_classes: int, norm_layer: Any) -> None:
        _, _, _ = in_shape
        super().__init__(in_shape, num_classes, norm_layer)


class TakesNothing(nn.Module):
    """A network of one's own whose norm is fixed."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(64, num_classes)


def compare(better: str, other: str, **more: Any) -> Hypothesis:
    """A primary hypothesis on two arms."""
    return Hypothesis(
        **{
            "name": f"{better} over {other}",
            "claim": "C1",
            "sentence": "One is more accurate than the other.",
            "estimand": partial(accuracy_difference, better=better, other=other),
            "delta": 1.0,
            "better": (better,),
            "other": (other,),
            **more,
        }
    )


def study_of(
    cells: tuple[Cell, ...], arms: tuple[Arm, ...], hypotheses: tuple[Hypothesis, ...], **base: Any
) -> Study:
    """A study with one design for both presets; the first arm is its baseline."""
    rows = {"data": "digits", "model": "mlp", "steps": 20, **base}
    design = Design(base=Trial(**rows), cells=cells, arms=arms, lr=(0.1, 1.0), replicates=5, trials=2)
    return Study("mine", "Is it so?", hypotheses, design, design, arms[0].name)


FOUR = (
    Cell("mlp-digits", data="digits", model="mlp", steps=10, constants={"target": 0.9}),
    Cell("mlp-mnist1d", data="mnist1d", model="mlp", steps=30, constants={"target": 0.5}),
    Cell("cnn-digits", data="digits", model="cnn", model_options={"channels": 4}, steps=40),
    Cell("cnn-mnist1d", data="mnist1d", model="cnn", model_options={"channels": 4}, steps=50),
)
NORMS = (Arm("none", norm="none"), Arm("batch", norm="batch"), Arm("ghost", norm="ghost_batch"))
PLACES = (Arm("before", order="norm-act"), Arm("after", order="act-norm"), Arm("first", order="pre-act"))
ON_FOUR = study_of(FOUR, NORMS, (compare("batch", "none"), compare("ghost", "none")))


def asked(study: Study, **question: Any) -> tuple[Study, tuple[str, ...]]:
    """The study that asks a question in the quick design."""
    return asked_in(study, Question(**question), "quick")


def rows_of(study: Study) -> dict[str, dict[str, Trial]]:
    """The first row of every arm, by cell."""
    design = study.quick
    return {c.name: {a.name: design.trial(c, a, 0) for a in design.arms_in(c.name)} for c in design.cells}


def test_other_data_gives_one_cell_a_model_with_that_cell_s_own_steps() -> None:
    study, _ = asked(ON_FOUR, data="mnist1d")
    assert study.name == "mine on mnist1d"
    rows = rows_of(study)
    assert list(rows) == ["mlp-mnist1d", "cnn-mnist1d"]
    assert {row.data for there in rows.values() for row in there.values()} == {"mnist1d"}
    # Both cells of a model answer as much, so the one whose data was asked for stands for both.
    assert [rows[name]["none"].steps for name in rows] == [30, 50]
    assert rows["cnn-mnist1d"]["none"].model_options == {"channels": 4}


def test_another_model_gives_one_cell_a_data_set_without_the_old_model_s_options() -> None:
    study, notes = asked(ON_FOUR, model=f"{__name__}:TakesSlot")
    assert study.name == f"mine with {__name__}.TakesSlot"
    assert [cell.changes["steps"] for cell in study.quick.cells] == [10, 30]
    assert all(row.model_options == {} for there in rows_of(study).values() for row in there.values())
    assert not any("left out" in note for note in notes)


def test_a_data_set_that_the_model_cannot_take_leaves_with_its_cell() -> None:
    study, notes = asked(ON_FOUR, model=f"{__name__}:TakesImages")
    assert [cell.name for cell in study.quick.cells] == [f"{__name__}.TakesImages-digits"]
    assert any(note.startswith("left out of") and "not enough values to unpack" in note for note in notes)
    assert any(
        note.startswith("left out: cell") and "-mnist1d', since its baseline" in note for note in notes
    )


def test_both_give_one_cell() -> None:
    study, _ = asked(ON_FOUR, data="digits", model="resnet20")
    assert [cell.name for cell in study.quick.cells] == ["resnet20-digits"]


def test_seeds_alone_leave_cells_and_rows_as_they_were() -> None:
    study, notes = asked(ON_FOUR, replicates=7)
    assert study.name == "mine, 7 seeds"
    assert rows_of(study) == rows_of(ON_FOUR)
    assert study.quick.replicates == 7
    assert notes == ()


def test_a_cell_keeps_its_own_number_of_seeds_unless_one_is_given() -> None:
    cells = tuple(with_replicates(cell, 4 - i) for i, cell in enumerate(ON_FOUR.quick.cells[:2]))
    design = replace(ON_FOUR.quick, cells=cells)
    own = replace(ON_FOUR, quick=design, full=design)
    counts = [
        [study.quick.replicates_in(cell.name) for cell in study.quick.cells]
        for study in (asked(own, norm="group")[0], asked(own, norm="group", replicates=7)[0])
    ]
    assert counts == [[4, 3], [7, 7]]


def with_replicates(cell: Cell, count: int) -> Cell:
    return Cell(cell.name, constants=cell.constants, replicates=count, **cell.changes)


def test_every_hypothesis_is_exploratory_and_the_study_is_another_one() -> None:
    for question in ({"data": "mnist1d"}, {"model": "cnn"}, {"norm": "group"}, {"replicates": 2}):
        study, _ = asked(ON_FOUR, **question)
        assert not any(h.primary for h in study.hypotheses)
        assert study.hash("quick") != ON_FOUR.hash("quick")
        assert prepare(study, "quick").study_hash == study.hash("quick")


def test_of_cells_that_become_one_that_with_most_primary_hypotheses_stands() -> None:
    arms = (*NORMS[:2], replace_cells(NORMS[2], ("mlp-mnist1d",)))
    hypotheses = (
        compare("batch", "none", cells=("mlp-digits", "mlp-mnist1d")),
        compare("ghost", "none", cells=("mlp-mnist1d",), primary=False),
    )
    study, _ = asked(study_of(FOUR[:2], arms, hypotheses), data="digits", replicates=3)
    rows = rows_of(study)
    assert list(rows) == ["mlp-digits"]
    assert list(rows["mlp-digits"]) == ["none", "batch", "ghost"]
    assert rows["mlp-digits"]["none"].steps == 30
    assert [h.cells for h in study.hypotheses] == [("mlp-digits",)] * 2
    poorer = study_of(FOUR[:2], arms, (replace(hypotheses[0], cells=("mlp-digits",)), hypotheses[1]))
    study, notes = asked(poorer, data="digits")
    assert [h.name for h in study.hypotheses] == ["batch over none"]
    assert any("'ghost over none', for want of arms or cells" in note for note in notes)


def replace_cells(arm: Arm, cells: tuple[str, ...]) -> Arm:
    """The arm in some cells only."""
    return Arm(arm.name, cells=cells, **arm.changes)


def test_an_order_that_the_model_does_not_offer_leaves_with_its_hypothesis() -> None:
    cells = (Cell("resnet20-digits", model="resnet20"),)
    study = study_of(cells, PLACES, (compare("before", "after"), compare("first", "before")))
    new, notes = asked(study, model="mlp")
    assert [arm.name for arm in new.quick.arms] == ["before", "after"]
    assert [h.name for h in new.hypotheses] == ["before over after"]
    (arm,) = [note for note in notes if "'first'" in note and "order 'pre-act'" in note]
    assert arm.startswith("left out: arm 'first', since")


@pytest.mark.parametrize(
    ("model", "arms", "words"),
    [
        ("TakesNorm", PLACES[:2], "does not read order"),
        ("TakesNorm", (Arm("plain"), Arm("drops", dropout=0.3)), "does not read dropout"),
        ("TakesNothing", (Arm("batch"), Arm("none", norm="none")), "does not read norm"),
        ("TakesSlot", (Arm("he"), Arm("xavier", init="xavier")), "does not read init"),
        ("TakesSlot", (Arm("before"), PLACES[2]), "offers the orders norm-act and act-norm only"),
    ],
)
def test_arms_that_differ_in_what_a_class_ignores_are_not_compared(
    model: str, arms: tuple[Arm, ...], words: str
) -> None:
    study = study_of((Cell("mlp-digits"),), arms, (compare(arms[1].name, arms[0].name),))
    with pytest.raises(BadInput, match=words) as error:
        asked(study, model=f"{__name__}:{model}")
    assert "nothing left to compare" in str(error.value)


def test_a_class_with_a_slot_is_asked_about_orders() -> None:
    study = study_of((Cell("mlp-digits"),), PLACES[:2], (compare("before", "after"),))
    new, _ = asked(study, model=f"{__name__}:TakesSlot")
    assert [row.order for row in rows_of(new)["tests.test_own_question.TakesSlot-digits"].values()] == [
        "norm-act", "act-norm"
    ]  # fmt: skip


def test_a_norm_stands_for_batch_in_rows_names_and_estimands() -> None:
    doses = (("batch, wide", 1.0), ("batch", 0.0), ("ghost", -1.0))
    arms = (*NORMS, Arm("batch, wide", model_options={"width": 8}))
    slope = compare(
        "batch", "none", name="slope", estimand=partial(metric_slope, doses=doses, metric="test/acc")
    )
    study, _ = asked(study_of((Cell("mlp-digits"),), arms, (compare("batch", "none"), slope)), norm="layer")
    norms = {name: row.norm for name, row in rows_of(study)["mlp-digits"].items()}
    assert norms == {"none": "none", "layer": "layer", "ghost": "ghost_batch", "layer, wide": "layer"}
    first, second = study.hypotheses
    assert (first.better, first.other) == (("layer",), ("none",))
    assert first.estimand.keywords["better"] == "layer"  # type: ignore[attr-defined]
    assert [arm for arm, _ in second.estimand.keywords["doses"]] == ["layer, wide", "layer", "ghost"]  # type: ignore[attr-defined]
    assert first.sentence.startswith("With norm layer in place of batch normalization: ")


def test_an_arm_that_became_another_one_leaves() -> None:
    study = study_of(
        (Cell("mlp-digits"),),
        (*NORMS[:2], Arm("layer", norm="layer")),
        (compare("batch", "none"), compare("batch", "layer")),
    )
    new, notes = asked(study, norm="layer")
    assert len(new.quick.arms) == 2
    assert [h.name for h in new.hypotheses] == ["batch over none"]
    assert any("it trains as" in note for note in notes)
    with pytest.raises(BadInput, match="it trains as 'none' does"):
        asked(replace(study, hypotheses=study.hypotheses[:1]), norm="none")


def test_without_a_norm_its_place_is_no_difference() -> None:
    study = study_of((Cell("mlp-digits"),), PLACES[:2], (compare("before", "after"),))
    with pytest.raises(BadInput, match="it trains as 'before' does"):
        asked(study, norm="none")


def test_twins_that_the_study_has_on_purpose_stay() -> None:
    study = study_of((Cell("mlp-digits"),), (Arm("one"), Arm("two")), (compare("one", "two"),))
    assert len(asked(study, replicates=2)[0].quick.arms) == 2


def test_a_search_keeps_what_the_model_reads_and_offers() -> None:
    space = (
        Range("lr", 0.01, 1.0),
        Choice(
            "placement", {"a": {"order": "norm-act"}, "b": {"order": "act-norm"}, "c": {"order": "pre-act"}}
        ),
        Choice("batch_size", (16, 32)),
    )
    arms = (Arm("none", norm="none"), Arm("batch", space=space))
    study = study_of((Cell("resnet20-digits", model="resnet20"),), arms, (compare("batch", "none"),))

    def searched(model: str) -> Mapping[str, list[str]]:
        new, _ = asked(study, model=model)
        (cell,) = new.quick.cells
        left = new.quick.arms[1].space_in(cell.name)
        return {d.name: list(d.levels) if isinstance(d, Choice) else [] for d in left}

    assert searched("mlp") == {"lr": [], "placement": ["a", "b"], "batch_size": ["16", "32"]}
    assert searched(f"{__name__}:TakesNorm") == {"lr": [], "batch_size": ["16", "32"]}


def test_a_target_is_asked_for_where_it_is_read_and_nowhere_else() -> None:
    speed = compare("batch", "none", estimand=partial(log_steps_ratio, better="batch", other="none"))
    fast, accurate = (
        study_of(FOUR[:1], NORMS, (speed,)),
        study_of(FOUR[:1], NORMS, (compare("batch", "none"),)),
    )
    with pytest.raises(BadInput, match=r"give --target, such as 0\.9"):
        asked(fast, data="mnist1d")
    assert asked(fast, data="mnist1d", target=0.7)[0].quick.cells[0].constants == {"target": 0.7}
    assert asked(fast, norm="group")[0].quick.cells[0].constants == {"target": 0.9}
    assert asked(accurate, data="mnist1d")[0].quick.cells[0].constants == {}


def test_the_constants_that_an_estimand_reads_are_found() -> None:
    suite = load_studies()

    def read(name: str) -> set[str]:
        study = suite[name]
        design = study.quick
        return {
            c
            for h in study.hypotheses
            for cell in study.cells_of(h, "quick")
            for c in constants_read(h, design, cell)
        }

    assert read("convergence") == read("batch_size") == {"target"}
    assert read("lr_stability") == read("placement") == read("scale") == set()


def test_fields_are_set_for_every_row_but_not_what_arms_differ_in() -> None:
    study, _ = asked(ON_FOUR, changes={"steps": 7, "augment": "none"})
    assert study.name == "mine, steps=7, augment=none"
    assert {row.steps for there in rows_of(study).values() for row in there.values()} == {7}
    with pytest.raises(BadInput, match=r"'norm'.*use --norm"):
        asked(ON_FOUR, changes={"norm": "group"})
    batches = study_of((Cell("mlp-digits"),), (Arm("8", batch_size=8), Arm("16")), (compare("8", "16"),))
    with pytest.raises(
        BadInput, match="'batch_size' cannot be set for all of study 'mine': its arm '8' sets it"
    ):
        asked(batches, changes={"batch_size": 4})


def test_a_study_that_compares_models_is_not_asked_of_one() -> None:
    arms = (Arm("mlp"), Arm("cnn", model="cnn"))
    study = study_of((Cell("digits"),), arms, (compare("cnn", "mlp"),))
    with pytest.raises(
        BadInput, match="'model' cannot be set for all of study 'mine': its arm 'cnn' sets it"
    ):
        asked(study, model="resnet20")
    assert len(asked(study, data="mnist1d")[0].quick.arms) == 2


@pytest.mark.parametrize(
    ("question", "refused"),
    [({"data": "digits"}, set()), ({"model": "mlp"}, set()), ({"norm": "group"}, {"scale"})],
)
def test_every_study_of_the_suite_can_be_asked(question: dict[str, str], refused: set[str]) -> None:
    left_out = set()
    for name, study in load_studies().items():
        try:
            new, notes = asked(study, **question, target=0.5)
        except BadInput as error:
            assert "\n" not in str(error)
            left_out.add(name)
            continue
        job = prepare(new, "quick")
        assert not any(h.primary for h in new.hypotheses)
        assert all("\n" not in note for note in notes)
        for cell in new.quick.cells:
            for arm in new.quick.arms_in(cell.name):
                row = new.quick.trial(cell, arm, 0)
                assert row.data == question.get("data", row.data)
                assert row.model == question.get("model", row.model)
                assert "norm" not in question or row.norm != "batch"
        assert len(job.rows) > 10
    assert left_out == refused
