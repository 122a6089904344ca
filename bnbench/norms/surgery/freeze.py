"""Batch statistics that stand still in a model that exists: freeze_norm and unfreeze_norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bnbench.norms.base import NORMS, KeepsMoments
from bnbench.norms.surgery.layers import Site, find_sites, is_lazy, may_do_more, registered_name
from bnbench.registry import BadInput


class StayInEvaluation:
    """A hook that puts a layer into evaluation mode before each forward pass, whatever train() said.

    It is a part of the layer: it goes with it through deepcopy and pickle, and the state_dict is as before.

    inside: the modules in the layer too, as its statistics may be theirs. A class that may do more than
    normalize has others there (dropout), which go on as they were.
    learned: the parameters that learn again once it is removed.
    marks: the layer's attribute `frozen` is this hook's.
    """

    changes_evaluation = False

    def __init__(self, *, inside: bool, learned: tuple[str, ...], marks: bool) -> None:
        self.inside = inside
        self.learned = learned
        self.marks = marks

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        for module in layer.modules() if self.inside else (layer,):
            module.training = False


def freeze_norm(model: nn.Module, *, learn_affine: bool = True) -> tuple[str, ...]:
    """Let every layer with running statistics normalize by them from now on, in training too, in place.

    train() does not undo it, the buffers no longer move, and no sample depends on another; recalibration
    leaves such a layer alone. Takes torch's BatchNorm, SyncBatchNorm and InstanceNorm with running
    statistics, classes that inherit from these (timm's BatchNormAct2d), other classes that have a
    running_mean, and the norms of this package that keep running statistics. It is undone by
    :func:`unfreeze_norm`, survives deepcopy and pickle, and leaves the state_dict as it is: which layers are
    frozen is not in it.

    learn_affine: γ and β go on learning; False stops them, and the other parameters of these layers.
    Returns the paths of the frozen layers. Raises BadInput, and has changed nothing then, for a batch norm
    without running statistics, and one without a shape.
    """
    sites = find_sites(model, _may_freeze)
    for site in sites:
        _check_statistics(site)
    unfreeze_norm(model)
    for site in sites:
        layer: Any = site.layer
        ours = registered_name(layer) is not None
        stopped = {} if learn_affine else dict(layer.named_parameters(recurse=ours))
        learned = tuple(name for name, parameter in stopped.items() if parameter.requires_grad)
        for parameter in stopped.values():
            parameter.requires_grad_(False)
        marks = not hasattr(layer, "frozen")
        if marks:
            # Recalibration reads it.
            layer.frozen = True
        layer.register_forward_pre_hook(StayInEvaluation(inside=ours, learned=learned, marks=marks))
    return tuple(path for site in sites for path in site.paths)


def unfreeze_norm(model: nn.Module) -> tuple[str, ...]:
    """Undo :func:`freeze_norm`: layers follow train() and eval() again, and learn what they learned before.

    Until the next train() they are in evaluation mode. Returns the paths of the layers that were frozen.
    """
    paths = []
    for path, layer in model.named_modules():
        for key, hook in list(layer._forward_pre_hooks.items()):
            if isinstance(hook, StayInEvaluation):
                del layer._forward_pre_hooks[key]
                for name in hook.learned:
                    layer.get_parameter(name).requires_grad_(True)
                if hook.marks:
                    del layer.frozen
                paths.append(path)
    return tuple(paths)


def _may_freeze(layer: nn.Module) -> bool:
    name = registered_name(layer)
    if name is not None:
        return NORMS[name].running_stats or isinstance(layer, KeepsMoments)
    if isinstance(layer, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d):
        return layer.track_running_stats
    return isinstance(layer, _NormBase) or (may_do_more(layer) and hasattr(layer, "running_mean"))


def _check_statistics(site: Site) -> None:
    layer: Any = site.layer
    if is_lazy(layer):
        raise BadInput(f"{site.path} has no shape yet; run the model once, then freeze")
    if isinstance(layer, _NormBase) and not isinstance(layer.running_mean, Tensor):
        raise BadInput(f"{site.path} keeps no running statistics (track_running_stats=False) to normalize by")
