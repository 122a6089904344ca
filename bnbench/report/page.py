"""The report as one page that needs nothing else, and as a folder with its numbers and figures."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from bnbench.registry import BadInput
from bnbench.report import sentences, words
from bnbench.report.advice import ADVICE_HEADS, advice_rows
from bnbench.report.album import Album
from bnbench.report.drawing import ArmStyle
from bnbench.report.gallery import Gallery, anchors, draw_all, in_order
from bnbench.report.plain import render_json
from bnbench.report.ranking import ranking_heads, ranking_rows, ranking_words, rankings_of
from bnbench.report.recipes import recipe_heads, recipe_rows
from bnbench.report.result import Report, StudyResult
from bnbench.report.summaries import changed_keys, failures, number_heads, number_rows
from bnbench.report.terms import space_words, tuning_terms
from bnbench.study import Hypothesis
from bnbench.study.verdicts import Verdict


def write_report(report: Report, folder: Path) -> Path:
    """Write index.html, verdicts.json, rows.parquet and figures/*.svg; return the page's path.

    Figures of an earlier report in the same folder are removed. Raises BadInput where the folder cannot be
    written.
    """
    figures = folder / "figures"
    gallery = draw_all(report, Album(figures))
    try:
        figures.mkdir(parents=True, exist_ok=True)
        names = {f"{drawing.name}.svg" for drawing in gallery.drawings()}
        for old in figures.glob("*.svg"):
            if old.name not in names:
                old.unlink()
        for drawing in gallery.drawings():
            _replace(figures / f"{drawing.name}.svg", drawing.file.encode())
        _replace(folder / "verdicts.json", render_json(report).encode())
        sink = pa.BufferOutputStream()
        pq.write_table(_rows(report), sink)
        _replace(folder / "rows.parquet", sink.getvalue().to_pybytes())
        page = folder / "index.html"
        _replace(page, _render(report, gallery).encode())
    except OSError as error:
        raise BadInput(
            f"cannot write the report to {folder}: {error.strerror}; free space there or name another folder"
        ) from None
    return page


def render_html(report: Report) -> str:
    """The page alone."""
    return _render(report, draw_all(report, Album()))


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, for who reads it meanwhile."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)  # noqa: PTH105


def _rows(report: Report) -> pa.Table:
    """Every row of every study with its place, its fields, its metrics, its curve and its probes' traces."""
    lines: list[dict[str, Any]] = []
    for result in report.results:
        for e in result.table.entries:
            place: dict[str, Any] = {
                "study": result.study.name,
                "preset": result.preset,
                "study_hash": result.study_hash,
            }
            place |= {"cell": e.cell, "arm": e.arm, "replicate": e.replicate, "role": e.role}
            place |= {"key": e.trial.key, "status": e.result.status, "reason": e.result.reason}
            fields = {
                f"trial/{name}": json.dumps(value, sort_keys=True) if isinstance(value, Mapping) else value
                for name, value in e.trial.as_dict().items()
            }
            # One of the few fields that may hold words or a number.
            fields["trial/bias_init"] = str(fields["trial/bias_init"])
            curve = {f"curve/{name}": [float(v) for v in series] for name, series in e.result.curve.items()}
            metrics = {name: float(value) for name, value in e.result.metrics.items()}
            traces = {"traces": json.dumps(e.result.plain_traces())} if e.result.traces else {}
            lines.append({**place, **fields, **metrics, **curve, **traces})
    names = dict.fromkeys(name for line in lines for name in line)
    return pa.table({name: pa.array([line.get(name) for line in lines]) for name in names})


def _render(report: Report, gallery: Gallery) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: "–" if value is None else value,
    )
    environment.filters.update(
        amount=words.amount, effect=words.effect, explain=sentences.explain, p=words.probability,
        digits=words.plain, duration=words.duration, values=_values, day=_day, status=sentences.status,
        beside=sentences.beside, matters=_matters,
        conclude=lambda verdict: sentences.conclude(verdict, report.condition(verdict)),
        badge=lambda text: text.lower().replace(" ", "-"), svg=lambda drawing: Markup(drawing.svg),
        swatch=_swatch, space_words=space_words,
    )  # fmt: skip
    claim_ids = anchors("claim", [claim.id for claim, _ in report.claims])
    by_id = {claim.id: anchor for (claim, _), anchor in zip(report.claims, claim_ids, strict=True)}
    study_ids = anchors("study", [f"{r.study.name} {r.preset}" for r in report.results])
    counts = Counter(sentences.status(verdict) for _, verdict in report.claims)
    rows = {e.trial.key: e for result in report.results for e in result.table.entries}
    return environment.get_template("page.html.j2").render(
        report=report,
        gallery=gallery,
        claims=[(claim, verdict, by_id[claim.id]) for claim, verdict in in_order(report)],
        studies=[
            _study(result, anchor, groups)
            for result, anchor, groups in zip(report.results, study_ids, gallery.studies, strict=True)
        ],
        study_anchor={r.study_hash: anchor for r, anchor in zip(report.results, study_ids, strict=True)},
        judged=[r for r in report.results if any(v.primary for v in r.verdicts)],
        advice_heads=ADVICE_HEADS,
        advice=advice_rows(report),
        counts=[(name.lower(), counts[name]) for name in sentences.ORDER if counts[name]],
        trainings=len(rows),
        diverged=sum(e.result.status == "diverged" for e in rows.values()),
        failed=sum(e.result.status == "failed" for e in rows.values()),
        seconds=sum(e.result.metrics.get("time/total_s", 0.0) for e in rows.values()),
        smoke=any(result.design.smoke for result in report.results),
    )


def _study(result: StudyResult, anchor: str, groups: Any) -> dict[str, Any]:
    versions = list(result.registered)
    shown = next((i for i, version in enumerate(versions) if version[0] == result.study_hash), len(versions))
    before = versions[shown - 1] if shown > 0 else None
    return {
        "result": result,
        "anchor": anchor,
        "groups": groups,
        "primary": _by_hypothesis(result, primary=True),
        "exploratory": _by_hypothesis(result, primary=False),
        "recipe_heads": recipe_heads(result),
        "recipes": [(cell.name, recipe_rows(result, cell)) for cell in result.design.cells],
        "ranking_heads": ranking_heads(result),
        "rankings": [(r.cell, ranking_words(r), ranking_rows(r)) for r in rankings_of(result)],
        "tuning": tuning_terms(result),
        "heads": number_heads(result),
        "numbers": [(cell.name, number_rows(result, cell.name)) for cell in result.design.cells],
        "failures": failures(result),
        "registered": versions[shown][1] if shown < len(versions) else None,
        "before": before,
        "changes": changed_keys(before[2], result.study.definition(result.preset)) if before else [],
    }


def _by_hypothesis(result: StudyResult, *, primary: bool) -> list[tuple[Hypothesis, list[Verdict]]]:
    found = [
        (hypothesis, [v for v in result.verdicts if v.hypothesis == hypothesis.name])
        for hypothesis in result.study.hypotheses
        if hypothesis.primary == primary
    ]
    return [pair for pair in found if pair[1]]


def _matters(cells: Sequence[Verdict]) -> str:
    """The smallest effects that matter in some cells: `1.25 ×`, `0.5 pp or 1 pp`."""
    return " or ".join(dict.fromkeys(words.amount(v.delta, v.unit) for v in cells))


def _values(mapping: Mapping[str, Any]) -> str:
    """`norm=group, num_groups=8`: changed settings in one line."""
    parts = [
        _values(value) if isinstance(value, Mapping) else f"{name}={value}" for name, value in mapping.items()
    ]
    return ", ".join(part for part in parts if part) or "nothing"


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _swatch(style: ArmStyle) -> Markup:
    """The line of an arm as a small picture."""
    dashes = "" if style.dashes == "-" else ",".join(f"{2 * part:g}" for part in style.dashes[1])
    return Markup(
        '<svg class="swatch" viewBox="0 0 34 8" aria-hidden="true"><line x1="0" y1="4" x2="34" y2="4"'
        ' stroke="{}" stroke-width="3" stroke-dasharray="{}"/></svg>'
    ).format(style.colour, dashes)
