"""The norm layers of any module: whose they are, and where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase, _NormBase
from torch.nn.utils import parametrize

from bnbench.norms.base import NORMS
from bnbench.registry import BadInput, nearest

TORCH_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Skip = Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Foreign:
    """A class of another package that is a norm and nothing besides.

    twin: the norm of ours that computes the same.
    axes: the number of spatial axes that the class determines, or None.
    last_axis: the channels are the last axis of its input, and not axis 1.
    """

    twin: str
    axes: int | None = None
    last_axis: bool = False


#: By full name, so that these packages need not be there.
FOREIGN: dict[str, Foreign] = {
    **{f"torch.nn.modules.batchnorm.BatchNorm{dim}d": Foreign("batch", dim) for dim in (1, 2, 3)},
    "torch.nn.modules.batchnorm.SyncBatchNorm": Foreign("sync_batch"),
    **{f"torch.nn.modules.instancenorm.InstanceNorm{dim}d": Foreign("instance", dim) for dim in (1, 2, 3)},
    "torch.nn.modules.normalization.GroupNorm": Foreign("group"),
    "torch.nn.modules.normalization.LayerNorm": Foreign("layer", last_axis=True),
    "torch.nn.modules.normalization.RMSNorm": Foreign("rms", last_axis=True),
    "torchvision.ops.misc.FrozenBatchNorm2d": Foreign("frozen_batch", 2),
    "torchvision.models.convnext.LayerNorm2d": Foreign("layer", 2),
    "timm.layers.norm.GroupNorm": Foreign("group"),
    "timm.layers.norm.GroupNorm1": Foreign("group"),
    "timm.layers.norm.LayerNorm": Foreign("layer", last_axis=True),
    "timm.layers.norm.LayerNorm2d": Foreign("layer", 2),
}


@dataclass
class Site:
    """A layer and every place that holds it: paths, and (parent, key); the root of a model has no parent."""

    layer: nn.Module
    paths: list[str] = field(default_factory=list)
    parents: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def path(self) -> str:
        """All paths, as the reports write them."""
        return ", ".join(path or "(the model itself)" for path in self.paths)

    @property
    def class_name(self) -> str:
        """The short name of the layer's class."""
        return type(self.layer).__name__


def full_name(layer: nn.Module) -> str:
    """The full name of a layer's class, looking through parametrizations."""
    kind = parametrize.type_before_parametrizations(layer)
    return f"{kind.__module__}.{kind.__qualname__}"


def foreign(layer: nn.Module) -> Foreign | None:
    """What is known about a norm of another package; None for all else."""
    return FOREIGN.get(full_name(layer))


def registered_name(layer: nn.Module) -> str | None:
    """The name in the registry of a layer that is exactly of a registered class, else None."""
    kind = parametrize.type_before_parametrizations(layer)
    return next((name for name, entry in NORMS.items() if kind is entry.layer), None)


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer is known to be a norm and nothing besides."""
    return foreign(layer) is not None or registered_name(layer) is not None


def is_lazy(layer: nn.Module) -> bool:
    """Whether a norm has no shape yet."""
    return isinstance(layer, _LazyNormBase)


def may_do_more(layer: nn.Module) -> bool:
    """Whether a layer normalizes, but is of a class that may do more, as those with an activation do."""
    if is_norm(layer) or is_lazy(layer) or isinstance(layer, nn.Identity):
        return False
    ours = tuple(entry.layer for entry in NORMS.values() if isinstance(entry.layer, type))
    keeps = all(isinstance(getattr(layer, name, None), Tensor) for name in ("running_mean", "running_var"))
    return keeps or isinstance(layer, (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, *ours))


def concerns_norms(layer: nn.Module) -> bool:
    """Whether a report on norms must speak of a layer: a norm, and what is called one."""
    called = "norm" in type(layer).__name__.lower() and not layer._modules
    return is_norm(layer) or is_lazy(layer) or may_do_more(layer) or called


def over_last_axis(layer: nn.Module) -> bool:
    """Whether a norm takes the channels from the last axis of its input."""
    known = foreign(layer)
    return known is not None and known.last_axis


def spatial_axes(layer: nn.Module) -> int | None:
    """The number of spatial axes that the class of a norm determines, else None."""
    known = foreign(layer)
    return None if known is None else known.axes


def count_channels(layer: nn.Module) -> int:
    """The number of channels of a norm. Raises BadInput where nothing on the layer tells it."""
    for name in ("num_features", "num_channels"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    shape = getattr(layer, "normalized_shape", None)
    if shape:
        return int(shape[-1])
    for name in ("running_mean", "weight", "bias"):
        values = getattr(layer, name, None)
        if isinstance(values, Tensor):
            return len(values)
    raise BadInput(
        f"a {full_name(layer)} does not say how many channels it has; give it the attribute num_features"
    )


def name_hooks(layer: nn.Module, *, harmless: bool) -> str | None:
    """Say what hangs on a layer and would be lost with it: hooks or parametrizations.

    A hook with the attribute `changes_evaluation` false counts only if harmless ones do.
    """
    for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if any(
            harmless or getattr(hook, "changes_evaluation", True) for hook in getattr(layer, kind).values()
        ):
            return "hooks"
    return "parametrizations" if parametrize.is_parametrized(layer) else None


def find_sites(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Site]:
    """Every wanted layer with all its places, in the order of the model; nothing inside one is looked at.

    Raises BadInput for a scripted model, whose modules cannot be swapped.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise BadInput("a scripted model cannot be changed; give the model that it was made of")
    sites: dict[int, Site] = {}

    def visit(layer: nn.Module, path: str, parent: tuple[nn.Module, str] | None) -> None:
        if wanted(layer):
            site = sites.setdefault(id(layer), Site(layer))
            site.paths.append(path)
            if parent is not None:
                site.parents.append(parent)
            return
        for key, child in layer._modules.items():
            if child is not None:
                visit(child, f"{path}.{key}" if path else key, (layer, key))

    visit(model, "", None)
    return list(sites.values())


def put(model: nn.Module, site: Site, layer: nn.Module) -> nn.Module:
    """Put a layer into every place of a site, and return the model, which is that layer if it is the root."""
    for parent, key in site.parents:
        parent._modules[key] = layer
    return model if site.parents else layer


def read_skip(model: nn.Module, skip: Skip) -> Callable[[str, nn.Module], bool]:
    """Turn names of modules, which stand for all that is inside them too, into a predicate.

    Raises BadInput for a name that the model has not.
    """
    if callable(skip):
        return skip
    names = (skip,) if isinstance(skip, str) else tuple(skip)
    known = [path for path, _ in model.named_modules(remove_duplicate=False)]
    for name in names:
        if name not in known:
            raise BadInput(f"skip: the model has no module {name!r}{nearest(name, filter(None, known))}")
    return lambda path, layer: any(path == name or path.startswith(f"{name}.") for name in names)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; at the end every module is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def run_example(model: nn.Module, example: Any) -> Any:
    """What the model gives in evaluation for an example: a tensor, or a tuple of arguments."""
    with in_evaluation(model):
        return model(*example) if isinstance(example, tuple) else model(example)


def input_ranks(model: nn.Module, sites: list[Site], example: Any) -> dict[int, int]:
    """The number of axes of each layer's input for an example, by the layer's id; {} without an example."""
    ranks: dict[int, int] = {}
    if example is None:
        return ranks

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        ranks.setdefault(id(layer), inputs[0].ndim)

    handles = [site.layer.register_forward_pre_hook(note) for site in sites]
    try:
        run_example(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return ranks
