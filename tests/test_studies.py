"""The contract of a study: holds for every file in studies/, so that a new one is tested by being there."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from bnbench.data import shape_of
from bnbench.engine.cost import seconds_of
from bnbench.engine.suite import prepare
from bnbench.study import Estimate, Replicate, Study, Table
from bnbench.study.claims import MIN_TRAIN_ACC, family_sizes, judge
from bnbench.study.load import load_claims, load_studies, load_study, studies_folder
from bnbench.study.programs import programs_of
from bnbench.study.space import Point, Space, stand_in
from tests.pilot_study import drive

SUITE = load_studies()
PRESETS = ("quick", "full", "smoke")
every_study = pytest.mark.parametrize("name", SUITE)
every_preset = pytest.mark.parametrize("preset", PRESETS)


def test_every_file_is_a_study_named_like_it() -> None:
    files = [path.stem for path in studies_folder().glob("*.py") if path.stem != "article"]
    assert sorted(SUITE) == sorted(files)
    assert all(load_study(name) is SUITE[name] for name in files)


rows_of = functools.cache(lambda name, preset: prepare(SUITE[name], preset).rows)


@every_study
@every_preset
def test_every_row_can_be_built(name: str, preset: str) -> None:
    rows = rows_of(name, preset)
    assert rows
    assert all(trial.score_on == "val" for trial in rows) == (SUITE[name].program == "sweep")


@every_study
@pytest.mark.parametrize("preset", ["quick", "full"])
def test_constants_are_possible(name: str, preset: str) -> None:
    study = SUITE[name]
    design = study.design(preset)
    for cell in design.cells:
        row = design.trial(cell, design.arms[0], 0)
        _, num_classes = shape_of(row.data, **row.data_options)
        for constant in ("target", MIN_TRAIN_ACC):
            assert 1 / num_classes < cell.constants.get(constant, 0.99) < 1, (cell.name, constant)
        for h in study.hypotheses:
            if cell in study.cells_of(h, preset):
                assert h.delta_in(cell) > 0


def test_all_quick_studies_together_keep_their_budget() -> None:
    """By costs of reference, so that the answer does not depend on the machine that asks."""
    rows = {study: prepare(SUITE[study], "quick", "auto").rows for study in SUITE}
    distinct = {trial.key: trial for planned in rows.values() for trial in planned}
    seconds = {study: sum(seconds_of(trial, {}) for trial in planned) for study, planned in rows.items()}
    total = sum(seconds_of(trial, {}) for trial in distinct.values())
    each = ", ".join(f"{study} {cost:.0f}" for study, cost in seconds.items())
    assert total <= 2000, f"{total:.0f} core-seconds; by study, shared rows in each: {each}"


@every_study
def test_every_hypothesis_speaks_of_a_claim_and_of_some_cell(name: str) -> None:
    claims = load_claims()
    for h in SUITE[name].hypotheses:
        assert h.claim in claims, h.name
        assert SUITE[name].cells_of(h, "quick") or SUITE[name].cells_of(h, "full"), h.name
        assert h.sentence.endswith("."), h.name


def step_through(
    space: Space, history: Any, count: int, seed: Any, is_new: Callable[[Point], bool]
) -> list[Point]:
    """A sampler that takes no time to think."""
    points = [stand_in(space, len(history) + number) for number in range(count)]
    return [point for n, point in enumerate(points) if is_new(point) and point not in points[:n]]


@every_study
@every_preset
def test_every_estimand_finds_what_it_reads(name: str, preset: str) -> None:
    """With one replicate of invented results: a misspelt arm, role, metric or constant shows here."""
    study: Study = SUITE[name]
    design = study.design(preset)
    seen = set()
    for cell_name, program in programs_of(study, preset, step_through):
        if cell_name in seen:
            continue
        seen.add(cell_name)
        cell = design.cell(cell_name)
        lines = [line for line in drive(program)[0] if line.role == "tune" or line.replicate == 0]
        replicate = Replicate(cell.name, 0, cell.constants, tuple(lines))
        for h in study.hypotheses:
            if cell in study.cells_of(h, preset):
                found = h.estimand(replicate)
                value = found.value if isinstance(found, Estimate) else found
                assert abs(value) < 1e6, (h.name, cell.name)
    assert seen == {cell.name for cell in design.cells}


@every_study
def test_the_smallest_preset_has_all_that_its_verdicts_read(name: str) -> None:
    """So that it ends with 0, unless a training fails."""
    study = SUITE[name]
    lines = [line for _, program in programs_of(study, "smoke", step_through) for line in drive(program)[0]]
    verdicts = judge(study, "smoke", Table(tuple(lines)), family_sizes(SUITE.values(), "smoke"))
    assert verdicts
    assert [v.reason for v in verdicts if v.gate == "incomplete"] == []


@every_study
@every_preset
def test_a_definition_is_plain_json(name: str, preset: str) -> None:
    definition = SUITE[name].definition(preset)
    assert json.loads(json.dumps(definition, allow_nan=False)) == definition


def test_hashes_are_the_same_in_another_process_and_all_different() -> None:
    here = {name: [study.hash(preset) for preset in PRESETS] for name, study in SUITE.items()}
    code = "import json; from bnbench.study.load import load_studies\n"
    code += f"print(json.dumps({{n: [s.hash(p) for p in {PRESETS}] for n, s in load_studies().items()}}))"
    answer = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout) == here
    hashes = [found for row in here.values() for found in row]
    assert len(set(hashes)) == len(hashes)


def test_no_two_hypotheses_of_the_suite_have_one_name() -> None:
    names = [h.name for study in SUITE.values() for h in study.hypotheses]
    assert len(set(names)) == len(names)


def test_claims_have_a_number_and_a_sentence_with_an_end() -> None:
    for claim in load_claims().values():
        assert claim.sentence.endswith(".")
        assert all(line.endswith(".") for line in claim.literature)
