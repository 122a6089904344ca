"""Every registered norm against the contract of bnbench.testing."""

import pytest

from bnbench.norms import NORMS, ghost_batch
from bnbench.testing import norm_cases, norm_checks

CASES = [case for name in NORMS for case in norm_cases(name)]
NAMES = {check: check.__name__.removeprefix("check_norm_") for check in norm_checks()}
#: Half a second each: of a norm's examples, all but the first are for the slow tests.
COSTLY = ("compile", "export")


def marked(case, check):
    """A case and a check, slow where the check is costly and the case not the first of its norm."""
    slow = NAMES[check] in COSTLY and case.options != case.entry.examples[0]
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(case, check, id=f"{case}-{NAMES[check]}", marks=marks)


@pytest.mark.parametrize(("case", "check"), [marked(case, check) for case in CASES for check in NAMES])
def test_norm_keeps_its_contract(case, check):
    check(case)


@pytest.mark.parametrize(
    ("case", "check"), [marked(case, check) for case in norm_cases("ghost_batch") for check in NAMES]
)
def test_ghost_batch_keeps_its_contract_with_looped_chunks(case, check, monkeypatch):
    monkeypatch.setattr(ghost_batch, "LOOPED_VALUES", 0)
    check(case)
