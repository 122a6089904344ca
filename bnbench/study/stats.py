"""The statistics behind verdicts: pure functions of sequences of numbers, one a replicate.

Student's t decides; the exact sign-flip p, the bootstrap interval and effect sizes are shown beside it. An
interval that cannot be had (fewer than two values, or no spread) is None. `level` is a confidence level
between 0 and 1.

>>> differences = [1.2, 0.7, 2.1, 0.4, 1.0, 1.6, -0.2, 0.9]
>>> low, high = paired_t_interval(differences, level=0.95)
>>> print(f"{low:.2f} to {high:.2f}, p = {sign_flip_p(differences):.3f}, d_z = {d_z(differences):.2f}")
0.37 to 1.55, p = 0.016, d_z = 1.36
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from bnbench.registry import BadInput

__all__ = [
    "MOST_SIGN_FLIPS",
    "Interval",
    "average_ranks",
    "bca_interval",
    "censored_rank_p",
    "cliffs_delta",
    "critical_difference",
    "d_z",
    "expected_half_width",
    "friedman_p",
    "holm",
    "mean_rank_correlation",
    "page_trend",
    "paired_t_interval",
    "paired_t_p",
    "rank_groups",
    "restricted_mean",
    "sign_flip_p",
    "smallest_visible_effect",
    "standard_deviation",
    "success_rate",
    "welch_p",
]

#: Sums closer than this share of the sum of absolute values are ties; a spread below it is rounding.
_TIE = 1e-10
#: Beyond this many values the exact sign-flip test would need more than 2^20 sums a half.
MOST_SIGN_FLIPS = 40

Interval = tuple[float, float]
_Array = npt.NDArray[np.float64]


def standard_deviation(values: Sequence[float]) -> float:
    """√(Σ(x − x̄)²/(n − 1)), and 0 where n < 2 or where the values differ by rounding only."""
    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:
        return 0.0
    sd = float(np.std(x, ddof=1))
    return sd if sd > _TIE * float(np.max(np.abs(x))) else 0.0


def paired_t_interval(values: Sequence[float], level: float) -> Interval | None:
    """Student's interval of the mean of paired differences: x̄ ± t_{(1+level)/2, n−1} s/√n."""
    half = smallest_visible_effect(values, level)
    if half is None:
        return None
    mean = float(np.mean(values))
    return mean - half, mean + half


def paired_t_p(values: Sequence[float]) -> float | None:
    """Two-sided p of Student's t for a mean of 0: 2 P(T_{n−1} ≥ |x̄| √n / s)."""
    sd = standard_deviation(values)
    if sd == 0:
        return None
    t = abs(float(np.mean(values))) * math.sqrt(len(values)) / sd
    return float(2 * special.stdtr(len(values) - 1, -t))


def smallest_visible_effect(values: Sequence[float], level: float) -> float | None:
    """The half-width of Student's interval: an effect below it cannot be told from none at this level."""
    sd = standard_deviation(values)
    return expected_half_width(sd, len(values), level) if sd > 0 else None


def expected_half_width(sd: float, n: int, level: float) -> float:
    """The half-width t_{(1+level)/2, n−1} sd/√n that n replicates with this standard deviation would give.

    Raises BadInput for n < 2 or a level outside (0, 1).
    """
    _check_level(level)
    if n < 2:
        raise BadInput(f"an interval needs 2 replicates or more, not {n}")
    return float(special.stdtrit(n - 1, (1 + level) / 2)) * sd / math.sqrt(n)


