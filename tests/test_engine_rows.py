"""What a row says about its training: when it is looked at, and whether it can train."""

from __future__ import annotations

import itertools

import pytest

from bnbench.data import seed_of
from bnbench.engine import rows
from bnbench.engine.rows import check_trial, curve_steps, look_steps, module_arguments
from bnbench.registry import BadInput
from bnbench.study.trial import Trial

ROW = Trial(data="digits", model_options={"depth": 2, "width": 16}, batch_size=20, steps=40)


def test_curve_steps_grow_to_the_last_step():
    assert curve_steps(1000, 0) == []
    assert curve_steps(1, 26) == [1]
    steps = curve_steps(1000, 26)
    assert len(steps) == 26
    assert steps[-1] == 1000
    assert all(later / step == pytest.approx(1.15, rel=0.02) for step, later in itertools.pairwise(steps))


@pytest.mark.parametrize(
    ("steps", "looks"),
    [(1, range(0)), (3, [1, 2]), (40, range(1, 40)), (41, range(2, 41, 2)), (1000, range(25, 1000, 25))],
)
def test_a_row_with_a_target_looks_every_fortieth_of_its_steps_before_the_last(steps, looks):
    assert list(look_steps(ROW.replace(steps=steps, until_train_nll=0.1))) == list(looks)
    assert list(look_steps(ROW.replace(steps=steps))) == []


def test_a_repetition_changes_the_seed_of_the_module_and_the_first_one_does_not():
    seeds = [module_arguments(ROW.replace(seed=3, repeat=repeat))["seed"] for repeat in range(4)]
    assert seeds[0] == seed_of(3, "val")
    assert len(set(seeds)) == 4


def test_rows_of_one_shape_share_a_check(monkeypatch):
    check_trial(ROW)
    monkeypatch.setattr(rows, "check_model", lambda *a, **k: pytest.fail("checked again"))
    same = {"seed": 7, "lr": 0.3, "data_seed": 5, "score_on": "test", "curve_points": 9}
    check_trial(ROW.replace(**same, repeat=2, until_train_nll=0.1))


GHOST = {"norm": "ghost_batch", "norm_options": {"ghost_size": 4}}
LAST = {"last_norm_options": {"gamma_init": 2.0}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma_decay": 0.1, "norm": "none"}, "norm 'none' learns no scale here; use 0"),
        ({"gamma_decay": 0.1, "norm_options": {"affine": False}}, "learns no scale"),
        ({"gamma_decay": 0.1, "norm_options": {"gamma": 1, "learn_gamma": False}}, "learns no scale"),
        ({"last_norm_options": {"gama_init": 2.0}}, "did you mean 'gamma_init'"),
        (LAST | {"norm": "none"}, "norm 'none' has no option 'gamma_init'"),
        (
            GHOST | {"last_norm_options": {"ghost_size": 3}},
            "3 does not divide the batch of 20",
        ),
        (
            LAST | {"model": "tests.test_lit:WithNormLayer", "model_options": {}},
            "model 'tests.test_lit:WithNormLayer' has no last norm for last_norm_options",
        ),
    ],
)
def test_a_field_without_effect_is_refused_in_one_line(changes, message):
    with pytest.raises(BadInput, match=message) as refusal:
        check_trial(ROW.replace(**changes))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 200


def test_a_decay_of_scales_is_taken_where_one_norm_learns_its_scale():
    fixed = {"norm_options": {"gamma": 1, "learn_gamma": False}}
    check_trial(ROW.replace(gamma_decay=0.1, **fixed, last_norm_options={"gamma": None, "learn_gamma": True}))
