"""The contracts of bnbench's parts, as checks: a package tests its own normalization layers with them.

@pytest.mark.parametrize("check", norm_checks())
@pytest.mark.parametrize("case", norm_cases("my_norm"), ids=str)
def test_my_norm_keeps_the_contract(case, check):
    check(case)
"""

from bnbench.testing.norm_case import NormCase, norm_cases
from bnbench.testing.norm_checks import NormCheck, check_norm, norm_checks

__all__ = ["NormCase", "NormCheck", "check_norm", "norm_cases", "norm_checks"]
