"""The usual dimensions of a training recipe, by the names that `bnbench search --space` takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bnbench.registry import BadInput, nearest
from bnbench.study.space import Choice, Dimension, Range, Space

BATCH_SIZES = (32, 64, 128, 256)
LEARNING_RATES = (1e-3, 3.0)
PLACEMENTS = {
    "norm-act": "before the activation",
    "act-norm": "after the activation",
    "pre-act": "first in the block",
    "post-add": "after the addition",
}
_DROPOUT = {
    "none": {"dropout": 0.0, "dropout_at": "all"},
    "0.1 everywhere": {"dropout": 0.1, "dropout_at": "all"},
    "0.1 before the norm": {"dropout": 0.1, "dropout_at": "before-norm"},
    "0.2 last": {"dropout": 0.2, "dropout_at": "last"},
    "0.5 last": {"dropout": 0.5, "dropout_at": "last"},
}
_WEIGHT_DECAY = {
    "none": {"weight_decay": 0.0, "decay_norm": False},
    "1e-4": {"weight_decay": 1e-4, "decay_norm": False},
    "1e-3": {"weight_decay": 1e-3, "decay_norm": False},
    "1e-2": {"weight_decay": 1e-2, "decay_norm": False},
    "1e-3, norms too": {"weight_decay": 1e-3, "decay_norm": True},
    "1e-2, norms too": {"weight_decay": 1e-2, "decay_norm": True},
}
#: The norms with that option; named here, since to read a study must not take loading torch.
WITH_GAMMA_INIT = ("batch", "group", "layer")
_GAMMA_INIT = {text: {"norm_options": {"gamma_init": float(text)}} for text in ("0.3", "1", "3")}

#: Every name, in the order in which reports show it.
NAMES = (
    *("lr", "schedule", "batch_size", "placement", "dropout", "weight_decay", "label_smoothing"),
    "gamma_init",
)


def recipe_space(
    names: Iterable[str] = NAMES,
    *,
    norm: str,
    examples: int,
    orders: Sequence[str] = ("norm-act", "act-norm"),
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Space:
    """The dimensions of these names; the learning rate is always among them.

    Every batch size reads the same number of `examples`, so it sets the number of steps. `orders` are what
    the model offers. What the norm does not have is left out. Raises BadInput for an unknown name.
    """
    wanted = {"lr", *names}
    for name in wanted:
        if name not in NAMES:
            raise BadInput(f"no dimension named {name!r}{nearest(name, NAMES)}")
    if norm == "none":
        wanted.discard("placement")
    if not _has_scale(norm):
        wanted.discard("gamma_init")
    return tuple(_dimension(name, norm, examples, orders, batch_sizes) for name in NAMES if name in wanted)


def recipe_start(norm: str) -> dict[str, float]:
    """The options with which a norm's defaults are a point of its space, at which a search then starts."""
    return {"gamma_init": 1.0} if _has_scale(norm) else {}


def _has_scale(norm: str) -> bool:
    return norm in WITH_GAMMA_INIT


def _dimension(
    name: str, norm: str, examples: int, orders: Sequence[str], batch_sizes: Sequence[int]
) -> Dimension:
    if name == "lr":
        return Range("lr", *LEARNING_RATES)
    if name == "schedule":
        return Choice("schedule", ("constant", "cosine", "trapezoid"))
    if name == "batch_size":
        steps = {size: max(1, examples // size) for size in batch_sizes}
        return Choice(name, {str(b): {"batch_size": b, "steps": steps[b]} for b in batch_sizes})
    if name == "placement":
        return Choice(name, {PLACEMENTS[order]: {"order": order} for order in orders})
    if name == "dropout":
        levels = {k: v for k, v in _DROPOUT.items() if norm != "none" or v["dropout_at"] != "before-norm"}
        return Choice(name, levels)
    if name == "weight_decay":
        return Choice(name, {k: v for k, v in _WEIGHT_DECAY.items() if norm != "none" or not v["decay_norm"]})
    if name == "label_smoothing":
        return Choice(name, {"none": {name: 0.0}, "0.1": {name: 0.1}})
    return Choice(name, _GAMMA_INIT)
