"""Holm's family, the verdict of a claim over its cells, and verdicts as JSON."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from bnbench.registry import BadInput
from bnbench.study import Table
from bnbench.study.claims import adjust, judge, judge_claim
from bnbench.study.verdicts import ClaimVerdict, Verdict, from_json, to_json
from tests.verdict_tables import GOOD, between, changed, hypothesis, judge_one, study


def family(p_values, claim="C", primary=True):
    base = judge_one(GOOD)
    return [dataclasses.replace(base, claim=claim, primary=primary, p_sign_flip=p) for p in p_values]


def test_holm_runs_over_the_declared_family_of_each_claim():
    verdicts = [*family([0.01, None, 0.04]), *family([0.03], "D"), *family([0.001], primary=False)]
    adjusted = adjust(verdicts, {"C": 6, "D": 1})
    assert [v.p_holm for v in adjusted] == [pytest.approx(0.06), None, pytest.approx(0.2), 0.03, None]
    assert [dataclasses.replace(v, p_holm=None) for v in adjusted] == verdicts


def test_a_family_larger_than_declared_is_refused():
    with pytest.raises(BadInput, match="3 p-values cannot belong to a declared family of 2"):
        adjust(family([0.1, 0.2, 0.3]), {"C": 2})


INTERVALS = {"S": (1.5, 2.5), "R": (-0.5, 0.5), "I": (-0.5, 1.5)}


def cells_of(decisions, size=None, primary=True):
    """Verdicts of one claim whose cells are decided as the letters say."""
    size = size or max(1, len(decisions))
    level = 1 - 0.05 / size
    return [
        dataclasses.replace(
            judge_one(between(*INTERVALS[d], level=level), size=size), cell=f"{d}{i}", primary=primary
        )
        for i, d in enumerate(decisions)
    ]


@pytest.mark.parametrize(
    ("decisions", "decision"),
    [
        ("S", "SUPPORTED"),
        ("SSI", "SUPPORTED"),
        ("SI", "INCONCLUSIVE"),
        ("SSSSII", "SUPPORTED"),
        ("SSSIII", "INCONCLUSIVE"),
        ("SSR", "MIXED"),
        ("R", "REFUTED"),
        ("RRI", "REFUTED"),
        ("RI", "INCONCLUSIVE"),
        ("RRRRII", "REFUTED"),
        ("RRRIII", "INCONCLUSIVE"),
        ("SRI", "MIXED"),
        ("III", "INCONCLUSIVE"),
        ("", "INCONCLUSIVE"),
    ],
)
def test_two_thirds_of_the_primary_cells_decide_a_claim(decisions, decision):
    verdict = judge_claim("C", cells_of(decisions))
    assert verdict.decision == decision
    assert (verdict.n_cells, verdict.n_supported, verdict.n_refuted) == (
        len(decisions),
        decisions.count("S"),
        decisions.count("R"),
    )
    assert bool(verdict.condition) == (decision == "MIXED")


def test_declared_cells_that_were_not_run_count_against_a_claim():
    assert judge_claim("C", cells_of("SS", size=3)).decision == "SUPPORTED"
    assert judge_claim("C", cells_of("SS", size=4)).decision == "INCONCLUSIVE"
    assert judge_claim("C", cells_of("SS", size=4)).n_cells == 4


def test_exploratory_cells_and_other_claims_do_not_decide():
    others = [*cells_of("RR", primary=False), *(dataclasses.replace(v, claim="D") for v in cells_of("RR"))]
    verdict = judge_claim("C", [*others, *cells_of("SS")])
    assert (verdict.decision, [v.cell for v in verdict.cells]) == ("SUPPORTED", ["S0", "S1"])


def test_a_mixed_claim_names_where_it_holds_and_where_not():
    assert judge_claim("C", cells_of("SRI")).condition == "supported in S0 (C.a); refuted in R1 (C.a)"


def test_a_claim_is_not_mixed_where_its_cells_do_not_demonstrably_differ():
    # Supported by a hair, refuted by a hair: wide against narrow, and no visible difference between them.
    supported = dataclasses.replace(judge_one(between(0.01, 1.6)), cell="one")
    refuted = dataclasses.replace(judge_one(between(0.6, 0.99)), cell="two")
    assert (supported.decision, refuted.decision) == ("SUPPORTED", "REFUTED")
    verdict = judge_claim("C", [supported, refuted])
    assert (verdict.decision, verdict.condition) == ("INCONCLUSIVE", "")


def test_cells_of_a_mixed_claim_are_compared_in_units_of_their_delta():
    # The same numbers, once against a delta of 1 and once of 4: they differ only as shares of delta.
    supported = dataclasses.replace(judge_one(between(1.5, 2.5)), cell="one")
    refuted = judge_one(between(1.5, 2.5), the_hypothesis=hypothesis(delta=4.0))
    assert refuted.decision == "REFUTED"
    assert judge_claim("C", [supported, refuted]).decision == "MIXED"
    # And the reverse: far apart as numbers, equal as shares of delta.
    supported = judge_one(between(3.2, 4.2), the_hypothesis=hypothesis(delta=4.0))
    refuted = judge_one(between(0.8, 0.99))
    assert (supported.decision, refuted.decision) == ("SUPPORTED", "REFUTED")
    assert judge_claim("C", [supported, refuted]).decision == "INCONCLUSIVE"


def test_pairs_of_a_mixed_claim_are_holm_adjusted():
    supported = dataclasses.replace(judge_one(between(0.2, 1.8)), cell="one")
    refuted = dataclasses.replace(judge_one(between(-0.6, 0.6)), cell="two")
    p = scipy_stats.ttest_ind(supported.values, refuted.values, equal_var=False).pvalue
    assert 0.05 / 4 < p < 0.05
    assert judge_claim("C", [supported, refuted]).decision == "MIXED"
    many = [dataclasses.replace(refuted, cell=f"two{i}") for i in range(4)]
    assert judge_claim("C", [supported, *many]).decision == "INCONCLUSIVE"


def test_hypotheses_of_different_kinds_are_not_compared():
    supported = judge_one(between(1.5, 2.5))
    refuted = judge_one(between(-2.5, -1.5), the_hypothesis=hypothesis("C.b", kind="equivalent"))
    assert refuted.decision == "REFUTED"
    assert judge_claim("C", [supported, refuted]).decision == "INCONCLUSIVE"


def turned(verdicts):
    return [dataclasses.replace(v, against=True) for v in verdicts]


@pytest.mark.parametrize(
    ("decisions", "decision"),
    [("R", "SUPPORTED"), ("RRI", "SUPPORTED"), ("S", "REFUTED"), ("SI", "INCONCLUSIVE"), ("SR", "MIXED")],
)
def test_a_sentence_that_contradicts_its_claim_counts_the_other_way_round(decisions, decision):
    verdict = judge_claim("C", turned(cells_of(decisions)))
    assert verdict.decision == decision
    assert (verdict.n_supported, verdict.n_refuted) == (decisions.count("R"), decisions.count("S"))
    if decision == "MIXED":
        assert verdict.condition == "supported in R1 (C.a); refuted in S0 (C.a)"


def test_sentences_for_and_against_a_claim_add_up():
    """One cell supports the claim's sentence; the other refutes the sentence that contradicts it."""
    agreeing = [*cells_of("S", size=2), *turned(cells_of("R", size=2))]
    assert judge_claim("C", agreeing).decision == "SUPPORTED"
    # Both sentences supported: the claim holds and does not, by numbers that cannot be compared.
    opposed = [judge_one(between(1.5, 2.5)), *turned([judge_one(between(4.5, 5.5))])]
    assert [v.decision for v in opposed] == ["SUPPORTED", "SUPPORTED"]
    assert judge_claim("C", opposed).decision == "INCONCLUSIVE"


