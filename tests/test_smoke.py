"""Tests of the preset smoke: rows as small as still train, each a point of its space where it is searched."""

from __future__ import annotations

from pathlib import Path

import pytest

from bnbench.engine.rows import check_trial
from bnbench.engine.search import draw
from bnbench.engine.train import Place, train
from bnbench.registry import BadInput
from bnbench.study import Arm, Cell, Choice, Range, Trial
from bnbench.study.programs import programs_of
from bnbench.study.smoke import cheap, left_of, smallest
from bnbench.study.space import point_of
from tests.pilot_study import design, drive, study


@pytest.mark.parametrize(
    ("changes", "batch_size", "ghost_sizes"),
    [
        ({}, 4, ()),
        ({"norm": "none", "batch_size": 256}, 4, ()),
        ({"batch_size": 2}, 2, ()),
        ({"norm": "ghost_batch", "norm_options": {"ghost_size": 2}}, 4, (2,)),
        ({"norm": "ghost_batch", "norm_options": {"ghost_size": 16}}, 4, (2,)),
        ({"norm": "ghost_batch", "norm_options": {"ghost_size": 3}, "batch_size": 3}, 3, (3,)),
        ({"norm": "ghost_batch", "batch_size": 128}, 32, ()),
        ({"norm": "sync_batch", "devices": 2}, 4, ()),
        ({"norm": "ghost_batch", "last_norm_options": {"ghost_size": 64}, "batch_size": 128}, 32, (2,)),
    ],
)
def test_a_batch_is_the_smallest_from_4_on_that_the_norms_take_and_that_they_split(
    changes: dict[str, object], batch_size: int, ghost_sizes: tuple[int, ...]
) -> None:
    small = smallest(Trial(**{"steps": 900, "n_train": 1000, **changes}))
    assert (small.batch_size, small.steps, small.n_train) == (batch_size, 2, batch_size * small.devices)
    assert (*small.norm_options.values(), *small.last_norm_options.values()) == ghost_sizes
    assert small.n_eval == 4
    check_trial(small)


def test_a_batch_that_no_norm_takes_is_left_to_be_refused() -> None:
    small = smallest(Trial(norm="ghost_batch", norm_options={"ghost_size": 7}))
    assert small.batch_size == 64
    with pytest.raises(BadInput, match="ghost_size=7 does not divide"):
        check_trial(small)


def test_a_reference_is_no_larger_than_the_batch(tmp_path: Path) -> None:
    given = {"reference_size": 512, "own_weight": 0.0}
    small = smallest(Trial(norm="virtual_batch", norm_options=given, data="digits"))
    assert small.norm_options == {**given, "reference_size": 4}
    assert train(small, Place(tmp_path, tmp_path)).status == "done"


def test_data_that_need_a_download_are_made_up() -> None:
    assert smallest(Trial(data="cifar10")).data_options["synthetic"]
    assert smallest(Trial(data="mnist1d")).data_options == {}
    with pytest.raises(BadInput, match="no data set named 'cifar11'"):
        smallest(Trial(data="cifar11"))


def test_probes_that_take_minutes_are_left_out_and_others_read_before_and_after_the_steps() -> None:
    given = {"hessian": {"every": 50}, "drift": {"every": 50}, "rank": {"steps": [0]}}
    assert cheap(given) == {"drift": {"every": 2}, "rank": {"steps": [0]}}


SIZES = {"32": {"batch_size": 32, "steps": 200}, "64": {"batch_size": 64, "steps": 100}}
SPACE = (Range("lr", 0.01, 1.0), Choice("batch size", SIZES), Choice("schedule", ("constant", "cosine")))


def test_a_space_keeps_the_dimensions_that_smoke_does_not_decide() -> None:
    assert left_of(SPACE) == (SPACE[0], SPACE[2])
    assert left_of({"mlp": SPACE, "cnn": SPACE[1:2]}) == {"mlp": (SPACE[0], SPACE[2]), "cnn": ()}


def test_every_row_of_a_search_is_a_point_of_the_space_that_is_registered() -> None:
    arms = (Arm("none", norm="none"), Arm("batch", space=SPACE), Arm("size alone", space=SPACE[1:2]))
    the_study = study(
        full=design(cells=(Cell("mlp"),), arms=arms, trials=5, tuning="once"),
        quick=design(arms=arms, trials=5),
        hypotheses=(),
    )
    smoke = the_study.design("smoke")
    assert set(the_study.definition("smoke")["spaces"]["mlp"]["batch"]) == {"lr", "schedule"}
    (_, program) = programs_of(the_study, "smoke", draw)[0]
    rows = [e for e in drive(program)[0] if e.arm == "batch"]
    assert {e.role for e in rows} == {"tune", "own"}
    for entry in rows:
        point = point_of(smoke.arms[1].space_in("mlp"), entry.trial)
        assert set(point) == {"lr", "schedule"}
        assert (entry.trial.batch_size, entry.trial.steps) == (4, 2)


def test_cells_of_one_shape_are_tried_once() -> None:
    cells = (
        Cell("mlp"),
        Cell("mlp, noisy", label_noise=0.2),
        Cell("mlp, one more arm", n_train=100),
        Cell("mlp, tanh", activation="tanh"),
    )
    arms = (Arm("none", norm="none"), Arm("batch", cells=("mlp, one more arm",)))
    smoke = study(full=design(cells=cells, arms=arms), quick=design(), hypotheses=()).design("smoke")
    assert [cell.name for cell in smoke.cells] == ["mlp", "mlp, one more arm", "mlp, tanh"]
    assert [arm.name for arm in smoke.arms_in("mlp, one more arm")] == ["none", "batch"]


def test_an_arm_of_some_cells_stays_one() -> None:
    arms = (Arm("none", norm="none"), Arm("batch", cells=("mlp",)))
    smoke = study(full=design(arms=arms), quick=design(arms=arms), hypotheses=()).design("smoke")
    assert [arm.name for arm in smoke.arms_in("cnn")] == ["none"]
