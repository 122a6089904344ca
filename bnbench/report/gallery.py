"""Which figures a report has: drawn once, shown in the page and written as files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bnbench.report.album import Album
from bnbench.report.drawing import ArmStyle, Dot, Drawing, Group, arm_styles
from bnbench.report.figures import draw_curves, draw_replicates, draw_sweep
from bnbench.report.forest import ForestRow, draw_forest
from bnbench.report.probe_gallery import probe_groups
from bnbench.report.ranking import rankings_of
from bnbench.report.ranking_figure import draw_ranking
from bnbench.report.result import Report, StudyResult
from bnbench.report.search_figures import (
    Expectation,
    Slice,
    draw_expected,
    draw_history,
    draw_importances,
    draw_slices,
)
from bnbench.report.searches import (
    Search,
    expected_best,
    has_searches,
    importances_of,
    learning_rate_arm,
    searched_arms,
    searches_of,
)
from bnbench.report.sentences import ORDER, status
from bnbench.report.summaries import (
    USABLE_MARGIN,
    confirmed,
    diverged_replicates,
    learning_curve,
    score,
    score_metric,
    sweep,
)
from bnbench.report.words import dimension_words
from bnbench.study import Claim
from bnbench.study.design import Arm, Cell, Design
from bnbench.study.table import Entry, Role
from bnbench.study.verdicts import ClaimVerdict


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


def draw_all(report: Report, album: Album) -> Gallery:
    """Draw every figure of a report that the album has not."""
    arms = [arm.name for result in report.results for arm in result.design.arms]
    styles = arm_styles(arms)
    claims = {}
    for name, (claim, verdict) in zip(
        anchors("claim", [claim.id for claim, _ in report.claims]), report.claims, strict=True
    ):
        if verdict.cells:
            claims[claim.id] = _forest(report, album, name, claim, verdict)
    names = anchors("study", [f"{r.study.name} {r.preset}" for r in report.results])
    studies = tuple(
        tuple(
            group
            for group in (
                *_ranking_groups(album, name, result, styles),
                *_search_groups(album, name, result, styles),
                *_groups(album, name, result, styles),
                *probe_groups(album, name, result, styles),
            )
            if group.drawings
        )
        for name, result in zip(names, report.results, strict=True)
    )
    return Gallery(styles, claims, studies, _headline(report, album))


def _forest(report: Report, album: Album, name: str, claim: Claim, verdict: ClaimVerdict) -> Drawing:
    units = {cell.unit for cell in verdict.cells}
    title = f"{claim.id}: the effect in every primary cell with its simultaneous interval"
    rows = _forest_rows(report, verdict)
    return album.draw(draw_forest, f"{name}-effects", title, rows, in_delta=len(units) > 1)


def _forest_rows(report: Report, verdict: ClaimVerdict) -> list[ForestRow]:
    """Each cell with its name, and with its hypothesis where the claim has several."""
    several = len({(cell.study, cell.hypothesis) for cell in verdict.cells}) > 1
    rows = []
    for v in verdict.cells:
        result = report.study_of(v)
        lost = diverged_replicates(result, v) if result else frozenset()
        rows.append(ForestRow(f"{v.hypothesis} · {v.cell}" if several else v.cell, v, diverged=lost))
    return rows


def _headline(report: Report, album: Album) -> Drawing | None:
    rows = []
    for claim, verdict in in_order(report):
        for i, row in enumerate(_forest_rows(report, verdict)):
            heading = (f"{claim.id}  {claim.sentence}", verdict.decision) if i == 0 else None
            rows.append(replace(row, heading=heading))
    if not rows:
        return None
    title = "Every primary cell of every claim, in units of the smallest effect that matters"
    return album.draw(draw_forest, "headline", title, rows, in_delta=True, wide=True)


def _ranking_groups(
    album: Album, name: str, result: StudyResult, styles: Mapping[str, ArmStyle]
) -> list[Group]:
    drawings = [
        (
            ranking.cell,
            album.draw(
                draw_ranking,
                f"{name}-ranking-{i}",
                f"Mean ranks of the arms, {ranking.cell}",
                ranking,
                styles,
            ),
        )
        for i, ranking in enumerate(rankings_of(result), start=1)
    ]
    caption = (
        "Within a replicate the best test accuracy has rank 1; equal ones share their mean rank, and a"
        " diverged training counts as guessing. Beside the names: the mean test accuracy in percent. A bar on"
        " the right joins arms of which no two mean ranks differ by more than the critical difference"
        " (Nemenyi's test at 5 %; Demšar 2006): these are not told apart."
    )
    return [Group("Ranks", caption, tuple(drawings))]


def _search_groups(
    album: Album, name: str, result: StudyResult, styles: Mapping[str, ArmStyle]
) -> list[Group]:
    design = result.design
    shares, expected, histories, slices = [], [], [], []
    repeated = set()
    for i, cell in enumerate(design.cells, start=1):
        arms = searched_arms(design, cell)
        searches = {arm.name: searches_of(result, cell, arm) for arm in arms}
        arms = [arm for arm in arms if any(search.scores for search in searches[arm.name])]
        if not arms:
            continue
        searches = {arm.name: searches[arm.name] for arm in arms}
        repeated.add(max(map(len, searches.values())))
        spaces = {arm.name: arm.space_in(cell.name) for arm in arms}
        found = {arm.name: importances_of(spaces[arm.name], searches[arm.name]) for arm in arms}
        if found := {arm: shares_there for arm, shares_there in found.items() if shares_there}:
            drawing = album.draw(draw_importances, f"{name}-importances-{i}", cell.name, found, styles)
            shares.append((cell.name, drawing))
        lines = _expectations(design, cell, arms, searches)
        drawing = album.draw(draw_expected, f"{name}-expected-{i}", cell.name, lines, styles)
        expected.append((cell.name, drawing))
        drawing = album.draw(draw_history, f"{name}-history-{i}", cell.name, searches, styles)
        histories.append((cell.name, drawing))
        slices += _slices(album, f"{name}-slices-{i}", cell, arms, searches, styles)
    anecdote = (
        "One search's importances are an anecdote: dots far apart say that searches disagree."
        if max(repeated, default=0) > 1
        else "There is one search only, so what it found is an anecdote: how far another one would"
        " disagree cannot be seen."
    )
    return [
        Group(
            "What mattered in the searches",
            "How much of the spread of a search's scores each dimension accounts for, by itself and with"
            " others (functional analysis of variance). A dot is one search, with data and seed of its own; a"
            f" bar is their mean. {anecdote}",
            tuple(shares),
        ),
        Group(
            "Best validation accuracy to expect after k trials",
            "The expected best of k settings drawn by lot from all that the arm's searches tried (Dodge et"
            " al. 2019), for k up to the trials of one search. That is exact for independent draws only. The"
            " later trials of a search depend on the earlier ones, so a line says how the tried settings"
            " spread, and the search history how the searches went. Failed trainings are out.",
            tuple(expected),
        ),
        Group(
            "Search history",
            "A dot is one trial, a line the best so far of one search, a triangle a score below the scale."
            " The best of many validation scores flatters: test accuracies are with the recipes, above.",
            tuple(histories),
            folded=True,
        ),
        Group(
            "Slices of the space",
            "Every trial of an arm's searches, over one dimension at a time; the others vary too. On each"
            " level the searches lie side by side; a bar is the level's median. A ring marks the setting"
            " that was confirmed, a triangle a score below the scale.",
            tuple(slices),
            folded=True,
        ),
    ]


def _expectations(
    design: Design, cell: Cell, arms: Sequence[Arm], searches: Mapping[str, Sequence[Search]]
) -> list[Expectation]:
    partners = {arm.name: learning_rate_arm(design, cell, arm) for arm in arms}
    beside = {partner.name for partner in partners.values() if partner is not None}
    lines = {
        name: expected_best(
            [value for search in there for value in search.scores], design.trials_in(cell.name)
        )
        for name, there in searches.items()
    }
    return [
        Expectation(arm.name, lines[arm.name], lines.get(partner.name, ()) if partner else ())
        for arm in arms
        if arm.name not in beside
        for partner in [partners[arm.name]]
    ]


def _slices(
    album: Album,
    name: str,
    cell: Cell,
    arms: Sequence[Arm],
    searches: Mapping[str, Sequence[Search]],
    styles: Mapping[str, ArmStyle],
) -> list[tuple[str, Drawing]]:
    """A figure for each arm; arms that search a single dimension share one."""
    figures: list[tuple[str, list[Slice]]] = []
    single: list[Slice] = []
    for arm in arms:
        space = arm.space_in(cell.name)
        if len(space) == 1:
            title = f"{arm.name}: {dimension_words(space[0].name)}"
            single.append(Slice(title, arm.name, space[0], searches[arm.name]))
        else:
            parts = [Slice(dimension_words(d.name), arm.name, d, searches[arm.name]) for d in space]
            figures.append((arm.name, parts))
    if single:
        figures.append(("one dimension each" if len(single) > 1 else single[0].arm, single))
    return [
        (
            f"{cell.name} · {label}",
            album.draw(draw_slices, f"{name}-{i}", f"Slices, {cell.name}, {label}", parts, styles),
        )
        for i, (label, parts) in enumerate(figures, start=1)
    ]


def _groups(album: Album, name: str, result: StudyResult, styles: Mapping[str, ArmStyle]) -> list[Group]:
    design = result.design
    grid_role: Role = "sweep" if result.study.program == "sweep" else "tune"
    curves: dict[str, list[tuple[str, Drawing]]] = {"own": [], "common": []}
    sweeps, pairs = [], []
    best = "settings" if has_searches(design) else "learning rates"
    metric = "best validation accuracy" if grid_role == "sweep" else "test accuracy"
    for i, cell in enumerate(design.cells, start=1):
        arms = design.arms_in(cell.name)
        there = {arm.name: result.table.of(cell=cell.name, arm=arm.name) for arm in arms}
        on_grid = {arm.name for arm in arms if not arm.space_in(cell.name)}
        rates = {
            arm: sweep([e for e in rows if e.role == grid_role])
            for arm, rows in there.items()
            if arm in on_grid
        }
        if found := {arm: rate for arm, rate in rates.items() if rate is not None}:
            sweeps.append((cell.name, album.draw(draw_sweep, f"{name}-sweep-{i}", cell.name, found, styles)))
        for role, note in (("own", f"own best {best}"), ("common", "common learning rate")):
            if role == "common" and len(on_grid) == 1 < len(arms):
                # An arm by itself is compared with nothing.
                continue
            maybe = {arm: learning_curve(e for e in rows if e.role == role) for arm, rows in there.items()}
            if bands := {arm: band for arm, band in maybe.items() if band is not None}:
                target = cell.constants.get("target")
                drawing = album.draw(
                    draw_curves, f"{name}-curves-{role}-{i}", cell.name, bands, styles, target, note
                )
                curves[role].append((cell.name, drawing))
        if trainings := _dots(result, cell.name):
            drawing = album.draw(
                draw_replicates, f"{name}-replicates-{i}", cell.name, trainings, styles, metric
            )
            pairs.append((cell.name, drawing))
    return [
        Group(
            f"Learning curves, each arm at its own best {best.removesuffix('s')}",
            "Line: median over replicates. Band: the middle half of the replicates. Steps on a log scale.",
            tuple(curves["own"]),
        ),
        Group(
            f"Learning curves, all arms {'on the grid ' * has_searches(design)}at the best learning rate of"
            f" “{result.study.baseline}”",
            "Line: median over replicates. Band: the middle half of the replicates. Steps on a log scale.",
            tuple(curves["common"]),
        ),
        Group(
            "Validation accuracy over the learning rate",
            "Small dots and thin lines: one replicate each, crosses where it diverged. Bold: their mean. Bars"
            " at the bottom: where the mean is within"
            f" {100 * USABLE_MARGIN:g} percentage points of the arm's own best. A diverged training counts as"
            " guessing.",
            tuple(sweeps),
        ),
        Group(
            f"Every replicate: {metric}",
            "A dot is one training"
            + (" at its best learning rate of the grid" if grid_role == "sweep" else "")
            + ", a cross one that diverged, a triangle one beyond the scale. A grey line joins the arms of"
            " one replicate, which saw the same data. Bars are means."
            + (" A dot opens its run in the MLflow UI." if result.links and grid_role == "tune" else ""),
            tuple(pairs),
        ),
    ]


def _dots(result: StudyResult, cell: str) -> dict[str, dict[int, Dot]]:
    """The confirmed trainings of a cell by arm and replicate, x being their accuracy."""
    metric = score_metric(result)

    def dot(e: Entry) -> Dot:
        diverged, page = e.result.status == "diverged", result.links.get(e.trial.key, "")
        return Dot(score(e, metric) or 0.0, 0.0, diverged, page)

    return {arm: {r: dot(e) for r, e in there.items()} for arm, there in confirmed(result, cell).items()}
