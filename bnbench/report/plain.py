"""A report without a page: JSON for programs, Markdown and CSV for people, tables for the terminal."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from bnbench.report.advice import ADVICE_HEADS, advice_rows, advise
from bnbench.report.gallery import in_order
from bnbench.report.ranking import (
    ranking_heads,
    ranking_rows,
    ranking_values,
    ranking_words,
    rankings_of,
)
from bnbench.report.recipes import (
    LEVEL,
    Recipe,
    mean_words,
    recipe_heads,
    recipe_rows,
    recipe_values,
    recipes_of,
)
from bnbench.report.result import Report, StudyResult
from bnbench.report.sentences import conclude, explain, status
from bnbench.report.words import amount, dimension_words, effect, probability
from bnbench.study.verdicts import to_json

#: So many arms of a ranking are shown in the terminal.
BEST_SHOWN = 5

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
            **({"recipes": recipes} if (recipes := recipe_values(result)) else {}),
            **({"rankings": rankings} if (rankings := ranking_values(result)) else {}),
        }
        for result in report.results
    ]
    claims = [
        {
            "sentence": claim.sentence,
            "status": status(verdict),
            "conclusion": conclude(verdict, report.condition(verdict)),
            "literature": list(claim.literature),
            **to_json(verdict),
        }
        for claim, verdict in report.claims
    ]
    advice = [{"best": line.best, **asdict(line)} for line in advise(report)]
    whole = {"claims": claims, "advice": advice, "studies": studies}
    return json.dumps(whole, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def render_markdown(report: Report) -> str:
    """The claims, the advice, the verdicts and the recipes as Markdown tables."""
    lines = ["| claim | verdict | in one sentence |", "| --- | --- | --- |"]
    for claim, verdict in in_order(report):
        said = conclude(verdict, report.condition(verdict))
        lines.append(_markdown_row(f"{claim.id}: {claim.sentence}", status(verdict), said))
    if advice := advice_rows(report):
        lines += ["", "## Should I use batch normalization here? (exploratory)", ""]
        lines += [_markdown_row(*ADVICE_HEADS), "| --- " * len(ADVICE_HEADS) + "|"]
        lines += [_markdown_row(*row) for row in advice]
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
        for ranking in rankings_of(result):
            heads = ranking_heads(result)
            lines += ["", f"{_cell_text(ranking.cell)}: {_cell_text(ranking_words(ranking))}", ""]
            lines += [_markdown_row(*heads), "| --- " * len(heads) + "|"]
            lines += [_markdown_row(*row) for row in ranking_rows(ranking)]
        if heads := recipe_heads(result):
            lines += ["", _markdown_row("cell", *heads), "| --- " * (1 + len(heads)) + "|"]
            for cell in result.design.cells:
                lines += [_markdown_row(cell.name, *row) for row in recipe_rows(result, cell)]
    return "\n".join(lines) + "\n"


def _cell_text(text: str) -> str:
    escaped = text.replace("\\", "\\\\")
    for mark in "|<>*_`[]":
        escaped = escaped.replace(mark, f"\\{mark}")
    return " ".join(escaped.split())


def _markdown_row(*texts: str) -> str:
    return "| " + " | ".join(map(_cell_text, texts)) + " |"


def render_csv(report: Report) -> str:
    """One line for each verdict of each cell, with all digits, and for each recipe with its gains.

    A recipe is of the kind `recipe`, its gains are of the kind `gain over <arm>`; both name their arm.
    """
    names = (
        *("study", "preset", "study_hash", "hypothesis", "claim", "cell", "primary", "kind", "unit", "delta"),
        *("n", "estimate", "low", "high", "level", "family_size", "p", "p_sign_flip", "p_holm", "d_z"),
        *("cliffs_delta", "decision", "label", "gate", "reason", "arm", "setting"),
    )
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in report.results:
        known = {"study": result.study.name, "preset": result.preset, "study_hash": result.study_hash}
        for verdict in result.verdicts:
            writer.writerow({**to_json(verdict), **known})
        for cell in result.design.cells:
            for recipe in recipes_of(result, cell):
                writer.writerows({**known, **line} for line in _csv_lines(recipe))
    return buffer.getvalue()


def _csv_lines(recipe: Recipe) -> list[dict[str, Any]]:
    setting = "; ".join(f"{name}: {text}" for name, text in {**recipe.setting, **recipe.given}.items())
    place = {"cell": recipe.cell, "arm": recipe.arm, "setting": setting, "level": LEVEL}
    gains = [gain for gain in (recipe.over_grid, recipe.over_lr) if gain is not None]
    means = [("recipe", "%", recipe.accuracy), *((f"gain over {g.over}", "pp", g.mean) for g in gains)]
    return [
        {**place, "kind": kind, "unit": unit}
        | ({} if mean is None else {"estimate": mean.value, "low": mean.low, "high": mean.high, "n": mean.n})
        for kind, unit, mean in means
    ]


def verdict_lines(result: StudyResult) -> RichTable:
    """The verdicts of one study for the terminal, shown when it ends."""
    there = "" if result.complete else f", {result.recorded} of {result.planned} trainings"
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


def recipe_lines(result: StudyResult) -> RichTable | None:
    """The recipe that every arm chose, for the terminal; None where nothing is searched."""
    recipes = [recipe for cell in result.design.cells for recipe in recipes_of(result, cell)]
    if not recipes:
        return None
    table = RichTable(title="Recipes", title_justify="left", box=box.SIMPLE)
    for head in ("cell", "arm", "test accuracy, %", "chosen"):
        table.add_column(head, overflow="fold")
    for recipe in recipes:
        chosen = "; ".join(f"{dimension_words(name)}: {text}" for name, text in recipe.setting.items())
        table.add_row(*map(Text, (recipe.cell, recipe.arm, mean_words(recipe.accuracy), chosen)))
    return table


def ranking_lines(result: StudyResult) -> RichTable | None:
    """The best arms of every cell and the baseline, for the terminal; None where nothing is ranked."""
    rankings = rankings_of(result)
    if not rankings:
        return None
    table = RichTable(title="Ranking (exploratory)", title_justify="left", box=box.SIMPLE)
    for head in ("cell", *ranking_heads(result)):
        table.add_column(head, overflow="fold")
    for ranking in rankings:
        rows = ranking_rows(ranking)
        shown = [*rows[:BEST_SHOWN], *(row for row in rows[BEST_SHOWN:] if row[0] == ranking.baseline)]
        for row in shown:
            table.add_row(*map(Text, (ranking.cell, *row)))
    table.caption = Text(f"The best {BEST_SHOWN} of each cell, and the baseline. The report has all.")
    table.caption_justify = "left"
    return table


def claim_lines(report: Report) -> RichTable | Text:
    """The claims for the terminal, shown at the end."""
    table = RichTable(title="The article's claims", title_justify="left", box=box.SIMPLE)
    for head in ("claim", "verdict", "p (Holm)", "in one sentence"):
        table.add_column(head, overflow="fold")
    untested = [claim.id for claim, verdict in in_order(report) if status(verdict) == "NOT TESTED"]
    if len(untested) == len(report.claims):
        return Text("No primary hypothesis is here, so no claim of the article is judged.")
    if untested:
        table.caption = Text(f"No study of this run speaks of {', '.join(untested)}.")
        table.caption_justify = "left"
    for claim, verdict in in_order(report):
        if claim.id in untested:
            continue
        smallest = min((c.p_holm for c in verdict.cells if c.p_holm is not None), default=None)
        decision = Text(status(verdict), style=_TERMINAL_COLOURS[status(verdict)])
        table.add_row(
            Text(f"{claim.id} {claim.sentence}"),
            decision,
            probability(smallest),
            Text(conclude(verdict, report.condition(verdict))),
        )
    return table
