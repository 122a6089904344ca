"""Which figures a report has: drawn once, shown in the page and written as files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bnbench.report.drawing import ArmStyle, Drawing, arm_styles
from bnbench.report.figures import ForestRow, draw_curves, draw_forest, draw_pairs, draw_sweep
from bnbench.report.result import Report, StudyResult
from bnbench.report.summaries import USABLE_MARGIN, learning_curve, paired_scores, sweep
from bnbench.report.words import ORDER, status
from bnbench.study import Claim
from bnbench.study.claims import ClaimVerdict, Verdict
from bnbench.study.table import Role


@dataclass(frozen=True)
class Group:
    """Figures of one kind, one for each cell, with the cell's name."""

    title: str
    caption: str
    drawings: tuple[tuple[str, Drawing], ...]


@dataclass(frozen=True)
class Gallery:
    """All figures: `claims` by claim id, `studies` in the order of the report's results."""

    styles: Mapping[str, ArmStyle]
    claims: Mapping[str, Drawing]
    studies: tuple[tuple[Group, ...], ...]
    headline: Drawing | None

    def drawings(self) -> tuple[Drawing, ...]:
        """Every figure once."""
        groups = [group for study in self.studies for group in study]
        own = [drawing for group in groups for _, drawing in group.drawings]
        return (*([self.headline] if self.headline else []), *self.claims.values(), *own)


def anchors(kind: str, names: Iterable[str]) -> list[str]:
    """An HTML id and file name for each name: plain ASCII, and different even where the names hardly are."""
    found: list[str] = []
    for name in names:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
        anchor = f"{kind}-{slug}" if slug else kind
        number = 1
        while (candidate := anchor if number == 1 else f"{anchor}--{number}") in found:
            number += 1
        found.append(candidate)
    return found


def in_order(report: Report) -> list[tuple[Claim, ClaimVerdict]]:
    """The claims with the disagreements first and those that nothing speaks of last."""
    return sorted(report.claims, key=lambda pair: ORDER.index(status(pair[1])))


def draw_all(report: Report) -> Gallery:
    """Draw every figure of a report."""
    arms = [arm.name for result in report.results for arm in result.design.arms]
    styles = arm_styles(arms)
    claims = {}
    for name, (claim, verdict) in zip(
        anchors("claim", [claim.id for claim, _ in report.claims]), report.claims, strict=True
    ):
        if verdict.cells:
            claims[claim.id] = _forest(name, claim, verdict)
    names = anchors("study", [f"{r.study.name} {r.preset}" for r in report.results])
    studies = tuple(
        tuple(group for group in _groups(name, result, styles) if group.drawings)
        for name, result in zip(names, report.results, strict=True)
    )
    return Gallery(styles, claims, studies, _headline(report))


def _forest(name: str, claim: Claim, verdict: ClaimVerdict) -> Drawing:
    units = {cell.unit for cell in verdict.cells}
    rows = [ForestRow(label, v) for label, v in _labelled(verdict)]
    title = f"{claim.id}: the effect in every primary cell with its simultaneous interval"
    return draw_forest(f"{name}-effects", title, rows, in_delta=len(units) > 1)


def _labelled(verdict: ClaimVerdict) -> list[tuple[str, Verdict]]:
    """Each cell with its name, and with its hypothesis where the claim has several."""
    several = len({(cell.study, cell.hypothesis) for cell in verdict.cells}) > 1
    return [(f"{v.hypothesis} · {v.cell}" if several else v.cell, v) for v in verdict.cells]


def _headline(report: Report) -> Drawing | None:
    rows = []
    for claim, verdict in in_order(report):
        for i, (label, cell) in enumerate(_labelled(verdict)):
            heading = (f"{claim.id}  {claim.sentence}", verdict.decision) if i == 0 else None
            rows.append(ForestRow(label, cell, heading))
    if not rows:
        return None
    title = "Every primary cell of every claim, in units of the smallest effect that matters"
    return draw_forest("headline", title, rows, in_delta=True, wide=True)


def _groups(name: str, result: StudyResult, styles: Mapping[str, ArmStyle]) -> list[Group]:
    design = result.design
    arms = [arm.name for arm in design.arms]
    grid_role: Role = "sweep" if result.study.program == "sweep" else "tune"
    curves: dict[str, list[tuple[str, Drawing]]] = {"own": [], "common": []}
    sweeps, pairs = [], []
    metric = "best validation accuracy" if grid_role == "sweep" else "test accuracy"
    for i, cell in enumerate(design.cells, start=1):
        there = {arm: result.table.of(cell=cell.name, arm=arm) for arm in arms}
        rates = {arm: sweep([e for e in rows if e.role == grid_role]) for arm, rows in there.items()}
        if found := {arm: rate for arm, rate in rates.items() if rate is not None}:
            sweeps.append((cell.name, draw_sweep(f"{name}-sweep-{i}", cell.name, found, styles)))
        for role, note in (("own", "own best learning rates"), ("common", "common learning rate")):
            maybe = {arm: learning_curve(e for e in rows if e.role == role) for arm, rows in there.items()}
            if bands := {arm: band for arm, band in maybe.items() if band is not None}:
                target = cell.constants.get("target")
                drawing = draw_curves(f"{name}-curves-{role}-{i}", cell.name, bands, styles, target, note)
                curves[role].append((cell.name, drawing))
        if scores := paired_scores(result, cell.name):
            drawing = draw_pairs(f"{name}-replicates-{i}", cell.name, scores, styles, metric)
            pairs.append((cell.name, drawing))
    return [
        Group(
            "Learning curves, each arm at its own best learning rate",
            "Line: median over replicates. Band: the middle half of the replicates. Steps on a log scale.",
            tuple(curves["own"]),
        ),
        Group(
            f"Learning curves, all arms at the best learning rate of “{result.study.baseline}”",
            "Line: median over replicates. Band: the middle half of the replicates. Steps on a log scale.",
            tuple(curves["common"]),
        ),
        Group(
            "Validation accuracy over the learning rate",
            "Thin: one replicate each. Bold: their mean. Bars at the bottom: where the mean is within"
            f" {100 * USABLE_MARGIN:g} percentage points of the arm's own best. A diverged training counts as"
            " guessing.",
            tuple(sweeps),
        ),
        Group(
            f"Every replicate: {metric}",
            "A dot is one training"
            + (" at its best learning rate of the grid" if grid_role == "sweep" else "")
            + ". A grey line joins the arms of one replicate, which saw the same data. Bars are means.",
            tuple(pairs),
        ),
    ]