def test_the_judge_hands_on_that_a_sentence_contradicts_its_claim():
    verdict = judge_one(GOOD, the_hypothesis=hypothesis(against=True))
    assert (verdict.against, verdict.decision, verdict.on_claim) == (True, "SUPPORTED", "REFUTED")
    assert judge_one(between(-0.5, 1.5), the_hypothesis=hypothesis(against=True)).on_claim == "INCONCLUSIVE"
    assert (judge_one(GOOD).against, judge_one(GOOD).on_claim) == (False, "SUPPORTED")


def all_kinds_of_verdicts():
    claim = judge_claim("C", adjust(cells_of("SRI"), {"C": 3}))
    (missing,) = judge(study(), "quick", Table(()), {"C": 1})
    diverged = judge_one(GOOD, better=changed(3, status="diverged"))
    bounds = judge_one(GOOD, allows={3: "support"}, the_hypothesis=hypothesis(against=True))
    return [claim, *claim.cells, missing, judge_one([2.0] * 10), judge_one([2.0]), diverged, bounds]


@pytest.mark.parametrize("verdict", all_kinds_of_verdicts(), ids=lambda v: type(v).__name__)
def test_verdicts_survive_json_to_the_last_bit(verdict):
    text = json.dumps(to_json(verdict), allow_nan=False)
    assert from_json(json.loads(text)) == verdict


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1e99, 1e99), min_size=1, max_size=8), st.sampled_from(["greater", "equivalent"]))
def test_no_verdict_holds_a_number_that_json_lacks(values, kind):
    verdict = judge_one(values, the_hypothesis=hypothesis(kind=kind))
    assert from_json(json.loads(json.dumps(to_json(verdict), allow_nan=False))) == verdict


def test_an_unknown_field_in_json_is_named():
    with pytest.raises(BadInput, match="a Verdict has no field 'decison'; did you mean 'decision'"):
        from_json({"decison": "SUPPORTED"})
    with pytest.raises(BadInput, match="a ClaimVerdict has no field 'cell'"):
        from_json({"cells": [], "cell": "mlp"})


def test_verdicts_are_frozen():
    for verdict in (judge_one(GOOD), judge_claim("C", [])):
        assert isinstance(verdict, Verdict | ClaimVerdict)
        with pytest.raises(dataclasses.FrozenInstanceError):
            verdict.decision = "SUPPORTED"
