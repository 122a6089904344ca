"""Estimands: what a hypothesis measures, as one number a replicate signed in the claim's direction.

Study files bind the arms with `functools.partial(log_steps_ratio, better="batch", other="none")`; every
argument but the replicate is given by name. A row that is missing raises LookupError; the judge then calls
the cell incomplete. An estimate of which a part was not observed says what it still allows to show.
"""

from bnbench.study.estimands.gradients import (
    flow_against_theory,
    flow_gain,
    flow_repair,
    mean_field_factor,
)
from bnbench.study.estimands.probes import best_accuracy_difference, log_probe_ratio
from bnbench.study.estimands.rows import TRAINS_AT_ALL, stuck, stuck_share
from bnbench.study.estimands.scores import (
    accuracy_difference,
    best_difference,
    interaction,
    interior_gain,
    metric_change,
    metric_slope,
    rising_doses,
    spread_shrinkage,
)
from bnbench.study.estimands.speed import (
    area_difference,
    area_under_curve,
    log_examples_ratio,
    log_examples_ratio_difference,
    log_steps_allowance,
    log_steps_ratio,
    log_time_ratio,
    steps_to_target,
)
from bnbench.study.estimands.widths import (
    init_scale_width_difference,
    lr_width_difference,
    usable_lr_width,
)

__all__ = [
    "TRAINS_AT_ALL",
    "accuracy_difference",
    "area_difference",
    "area_under_curve",
    "best_accuracy_difference",
    "best_difference",
    "flow_against_theory",
    "flow_gain",
    "flow_repair",
    "init_scale_width_difference",
    "interaction",
    "interior_gain",
    "log_examples_ratio",
    "log_examples_ratio_difference",
    "log_probe_ratio",
    "log_steps_allowance",
    "log_steps_ratio",
    "log_time_ratio",
    "lr_width_difference",
    "mean_field_factor",
    "metric_change",
    "metric_slope",
    "rising_doses",
    "spread_shrinkage",
    "steps_to_target",
    "stuck",
    "stuck_share",
    "usable_lr_width",
]
