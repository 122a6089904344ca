"""What every model shares: the slot that a norm goes into, the registry, and the conventions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from bnbench.norms import NORMS, build_norm
from bnbench.norms.reparam import REPARAMS, apply_reparam
from bnbench.registry import BadInput, Registry, check_options, nearest

ORDERS = ("norm-act", "act-norm", "pre-act", "post-add")
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
}
DROPOUT_PLACES = ("all", "last", "before-norm")
LINEAR_MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d}
_Builder = TypeVar("_Builder", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class Slot:
    """What a model puts around its linear maps: norm, activation, dropout, reparametrized weights.

    `order`, for a linear map W, and for a residual block with branch f and skip s:

    - ``"norm-act"``: act(norm(Wx)); in a block act(norm(W₂ act(norm(W₁x))) + s(x)) (He et al., 2016a).
    - ``"act-norm"``: norm(act(Wx)); in a block norm(act(W₂ norm(act(W₁x)) + s(x))).
    - ``"pre-act"``: residual only: x + W₂ act(norm(W₁ act(norm(x)))) (He et al., 2016b, figure 4e).
    - ``"post-add"``: residual only: act(norm(W₂ act(norm(W₁x)) + s(x))) (He et al., 2016b, figure 4b).

    `dropout` is the probability that one number is dropped, and `dropout_at` says where:

    - ``"all"``: after every hidden layer, that is after the later one of its norm and activation. That of
      the last layer comes after the pooling, directly before the classifier. Residual nets drop between
      the two convolutions of each block (Zagoruyko & Komodakis, 2016) and before the classifier, never
      on the skip path.
    - ``"last"``: directly before the classifier only.
    - ``"before-norm"``: directly before the norm of every hidden layer; with the norm "none" at that place.

    `last_norm_options` are changes to `norm_options` for the norm of the last hidden layer alone, the one
    that nothing normalizes again: a residual net has it at the end of the last block's branch in norm-act,
    before the pooling in pre-act, and behind the last addition in the other orders.

    The classifier has no norm, no activation and no reparametrization. A norm that replaces the activation
    (its trait) leaves the activation out. Raises BadInput for unknown names and a dropout outside [0, 1).
    """

    norm: str = "batch"
    norm_options: Mapping[str, Any] = field(default_factory=dict)
    order: str = "norm-act"
    activation: str = "relu"
    dropout: float = 0.0
    dropout_at: str = "all"
    reparam: str | None = None
    reparam_options: Mapping[str, Any] = field(default_factory=dict)
    last_norm_options: Mapping[str, Any] = field(default_factory=dict)
    #: Set by `at` alone: the norms of this slot are that of the last hidden layer.
    is_last: bool = False

    def __post_init__(self) -> None:
        NORMS[self.norm]
        if self.reparam is not None:
            REPARAMS[self.reparam]
        for kind, name, known in (
            ("order", self.order, ORDERS),
            ("activation", self.activation, ACTIVATIONS),
            ("place for dropout", self.dropout_at, DROPOUT_PLACES),
        ):
            if name not in known:
                raise BadInput(f"no {kind} named {name!r}{nearest(name, known)}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise BadInput(f"dropout is a probability in [0, 1), not {self.dropout!r}")

    def at(self, index: int, depth: int) -> Slot:
        """The slot of hidden layer `index` of `depth`: that of the last one has the changed norm options."""
        if index < depth - 1 or not self.last_norm_options:
            return self
        options = {**self.norm_options, **self.last_norm_options}
        return replace(self, norm_options=options, last_norm_options={}, is_last=True)

    def build_linear(self, num_inputs: int, num_features: int) -> nn.Linear:
        """Build the linear map of a hidden layer."""
        linear = nn.Linear(num_inputs, num_features, bias=self._keeps_bias(num_features, 0))
        self._reparametrize(linear)
        return linear

    def build_conv(
        self, num_inputs: int, num_features: int, dim: int, *, kernel: int = 3, stride: int = 1
    ) -> nn.Module:
        """Build the convolution of a hidden layer, padded so that stride 1 keeps the size."""
        conv = _CONVOLUTIONS[dim](
            num_inputs,
            num_features,
            kernel,
            stride=stride,
            padding=kernel // 2,
            bias=self._keeps_bias(num_features, dim),
        )
        self._reparametrize(conv)
        return conv

    def build(self, num_features: int, dim: int, index: int, depth: int) -> nn.Sequential:
        """Build what fills the gap after hidden layer `index` of `depth`: norm, activation and dropout.

        `dim` is the number of spatial axes: 0 for (N, C), 1 for (N, C, L), 2 for (N, C, H, W).
        """
        gap = self.at(index, depth).build_pair(num_features, dim)
        if self.dropout > 0 and self.dropout_at == "all" and index < depth - 1:
            gap.add_module("dropout", nn.Dropout(self.dropout))
        return gap

    def build_pair(self, num_features: int, dim: int) -> nn.Sequential:
        """Build the norm and the activation, in the slot's order."""
        norm = self.build_norm_parts(num_features, dim)
        activation = [("activation", self.build_activation())]
        parts = activation + norm if self.order == "act-norm" else norm + activation
        gap = nn.Sequential()
        for name, part in parts:
            gap.add_module(name, part)
        return gap

    def build_norm_parts(self, num_features: int, dim: int) -> list[tuple[str, nn.Module]]:
        """Build the norm by name, with the dropout before it where it belongs there."""
        drops = self.dropout > 0 and self.dropout_at == "before-norm"
        before = [("dropout", nn.Dropout(self.dropout))] if drops else []
        return [*before, ("norm", self.build_norm(num_features, dim))]

    def build_last_dropout(self) -> nn.Module:
        """Build what stands directly before the classifier."""
        drops = self.dropout > 0 and self.dropout_at in ("all", "last")
        return nn.Dropout(self.dropout) if drops else nn.Identity()

    def build_norm(self, num_features: int, dim: int) -> nn.Module:
        """Build the norm alone."""
        layer = build_norm(self.norm, num_features, dim, **self.norm_options)
        if self.is_last:
            layer.is_last_norm = True  # type: ignore[assignment]
        return layer

    def build_activation(self) -> nn.Module:
        """Build the activation alone: the identity where the norm replaces it."""
        return nn.Identity() if NORMS[self.norm].replaces_activation else ACTIVATIONS[self.activation]()

    def _keeps_bias(self, num_features: int, dim: int) -> bool:
        # Where a norm directly follows (an addition in between changes nothing), a bias is dead or doubled:
        # batch norm subtracts it, most norms add a shift of their own. A norm that neither centres nor
        # shifts, such as RMSNorm, leaves it alive.
        entry = NORMS[self.norm]
        if self.order == "act-norm" and not entry.replaces_activation:
            return True
        if entry.centres:
            return False
        with torch.device("meta"):
            return getattr(self.build_norm(num_features, dim), "bias", None) is None

    def _reparametrize(self, linear: nn.Module) -> None:
        if self.reparam is None:
            return
        options = dict(self.reparam_options)
        # A reparametrization may make up for what the activation behind it does to the variance.
        if "activation" in inspect.signature(REPARAMS[self.reparam].apply).parameters:
            replaced = NORMS[self.norm].replaces_activation
            options.setdefault("activation", "identity" if replaced else self.activation)
        apply_reparam(linear, self.reparam, **options)


