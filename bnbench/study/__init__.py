"""Studies as declarations, and the statistics that judge them."""

from bnbench.study.spec import Arm, Cell, Claim, Design, Estimate, Factor, Hypothesis, Study, cross
from bnbench.study.table import Entry, Replicate, Result, Table
from bnbench.study.trial import Trial

__all__ = [
    "Arm",
    "Cell",
    "Claim",
    "Design",
    "Entry",
    "Estimate",
    "Factor",
    "Hypothesis",
    "Replicate",
    "Result",
    "Study",
    "Table",
    "Trial",
    "cross",
]
