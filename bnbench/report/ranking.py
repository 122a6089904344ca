"""The ranking of a study's arms in a cell: mean ranks with ties, accuracy, and what a step costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bnbench.report.recipes import Mean, mean_of, mean_words
from bnbench.report.result import StudyResult
from bnbench.report.summaries import confirmed, paired_scores
from bnbench.report.words import median_range, plain, probability
from bnbench.study.design import Cell
from bnbench.study.stats import average_ranks, critical_difference, friedman_p, rank_groups
from bnbench.study.table import Entry

_COSTS = ("step alone, ms (×)", "saved, MiB (×)")


@dataclass(frozen=True)
class Place:
    """One arm of a ranking.

    `rank` is the mean over replicates of the arm's rank by test accuracy, 1 for the best; equal accuracies
    share their mean rank. `accuracy` is in percent, `over_baseline` the paired difference to the baseline in
    percentage points (None for the baseline itself). `edge` says that the chosen learning rate is an end of
    the grid. `step_ms` and `saved_mib` are those of a training step with nothing beside it: its time, and
    what it keeps for its backward pass.
    """

    arm: str
    rank: float
    accuracy: Mean
    over_baseline: Mean | None
    diverged: int
    rates: tuple[float, ...]
    edge: bool
    step_ms: float | None
    saved_mib: float | None


@dataclass(frozen=True)
class Ranking:
    """The arms of a cell by mean rank over `n` replicates, the best first.

    `difference` is the critical difference of two mean ranks (Nemenyi, 5 %), `groups` the sets of arms of
    which no two differ by more, `friedman_p` how often equal arms would rank as differently. `left_out` are
    the arms with fewer replicates than others, of which a training failed or is not there yet.
    """

    cell: str
    baseline: str
    n: int
    places: tuple[Place, ...]
    friedman_p: float | None
    difference: float
    groups: tuple[tuple[str, ...], ...]
    left_out: tuple[str, ...]

    def levels_with_best(self, place: Place) -> bool:
        """Whether an arm's mean rank is within the critical difference of the best one's."""
        return place.rank - self.places[0].rank <= self.difference


def rank_cell(result: StudyResult, cell: Cell) -> Ranking | None:
    """Rank the arms of a cell that have all replicates that any has; None for fewer than two arms."""
    scores = paired_scores(result, cell.name)
    most = max(map(len, scores.values()), default=0)
    arms = [arm for arm, there in scores.items() if len(there) == most]
    if len(arms) < 2:
        return None
    replicates = sorted(set.intersection(*(set(scores[arm]) for arm in arms)))
    if not replicates:
        return None
    rows = [[scores[arm][r] for arm in arms] for r in replicates]
    ranks = average_ranks(rows)
    difference = critical_difference(len(arms), len(rows))
    order = sorted(range(len(arms)), key=lambda place: ranks[place])
    baseline, entries = result.study.baseline, confirmed(result, cell.name)
    base = scores.get(baseline, {})
    return Ranking(
        cell=cell.name,
        baseline=baseline,
        n=len(rows),
        places=tuple(
            _place(
                result, list(entries[arm].values()), ranks[i], scores[arm], {} if arm == baseline else base
            )
            for i in order
            for arm in [arms[i]]
        ),
        friedman_p=friedman_p(rows) if len(arms) > 2 and len(rows) > 1 else None,
        difference=difference,
        groups=tuple(tuple(arms[i] for i in group) for group in rank_groups(ranks, difference)),
        left_out=tuple(arm.name for arm in result.design.arms_in(cell.name) if arm.name not in arms),
    )


def _place(
    result: StudyResult,
    entries: Sequence[Entry],
    rank: float,
    scores: Mapping[int, float],
    base: Mapping[int, float],
) -> Place:
    first = entries[0]
    accuracy = mean_of([100 * score for score in scores.values()])
    assert accuracy is not None
    timed = result.table.of(cell=first.cell, arm=first.arm, roles=("timing",))
    rates = tuple(entry.trial.lr for entry in entries)
    ends = (result.design.lr[0], result.design.lr[-1])
    return Place(
        arm=first.arm,
        rank=rank,
        accuracy=accuracy,
        over_baseline=mean_of([100 * (scores[r] - base[r]) for r in scores if r in base]),
        diverged=sum(entry.result.status == "diverged" for entry in entries),
        rates=rates,
        edge=statistics.median_low(rates) in ends,
        step_ms=_median(timed, "time/step_ms"),
        saved_mib=_median(timed, "memory/saved_mib"),
    )


def _median(entries: Sequence[Entry], metric: str) -> float | None:
    found = [entry[metric] for entry in entries if metric in entry.result.metrics]
    return statistics.median(found) if found else None


def rankings_of(result: StudyResult) -> list[Ranking]:
    """The ranking of every cell of a study that ranks its arms."""
    if not result.study.ranked:
        return []
    found = (rank_cell(result, cell) for cell in result.design.cells)
    return [ranking for ranking in found if ranking is not None]


def ranking_values(result: StudyResult) -> list[dict[str, Any]]:
    """The rankings as plain values with all their digits."""
    return [asdict(ranking) for ranking in rankings_of(result)]


def ranking_heads(result: StudyResult) -> list[str]:
    """The heads of the table of ranks; empty where a study ranks nothing."""
    if not result.study.ranked:
        return []
    over = f"over “{result.study.baseline}”, pp [95 %]"
    return ["arm", "mean rank", "like the best", "test accuracy, % [95 %]", over, "lr", *_COSTS]


def ranking_rows(ranking: Ranking) -> list[list[str]]:
    """A ranking as texts under :func:`ranking_heads`."""
    base = next((place for place in ranking.places if place.arm == ranking.baseline), None)
    return [
        [
            place.arm,
            plain(place.rank, 1),
            "yes" if ranking.levels_with_best(place) else "",
            mean_words(place.accuracy) + (f", {place.diverged} diverged" if place.diverged else ""),
            "–" if place.over_baseline is None else mean_words(place.over_baseline, sign=True),
            median_range(place.rates) + (" (edge)" if place.edge else ""),
            _beside(place.step_ms, base.step_ms if base else None),
            _beside(place.saved_mib, base.saved_mib if base else None),
        ]
        for place in ranking.places
    ]


def _beside(value: float | None, base: float | None) -> str:
    """`1.52 (1.20)`: a cost, and in parentheses how many times that of the baseline."""
    if value is None:
        return "–"
    return f"{value:.2f} ({value / base:.2f})" if base else f"{value:.2f}"


def ranking_words(ranking: Ranking) -> str:
    """What a ranking says in one line."""
    k, n = len(ranking.places), ranking.n
    best = [place.arm for place in ranking.places if ranking.levels_with_best(place)]
    told = f"{k} arms over {n} replicate{'s' if n > 1 else ''}; mean ranks that differ by more than"
    told += f" {ranking.difference:.1f} are told apart (Nemenyi, 5 %)."
    if ranking.friedman_p is not None:
        told += f" Friedman's p that all are equal: {probability(ranking.friedman_p)}."
    told += f" {len(best)} of them are not told apart from the best."
    if ranking.left_out:
        told += f" Not ranked, since trainings are missing: {', '.join(ranking.left_out)}."
    return told
