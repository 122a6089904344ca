"""The table `Should I use batch normalization here?`, against comparisons made by hand."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from scipy import stats

from bnbench.report import Report, StudyResult, render_html, render_json, render_markdown
from bnbench.report.advice import ADVICE_HEADS, Advice, advice_rows, advise, norm_words
from bnbench.study import Arm, Cell, Choice, Design, Entry, Range, Result, Study, Table, Trial
from tests.test_report import Page

NONE, BATCH, LAYER = Arm("plain", norm="none"), Arm("bn", norm="batch"), Arm("ln", norm="layer")
FIVE = (0.0, 0.2, -0.2, 0.1, -0.1)


def result(
    scores: Mapping[tuple[str, str], Sequence[float | None]],
    arms: Sequence[Arm] = (NONE, BATCH, LAYER),
    cells: Sequence[Cell] = (Cell("mlp"),),
    *,
    name: str = "any",
    program: str = "search",
    **base: Any,
) -> StudyResult:
    """A study with these test accuracies, in percent, by cell and arm; None for one that diverged."""
    n = max(map(len, scores.values()))
    design = Design(Trial(**base), tuple(cells), tuple(arms), (0.1, 0.3), replicates=n, trials=3)
    study = Study(name, "Which?", (), design, design, baseline=arms[0].name, program=program)
    entries = []
    for (cell, arm), values in scores.items():
        place = design.cell(cell), next(a for a in arms if a.name == arm)
        for r, value in enumerate(values):
            trial = design.trial(*place, r, lr=0.3, score_on="test")
            found = (
                Result("diverged", {"chance": 0.1})
                if value is None
                else Result("done", {"test/acc": value / 100})
            )
            entries.append(Entry(cell, arm, r, "own", trial, found))
    return StudyResult(study, "quick", study.hash("quick"), Table(tuple(entries)), (), len(entries))


def advice(*results: StudyResult) -> list[Advice]:
    return list(advise(Report(results, ())))


def shifted(mean: float, noise: Sequence[float] = FIVE) -> list[float]:
    return [mean + x for x in noise]


def test_the_best_norm_leads_by_the_paired_difference_with_students_interval() -> None:
    rows = {"plain": [70.0, 71.0, 69.5, 70.2, 70.6], "bn": [72.1, 72.4, 72.0, 71.6, 73.0], "ln": [70.5] * 5}
    (line,) = advice(result({("mlp", arm): values for arm, values in rows.items()}))
    assert list(line.accuracies) == ["batch", "layer", "none"]
    assert line.best == "batch" and line.answer == "yes" and line.level == ("batch",)
    paired = stats.ttest_rel(rows["bn"], rows["ln"])
    assert (line.lead.low, line.lead.high) == pytest.approx(tuple(paired.confidence_interval(0.95)))
    assert line.lead.value == pytest.approx(72.22 - 70.5) and line.n == 5
    assert line.over_batch is None


def test_no_clear_winner_where_the_interval_holds_zero_and_the_level_ones_are_named() -> None:
    scores = {
        ("mlp", "plain"): shifted(60),
        ("mlp", "bn"): shifted(70),
        ("mlp", "ln"): [70.3, 69.6, 70.4, 69.7, 70.3],
    }
    (line,) = advice(result(scores))
    paired = stats.ttest_rel(scores["mlp", "ln"], scores["mlp", "bn"]).confidence_interval(0.95)
    assert paired.low < 0 < paired.high
    assert line.answer == "no clear winner" and line.level == ("layer", "batch")
    assert advice_rows(Report((result(scores),), ()))[0][8] == "no clear winner: layer, batch"


def test_another_norm_wins_where_it_beats_batch_even_if_two_of_them_are_level() -> None:
    scores = {
        ("mlp", "plain"): shifted(71),
        ("mlp", "bn"): shifted(65, FIVE[::-1]),
        ("mlp", "ln"): [71.2, 71.1, 70.9, 71.2, 70.7],
    }
    (line,) = advice(result(scores))
    paired = stats.ttest_rel(
        scores["mlp", line.level[0].replace("layer", "ln").replace("none", "plain")], scores["mlp", "bn"]
    )
    assert line.answer == "no" and set(line.level) == {"none", "layer"}
    assert line.over_batch is not None
    assert (line.over_batch.low, line.over_batch.high) == pytest.approx(
        tuple(paired.confidence_interval(0.95))
    )


def test_only_arms_that_differ_in_the_norm_alone_are_compared() -> None:
    arms = (
        NONE,
        BATCH,
        Arm("bn, B 16", norm="batch", batch_size=16),
        Arm("none, dropout", norm="none", dropout=0.2),
        Arm("bn searched", norm="batch", space=(Range("lr", 0.01, 1.0), Choice("dropout", (0.0, 0.2)))),
        Arm("none, lr alone", norm="none", space=(Range("lr", 0.01, 1.0),)),
        Arm("bn, half", norm="batch", norm_options={"gamma": 0.5, "learn_gamma": False}),
    )  # fmt: skip
    high = {("mlp", arm.name): shifted(60.0 + 3 * i) for i, arm in enumerate(arms)}
    (line,) = advice(result(high, arms))
    assert set(line.accuracies) == {"none", "batch"}
    assert line.accuracies["batch"].value == pytest.approx(63.0)
    assert line.setting == ""
    # A search of the learning rate alone is compared with another such.
    arms = (*arms, Arm("bn, lr alone", norm="batch", space=(Range("lr", 0.01, 1.0),)))
    both = {("mlp", arm.name): shifted(60.0 + 3 * i) for i, arm in enumerate(arms)}
    assert sorted(line.accuracies["batch"].value for line in advice(result(both, arms))) == [
        pytest.approx(63.0),
        pytest.approx(81.0),
    ]
    assert advice(result(both, arms))[1].setting == "learning rate searched"
    without = {("mlp", "plain"): shifted(60), ("mlp", "ln"): shifted(61)}
    assert advice(result(without, (NONE, LAYER))) == []


def test_lines_name_batch_size_network_data_and_what_else_is_not_the_default() -> None:
    cells = (
        Cell("a", batch_size=128),
        Cell("b", model="cnn", model_options={"channels": 16}, data="digits", n_train=400, label_noise=0.2),
        Cell("c", batch_size=8),
    )
    scores = {(c.name, arm.name): shifted(60 + i) for c in cells for i, arm in enumerate((NONE, BATCH))}
    lines = advice(result(scores, (NONE, BATCH), cells))
    assert [(a.network, a.data, a.batch_size, a.setting) for a in lines] == [
        ("cnn channels=16", "digits", "64", "n_train=400, label_noise=0.2"),
        ("mlp", "mnist1d", "8", ""),
        ("mlp", "mnist1d", "128", ""),
    ]


def test_lines_that_would_look_alike_tell_their_budgets() -> None:
    scores = {("mlp", "plain"): shifted(60), ("mlp", "bn"): shifted(61)}
    short = result(scores, (NONE, BATCH), name="short", steps=100)
    long = result(scores, (NONE, BATCH), name="long", steps=900, schedule="constant")
    assert [line.setting for line in advice(short, long)] == [
        "steps=100, schedule=cosine", "steps=900, schedule=constant",
    ]  # fmt: skip
    assert advice(short)[0].setting == ""


def test_a_comparison_that_a_larger_one_contains_is_left_out() -> None:
    two = {("mlp", "plain"): shifted(60), ("mlp", "bn"): shifted(61)}
    small, same = result(two, (NONE, BATCH), name="small"), result(two, (NONE, BATCH), name="same")
    large = result({**two, ("mlp", "ln"): shifted(62)}, name="large")
    assert [line.study for line in advice(small, large)] == ["large"]
    assert [line.study for line in advice(large, small)] == ["large"]
    assert [line.study for line in advice(small, same)] == ["small"]
    # Other numbers are other rows, tuned in another way: both stay.
    other = result({**two, ("mlp", "bn"): shifted(61.5)}, (NONE, BATCH), name="other")
    assert [line.study for line in advice(small, other)] == ["small", "other"]


def test_diverged_trainings_count_as_guessing_and_are_told_and_missing_ones_leave_their_pair_out() -> None:
    scores = {
        ("mlp", "plain"): [60.0, 61.0, None, 60.5, 60.2, 60.1],
        ("mlp", "bn"): [70.0, 70.5, 70.2, 70.1, 70.9],
    }
    (line,) = advice(result(scores, (NONE, BATCH)))
    assert line.n == 5
    assert line.accuracies["none"].value == pytest.approx((60.0 + 61.0 + 10.0 + 60.5 + 60.2) / 5)
    assert line.diverged == {"none": 1}
    assert "1 of “none” diverged" in advice_rows(Report((result(scores, (NONE, BATCH)),), ()))[0][8]


def test_few_replicates_give_no_answer_and_sweeps_no_line() -> None:
    scores = {("mlp", "plain"): [60.0, 61.0, 60.1, 60.2], ("mlp", "bn"): [70.0, 70.5, 70.2, 70.3]}
    assert advice(result(scores, (NONE, BATCH)))[0].answer == "too few replicates"
    assert advice(result(scores, (NONE, BATCH), program="sweep")) == []


def test_norms_are_told_by_their_options_and_reparametrization() -> None:
    row = Trial(norm="ghost_batch", norm_options={"ghost_size": 16})
    assert norm_words(row) == "ghost_batch ghost_size=16"
    assert (
        norm_words(Trial(norm="group", reparam="weight_standardization")) == "group + weight_standardization"
    )


def test_page_json_and_markdown_have_the_table() -> None:
    scores = {("mlp", "plain"): shifted(60), ("mlp", "bn"): shifted(70, FIVE[::-1])}
    report = Report((result(scores, (NONE, BATCH)),), ())
    (row,) = advice_rows(report)
    assert len(row) == len(ADVICE_HEADS)
    text = " ".join(Page(render_html(report)).text.split())
    assert "Should I use batch normalization here?" in text and all(cell in text for cell in row)
    (line,) = json.loads(render_json(report))["advice"]
    assert (line["best"], line["answer"], line["n"]) == ("batch", "yes", 5)
    assert line["lead"]["low"] == advise(report)[0].lead.low
    assert "| mlp | mnist1d | 64 | 5 | batch |" in render_markdown(report)
