"""Every registered norm against the contract of bnbench.testing."""

import pytest

from bnbench.norms import NORMS, ghost_batch
from bnbench.testing import norm_cases, norm_checks

CASES = [case for name in NORMS for case in norm_cases(name)]
each_check = pytest.mark.parametrize(
    "check", norm_checks(), ids=lambda check: check.__name__.removeprefix("check_norm_")
)


@each_check
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_keeps_its_contract(case, check):
    check(case)


@each_check
@pytest.mark.parametrize("case", norm_cases("ghost_batch"), ids=str)
def test_ghost_batch_keeps_its_contract_with_looped_chunks(case, check, monkeypatch):
    monkeypatch.setattr(ghost_batch, "LOOPED_VALUES", 0)
    check(case)
