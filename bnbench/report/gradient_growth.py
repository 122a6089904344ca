"""The growth of gradients at initialization beside its mean-field theory: one figure of one study."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bnbench.probes import Trace
from bnbench.report.album import Album
from bnbench.report.drawing import INK, ArmStyle, Drawing, Group, finish, house_style, panel
from bnbench.report.result import StudyResult
from bnbench.report.summaries import confirmed
from bnbench.study.estimands.gradients import mean_field_factor

#: Measured factors are to lie this close to the theory's, as a share of it.
TOLERANCE = 0.02

_STUDY, _BATCH_SIZE = "gradient_flow", re.compile(r" · batch_size=\d+")
#: Growth factors at initialization, a number a replicate, by arm and batch size.
Factors = Mapping[str, Mapping[int, Sequence[float]]]


def growth_group(album: Album, name: str, result: StudyResult, styles: Mapping[str, ArmStyle]) -> Group:
    """The measured growth beside the theory's, a figure for each setting; none but in the study that asks."""
    settings = growth_by_batch_size(result) if result.study.name == _STUDY else {}
    return Group(
        "Gradient growth against its theory",
        "The factor by which the gradient's norm grows from a layer to the one below, before the first step."
        " Small marks: one replicate each. Large marks: their geometric mean. Dashed: the exact factor for an"
        " infinitely wide network of linear maps, batch normalization and ReLU (Yang et al. 2019, Theorem 8);"
        f" grey: ±{100 * TOLERANCE:g} %.",
        tuple(
            (setting, album.draw(draw_growth, f"{name}-growth-{i}", setting, factors, styles))
            for i, (setting, factors) in enumerate(settings.items(), start=1)
        ),
    )


def growth_by_batch_size(result: StudyResult) -> dict[str, Factors]:
    """The growth factors before the first step, by setting.

    A setting is what cells have in common that differ in their batch size only. Arms at fewer than three
    batch sizes are left out, and settings without the arm `batch`.
    """
    settings: dict[str, dict[str, dict[int, list[float]]]] = {}
    for cell in result.design.cells:
        setting = _BATCH_SIZE.sub("", cell.name)
        if setting == cell.name:
            continue
        for arm, entries in confirmed(result, cell.name).items():
            for entry in entries.values():
                trace = entry.result.traces.get("gradient_flow", Trace())
                factor = dict(zip(trace.steps, trace.values.get("factor", ()), strict=False)).get(0, math.nan)
                if math.isfinite(factor) and factor > 0:
                    sizes = settings.setdefault(setting, {}).setdefault(arm, {})
                    sizes.setdefault(entry.trial.batch_size, []).append(factor)
    wide = {s: {a: sizes for a, sizes in arms.items() if len(sizes) >= 3} for s, arms in settings.items()}
    return {setting: arms for setting, arms in wide.items() if "batch" in arms}


def draw_growth(name: str, setting: str, factors: Factors, styles: Mapping[str, ArmStyle]) -> Drawing:
    """The growth of gradients at initialization by batch size, every replicate, and what theory says."""
    sizes = sorted({size for found in factors.values() for size in found})
    # The theory speaks of batches of four and more.
    least = max(sizes[0], 4)
    fine = [least * (sizes[-1] / least) ** (i / 60) for i in range(61)]
    exact = [mean_field_factor(size) for size in fine]
    with house_style():
        figure, axes = panel(255.0, factors, styles, markers=True)
        inner, outer = ([value * side for value in exact] for side in (1 - TOLERANCE, 1 + TOLERANCE))
        axes.fill_between(fine, inner, outer, color=INK, alpha=0.13, linewidth=0)
        axes.plot(fine, exact, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        for arm, found in factors.items():
            look = styles[arm]
            style = {"color": look.colour, "marker": look.marker, "linestyle": "none", "markeredgewidth": 0}
            dots = [(size, factor) for size, values in found.items() for factor in values]
            axes.plot(*zip(*dots, strict=True), markersize=3.2, alpha=0.45, **style)
            means = [(size, statistics.geometric_mean(found[size])) for size in sorted(found)]
            axes.plot(*zip(*means, strict=True), markersize=6.5, **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("batch size that statistics are taken over")
        axes.set_ylabel("gradient growth per layer, ×")
        middle = len(fine) // 2
        axes.annotate(
            "mean-field theory", (fine[middle], exact[middle]), xytext=(4, 12), textcoords="offset points",
            fontsize=9.5,
        )  # fmt: skip
        return finish(figure, name, f"Gradient growth per layer at initialization by batch size, {setting}")
