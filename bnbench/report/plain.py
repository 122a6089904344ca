"""A report without a page: JSON for programs, Markdown and CSV for people, tables for the terminal."""

from __future__ import annotations

import csv
import io
import json

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from bnbench.report.gallery import in_order
from bnbench.report.result import Report, StudyResult
from bnbench.report.words import amount, conclude, effect, explain, probability, status
from bnbench.study.claims import to_json

_TERMINAL_COLOURS = {
    "SUPPORTED": "bold green",
    "REFUTED": "bold red",
    "MIXED": "bold magenta",
    "INCONCLUSIVE": "bold yellow",
    "NOT TESTED": "dim",
}


def render_json(report: Report) -> str:
    """Verdicts and claims with all their digits; equal tables give equal bytes, wherever they were made."""
    studies = [
        {
            "name": result.study.name,
            "preset": result.preset,
            "study_hash": result.study_hash,
            "question": result.study.question,
            "planned": result.planned,
            "recorded": result.recorded,
            "verdicts": [to_json(verdict) for verdict in result.verdicts],
        }
        for result in report.results
    ]
    claims = [
        {"sentence": claim.sentence, "status": status(verdict), **to_json(verdict)}
        for claim, verdict in report.claims
    ]
    whole = {"claims": claims, "studies": studies}
    return json.dumps(whole, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def render_markdown(report: Report) -> str:
    """The claims and the verdicts as Markdown tables."""
    lines = ["| claim | verdict | in one sentence |", "| --- | --- | --- |"]
    for claim, verdict in in_order(report):
        lines.append(_markdown_row(f"{claim.id}: {claim.sentence}", status(verdict), conclude(verdict)))
    for result in report.results:
        lines += [
            "",
            f"## {_cell_text(result.study.name)} ({result.preset}, definition `{result.study_hash}`)",
        ]
        lines += ["", _cell_text(result.study.question), "", f"`{result.command}`", ""]
        lines += ["| hypothesis | cell | effect [interval] | matters from | n | verdict | in one sentence |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for v in result.verdicts:
            name = v.hypothesis if v.primary else f"{v.hypothesis} (exploratory)"
            matters = amount(v.delta, v.unit)
            lines.append(_markdown_row(name, v.cell, effect(v), matters, str(v.n), v.decision, explain(v)))
    return "\n".join(lines) + "\n"


def _cell_text(text: str) -> str:
    escaped = text.replace("\\", "\\\\")
    for mark in "|<>*_`[]":
        escaped = escaped.replace(mark, f"\\{mark}")
    return " ".join(escaped.split())


def _markdown_row(*texts: str) -> str:
    return "| " + " | ".join(map(_cell_text, texts)) + " |"


def render_csv(report: Report) -> str:
    """One line for each verdict of each cell, with all digits."""
    names = (
        *("study", "preset", "study_hash", "hypothesis", "claim", "cell", "primary", "kind", "unit", "delta"),
        *("n", "estimate", "low", "high", "level", "family_size", "p", "p_sign_flip", "p_holm", "d_z"),
        *("cliffs_delta", "decision", "label", "gate", "reason"),
    )
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in report.results:
        for verdict in result.verdicts:
            known = {"preset": result.preset, "study_hash": result.study_hash}
            writer.writerow({**to_json(verdict), **known})
    return buffer.getvalue()


def verdict_lines(result: StudyResult) -> RichTable:
    """The verdicts of one study for the terminal, shown when it ends."""
    there = "" if result.recorded >= result.planned else f", {result.recorded} of {result.planned} trainings"
    table = RichTable(
        title=Text(f"{result.study.name} ({result.preset}{there})"), title_justify="left", box=box.SIMPLE
    )
    for head in ("claim", "cell", "effect [interval]", "verdict", "in one sentence"):
        table.add_column(head, overflow="fold", ratio=2 if head == "in one sentence" else None)
    for v in result.verdicts:
        decision = Text(v.decision, style=_TERMINAL_COLOURS[v.decision])
        if not v.primary:
            decision.append(" exploratory", style="dim")
        table.add_row(
            Text(f"{v.claim} {v.hypothesis}"), Text(v.cell), Text(effect(v)), decision, Text(explain(v))
        )
    return table


def claim_lines(report: Report) -> RichTable:
    """The claims for the terminal, shown at the end."""
    table = RichTable(title="The article's claims", title_justify="left", box=box.SIMPLE)
    for head in ("claim", "verdict", "p (Holm)", "in one sentence"):
        table.add_column(head, overflow="fold")
    untested = [claim.id for claim, verdict in in_order(report) if status(verdict) == "NOT TESTED"]
    if untested:
        table.caption = Text(f"No study of this run speaks of {', '.join(untested)}.")
        table.caption_justify = "left"
    for claim, verdict in in_order(report):
        if claim.id in untested:
            continue
        smallest = min((c.p_holm for c in verdict.cells if c.p_holm is not None), default=None)
        decision = Text(status(verdict), style=_TERMINAL_COLOURS[status(verdict)])
        table.add_row(
            Text(f"{claim.id} {claim.sentence}"), decision, probability(smallest), Text(conclude(verdict))
        )
    return table
