"""Tests of search spaces: what a point changes, that a row tells its point, and what is refused."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnbench.norms import NORMS, norm_names
from bnbench.registry import BadInput
from bnbench.study import Arm, Choice, Range, Trial
from bnbench.study.recipes import NAMES, WITH_GAMMA_INIT, recipe_space
from bnbench.study.space import changes_of, check_space, define, most_levels, point_of, stand_in

SPACE = (
    Range("lr", 1e-3, 3.0),
    Choice("batch_size", {"32": {"batch_size": 32, "steps": 8}, "64": {"batch_size": 64, "steps": 4}}),
    Choice("gamma", {f"{g:g}": {"norm_options": {"gamma_init": g}} for g in (0.3, 1.0)}),
    Choice("eps", {f"{e:g}": {"norm_options": {"eps": e}} for e in (1e-5, 0.1)}),
    Choice("schedule", ("constant", "cosine")),
)  # fmt: skip
points = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-3, 3.0).map(lambda x: SPACE[0].kept(x)),  # type: ignore[arg-type]
        **{d.name: st.sampled_from(list(d.levels)) for d in SPACE if isinstance(d, Choice)},
    }
)


@given(points)
def test_a_row_tells_the_point_that_made_it(point: dict[str, object]) -> None:
    assert point_of(SPACE, Trial(**changes_of(SPACE, point))) == point


def test_options_of_two_dimensions_come_together() -> None:
    changes = changes_of(
        SPACE, {"lr": 0.1, "batch_size": "64", "gamma": "0.3", "eps": "0.1", "schedule": "cosine"}
    )
    assert changes["norm_options"] == {"gamma_init": 0.3, "eps": 0.1}
    assert (changes["batch_size"], changes["steps"], changes["schedule"]) == (64, 4, "cosine")


@given(st.floats(1e-3, 3.0))
def test_a_number_is_kept_to_three_digits_within_its_bounds(value: float) -> None:
    lr = SPACE[0]
    assert isinstance(lr, Range)
    kept = lr.kept(value)
    assert lr.low <= kept <= lr.high
    assert float(f"{kept:.3g}") == kept
    assert abs(kept / value - 1) <= 0.005
    assert lr.kept(kept) == kept


def test_a_row_of_another_space_has_no_point() -> None:
    with pytest.raises(LookupError, match="no level of 'batch_size'"):
        point_of(SPACE, Trial(batch_size=7))


def test_stand_ins_meet_every_level_and_are_all_different() -> None:
    made = [stand_in(SPACE, number) for number in range(24)]
    assert len({Trial(**changes_of(SPACE, point)).key for point in made}) == 24
    first = made[: most_levels(SPACE)]
    for dimension in SPACE:
        if isinstance(dimension, Choice):
            assert {point[dimension.name] for point in first} == set(dimension.levels)


def test_a_definition_has_every_level_and_bound() -> None:
    said = define(SPACE)
    assert said["lr"] == {"low": 0.001, "high": 3.0}
    assert said["schedule"] == {"constant": {"schedule": "constant"}, "cosine": {"schedule": "cosine"}}
    assert list(said) == [dimension.name for dimension in SPACE]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Range("lr", 1.0, 0.1), "low (1) must be below high (0.1)"),
        (lambda: Range("lr", 0.0, 0.1), "low must be a finite number above 0, not 0.0"),
        (lambda: Range("rate", 0.1, 1.0), "has no field 'rate'"),
        (lambda: Range("dropout", 0.1, 1.5), "dropout must be at least 0 and below 1"),
        (lambda: Range("steps", 1.0, 10.0), "is no number with a fraction; give its values as a Choice"),
        (lambda: Choice("schedule", "cosine"), "must be a tuple"),
        (lambda: Choice("schedule", ("cosines",)), "did you mean 'cosine'"),
        (lambda: Choice("schedule", ()), "is empty"),
        (lambda: Choice("b", {"1": {"batch_size": 1}, "2": {"steps": 2}}), "the same fields"),
        (lambda: Choice("b", {"1": {}}), "a level is a label with changes"),
        (lambda: Choice("s", {"a": {"seed": 1}}), "cannot set 'seed'"),
        (lambda: check_space("space", (Range("lr", 0.1, 1.0), "lr")), "Choice and Range only, not 'lr'"),
        (lambda: check_space("space", Range("lr", 0.1, 1.0)), "must be a tuple"),
        (
            lambda: check_space("s", (Choice("a", {"x": {"steps": 1}}), Choice("b", {"y": {"steps": 2}}))),
            "'a' and 'b' both set 'steps'",
        ),
        (lambda: Arm("a", space=("lr",)), "arm 'a': space must hold Choice and Range only"),
        (lambda: Arm("a", space={"mlp": ("lr",)}), "arm 'a': space in 'mlp' must hold"),
    ],
)  # fmt: skip
def test_a_wrong_space_is_refused_in_one_line(make, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadInput) as error:
        make()
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_every_batch_size_of_a_recipe_reads_the_same_examples() -> None:
    (sizes,) = [d for d in recipe_space(norm="batch", examples=6400) if d.name == "batch_size"]
    assert isinstance(sizes, Choice)
    for changes in sizes.levels.values():
        assert changes["batch_size"] * changes["steps"] == 6400


def test_a_recipe_without_a_norm_has_nothing_that_concerns_one() -> None:
    without = {d.name: d for d in recipe_space(norm="none", examples=6400)}
    assert set(NAMES) - set(without) == {"placement", "gamma_init"}
    for dimension in without.values():
        if isinstance(dimension, Choice):
            assert not any("norm" in label for label in dimension.levels)


def test_the_norms_with_an_initial_scale_are_those_of_the_registry() -> None:
    found = [n for n in norm_names() if "gamma_init" in inspect.signature(NORMS[n].layer).parameters]
    assert sorted(found) == sorted(WITH_GAMMA_INIT)


def test_a_recipe_has_the_names_asked_for_and_the_learning_rate() -> None:
    space = recipe_space(["dropout", "placement"], norm="group", examples=100, orders=("norm-act", "pre-act"))
    assert [d.name for d in space] == ["lr", "placement", "dropout"]
    assert isinstance(space[1], Choice)
    assert [changes["order"] for changes in space[1].levels.values()] == ["norm-act", "pre-act"]
    with pytest.raises(BadInput, match="no dimension named 'dropuot'; did you mean 'dropout'"):
        recipe_space(["dropuot"], norm="batch", examples=100)
