"""What the report says of verdicts: which cells, which way, how large, and what it does not know."""

import json
from dataclasses import replace
from typing import Any

import pytest

from bnbench.report import Report, render_html, render_json, render_markdown, sentences
from bnbench.report.gallery import anchors
from bnbench.study import Claim
from bnbench.study.claims import judge_claim
from bnbench.study.verdicts import ClaimVerdict, Verdict
from tests.doctored_results import doctored_report, wide_report
from tests.test_report import Page


def verdict(cell: str, decision: str, estimate: float = 1.5, **changes: Any) -> Verdict:
    whole = {
        "study": "s", "hypothesis": "C9.a", "claim": "C9", "kind": "greater", "delta": 1.0, "unit": "pp",
        "primary": True, "level": 0.95, "family_size": 4, "n": 10, "low": estimate - 0.3,
        "high": estimate + 0.3, **changes,
    }  # fmt: skip
    return Verdict(cell=cell, decision=decision, estimate=estimate, **whole)


def claim(decision: str, *cells: Verdict, n_cells: int = 4) -> ClaimVerdict:
    return ClaimVerdict("C9", decision, n_cells, 0, 0, "", cells)


@pytest.mark.parametrize(
    ("label", "decision", "kind", "expected"),
    [
        ("at_least_delta", "SUPPORTED", "greater", "at least as large as"),
        ("size_uncertain", "SUPPORTED", "greater", "stays open"),
        ("negligible", "REFUTED", "greater", "in either direction, is smaller"),
        ("reversed", "REFUTED", "greater", "goes the other way."),
        ("", "REFUTED", "greater", "The effect is smaller than"),
        ("", "SUPPORTED", "equivalent", "differ by less than"),
        ("", "REFUTED", "equivalent", "differ by more than"),
        ("", "INCONCLUSIVE", "greater", "leaves open"),
    ],
)
def test_every_outcome_has_a_sentence(label: str, decision: str, kind: str, expected: str) -> None:
    found = verdict("mlp", decision, label=label, kind=kind)
    assert expected in sentences.explain(found)
    assert sentences.explain(replace(found, tuning="once")).endswith("; conditional on one tuning.")


def test_a_claim_says_in_which_cells_it_holds_and_how_large_the_effects_are() -> None:
    cells = [
        verdict("a", "SUPPORTED", 1.2),
        verdict("b", "SUPPORTED", 2.34),
        verdict("c", "INCONCLUSIVE", 0.2),
    ]
    assert sentences.conclude(claim("SUPPORTED", *cells)) == (
        "It holds in 2 of 4 cells: a, b (+1.2 to +2.3 pp); undecided in 1 of 4 cells: c (+0.20 pp);"
        " 1 declared cell is not here."
    )  # fmt: skip
    whole = [verdict(name, "SUPPORTED", 0.588, unit="log steps") for name in "abcd"]
    assert sentences.conclude(claim("SUPPORTED", *whole)) == "It holds in all 4 cells (1.80 ×)."
    once = [replace(v, tuning="once", label="size_uncertain") for v in whole]
    assert sentences.conclude(claim("SUPPORTED", *once)) == (
        "It holds in all 4 cells (1.80 ×, perhaps below 2.72 ×); conditional on one tuning."
    )


def test_a_claim_that_fails_says_whether_the_effect_is_small_or_goes_the_other_way() -> None:
    cells = (
        verdict("a", "REFUTED", -2.9, label="reversed"),
        verdict("b", "REFUTED", 0.1, label="negligible"),
        verdict("c", "REFUTED", 0.6),
        verdict("d", "SUPPORTED", 1.5, kind="equivalent", against=True, hypothesis="C9.b"),
    )
    assert sentences.conclude(claim("REFUTED", *cells)) == (
        "It fails in all 4 cells: C9.a in a (the effect goes the other way: −2.9 pp), C9.a in b (any effect"
        " is below 1 pp: +0.10 pp), C9.a in c (the effect is below 1 pp: +0.60 pp), C9.b in d (a difference"
        " below 1 pp: +1.5 pp)."
    )


