"""The preset smoke: the rows of a study's full size, made as small as still trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bnbench.registry import BadInput
from bnbench.study.space import Space, fields_of
from bnbench.study.trial import Trial

#: Two steps: the second one starts from what the first has changed.
STEPS = 2
#: Batches are not made smaller than this.
LEAST_BATCH = 8
#: So many samples are evaluated: to evaluate a large network takes longer than two steps of it.
EVALUATED = 8
CURVE_POINTS = 1
#: A probe that costs more training steps a reading is left out: with a large network it takes minutes.
MOST_PASSES = 10
_DECIDED = ("steps", "batch_size", "n_train", "n_eval", "data_options")


def smallest(trial: Trial) -> Trial:
    """The row for two steps of the smallest batch that its norms take, on no more data than that.

    Data that would have to be downloaded are made up. Raises BadInput for unknown data.
    """
    # Brings torch.
    from bnbench.data import DATASETS

    row = trial.replace(steps=STEPS, batch_size=_smallest_batch(trial))
    options = {**trial.data_options, **DATASETS[trial.data].offline}
    changes = {"n_train": row.global_batch, "n_eval": EVALUATED, "data_options": options}
    for name in ("norm_options", "last_norm_options"):
        given = getattr(trial, name)
        if "reference_size" in given:
            changes[name] = {**given, "reference_size": min(given["reference_size"], row.batch_size)}
    return row.replace(**changes)


def cheap(probes: Mapping[str, Any]) -> dict[str, Any]:
    """The probes whose reading takes no longer than all else that is done with such a row."""
    # Brings torch.
    from bnbench.probes import PROBES

    return {name: options for name, options in probes.items() if PROBES[name].probe.passes <= MOST_PASSES}


def left_of(space: Space | Mapping[str, Space]) -> Space | dict[str, Space]:
    """The dimensions of a space, given by cell or not, that :func:`smallest` leaves to it."""
    if isinstance(space, Mapping):
        return {cell: _left_of(found) for cell, found in space.items()}
    return _left_of(space)


def _left_of(space: Space) -> Space:
    return tuple(d for d in space if not set(_DECIDED) & set(fields_of(d)))


def _smallest_batch(trial: Trial) -> int:
    own = trial.batch_size
    if not _takes(trial, own):
        return own  # What cannot be trained is refused, in this preset too.
    return next(size for size in range(min(LEAST_BATCH, own), own + 1) if _takes(trial, size))


def _takes(trial: Trial, batch_size: int) -> bool:
    """Whether the norms of a row can be trained on batches of this size."""
    from bnbench.norms import normalization_batch_size

    try:
        for options in (trial.norm_options, {**trial.norm_options, **trial.last_norm_options}):
            normalization_batch_size(trial.norm, batch_size, **options)
    except BadInput:
        return False
    return True
