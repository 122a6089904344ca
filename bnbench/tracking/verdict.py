"""The run that holds the verdicts on one definition of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnbench.study.table import Table
from bnbench.tracking.draft import LONGEST_TAG, Definition, Draft, Point, as_json, finite, span, study_tags


def verdict_draft(
    definition: Definition, table: Table, verdicts: Sequence[Mapping[str, Any]], artifacts: Sequence[Path]
) -> Draft:
    """The run of a definition: its question and verdicts; the step of `effect/*` is the verdict's place."""
    names = {"mean": "estimate", "low": "low", "high": "high", "p": "p", "p_holm": "p_holm", "n": "n"}
    points = [
        Point(f"effect/{shown}", float(verdict[name]), None, step)
        for step, verdict in enumerate(verdicts)
        for shown, name in names.items()
        if verdict.get(name) is not None
    ]
    decisions = [str(v["decision"]) for v in verdicts]
    tags = {
        **study_tags(definition, "verdict"),
        "bnbench.status": "done",
        "bnbench.verdict": ", ".join(f"{decisions.count(d)} {d}" for d in sorted(set(decisions))),
        "mlflow.note.content": verdict_note(definition, verdicts),
    }
    files: dict[str, str | Path] = {
        "definition.json": as_json(definition.values),
        "verdicts.json": as_json(list(verdicts)),
        **{path.name: path for path in artifacts},
    }
    # Judged last, so that MLflow's page, newest first, has it on top.
    judged = max(round(definition.registered * 1000), span(*table.entries)[1] if table.entries else 0)
    params = {
        name: str(definition.values[name]) for name in ("program", "baseline", "replicates", "tuning", "lr")
    }
    name = f"verdict · {definition.study_hash}"
    return Draft(name, tags, judged, judged, params, finite(points), files)


def verdict_note(definition: Definition, verdicts: Sequence[Mapping[str, Any]]) -> str:
    """The question, the table of verdicts and the command, in Markdown that fits a tag."""
    head = [f"**{definition.values['question']}**", ""]
    if verdicts:
        head += ["| # | hypothesis | cell | effect | interval | n | p (Holm) | verdict |", "|" + "---|" * 8]
    foot = [
        "",
        f"Step of `effect/*` = #. Definition `{definition.study_hash}`. Again: `{definition.command}`",
    ]
    left = "\nThe other verdicts are in verdicts.json."
    room = LONGEST_TAG - sum(len(line) + 1 for line in (*head, *foot, left))
    rows = []
    for number, v in enumerate(verdicts):
        why = f" ({v.get('gate') or v.get('label')})" if v.get("gate") or v.get("label") else ""
        effect = f"{_number(v.get('estimate'))} {v.get('unit') or ''}".strip()
        interval = f"{_number(v.get('low'))} … {_number(v.get('high'))}"
        cells = (
            number,
            v["hypothesis"],
            v["cell"],
            effect,
            interval,
            v.get("n", "–"),
            _number(v.get("p_holm")),
        )
        row = f"| {' | '.join(str(cell) for cell in cells)} | {v['decision']}{why} |"
        room -= len(row) + 1
        if room < 0:
            foot.insert(0, left)
            break
        rows.append(row)
    return "\n".join((*head, *rows, *foot))


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"
