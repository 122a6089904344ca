"""The words, numbers and colours of the report."""

import math
import re
import runpy
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnbench.report import (
    summaries,
    words,
)
from bnbench.report.drawing import DECISION_COLOURS, FILE_INK, arm_styles
from bnbench.report.gallery import anchors
from bnbench.study import Entry, Result, Table, Trial
from bnbench.study.claims import family_sizes, judge
from bnbench.study.estimands import (
    usable_lr_width,
)
from tests.doctored_results import doctored_report, doctored_studies


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_colours_show_on_white_and_on_black() -> None:
    # WCAG 2: 3 for graphics; text of the files, which cannot follow the page, gets the most that both allow.
    drawn = [style.colour for style in arm_styles(map(str, range(8))).values()]
    for background in ("#ffffff", "#0d1117"):
        assert min(_contrast(colour, background) for colour in (*drawn, *DECISION_COLOURS.values())) >= 3
        assert _contrast(FILE_INK, background) >= 4.3


def test_arms_differ_in_more_than_colour() -> None:
    styles = arm_styles(map(str, range(32)))
    assert len({(s.colour, str(s.dashes)) for s in styles.values()}) == 32
    first = [styles[str(i)] for i in range(4)]
    assert len({str(s.dashes) for s in first}) == len({s.marker for s in first}) == 4


@pytest.mark.parametrize("unit", ["pp", "decades", "log steps", ""])
@given(estimate=st.floats(-5, 5), width=st.floats(1e-3, 5))
def test_an_effect_reads_back_as_its_numbers(unit: str, estimate: float, width: float) -> None:
    verdict = doctored_verdict(unit=unit, estimate=estimate, low=estimate - width, high=estimate + width)
    text = words.effect(verdict).replace("−", "-").replace("decades", "").replace("pp", "").replace("×", "")
    numbers = [float(x) for x in re.findall(r"[-+]?\d+\.?\d*", text)]
    expected = (verdict.estimate, verdict.low, verdict.high)
    assert len(numbers) == 3
    for shown, value in zip(numbers, expected, strict=True):
        true = math.exp(value) if unit.startswith("log") else value
        precision = (0.005 if true < 10 else 0.5) if unit.startswith("log") else max(width / 20, 5e-4)
        assert abs(shown - true) <= precision * 1.01


def doctored_verdict(**changes):
    study = doctored_studies(5)[0]
    return replace(judge(study, "quick", Table(()), family_sizes([study], "quick"))[0], **changes)


def test_a_ratio_is_shown_as_times() -> None:
    verdict = doctored_verdict(
        unit="log steps", estimate=math.log(1.8), low=math.log(1.5), high=math.log(2.14)
    )
    assert words.effect(verdict) == "1.80 × [1.50, 2.14]"
    assert words.amount(math.log(1.25), "log steps") == "1.25 ×"


@given(st.lists(st.integers(0, 40), min_size=1))
def test_spans_read_back_as_the_numbers(numbers: list[int]) -> None:
    found: set[int] = set()
    for part in words.spans(numbers).split(", "):
        first, _, last = part.partition("–")
        found |= set(range(int(first), int(last or first) + 1))
    assert found == set(numbers)


@given(st.lists(st.text(max_size=12), max_size=8))
def test_anchors_are_plain_and_all_different(names: list[str]) -> None:
    found = anchors("x", names)
    assert len(set(found)) == len(names)
    assert all(re.fullmatch(r"x[a-z0-9-]*", anchor) for anchor in found)


@given(st.lists(st.floats(0.1, 1.0), min_size=2, max_size=6))
def test_the_usable_range_drawn_is_the_one_judged(accuracies: list[float]) -> None:
    entries = [
        Entry(
            "c", "a", 0, "sweep", Trial(lr=0.01 * 3**i), Result("done", {"chance": 0.1, "val/acc": accuracy})
        )
        for i, accuracy in enumerate(accuracies)
    ]
    found = summaries.sweep(entries)
    assert found is not None
    drawn = sum(math.log10(end / start) for start, end in found.usable)
    assert drawn == pytest.approx(usable_lr_width(entries, summaries.USABLE_MARGIN), abs=1e-9)


def test_a_learning_curve_is_the_median_with_quartiles_and_diverged_rows_stay_at_chance() -> None:
    steps = (1.0, 10.0, 100.0)
    curves = [(0.1, 0.5 + i / 10, 0.9) for i in range(4)]
    entries = [
        Entry("c", "a", i, "own", Trial(), Result("done", {"chance": 0.1}, {"step": steps, "val/acc": curve}))
        for i, curve in enumerate(curves)
    ]
    lost = Result("diverged", {"chance": 0.1}, {"step": (1.0,), "val/acc": (0.2,)})
    entries.append(Entry("c", "a", 4, "own", Trial(), lost))
    band = summaries.learning_curve(entries)
    assert band is not None and band.steps == steps
    middle = sorted([0.5, 0.6, 0.7, 0.8, 0.1])
    assert band.middle[1] == statistics.median(middle)
    assert (band.low[1], band.high[1]) == (middle[1], middle[3])
    assert summaries.learning_curve([]) is None


def test_the_table_of_numbers_holds_means_and_standard_deviations() -> None:
    result = doctored_report(replicates=6).results[0]
    heads = summaries.number_heads(result)
    rows = summaries.number_rows(result, "cnn · B=8")
    assert all(len(row) == len(heads) for row in rows) and len(rows) == 6
    own = [100 * e["test/acc"] for e in result.table.of(cell="cnn · B=8", arm="batch", roles=("own",))]
    assert rows[1][:3] == ["batch", "own best", f"{statistics.mean(own):.1f} ± {statistics.stdev(own):.1f}"]


def test_changed_keys_name_what_was_added_changed_and_dropped() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "gone": "x" * 200, "same": {}}
    new = {"a": {"b": 2, "c": [1, 2]}, "same": {}, "new": None}
    changes = summaries.changed_keys(old, new)
    assert [key for key, _, _ in changes] == ["a › b", "gone", "new"]
    assert changes[0][1:] == ("1", "2")
    assert "202 characters" in changes[1][1] and changes[1][2] == "(not there)"
    assert changes[2][1:] == ("(not there)", "null")


def test_the_article_has_its_eleven_claims() -> None:
    path = Path(__file__).parents[1] / "studies" / "article.py"
    claims = runpy.run_path(str(path))["CLAIMS"]
    assert [claim.id for claim in claims] == [
        "C0",
        "C1",
        "C2",
        "C3",
        "C4",
        "P1",
        "P2",
        "P3",
        "P4",
        "P5",
        "C5",
    ]
    for claim in claims:
        assert claim.sentence.endswith(".") and claim.literature
        # Every sentence names its source: authors and a year.
        assert all(re.search(r"^[A-Z][^()]* \(20\d\d", text) for text in claim.literature)
