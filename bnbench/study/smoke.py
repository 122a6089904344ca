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
LEAST_BATCH = 4
#: So many samples are evaluated: to evaluate a large network takes longer than two steps of it.
EVALUATED = 4
CURVE_POINTS = 1
#: A probe that costs more training steps a reading is left out: with a large network it takes minutes.
MOST_PASSES = 10
_DECIDED = ("steps", "batch_size", "n_train", "n_eval", "data_options")
#: Norms that take samples together take so many at most: two ghost batches make a batch.
_TOGETHER = {"ghost_size": LEAST_BATCH // 2, "reference_size": LEAST_BATCH}


def smallest(trial: Trial) -> Trial:
    """The row for two steps of the smallest batch that its norms take, on no more data than that.

    Norms that take samples together take fewer, and data that would have to be downloaded are made up. Raises
    BadInput for unknown data.
    """
    # Brings torch.
    from bnbench.data import DATASETS

    row = _with_smallest_batch(trial.replace(steps=STEPS))
    options = {**trial.data_options, **DATASETS[trial.data].offline}
    return row.replace(n_train=row.global_batch, n_eval=EVALUATED, data_options=options)


def cheap(probes: Mapping[str, Any]) -> dict[str, Any]:
    """The probes whose reading takes no longer than all else that is done with such a row.

    Those that read every so many steps do so before the first and after the last one: some, like `drift`,
    compare a reading with the one before.
    """
    # Brings torch.
    from bnbench.probes import PROBES

    kept = {name: options for name, options in probes.items() if PROBES[name].probe.passes <= MOST_PASSES}
    return {
        name: {**options, "every": min(options["every"], STEPS)} if "every" in options else options
        for name, options in kept.items()
    }


def left_of(space: Space | Mapping[str, Space]) -> Space | dict[str, Space]:
    """The dimensions of a space, given by cell or not, that :func:`smallest` leaves to it."""
    if isinstance(space, Mapping):
        return {cell: _left_of(found) for cell, found in space.items()}
    return _left_of(space)


def _left_of(space: Space) -> Space:
    return tuple(d for d in space if not set(_DECIDED) & set(fields_of(d)))


def _with_smallest_batch(trial: Trial) -> Trial:
    own = trial.batch_size
    if not _takes(trial, own):
        return trial  # What cannot be trained is refused, in this preset too.
    least = min(LEAST_BATCH, own)
    small = trial.replace(
        norm_options=_with_fewer(trial.norm_options, least),
        last_norm_options=_with_fewer(trial.last_norm_options, least),
    )
    sizes = range(least, own + 1)
    return next(row.replace(batch_size=size) for row in (small, trial) for size in sizes if _takes(row, size))


def _with_fewer(options: Mapping[str, Any], least: int) -> dict[str, Any]:
    """The options of a norm that takes fewer samples together."""
    taken = {name: min(options[name], most, least) for name, most in _TOGETHER.items() if options.get(name)}
    return {**options, **taken}


def _takes(trial: Trial, batch_size: int) -> bool:
    """Whether the norms of a row can be trained on batches of this size."""
    from bnbench.norms import normalization_batch_size

    try:
        for options in (trial.norm_options, {**trial.norm_options, **trial.last_norm_options}):
            normalization_batch_size(trial.norm, batch_size, **options)
    except BadInput:
        return False
    return True
