"""The ranking of arms: ranks, critical differences and costs, against computations of their own."""

from __future__ import annotations

import itertools
import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from bnbench.report import Report, StudyResult, ranking_lines, render_html, render_json, render_markdown
from bnbench.report.drawing import arm_styles
from bnbench.report.ranking import Ranking, rank_cell, ranking_heads, ranking_rows, ranking_words, rankings_of
from bnbench.report.ranking_figure import bars_in_lanes, draw_ranking
from bnbench.study import Arm, Cell, Design, Entry, Result, Study, Table, Trial
from tests.test_report import Page

Scores = Mapping[str, Sequence[float | None]]


def result(scores: Scores, *, ranked: bool = True, rates: Sequence[float] = (0.1, 0.3, 1.0)) -> StudyResult:
    """One cell with these test accuracies, in percent, by norm; None where a training diverged.

    The first norm takes 2 ms a step and saves 4 MiB, the next one twice as much, and so on.
    """
    arms = tuple(Arm(name, norm_options={"gamma_init": 1 + i}) for i, name in enumerate(scores))
    n = max(map(len, scores.values()))
    design = Design(Trial(), (Cell("mlp"),), arms, tuple(rates), replicates=n, timing_steps=9)
    study = Study("any", "Which?", (), design, design, baseline=arms[0].name, ranked=ranked)
    entries = []
    for i, arm in enumerate(arms):
        for r, value in enumerate(scores[arm.name]):
            trial = design.trial(design.cells[0], arm, r, lr=rates[i % len(rates)], score_on="test")
            found = (
                Result("done", {"test/acc": value / 100}) if value else Result("diverged", {"chance": 0.1})
            )
            cost = Result("done", {"time/step_ms": 2.0 * (i + 1), "memory/saved_mib": 4.0 * (i + 1)})
            entries.append(Entry("mlp", arm.name, r, "own", trial, found))
            entries.append(Entry("mlp", arm.name, r, "timing", trial.replace(alone=True), cost))
    return StudyResult(study, "quick", study.hash("quick"), Table(tuple(entries)), (), len(entries))


def ranking(scores: Scores) -> Ranking:
    (found,) = rankings_of(result(scores))
    return found


THREE: Scores = {"a": [70.0, 71.0, 69.0, 70.0], "b": [72.0, 71.0, 73.0, None], "c": [60.0, 62.0, 61.0, 60.0]}


def drawn_scores(arms: int, n: int, spread: float) -> dict[str, list[float]]:
    """Accuracies of some arms, each better than the one before by about `spread`."""
    noise = np.random.default_rng(arms + n).normal(size=(arms, n))
    return {f"arm {i}": list(50 + spread * i + noise[i]) for i in range(arms)}


def test_arms_come_by_mean_rank_with_ties_shared_and_diverged_trainings_as_guessing() -> None:
    found = ranking(THREE)
    # Replicate by replicate a: 2, 1.5, 2, 1; b: 1, 1.5, 1, 3; c: 3, 3, 3, 2.
    assert [(place.arm, place.rank) for place in found.places] == [("a", 1.625), ("b", 1.625), ("c", 2.75)]
    assert found.n == 4
    assert [place.diverged for place in found.places] == [0, 1, 0]
    assert found.places[1].accuracy.value == pytest.approx((72 + 71 + 73 + 10) / 4)


def test_ranks_and_the_test_of_equal_ranks_are_scipys() -> None:
    scores = drawn_scores(6, 8, 0.6)
    found = ranking(scores)
    ranks = stats.rankdata(-np.array(list(scores.values())), axis=0).mean(axis=1)
    assert {place.arm: place.rank for place in found.places} == pytest.approx(
        dict(zip(scores, ranks, strict=True))
    )
    assert found.friedman_p == pytest.approx(stats.friedmanchisquare(*scores.values()).pvalue)


@pytest.mark.parametrize(("arms", "n", "spread"), [(5, 10, 0.5), (12, 5, 0.3), (40, 5, 0.2)])
def test_arms_are_joined_where_nemenyis_test_does_not_tell_them_apart(
    arms: int, n: int, spread: float
) -> None:
    """By p values: a difference of mean ranks over √(k(k + 1)/(12 n)) is a studentized range."""
    scores = drawn_scores(arms, n, spread)
    found = ranking(scores)
    joined = {frozenset(pair) for group in found.groups for pair in itertools.combinations(group, 2)}
    deviation = math.sqrt(arms * (arms + 1) / (12 * n))
    seen = {}
    for one, two in itertools.combinations(found.places, 2):
        apart = round(abs(one.rank - two.rank), 9)
        if apart not in seen:
            seen[apart] = stats.studentized_range.sf(apart / deviation, arms, 1e6) <= 0.05
        if abs(apart - found.difference) > 0.01:
            assert (frozenset((one.arm, two.arm)) in joined) != seen[apart]
    assert not all(seen.values())
    best = found.places[0]
    level = [place.arm for place in found.places if found.levels_with_best(place)]
    assert level == [best.arm, *(p.arm for p in found.places[1:] if frozenset((best.arm, p.arm)) in joined)]


