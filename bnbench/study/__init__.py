"""Studies as declarations, and the statistics that judge them."""

from bnbench.study.design import Arm, Cell, Design, Factor, cross
from bnbench.study.space import Choice, Range
from bnbench.study.spec import Claim, Estimate, Hypothesis, Study
from bnbench.study.table import Entry, Replicate, Result, Table
from bnbench.study.trial import Trial

__all__ = [
    "Arm",
    "Cell",
    "Choice",
    "Claim",
    "Design",
    "Entry",
    "Estimate",
    "Factor",
    "Hypothesis",
    "Range",
    "Replicate",
    "Result",
    "Study",
    "Table",
    "Trial",
    "cross",
]