@dataclass(frozen=True)
class ModelEntry:
    """A model of the registry.

    `orders` are the slot's orders that it offers, `ranks` the lengths of `in_shape` that it takes (2 for
    (C, L), 3 for (C, H, W)), `options` its options with their defaults.
    """

    name: str
    build: Callable[..., nn.Module]
    orders: tuple[str, ...]
    ranks: tuple[int, ...]
    paper: str
    options: Mapping[str, Any]


MODELS: Registry[ModelEntry] = Registry("model", "bnbench.models")


def model(
    name: str, *, orders: Sequence[str], ranks: Sequence[int], paper: str = ""
) -> Callable[[_Builder], _Builder]:
    """Register a builder `(in_shape, num_classes, slot, *, **options)`; each option has a default.

    What it builds has the attributes ``head``, its classifier, an `nn.Linear`, and ``layers``, an
    `nn.Sequential` of its hidden layers or residual blocks.
    """

    def register(build: _Builder) -> _Builder:
        parameters = inspect.signature(build).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        MODELS.add(name, ModelEntry(name, build, tuple(orders), tuple(ranks), paper, options))
        return build

    return register


def build_model(
    name: str, in_shape: Sequence[int], num_classes: int, slot: Slot, **options: Any
) -> nn.Module:
    """Build a model of the registry for inputs (N, *in_shape) and logits (N, num_classes).

    Its weights are placeholders, the same in every call and on every device: `initialize` draws them. The
    global random state is left as it was. Under ``torch.device("meta")`` nothing is allocated, which checks
    a name with its options cheaply. Raises BadInput for an unknown model or option, an option of the wrong
    kind, and an order or an in_shape that the model does not take.
    """
    entry = MODELS[name]
    _check(entry, in_shape, num_classes, slot, options)
    device = torch.get_default_device()
    built_on = torch.device("meta" if device.type == "meta" else "cpu")
    with torch.random.fork_rng(devices=[]), built_on:
        torch.default_generator.manual_seed(0)
        built = entry.build(tuple(in_shape), num_classes, slot, **options)
    check_last_norm(name, built, slot.last_norm_options)
    return built if device == built_on else built.to(device)