def test_what_carries_no_verdict_is_named_with_its_reason() -> None:
    cells = (
        verdict("a", "INCONCLUSIVE", gate="under_trained"),
        verdict("b", "INCONCLUSIVE", gate="under_trained"),
        replace(verdict("c", "INCONCLUSIVE", gate="incomplete"), estimate=None, low=None, high=None),
    )
    said = sentences.conclude(claim("INCONCLUSIVE", *cells, n_cells=3))
    assert said == (
        "The data do not decide it: no verdict in all 3 cells: a, b (under-trained), c (incomplete)."
    )
    assert sentences.conclude(claim("INCONCLUSIVE", n_cells=0)).startswith("No study of this report")


def test_a_verdict_that_differs_by_network_names_the_network() -> None:
    report = doctored_report()
    mixed = {c.id: v for c, v in report.claims}["C5"]
    assert mixed.decision == "MIXED"
    assert report.condition(mixed) == "the network (mlp against cnn)"
    assert "It depends on the network (mlp against cnn): " in render_markdown(report)
    # Where both sides have both networks, nothing is named but the cells.
    swapped = tuple(
        replace(v, decision="SUPPORTED" if v.decision == "INCONCLUSIVE" else v.decision) for v in mixed.cells
    )
    other = replace(mixed, cells=(*swapped[:1], replace(swapped[1], decision="SUPPORTED"), *swapped[2:3]))
    results = tuple(
        replace(r, verdicts=tuple(v for v in other.cells if v.study == r.study.name)) for r in report.results
    )
    assert replace(report, results=results).condition(other) == "the batch size (default against 8)"


def test_chance_is_said_where_cells_contradict_each_other_by_no_more() -> None:
    cells = (verdict("a", "SUPPORTED", 1.1), verdict("b", "REFUTED", 0.2))
    said = sentences.conclude(claim("INCONCLUSIVE", *cells), "the network (x against y)")
    assert said.startswith("The data do not decide it: it holds in 1 of 4 cells") and "network" not in said
    assert "by chance alone cells could differ so much" in said


def test_who_diverged_and_what_is_only_a_bound_is_said_beside_the_numbers() -> None:
    found = verdict(
        "a", "SUPPORTED", n_diverged={"none": 1, "batch": 0}, allows=("both",) * 7 + ("support",) * 3,
        p_rank=0.01, page_p=0.00001,
    )  # fmt: skip
    assert sentences.beside(found) == (
        "1 training of “none” diverged, in the score as guessing; 3 of 10 replicates are bounds only;"
        " signed-rank test that knows the bounds: p = 0.01; Page's test of a trend over the doses:"
        " p < 0.0001."
    )
    assert sentences.beside(verdict("a", "SUPPORTED", n_diverged={"none": 0}, allows=("both",))) == ""


def test_a_card_shows_each_hypothesis_apart_and_an_untested_claim_has_a_card_too() -> None:
    report = wide_report(6)
    untested = (Claim("C4", "Unheard of.", ("Someone (2020) says so.",)), judge_claim("C4", ()))
    text = " ".join(Page(render_html(replace(report, claims=(*report.claims, untested)))).text.split())
    places = [text.index(f"{h.name} : {h.sentence}") for h in report.results[0].study.hypotheses]
    assert places == sorted(places)
    card = text[text.index("C4 · Unheard of.") :]
    assert card.index("No study of this report speaks of it.") < card.index("Someone (2020) says so.")
    assert "Equality within 1 pp matters." in text


def test_the_json_has_the_same_sentences() -> None:
    report = doctored_report()
    found = {c["claim"]: c["conclusion"] for c in json.loads(render_json(report))["claims"]}
    assert found == {c.id: sentences.conclude(v, report.condition(v)) for c, v in report.claims}


def test_a_study_at_two_presets_is_told_apart() -> None:
    quick = doctored_report(5).results[1]
    full = replace(quick, preset="full", study_hash="f" * 12)
    full = replace(full, verdicts=tuple(replace(v, n=7) for v in full.verdicts))
    report = Report((quick, full), ())
    assert report.study_of(full.verdicts[0]) is full and report.study_of(quick.verdicts[0]) is quick
    whole = judge_claim("C2", full.verdicts)
    assert report.studies_of(whole) == (full,)
    page = render_html(replace(report, claims=((Claim("C2", "It tolerates more."), whole),)))
    card = page[page.index('<article class="card" id="claim-c2">') : page.index("</article>")]
    assert "--preset full" in card and "--preset quick" not in card
    assert f'href="#{anchors("study", ["lr stability quick", "lr stability full"])[1]}"' in card
