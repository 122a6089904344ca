"""A trial: one training as a frozen row of plain values, whose content hash is its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bnbench.registry import BadInput, nearest

#: Raised when code or a default changes the numbers of a row that looks the same.
ROW_VERSION = 2

_PLAIN = {"str": str, "int": int, "float": float, "bool": bool}
# Beyond these, a float no longer tells neighbouring whole numbers apart, and SQLite has no whole number.
_LARGEST_EXACT_FLOAT = 2**53
_LARGEST_INT = 2**63 - 1
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 100
_CHOICES = {
    "score_on": ("val", "test"),
    "optimizer": ("sgd",),
    "schedule": ("constant", "cosine", "trapezoid"),
    "recalibration": ("none", "precise"),
    "precision": ("32-true", "64-true", "bf16-mixed"),
    "backend": ("single", "eager", "compiled"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One training. Every field is a plain value with a neutral default.

    Two trials are equal where their keys are. A number in options is kept as a whole number where it is one,
    so that `{"eps": 1.0}` and `{"eps": 1}` are the same row.

    `seed` and `score_on` seed the training together: a tuning row reads validation data, a confirmed row
    reads test data too, and both train from different random numbers on the same data (`data_seed`).
    `n_train` is the number of training samples, `n_eval` the most validation and test samples that are read.
    `batch_size` is that of one device. `steps` is the training budget in optimizer steps; `warmup` is the
    share of it with a linearly rising learning rate; `curve_points` the number of geometrically spaced
    evaluations on the way. With `until_train_nll` the training stops earlier, at the first of some 40 equally
    spaced evaluations whose training NLL (evaluation mode, precise statistics) is at or below that number.

    `clip_norm` bounds the norm of all gradients together, `adaptive_clip` that of each unit's gradient by the
    norm of its weights (:func:`bnbench.optimization.clip_by_unit`).
    `last_norm_options` are changes to `norm_options` for the norm of the last hidden layer alone.
    `logit_scale` multiplies the logits. `gamma_decay` is an L2 penalty on the scales of norms, beside what
    `decay_norm` gives them. `probes` maps names of probes to their options,
    `{"gradient_flow": {"steps": [0, 100]}}`: they measure on the way and change nothing. `repeat` counts
    trainings of one row that differ in their random numbers alone: one that is not 0 joins the seed of the
    training. With `alone` a study trains nothing beside the row, so that its `time/step_ms` is that of an
    idle machine.

    `backend` says how the row is trained: "single" by itself, "eager" and "compiled" in a fleet, by a step
    that is vectorized over the fleet's rows (`torch.vmap`), and for "compiled" also compiled. It is part of
    the key, since rounding differs between them; with which other rows, and how many, changes nothing.
    """

    data: str = "mnist1d"
    data_options: Mapping[str, Any] = field(default_factory=dict)
    data_seed: int = 0
    n_train: int | None = None
    n_eval: int | None = None
    label_noise: float = 0.0
    augment: str = "none"
    model: str = "mlp"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    norm: str = "batch"
    norm_options: Mapping[str, Any] = field(default_factory=dict)
    last_norm_options: Mapping[str, Any] = field(default_factory=dict)
    reparam: str | None = None
    order: str = "norm-act"
    activation: str = "relu"
    dropout: float = 0.0
    dropout_at: str = "all"
    init: str = "he"
    init_scale: float = 1.0
    bias_init: str | float = "zero"
    logit_scale: float = 1.0
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay_norm: bool = False
    gamma_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.0
    clip_norm: float | None = None
    adaptive_clip: float | None = None
    label_smoothing: float = 0.0
    batch_size: int = 64
    steps: int = 500
    until_train_nll: float | None = None
    seed: int = 0
    repeat: int = 0
    score_on: str = "val"
    curve_points: int = 0
    probes: Mapping[str, Any] = field(default_factory=dict)
    recalibration: str = "none"
    alone: bool = False
    devices: int = 1
    num_nodes: int = 1
    precision: str = "32-true"
    backend: str = "single"

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if (value := getattr(self, f.name)) is not f.default:
                object.__setattr__(self, f.name, _checked(f.name, str(f.type), value))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise BadInput(f"{name} cannot be {shown(value)}{nearest(value, choices)}")
        for name in ("batch_size", "steps", "devices", "num_nodes"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of 1 or more")
        for name in ("data_seed", "seed", "repeat"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a whole number of 0 or more")
        for name in ("n_train", "n_eval"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "1 or more, or None")
        for name in ("lr", "init_scale", "logit_scale"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("weight_decay", "gamma_decay", "curve_points"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("clip_norm", "adaptive_clip", "until_train_nll"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "above 0, or None")
        for name in ("label_noise", "dropout", "momentum", "label_smoothing"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        _require(0 <= self.warmup <= 1, "warmup", self.warmup, "between 0 and 1")
        fits = self.backend == "single" or self.world_size == 1
        _require(fits, "backend", self.backend, "'single' for a row on several devices")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trial) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def training_seed(self) -> tuple[int | str, ...]:
        """What seeds every random number of the training; the data's is `data_seed`."""
        repeated = ("repeat", self.repeat) if self.repeat else ()
        return (self.seed, self.score_on, *repeated)

    @property
    def world_size(self) -> int:
        """The processes that train the row, one a device."""
        return self.devices * self.num_nodes

    @property
    def global_batch(self) -> int:
        """The samples of an optimizer step: `batch_size` is each device's share."""
        return self.batch_size * self.world_size

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults, in the order of their declaration."""
        default = _DEFAULT_FIELDS
        return {name: value for name, value in self.as_dict().items() if value != default[name]}

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values, ready for JSON."""
        return {
            f.name: dict(value) if isinstance(value := getattr(self, f.name), Mapping) else value
            for f in dataclasses.fields(self)
        }

    @property
    def key(self) -> str:
        """16 hexadecimal digits of SHA-256 over the changed fields and ROW_VERSION."""
        cached: str | None = self.__dict__.get("_key")
        if cached is None:
            text = json.dumps({"row_version": ROW_VERSION, **self.changed()}, sort_keys=True)
            cached = hashlib.sha256(text.encode()).hexdigest()[:16]
            object.__setattr__(self, "_key", cached)
        return cached

    def replace(self, **changes: Any) -> Trial:
        """The same row with some fields changed. Raises BadInput for a field that no trial has."""
        check_fields(changes, "a trial")
        return dataclasses.replace(self, **changes)


def check_fields(names: Iterable[Any], where: str, more: Sequence[str] = ()) -> None:
    """Raise BadInput where a change names a field that no trial has; `more` is only suggested."""
    for name in names:
        if not isinstance(name, str) or name not in _DEFAULT_FIELDS:
            known = [*_DEFAULT_FIELDS, *more]
            raise BadInput(f"{where} has no field {shown(name)}{nearest(str(name), known)}")


def trial_from(values: Any, where: str = "trial") -> Trial:
    """Make a trial from decoded JSON. Raises BadInput where it is none."""
    if not isinstance(values, Mapping):
        raise BadInput(
            f"{where}: a trial is a JSON object of field names and values, not {type(values).__name__}"
        )
    check_fields(values, where)
    try:
        return Trial(**values)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def shown(value: Any) -> str:
    """A value for a message: its representation in one line, shortened where it is long."""
    return " ".join(_repr.repr(value).split())


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise BadInput(f"{name} must be {wanted}, not {shown(value)}")


def _checked(name: str, kind: str, value: Any) -> Any:
    """The value in its field's plain type; 1 becomes 1.0 in a float field, so that both are one row."""
    if kind.startswith("Mapping"):
        plain_keys = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        _require(plain_keys, name, value, "a mapping of option names to values")
        return _options(name, value)
    kinds = [part.strip() for part in kind.split("|")]
    if value is None and "None" in kinds:
        return None
    for part in kinds:
        plain = _PLAIN.get(part)
        if plain is float and isinstance(value, int | float) and not isinstance(value, bool):
            # The limit comes first: a larger whole number has no float at all. Adding 0.0 makes -0.0 to 0.0.
            finite = abs(value) <= _LARGEST_INT if isinstance(value, int) else math.isfinite(value)
            _require(finite, name, value, "a finite number")
            return float(value) + 0.0
        if plain is not None and isinstance(value, plain) and (plain is bool or not isinstance(value, bool)):
            if isinstance(value, int):
                _require(abs(value) <= _LARGEST_INT, name, value, "a whole number below 2**63")
            return value
    raise BadInput(f"{name} must be {kind.replace(' | ', ' or ')}, not {shown(value)}")


def _options(name: str, value: Mapping[str, Any]) -> Any:
    """Options as JSON gives them back, with whole numbers as such."""
    if not value:
        return {}
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False), parse_float=_whole_if_it_is)
    except (TypeError, ValueError, RecursionError):
        raise BadInput(f"{name} must hold plain finite JSON values, not {shown(dict(value))}") from None


def _whole_if_it_is(text: str) -> int | float:
    number = float(text)
    return int(number) if number.is_integer() and abs(number) <= _LARGEST_EXACT_FLOAT else number


_DEFAULT_FIELDS: dict[str, Any] = {
    f.name: (f.default if f.default is not dataclasses.MISSING else {}) for f in dataclasses.fields(Trial)
}