def test_differences_to_the_baseline_are_paired() -> None:
    found = {place.arm: place for place in ranking(THREE).places}
    assert found["a"].over_baseline is None
    paired = stats.ttest_rel(THREE["c"], THREE["a"]).confidence_interval(0.95)
    over = found["c"].over_baseline
    assert over is not None
    assert (over.low, over.high) == pytest.approx((paired.low, paired.high))


def test_an_arm_with_missing_trainings_is_named_and_not_ranked() -> None:
    found = ranking({**THREE, "d": [99.0]})
    assert [place.arm for place in found.places] == ["a", "b", "c"]
    assert found.left_out == ("d",)
    assert ranking_words(found).startswith("3 arms over 4 replicates; ")
    assert "Not ranked, since trainings are missing: d." in ranking_words(found)
    assert ranking_words(ranking({"a": [70.0], "b": [71.0]})).startswith("2 arms over 1 replicate; ")


def test_nothing_is_ranked_where_a_study_does_not_say_so_or_has_one_arm() -> None:
    assert rankings_of(result(THREE, ranked=False)) == []
    assert ranking_heads(result(THREE, ranked=False)) == []
    alone = result({"a": [70.0, 71.0]})
    assert rank_cell(alone, alone.design.cells[0]) is None
    assert ranking_lines(alone) is None


def test_the_table_has_costs_beside_those_of_the_baseline_and_marks_the_edges_of_the_grid() -> None:
    found = ranking(THREE)
    rows = {row[0]: row for row in ranking_rows(found)}
    assert len(rows["a"]) == len(ranking_heads(result(THREE)))
    assert [rows[arm][6:] for arm in "abc"] == [
        ["2.00 (1.00)", "4.00 (1.00)"],
        ["4.00 (2.00)", "8.00 (2.00)"],
        ["6.00 (3.00)", "12.00 (3.00)"],
    ]
    assert [rows[arm][5] for arm in "abc"] == ["0.1 (edge)", "0.3", "1 (edge)"]
    assert rows["a"][4] == "–"
    assert [rows[arm][3].partition(", ")[2].partition("], ")[2] for arm in "ab"] == ["", "1 diverged"]


def test_costs_that_nobody_measured_are_dashes() -> None:
    whole = result(THREE)
    own = Table(tuple(e for e in whole.table.entries if e.role == "own"))
    (found,) = rankings_of(replace(whole, table=own))
    assert {tuple(row[6:]) for row in ranking_rows(found)} == {("–", "–")}


def test_bars_lie_in_as_few_lanes_as_keep_them_apart() -> None:
    bars = [(0, 3), (2, 5), (4, 6), (7, 8), (5, 7)]
    lanes = bars_in_lanes(bars)
    assert sorted(bar for lane in lanes for bar in lane) == sorted(bars)
    for lane in lanes:
        assert all(one[1] < two[0] for one, two in itertools.pairwise(lane))
    rows = range(9)
    assert len(lanes) == max(sum(start <= row <= end for start, end in bars) for row in rows)


@pytest.mark.parametrize("arms", [2, 40])
def test_the_figure_names_every_arm_once(arms: int) -> None:
    scores = drawn_scores(arms, 5, 0.2)
    drawing = draw_ranking("f", "Ranks", ranking(scores), arm_styles(scores))
    tree = ElementTree.fromstring(drawing.svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    texts = ["".join(node.itertext()) for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    for arm, values in scores.items():
        assert texts.count(f"{arm}  {np.mean(values):.1f}") == 1


def test_page_json_markdown_and_terminal_have_the_ranking() -> None:
    there = result(drawn_scores(8, 5, 1.0))
    (found,) = rankings_of(there)
    report = Report((there,), ())
    text = " ".join(Page(render_html(report)).text.split())
    assert ranking_words(found) in text and "Mean ranks of the arms, mlp" in text
    assert all(" ".join(row).replace("  ", " ") in text for row in ranking_rows(found))
    (study,) = json.loads(render_json(report))["studies"]
    assert [place["arm"] for place in study["rankings"][0]["places"]] == [p.arm for p in found.places]
    assert study["rankings"][0]["difference"] == found.difference
    markdown = render_markdown(report)
    assert all(f"| {place.arm} | {place.rank:.1f} |" in markdown for place in found.places)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(ranking_lines(there))
    # The five best, and the baseline, which is the worst.
    assert [name for name in (f"arm {i}" for i in range(8)) if name in captured.get()] == [
        "arm 0", "arm 3", "arm 4", "arm 5", "arm 6", "arm 7",
    ]  # fmt: skip
