"""What a row says about its training: the module's arguments, when it is looked at, whether it can train."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from bnbench.data import Arrays, augmentation, seed_of, shape_of
from bnbench.engine.chunked import ChunkedClassifier
from bnbench.engine.distributed import Group, launcher
from bnbench.lit import check_model
from bnbench.norms import normalization_batch_size
from bnbench.probes.base import Probe, build_probe
from bnbench.registry import BadInput
from bnbench.study.trial import Trial

CURVE_RATIO = 1.15
LOOKS = 40  # how often a row with `until_train_nll` looks at its training NLL, at most
#: Fields of a row that its module can be built with whatever they are.
_FREE = {"lr", "data_seed", "seed", "repeat", "score_on", "curve_points", "until_train_nll", "alone"}


def module_arguments(trial: Trial) -> dict[str, Any]:
    """The arguments of NormClassifier for a row, as plain values."""
    in_shape, num_classes = shape_of(trial.data, **trial.data_options)
    same = (
        "model model_options norm norm_options last_norm_options reparam order activation dropout dropout_at"
        " init init_scale bias_init logit_scale lr momentum weight_decay decay_norm gamma_decay schedule"
        " warmup adaptive_clip label_smoothing steps"
    )
    row = trial.as_dict()
    return {
        **{name: row[name] for name in same.split()},
        "in_shape": list(in_shape),
        "num_classes": num_classes,
        "seed": seed_of(*trial.training_seed),
    }


def classifier_of(trial: Trial, train: Arrays, group: Group = Group()) -> ChunkedClassifier:  # noqa: B008
    """The module that trains a row, on these data."""
    return ChunkedClassifier(
        train=train,
        batch_size=trial.batch_size,
        training_seed=trial.training_seed,
        augment=trial.augment,
        clip_norm=trial.clip_norm,
        group=group,
        **module_arguments(trial),
    )


@functools.lru_cache(maxsize=4096)
def _check_shape(text: str) -> None:
    """Build the row's module on the meta device; rows that differ in seed or learning rate share it."""
    trial = Trial(**json.loads(text))
    arguments = module_arguments(trial)
    check_model(arguments.pop("model"), arguments.pop("norm"), **arguments)
    augmentation(trial.augment, tuple(arguments["in_shape"]))
    probes_of(trial)
    normalized_together(trial)
    normalized_together(trial.replace(norm_options={**trial.norm_options, **trial.last_norm_options}))


def probes_of(trial: Trial) -> list[Probe]:
    """The probes of a row. Raises BadInput for unknown names, options and values."""
    for name, options in trial.probes.items():
        if not isinstance(options, Mapping):
            raise BadInput(f"probes: the options of {name!r} must be a mapping such as {{}}, not {options!r}")
    return [build_probe(name, **options) for name, options in trial.probes.items()]


def normalized_together(trial: Trial) -> int | None:
    """How many samples share one set of statistics in training; None without batch statistics."""
    size = trial.global_batch if trial.norm == "sync_batch" else trial.batch_size
    return normalization_batch_size(trial.norm, size, **trial.norm_options)


def check_trial(trial: Trial) -> None:
    """Raise BadInput where a row cannot train: unknown names, groups that do not divide, and the like."""
    if trial.num_nodes > 1 and launcher() is None:
        raise BadInput(
            f"num_nodes is {trial.num_nodes}: start the row on all nodes at once, by torchrun (--nnodes"
            f" {trial.num_nodes} --nproc-per-node {trial.devices} -m bnbench.cli train trial.json) or by srun"
            f" (--nodes {trial.num_nodes} --ntasks-per-node {trial.devices} bnbench train trial.json)"
        )
    shape = {name: value for name, value in trial.changed().items() if name not in _FREE}
    _check_shape(json.dumps(shape, sort_keys=True))


def curve_steps(steps: int, points: int) -> list[int]:
    """Up to `points` steps that end at `steps` and grow by a ratio of 1.15, rounded to whole steps."""
    return sorted({max(1, round(steps / CURVE_RATIO**back)) for back in range(points)})


def look_steps(trial: Trial) -> range:
    """The steps after which a row looks whether it has reached `until_train_nll`; none without one."""
    every = math.ceil(trial.steps / LOOKS)
    return range(every, trial.steps, every) if trial.until_train_nll is not None else range(0)
