"""The report: one page, its figures and its numbers as files, from tables and verdicts alone."""

from bnbench.report.page import render_html, write_report
from bnbench.report.plain import (
    claim_lines,
    ranking_lines,
    recipe_lines,
    render_csv,
    render_json,
    render_markdown,
    verdict_lines,
)
from bnbench.report.result import Report, StudyResult

__all__ = [
    "Report",
    "StudyResult",
    "claim_lines",
    "ranking_lines",
    "recipe_lines",
    "render_csv",
    "render_html",
    "render_json",
    "render_markdown",
    "verdict_lines",
    "write_report",
]
