"""Searches in the report: recipes with their intervals, importances, histories, and what they cost."""

import csv
import io
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from bnbench.engine import search
from bnbench.report import (
    Report,
    StudyResult,
    render_csv,
    render_html,
    render_json,
    render_markdown,
    summaries,
    write_report,
)
from bnbench.report.drawing import arm_styles
from bnbench.report.recipes import recipe_heads, recipe_rows, recipes_of
from bnbench.report.search_figures import Slice, draw_importances, draw_slices, score_limits
from bnbench.report.searches import (
    Search,
    best_so_far,
    expected_best,
    grid_arm,
    importances_of,
    larger_arm,
    learning_rate_arm,
    readable_point,
    searches_of,
)
from bnbench.report.terms import space_words, tuning_terms
from bnbench.study import Arm, Cell, Choice, Entry, Range, Result, Table
from bnbench.study.programs import programs_of
from tests.doctored_results import doctored_report, recipe_report, recipe_result, recipe_study
from tests.pilot_study import design, drive, study
from tests.test_report import Page


@pytest.fixture(scope="module")
def result() -> StudyResult:
    return recipe_report(recipe_study(trials=10))


@pytest.fixture(scope="module")
def folder(result: StudyResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("report")
    write_report(Report((result,), ()), written)
    return written


def own(result: StudyResult, cell: str, arm: str) -> list[float]:
    rows = result.table.of(cell=cell, arm=arm, roles=("own",))
    return [100 * e["test/acc"] for e in sorted(rows, key=lambda e: e.replicate)]


def test_a_recipe_has_students_interval_and_its_gains_are_paired(result: StudyResult) -> None:
    cell = result.design.cells[0]
    recipes = {recipe.arm: recipe for recipe in recipes_of(result, cell)}
    assert list(recipes) == ["none", "batch", "none, lr alone", "batch, lr alone", "the article"]
    for arm, recipe in recipes.items():
        scores = own(result, cell.name, arm)
        interval = stats.ttest_1samp(scores, 0).confidence_interval(0.95)
        assert recipe.accuracy is not None and recipe.accuracy.n == 6
        assert recipe.accuracy.value == pytest.approx(statistics.mean(scores))
        assert (recipe.accuracy.low, recipe.accuracy.high) == pytest.approx(tuple(interval))
        others = (("the article", recipe.over_grid), (f"{arm}, lr alone", recipe.over_lr))
        for other, gain in others:
            if other not in recipes or other == arm:
                assert gain is None
                continue
            paired = stats.ttest_rel(scores, own(result, cell.name, other))
            assert gain is not None and gain.over == other
            assert (gain.mean.low, gain.mean.high) == pytest.approx(tuple(paired.confidence_interval(0.95)))


def test_a_recipe_says_what_was_chosen_what_was_given_and_what_it_cost(result: StudyResult) -> None:
    cell = result.design.cells[0]
    recipes = {recipe.arm: recipe for recipe in recipes_of(result, cell)}
    chosen = result.table.of(cell=cell.name, arm="batch", roles=("own",))[0].trial
    setting = recipes["batch"].setting
    assert setting["lr"] == f"{chosen.lr:.3g}" and setting["batch_size"] == str(chosen.batch_size)
    assert setting["schedule"] == chosen.schedule
    assert setting["placement"] == f"{'before' if chosen.order == 'norm-act' else 'after'} the activation"
    assert "placement" not in recipes["none"].setting and recipes["none"].given == {}
    assert list(recipes["batch, lr alone"].setting) == ["lr"]
    assert recipes["the article"].setting["lr"] in ("0.1", "0.3", "1")
    assert recipes["the article"].given == {
        "schedule": "cosine", "batch_size": "64", "placement": "before the activation", "dropout": "none",
        "weight_decay": "none", "label_smoothing": "none",
    }  # fmt: skip
    assert recipes["the article"].trials == 3 * 5 and recipes["the article"].compared == 0
    for name in ("batch", "none, lr alone"):
        keys = {e.trial.key for e in result.table.of(cell=cell.name, arm=name, roles=("tune", "shortlist"))}
        assert recipes[name].trials == 3 * 10
        assert recipes[name].trials + recipes[name].compared == len(keys) > 30


def test_arms_are_related_by_their_rows_and_not_by_their_names() -> None:
    small, large = (Range("lr", 0.01, 1),), (Range("lr", 0.01, 1), Choice("dropout", (0.0, 0.2)))
    arms = (
        Arm("x", norm="layer", space=large),
        Arm("y", norm="layer", space=small),
        Arm("other norm", norm="batch", space=small),
        Arm("other batch", norm="layer", batch_size=8, space=small),
        Arm("z", norm="layer"),
    )
    base = recipe_study().design("quick")
    design = replace(base, arms=arms, cells=base.cells[1:])
    cell = design.cells[0]
    assert [a and a.name for a in (learning_rate_arm(design, cell, arm) for arm in arms)] == [
        "y", None, None, None, None,
    ]  # fmt: skip
    assert [a and a.name for a in (larger_arm(design, cell, arm) for arm in arms)] == [
        None, "x", None, None, "x",
    ]  # fmt: skip
    assert grid_arm(design, cell, "x") is arms[4]
    several = replace(design, arms=(*arms, Arm("w")))
    assert grid_arm(several, cell, "w") is several.arms[-1] and grid_arm(several, cell, "x") is None


def test_trials_stay_in_the_order_in_which_they_were_drawn(result: StudyResult) -> None:
    cell, arm = result.design.cells[0], result.design.arms[1]
    found = searches_of(result, cell, arm)
    assert [len(one.trials) for one in found] == [10, 10, 10]
    rows = result.table.of(cell=cell.name, arm="batch", roles=("tune",))
    drawn = [[e for e in rows if e.replicate == one.replicate] for one in found]
    for one, entries in zip(found, drawn, strict=True):
        assert [point["lr"] for point, _ in one.trials] == [e.trial.lr for e in entries]
        assert [score for _, score in one.trials] == [e["val/acc"] for e in entries]
    confirmed = result.table.of(cell=cell.name, arm="batch", roles=("own",))[0].trial
    assert all(one.chosen == (readable_point(arm.space_in(cell.name), confirmed),) for one in found)
    assert any(found[0].chosen[0] == point for one in found for point, _ in one.trials)


def test_the_best_so_far_skips_what_failed() -> None:
    one = Search(0, (({}, None), ({}, 0.5), ({}, 0.4), ({}, None), ({}, 0.6)), ())
    assert best_so_far(one) == [(2, 0.5), (3, 0.5), (5, 0.6)]
    assert one.scores == (0.5, 0.4, 0.6)


@pytest.mark.parametrize("scores", [[0.5], [0.3, 0.1, 0.7, 0.2], [0.4, 0.4, 0.1, 0.9, 0.4]])
def test_the_best_to_expect_is_the_mean_over_all_draws(scores: list[float]) -> None:
    found = expected_best(scores, 4)
    for k, value in enumerate(found, start=1):
        draws = list(itertools.product(scores, repeat=k))
        assert value == pytest.approx(sum(map(max, draws)) / len(draws), abs=1e-12)
    assert expected_best([], 4) == []


def test_importances_are_those_of_each_search_by_itself(result: StudyResult) -> None:
    cell, arm = result.design.cells[1], result.design.arms[1]
    space, searches = arm.space_in(cell.name), searches_of(result, cell, arm)
    found = importances_of(space, searches)
    assert list(found) == ["lr", "batch_size", "dropout"]
    for number, one in enumerate(searches):
        alone = search.importances(space, one.trials)
        assert {name: shares[number] for name, shares in found.items()} == alone
        assert sum(alone.values()) == pytest.approx(1)
    assert len(set(found["lr"])) == 3
    alike = [Search(0, tuple((point, 0.5) for point, _ in searches[0].trials), ()), searches[1]]
    assert importances_of(space, alike) == {name: shares[1:2] for name, shares in found.items()}
    assert importances_of(space[:1], searches) == importances_of(space, alike[:1]) == {}


def test_page_shows_recipes_and_every_figure_of_the_searches(result: StudyResult, folder: Path) -> None:
    source = (folder / "index.html").read_text()
    page = Page(source)
    assert len(page.ids) == len(set(page.ids))
    assert all(target[1:] in page.ids for target in page.loads if target.startswith("#"))
    assert source.count("<details>") == 2
    text = " ".join(page.text.split())
    for head in recipe_heads(result):
        assert head in text
    for cell in result.design.cells:
        for row in recipe_rows(result, cell):
            assert " ".join(row) in text
    for name, explanation in tuning_terms(result):
        assert f"{name} {explanation}" in text
    assert "One search's importances are an anecdote" in text and "Dodge et al. 2019" in text
    names = {file.stem.removeprefix("study-recipe-quick-") for file in (folder / "figures").iterdir()}
    # Slices: two searched arms by themselves, and one figure of those with the learning rate alone.
    slices = {f"slices-{cell}-{part}" for cell in (1, 2) for part in (1, 2, 3)}
    others = {f"{kind}-{c}" for kind in ("importances", "expected", "history", "sweep", "replicates")
              for c in (1, 2)}  # fmt: skip
    assert names == slices | others
    assert text.count(result.command) >= len(names)


def test_the_figure_over_the_grid_leaves_out_what_was_searched(folder: Path) -> None:
    svg = (folder / "figures" / "study-recipe-quick-sweep-1.svg").read_text()
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert "the article" in texts and "none" not in texts and "batch, lr alone" not in texts


def test_slices_have_a_dot_for_every_trial_and_a_ring_for_the_chosen() -> None:
    space = (
        Range("lr", 0.001, 1.0),
        Choice("batch size", {"8": {"batch_size": 8}, "64": {"batch_size": 64}}),
    )
    noise = random.Random(0)
    points = [{"lr": 10 ** noise.uniform(-3, 0), "batch size": noise.choice(("8", "64"))} for _ in range(20)]
    trials = tuple((point, noise.uniform(0.6, 0.8)) for point in points)
    trials = (*trials, ({"lr": 0.5, "batch size": "8"}, 0.1), ({"lr": 0.6, "batch size": "8"}, None))
    found = [Search(0, trials[:10], (points[3],)), Search(1, trials[10:], (points[3],))]
    styles = arm_styles(["a"])
    svg = draw_slices("s", "t", [Slice(d.name, "a", d, found) for d in space], styles).file
    marks = re.findall(rf"<g[^>]*fill: {styles['a'].colour}[^>]*>((?: *<use [^>]*>)+)", svg)
    alone = re.findall(rf"<use [^>]*fill: {styles['a'].colour}[^>]*>", svg)
    assert [group.count("<use") for group in marks] == [20, 20]
    # The score far below the others stands at the edge of both strips; the failed one is nowhere.
    assert len(alone) == 2 and score_limits([score for _, score in trials[:-1]])[0] > 0.4
    rings = re.findall(r"<use [^>]*fill-opacity: 0;[^>]*>|<use [^>]*fill: none[^>]*>", svg)
    assert len(rings) == 2
    ElementTree.fromstring(svg)


def test_one_search_is_called_an_anecdote() -> None:
    styles = arm_styles(["a"])
    one = draw_importances("s", "c", {"a": {"lr": (0.7,), "dropout": (0.3,)}}, styles)
    two = draw_importances("s", "c", {"a": {"lr": (0.7, 0.6), "dropout": (0.3, 0.4)}}, styles)
    assert "anecdote" in one.svg and "anecdote" not in two.svg
    report = Report((recipe_report(recipe_study(replicates=2, trials=4, searches=1)),), ())
    text = " ".join(Page(render_html(report)).text.split())
    assert "There is one search only, so what it found is an anecdote" in text


def test_importances_are_computed_once_a_report(result: StudyResult, tmp_path: Path, monkeypatch) -> None:
    calls = []

    def counted(space, history):
        calls.append(space)
        return {dimension.name: 1 / len(space) for dimension in space}

    monkeypatch.setattr("bnbench.report.searches.importances", counted)
    write_report(Report((result,), ()), tmp_path)
    # Two arms with more than one dimension, two cells, three searches.
    assert len(calls) == 12


def test_a_report_without_searches_does_not_load_optuna() -> None:
    code = (
        "import sys; from tests.doctored_results import doctored_report; from bnbench.report import *;"
        "r = doctored_report(5); render_html(Report(r.results[1:], ())); print('optuna' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    answer = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert answer.stdout.strip() == "False", answer.stderr
    plain = doctored_report(5).results[1]
    assert (
        recipe_heads(plain) == []
        and "recipes" not in json.loads(render_json(Report((plain,), ())))["studies"][0]
    )
    assert tuning_terms(plain)[0] == ("Learning rates", "0.01, 0.03, 0.1, 0.3, 1, the same for every arm")


def test_json_csv_and_markdown_have_the_recipes(result: StudyResult) -> None:
    report = Report((result,), ())
    recipes = [recipe for cell in result.design.cells for recipe in recipes_of(result, cell)]
    values = json.loads(render_json(report))["studies"][0]["recipes"]
    assert [(v["cell"], v["arm"]) for v in values] == [(r.cell, r.arm) for r in recipes]
    assert [v["accuracy"]["value"] for v in values] == [r.accuracy.value for r in recipes if r.accuracy]
    assert values[1]["over_lr"]["over"] == "batch, lr alone"
    backwards = replace(result, table=Table(result.table.entries[::-1]))
    again = json.loads(render_json(Report((backwards,), ())))["studies"][0]["recipes"]
    assert again == values
    lines = list(csv.DictReader(io.StringIO(render_csv(report))))
    accuracies = [line for line in lines if line["kind"] == "recipe"]
    assert [float(line["estimate"]) for line in accuracies] == [v["accuracy"]["value"] for v in values]
    assert "batch_size: 64" in accuracies[4]["setting"] and accuracies[4]["arm"] == "the article"
    gains = [line for line in lines if line["kind"] == "gain over batch, lr alone"]
    assert [line["arm"] for line in gains] == ["batch", "batch"]
    table = [line for line in render_markdown(report).splitlines() if line.startswith("| mlp · mnist1d | ")]
    assert [line.split(" | ")[1] for line in table] == [r.arm for r in recipes[:5]]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_recipes_tuned_in_every_replicate_say_how_often_each_value_was_chosen() -> None:
    result = recipe_report(recipe_study(replicates=3, trials=4, tuning="per_replicate"))
    cell, arm = result.design.cells[0], result.design.arms[1]
    rows = sorted(result.table.of(cell=cell.name, arm="batch", roles=("own",)), key=lambda e: e.replicate)
    setting = {recipe.arm: recipe for recipe in recipes_of(result, cell)}["batch"].setting
    rates = sorted(e.trial.lr for e in rows)
    assert setting["lr"] == f"{rates[1]:g} ({rates[0]:g}–{rates[2]:g})"
    sizes = [str(e.trial.batch_size) for e in rows]
    assert (
        all(f"{size} (× {sizes.count(size)})" in setting["batch_size"] for size in sizes)
        or len(set(sizes)) == 1
    )
    for one, entry in zip(searches_of(result, cell, arm), rows, strict=True):
        assert one.replicate == entry.replicate
        assert [point["lr"] for point in one.chosen] == [entry.trial.lr]
    terms = dict(tuning_terms(result))
    assert (
        terms["Searches"].startswith("one for each arm, cell and replicate")
        and "4 trials" in terms["Searches"]
    )
    assert "Comparing the best" not in terms
    assert terms["Trainings to choose, an arm"] == "3 × 4 by searching, or 3 × 5 on the grid"


def test_what_it_costs_to_choose_counts_the_replicates_of_each_cell() -> None:
    cells = (Cell("mlp", replicates=4), Cell("cnn", model="cnn"))
    arms = (Arm("none", norm="none"), Arm("batch", space=(Range("lr", 0.01, 1.0),)))
    own = study(quick=design(cells=cells, arms=arms, trials=5))
    result = StudyResult(own, "quick", own.hash("quick"), Table(()), (), 0)
    said = dict(tuning_terms(result))["Trainings to choose, an arm"]
    assert said == "; ".join(
        f"{name}: {n} × 5 by searching, or {n} × 3 on the grid" for name, n in (("mlp", 4), ("cnn", 2))
    )


def test_the_design_says_what_is_searched_and_what_it_costs(result: StudyResult) -> None:
    terms = dict(tuning_terms(result))
    assert terms["Learning rates"] == "0.01, 0.03, 0.1, 0.3, 1 for “the article”; searched by the other arms"
    assert "10 trials, 4 at a time: the arm's own setting first" in terms["Searches"]
    assert terms["Comparing the best"].startswith("the 2 best settings of each search are tried on all 3")
    assert (
        terms["Trainings to choose, an arm"]
        == "3 × 10 by searching and up to 12 to compare, or 3 × 5 on the grid"
    )
    words = space_words(result.design, result.design.arms[0])
    assert (
        words[0] == "learning rate: 0.001 to 3"
        and "schedule: constant | cosine | trapezoid (mlp · mnist1d)" in words
    )
    assert space_words(result.design, result.design.arms[-1]) == ["learning rate: the grid"]
    by_cell = replace(result.design, trials={"mlp · mnist1d": 10, "cnn · small": 4})
    study = replace(result.study, quick=by_cell)
    assert (
        "mlp · mnist1d: 10 trials; cnn · small: 4 trials"
        in dict(tuning_terms(replace(result, study=study)))["Searches"]
    )


def test_diverged_trials_of_searches_share_a_line(result: StudyResult) -> None:
    lost = [
        e
        for e in result.table.of(cell="mlp · mnist1d", arm="none", roles=("tune",))
        if e.result.status != "done"
    ]
    assert len({e.result.reason for e in lost}) > 1
    [line] = [row for row in summaries.failures(result) if row[:3] == ["mlp · mnist1d", "none", "tuning"]]
    rates = sorted(e.trial.lr for e in lost)
    assert line[3] == f"{rates[0]:g}–{rates[-1]:g}" and line[4] == "diverged"
    assert line[5].startswith(f"{len(lost)} trainings; the first: loss was NaN at step")


def test_failed_trials_and_missing_confirmations_are_no_obstacle(result: StudyResult) -> None:
    def damaged(entry: Entry) -> Entry:
        fails = entry.role in ("tune", "shortlist") and int(entry.trial.key, 16) % 3 == 0
        return replace(entry, result=Result("failed", reason="out of <memory>")) if fails else entry

    entries = tuple(damaged(e) for e in result.table.entries if e.role != "own" or e.arm == "batch")
    torn = replace(result, table=Table(entries))
    rows = recipe_rows(torn, result.design.cells[0])
    assert rows[0][1:3] == ["–", "0"] and rows[1][2] == "6"
    text = Page(render_html(Report((torn,), ()))).text
    assert "out of <memory>" in text
    nothing = replace(result, table=Table(()))
    assert "What mattered" not in Page(render_html(Report((nothing,), ()))).text


def test_a_smoke_run_of_searches_can_be_shown() -> None:
    study = recipe_study()
    entries = [e for _, p in programs_of(study, "smoke", search.draw) for e in drive(p, recipe_result)[0]]
    shown = StudyResult(study, "smoke", study.hash("smoke"), Table(tuple(entries)), (), len(entries))
    text = " ".join(Page(render_html(Report((shown,), ()))).text.split())
    assert "No number here says anything" in text and "Search history" in text
