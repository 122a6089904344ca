"""The study `normalizers`: it ranks every norm that there is where it suits, and takes a user's own."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import get_args

import pytest

from bnbench.engine.suite import prepare
from bnbench.models.residual import Residual
from bnbench.norms import NORMS
from bnbench.norms.reparam import REPARAMS
from bnbench.study import Arm, Study, Trial
from bnbench.study.load import load_study, studies_folder
from bnbench.study.programs import planned_rows

#: Norms of this package that the study does not rank, each with the reason.
LEFT_OUT = {"sync_batch": "on one device it is batch"}

STUDY: Study = load_study("normalizers")
DESIGNS = {preset: STUDY.design(preset) for preset in ("quick", "full", "smoke")}


def strategies(preset: str) -> dict[str, Trial]:
    """The row of every arm, in some cell that has it."""
    design = DESIGNS[preset]
    return {
        arm.name: design.trial(cell, arm, 0) for cell in design.cells for arm in design.arms_in(cell.name)
    }


@pytest.mark.parametrize("preset", DESIGNS)
def test_every_norm_of_the_package_is_ranked_or_left_out_for_a_reason(preset: str) -> None:
    ours = {name for name, entry in NORMS.items() if entry.layer.__module__.startswith("bnbench.")}
    assert {row.norm for row in strategies(preset).values()} == ours - LEFT_OUT.keys()


@pytest.mark.parametrize("preset", DESIGNS)
def test_every_reparametrization_of_the_package_is_ranked(preset: str) -> None:
    ours = {name for name, entry in REPARAMS.items() if entry.apply.__module__.startswith("bnbench.")}
    assert {row.reparam for row in strategies(preset).values()} - {None} == ours


def test_every_option_of_residual_networks_is_ranked_where_there_are_shortcuts() -> None:
    options = {row.model_options.get("residual", "plain") for row in strategies("full").values()}
    assert options == set(get_args(Residual))
    assert {name for name, row in strategies("full").items() if "residual" in row.model_options} == (
        strategies("full").keys() - {arm.name for arm in DESIGNS["quick"].arms}
    )


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_what_needs_positions_is_ranked_where_there_are_some_and_all_else_everywhere(preset: str) -> None:
    design = DESIGNS[preset]
    for arm in design.arms:
        cells = [cell for cell in design.cells if arm in design.arms_in(cell.name)]
        rows = [design.trial(cell, arm, 0) for cell in cells]
        # Without positions, all that a layer or a root mean square can be taken over is the channels.
        is_same = "over" in rows[0].norm_options
        has_positions = all(row.model != "mlp" for row in rows)
        assert has_positions == (
            NORMS[rows[0].norm].min_dim > 0 or is_same or "residual" in rows[0].model_options
        )
    for cell in design.cells:
        names = [arm.name for arm in design.arms_in(cell.name)]
        rows = [design.trial(cell, arm, 0) for arm in design.arms_in(cell.name)]
        assert len({row.key for row in rows}) == len(names)
        assert {"none", "batch"} <= set(names)
        dim = 0 if rows[0].model == "mlp" else 1
        suiting = {name for name, entry in NORMS.items() if entry.min_dim <= dim} - LEFT_OUT.keys()
        assert {row.norm for row in rows} >= {
            name for name in suiting if NORMS[name].layer.__module__.startswith("bnbench.")
        }


def test_ghost_batches_are_smaller_than_the_batch_in_every_cell() -> None:
    for design in (DESIGNS["quick"], DESIGNS["full"]):
        for cell in design.cells:
            (row,) = (
                row
                for arm in design.arms_in(cell.name)
                if (row := design.trial(cell, arm, 0)).norm == "ghost_batch"
            )
            assert row.norm_options["ghost_size"] < row.batch_size


def test_the_smallest_preset_is_small_and_tries_every_strategy_once() -> None:
    rows = planned_rows(STUDY, "smoke")
    arms = DESIGNS["smoke"].arms
    assert {arm.name for arm in arms} > {"none", "batch", "evonorm_b0"}
    # To choose a rate, to confirm it, to measure a step.
    assert len(rows) == 3 * len(arms)
    assert len({row.model for row in rows}) == 1


def test_a_norm_of_ones_own_joins_by_a_file_and_shares_all_other_rows(tmp_path: Path) -> None:
    page = (studies_folder() / "normalizers.py").read_text()
    found = re.search(r"\n\n((?:    .*\n|\n)+)\"\"\"", page)
    assert found is not None
    code = textwrap.dedent(found[1])
    assert "my_norm" in code
    # A norm that is not among the arms in this form.
    own = code.replace('norm="my_norm"', 'norm="group", norm_options={"num_groups": 2}')
    (tmp_path / "mine.py").write_text(own)
    mine = load_study(str(tmp_path / "mine.py"))
    theirs, ours = (
        {row.key for row in prepare(study, "quick").rows} for study in (mine, STUDY)
    )  # fmt: skip
    more = theirs - ours
    assert ours < theirs
    assert len(more) == len(theirs) - len(ours)
    design = mine.design("quick")
    for cell in design.cells:
        assert design.arms_in(cell.name)[-1].name == "mine" or cell.name.startswith("cnn")
        row = design.trial(cell, next(arm for arm in design.arms if arm.name == "mine"), 0)
        assert row.norm_options == {"num_groups": 2}


def test_nothing_is_claimed() -> None:
    assert STUDY.ranked
    assert not any(h.primary for h in STUDY.hypotheses)
    assert isinstance(DESIGNS["quick"].arms[0], Arm)