def _check(
    entry: ModelEntry, in_shape: Sequence[int], num_classes: int, slot: Slot, options: Mapping[str, Any]
) -> None:
    if slot.order not in entry.orders:
        raise BadInput(
            f"model {entry.name!r} does not offer the order {slot.order!r}; "
            f"its orders: {', '.join(entry.orders)}"
        )
    is_shape = isinstance(in_shape, Sequence) and all(_is_count(size) for size in in_shape)
    if not is_shape or len(in_shape) not in entry.ranks:
        shapes = " or ".join(_SHAPES[rank] for rank in entry.ranks)
        raise BadInput(f"model {entry.name!r} takes an in_shape of {shapes}, not {in_shape!r}")
    if not _is_count(num_classes):
        raise BadInput(f"num_classes is a whole number of at least 1, not {num_classes!r}")
    check_options(f"model {entry.name!r}", entry.build, options)
    for option, value in options.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise BadInput(f"model {entry.name!r}: {option} must be at least 1, not {value!r}")


_SHAPES = {1: "(features,)", 2: "(C, L)", 3: "(C, H, W)"}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def average_pool(maps: torch.Tensor) -> torch.Tensor:
    """Average (N, C, *) over all positions to (N, C)."""
    return maps.mean(dim=tuple(range(2, maps.ndim)))


def output_layer(model: nn.Module) -> nn.Linear:
    """Return the classifier of a model, its attribute ``head``. Raises BadInput where there is none."""
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Linear):
        raise BadInput(f"{type(model).__name__} has no nn.Linear named 'head'; name its classifier so")
    return head


def check_last_norm(name: str, model: nn.Module, last_norm_options: Mapping[str, Any]) -> None:
    """Raise BadInput where there are options for the last norm and the model has built none with them."""
    if last_norm_options and not any(getattr(module, "is_last_norm", False) for module in model.modules()):
        raise BadInput(
            f"model {name!r} has no last norm for last_norm_options: none is built by slot.at(index, depth)"
        )


def norm_scales(model: nn.Module) -> list[torch.Tensor]:
    """The scales γ of the registered norms in a model: parameters where they are learned, else buffers."""
    layers = tuple(entry.layer for entry in NORMS.values() if isinstance(entry.layer, type))
    found = (getattr(module, "weight", None) for module in model.modules() if isinstance(module, layers))
    return [scale for scale in found if isinstance(scale, torch.Tensor)]


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: weights and biases of linear maps and convolutions, and all the rest."""

    weights: int
    biases: int
    norm: int

    @property
    def total(self) -> int:
        """All parameters together."""
        return self.weights + self.biases + self.norm


def describe(model: nn.Module) -> ParameterCount:
    """Count the parameters of a model. What a reparametrization adds to a weight counts as weights."""
    biases = weights = 0
    for layer in model.modules():
        if isinstance(layer, LINEAR_MAPS):
            for name, parameter in layer.named_parameters():
                if name == "bias":
                    biases += parameter.numel()
                else:
                    weights += parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    return ParameterCount(weights, biases, norm=total - weights - biases)