def sign_flip_p(values: Sequence[float]) -> float:
    """Exact two-sided p of the sign-flip test: how often random signs give a sum at least as far from 0.

    p = #{s ∈ {−1, 1}ⁿ : |Σ sᵢxᵢ| ≥ |Σ xᵢ|} / 2ⁿ (Fisher 1935, ch. 3), ties counted. All 2ⁿ sums are
    counted without listing them: those of the first half of the values meet the sorted sums of the second
    half (Horowitz & Sahni 1974), 2^(n/2) each. Raises BadInput for no values, or for more than 40.
    """
    x = np.abs(np.asarray(values, dtype=np.float64))
    n = x.size
    if not 1 <= n <= MOST_SIGN_FLIPS:
        raise BadInput(f"the exact sign-flip test takes 1 to {MOST_SIGN_FLIPS} values, not {n}")
    threshold = abs(float(np.sum(values))) - _TIE * float(np.sum(x))
    if threshold <= 0:
        return 1.0
    first, second = _signed_sums(x[: n // 2]), np.sort(_signed_sums(x[n // 2 :]))
    reaching = second.size - np.searchsorted(second, threshold - first, side="left")
    # The sums are symmetric about 0: as many reach −threshold from the other side.
    return math.ldexp(int(reaching.sum()), 1 - n)


def _signed_sums(x: _Array) -> _Array:
    """The sums of x under all 2^len(x) choices of signs."""
    sums = np.zeros(1)
    for value in x:
        sums = np.concatenate([sums - value, sums + value])
    return sums


def censored_rank_p(values: Sequence[float], allows: Sequence[str]) -> float:
    """Exact two-sided p of the signed-rank test for paired differences of which some are only bounds.

    A value that allows "both" was observed; the true one behind "support" is at least, behind "refute" at
    most as large. A size |value| scores its mean rank over all orders of the true sizes that the bounds leave
    possible, over n + 1 (Woolson & Lachenbruch 1980, Wilcoxon scores): 1 − P where it was observed, P =
    Π nⱼ/(nⱼ + 1) over the observed sizes up to it and nⱼ the sizes that are at least the j-th; 1 − P/2 where
    it is a bound. Equal sizes share their mean. Zeros, "neither", and bounds that leave the sign open score 0
    and are not ranked. The signed scores go through :func:`sign_flip_p`; without bounds and ties the test is
    Wilcoxon's. Raises BadInput for no values, or for more than 40.

    In seven of ten pairs one arm alone reached its target, and in the rest neither was much faster:

    >>> censored_rank_p([0.9] * 7 + [-0.1, -0.2, 0.3], ["support"] * 7 + ["both"] * 3)
    0.009765625
    """
    if len(values) != len(allows):
        raise BadInput(f"{len(values)} values do not go with {len(allows)} notes on what they allow")
    known = [
        (abs(value), allowed != "both", 1.0 if value > 0 else -1.0)
        for value, allowed in zip(values, allows, strict=True)
        if allowed == "both" or (allowed == "support" and value > 0) or (allowed == "refute" and value < 0)
    ]
    scores = _censored_scores([(size, bound) for size, bound, _ in known if size > 0])
    signed = [sign * scores[size, bound] if size > 0 else 0.0 for size, bound, sign in known]
    return sign_flip_p([*signed, *[0.0] * (len(values) - len(known))])


def _censored_scores(sizes: Sequence[tuple[float, bool]]) -> dict[tuple[float, bool], float]:
    """The score of each (size, is a bound); an observed size comes before an equal bound."""
    observed: dict[float, list[float]] = {}
    scores: dict[tuple[float, bool], float] = {}
    beyond = 1.0
    for index, (size, bound) in enumerate(sorted(sizes)):
        if bound:
            scores[size, bound] = 1 - beyond / 2
        else:
            at_least = len(sizes) - index
            beyond *= at_least / (at_least + 1)
            observed.setdefault(size, []).append(1 - beyond)
    return scores | {(size, False): float(np.mean(found)) for size, found in observed.items()}


def success_rate(steps: Sequence[float | None]) -> float:
    """The share of rows that reached their target; None stands for one that did not. 0 to 1.

    Raises BadInput for no rows.

    >>> success_rate([120.0, None, 310.0, 95.0])
    0.75
    """
    if not len(steps):
        raise BadInput("a success rate needs one row or more")
    return sum(found is not None for found in steps) / len(steps)


def restricted_mean(steps: Sequence[float | None], budget: float) -> float:
    """The mean of min(T, budget) over rows, where T is None if the target was never reached.

    It is the area under the share of rows that have not yet reached the target (Royston & Parmar 2013), and
    needs no guess about what lies beyond the budget. Raises BadInput for no rows.

    >>> restricted_mean([120.0, None, 310.0, 95.0], budget=600)
    281.25
    """
    if not len(steps):
        raise BadInput("a restricted mean needs one row or more")
    return float(np.mean([budget if found is None else min(found, budget) for found in steps]))


def bca_interval(values: Sequence[float], level: float = 0.95, *, seed: int) -> Interval | None:
    """Bias-corrected and accelerated bootstrap interval of the mean from 9,999 resamples (Efron 1987).

    It covers about .90 where it says .95 at n = 10, so it is shown and decides nothing.
    """
    _check_level(level)
    if standard_deviation(values) == 0:
        return None
    with warnings.catch_warnings():
        # A degenerate bootstrap distribution warns and gives NaN: it becomes None below.
        warnings.simplefilter("ignore")
        interval = stats.bootstrap(
            (np.asarray(values, dtype=np.float64),),
            np.mean,
            confidence_level=level,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def holm(p_values: Sequence[float | None], family_size: int) -> tuple[float | None, ...]:
    """Holm's step-down adjusted p of members of a family; members without a p count as 1 and keep None.

    With p₍₁₎ ≤ p₍₂₎ ≤ … and m = family_size, adjusted p₍ᵢ₎ = max_{j ≤ i} min(1, (m − j + 1) p₍ⱼ₎) (Holm
    1979). Members that were declared and are not given count as 1 too. Raises BadInput where more members
    are given than the family has.
    """
    if len(p_values) > family_size:
        raise BadInput(f"{len(p_values)} p-values cannot belong to a declared family of {family_size}")
    adjusted: list[float | None] = [None] * len(p_values)
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    running = 0.0
    for rank, (p, index) in enumerate(known):
        running = max(running, min(1.0, (family_size - rank) * p))
        adjusted[index] = running
    return tuple(adjusted)


def welch_p(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Two-sided p of Welch's t for equal means of two independent samples; None where one has no spread."""
    if standard_deviation(one) == 0 or standard_deviation(two) == 0:
        return None
    return float(stats.ttest_ind(one, two, equal_var=False).pvalue)


def d_z(values: Sequence[float]) -> float | None:
    """The standardized mean of paired differences, x̄/s (Cohen 1988, p. 48)."""
    sd = standard_deviation(values)
    return float(np.mean(values)) / sd if sd > 0 else None


def cliffs_delta(better: Sequence[float], other: Sequence[float]) -> float:
    """Dominance of one sample over another: (#{bᵢ > oⱼ} − #{bᵢ < oⱼ}) / (n_b n_o), −1 to 1 (Cliff 1993).

    Of paired differences against `(0.0,)` it is Cliff's within-pair dominance. Raises BadInput for an empty
    sample.
    """
    if not len(better) or not len(other):
        raise BadInput("Cliff's delta needs one value or more in both samples")
    return float(np.sign(np.subtract.outer(np.asarray(better, float), np.asarray(other, float))).mean())


def page_trend(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Page's L and its one-sided p for values that rise from column to column (Page 1963).

    `rows` are replicates (2 or more), columns are doses (3 or more) in the order in which values should rise.
    """
    blocks = _as_blocks(rows, least=3)
    if len(blocks) < 2:
        raise BadInput("Page's trend test needs two rows or more")
    result = stats.page_trend_test(blocks)
    return float(result.statistic), float(result.pvalue)


def mean_rank_correlation(rows: Sequence[Sequence[float]]) -> float:
    """The mean over rows of Spearman's ρ between a row's values and their places, −1 to 1; a tied row has 0.

    It says how regular the trend is that Page's test looks for: without ties ρ̄ = 12 L/(n k (k² − 1)) −
    3 (k + 1)/(k − 1) for n rows of k columns (2 or more).

    >>> mean_rank_correlation([[0.1, 0.3, 0.2], [0.5, 0.6, 0.9]])
    0.75
    """
    blocks = _as_blocks(rows, least=2)
    places = np.arange(blocks.shape[1]) - (blocks.shape[1] - 1) / 2
    ranks = stats.rankdata(blocks, axis=1) - (blocks.shape[1] + 1) / 2
    scale = np.sqrt((ranks**2).sum(axis=1) * (places**2).sum())
    return float(np.mean(np.divide(ranks @ places, scale, out=np.zeros(len(blocks)), where=scale > 0)))


def average_ranks(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean rank of each column over the rows, 1 for the highest value of a row, ties sharing theirs."""
    return tuple(float(r) for r in stats.rankdata(-_as_blocks(rows, least=1), axis=1).mean(axis=0))


def friedman_p(rows: Sequence[Sequence[float]]) -> float | None:
    """Friedman's p for columns (3 or more) of equal mean rank; None where every row is one tie."""
    blocks = _as_blocks(rows, least=3)
    if (blocks == blocks[:, :1]).all():
        return None
    return float(stats.friedmanchisquare(*blocks.T).pvalue)


def critical_difference(num_columns: int, num_rows: int, level: float = 0.95) -> float:
    """Nemenyi's critical difference of two mean ranks: q √(k(k + 1)/(6N)) (Demšar 2006, section 3.2.2).

    k columns over N rows; q is the upper quantile of the studentized range of k means, infinite degrees of
    freedom, divided by √2.
    """
    _check_level(level)
    if num_columns < 2 or num_rows < 1:
        raise BadInput(f"ranks need 2 columns and 1 row or more, not {num_columns} and {num_rows}")
    q = float(stats.studentized_range.ppf(level, num_columns, np.inf)) / math.sqrt(2)
    return q * math.sqrt(num_columns * (num_columns + 1) / (6 * num_rows))


def rank_groups(ranks: Sequence[float], difference: float) -> tuple[tuple[int, ...], ...]:
    """The maximal groups of columns of which no two mean ranks differ by more than a critical difference.

    Columns are named by their place in `ranks`; each group, and the groups, go by rising rank. These are the
    bars of a critical-difference diagram (Demšar 2006, figure 1), so a column that differs from all others is
    in no group.

    >>> rank_groups([2.0, 1.0, 3.5, 2.5], difference=1.5)
    ((1, 0, 3), (0, 3, 2))
    """
    order = sorted(range(len(ranks)), key=lambda column: ranks[column])
    groups: list[tuple[int, ...]] = []
    reached = 0
    for first, column in enumerate(order):
        end = first
        while end < len(order) and ranks[order[end]] - ranks[column] <= difference:
            end += 1
        # A group that ends where the one before it ends is part of that one.
        if end > reached and end - first > 1:
            groups.append(tuple(order[first:end]))
        reached = max(reached, end)
    return tuple(groups)


def _as_blocks(rows: Sequence[Sequence[float]], least: int) -> _Array:
    if not rows or len({len(row) for row in rows}) != 1 or len(rows[0]) < least:
        raise BadInput(f"ranks need one row or more of equal length, each with {least} columns or more")
    return np.asarray(rows, dtype=np.float64)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise BadInput(f"level must be between 0 and 1, not {level!r}")
