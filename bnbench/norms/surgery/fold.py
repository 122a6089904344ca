"""Norms folded into the linear maps before them, for evaluation: fold_norm."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnbench.norms.surgery.evaluation import channel_map, copy_for_evaluation
from bnbench.norms.surgery.layers import (
    Site,
    concerns_norms,
    count_channels,
    find_sites,
    full_name,
    is_norm,
    name_hooks,
    put,
    run_example,
)
from bnbench.norms.surgery.report import Fold, Folding, Left
from bnbench.registry import BadInput

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
MAPS = (nn.Linear, *_CONVOLUTIONS)


@dataclass(frozen=True)
class Pairs:
    """The linear map that feeds each norm and nothing else, by the norm's id, and how that was found out."""

    maps: Mapping[int, nn.Module]
    found_by: str


def fold_norm(model: nn.Module, example: Any = None) -> Folding:
    """Fold norms into the linear maps directly before them, in place, for a model in evaluation mode.

    A norm whose evaluation is s x + t a channel, as that of all batch norms, after y = W x + b leaves
    W' = s W and b' = s b + t: the map becomes one with these (computed in float64, rounded once, b' a new
    parameter where there was none), the norm becomes nn.Identity. Maps are Linear, Conv1d to 3d and
    ConvTranspose1d to 3d; a parametrized weight (weight norm) is folded as it is in evaluation, and becomes a
    plain one. Linear is taken to map (N, C_in), unless an `example` shows that the result differs.

    A norm is folded if it alone reads what the map gives, and both are used once. That is told by torch.fx
    tracing; where the model cannot be traced, by the order in nn.Sequential, and then an example is needed.
    Each pair is compared on random input, and with an `example` (an input of the model; a tuple: its
    arguments) the model's output before and after, to the square root of its type's precision.

    Raises BadInput, and has changed nothing then, where a norm is in training mode, the model cannot be
    traced and there is no example, and where a result differs by more than rounding.
    """
    norms = find_sites(model, lambda layer: concerns_norms(layer) and not isinstance(layer, nn.Identity))
    for site in norms:
        if site.layer.training:
            raise BadInput(
                f"{site.path} is in training mode, and folding is for evaluation; call model.eval()"
            )
    maps = {id(site.layer): site for site in find_sites(model, _is_map)}
    pairs = _find_pairs(model, norms, maps, has_example=example is not None)
    before = None if example is None else _tensors(run_example(model, example))
    swaps: list[tuple[Site, nn.Module]] = []
    folded: list[Fold] = []
    left: list[Left] = []
    for site in norms:
        source = maps.get(id(pairs.maps.get(id(site.layer))))
        reason = _reason_to_leave(site, source)
        found = None if reason is not None else channel_map(site.layer)
        if found is None or source is None:
            reason = reason or "its evaluation is not a fixed scale and shift of each channel"
            left.append(Left(site.path, site.class_name, reason))
            continue
        new = _scaled(source.layer, *found)
        folded.append(Fold(source.path, site.path, _compare(source, site, new)))
        swaps += [(source, new), (site, nn.Identity().eval())]
    for site, layer in swaps:
        put(model, site, layer)
    difference = None
    try:
        if before is not None:
            difference = _compare_outputs(before, _tensors(run_example(model, example)))
    except BaseException:
        for site, _ in swaps:
            put(model, site, site.layer)
        raise
    return Folding(model, tuple(folded), tuple(left), pairs.found_by, difference)


def _is_map(layer: nn.Module) -> bool:
    return parametrize.type_before_parametrizations(layer) in MAPS


def _reason_to_leave(site: Site, source: Site | None) -> str | None:
    if not is_norm(site.layer):
        return f"{full_name(site.layer)} may do more than normalize, or is not known"
    if source is None:
        return "no linear map comes directly before it and feeds it alone"
    hanging = name_hooks(site.layer, harmless=False)
    if hanging is None and name_hooks(source.layer, harmless=False) == "hooks":
        hanging = "hooks (its linear map has them)"
    if hanging is not None:
        return f"it has {hanging}, which would be lost"
    outputs = _count_outputs(source.layer)
    if outputs != count_channels(site.layer):
        return f"it has {count_channels(site.layer)} channels, and the map before it {outputs} outputs"
    return None


def _count_outputs(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


# Which map feeds which norm


class _Tracer(fx.Tracer):
    """A tracer that looks into neither maps nor norms."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_map(m) or concerns_norms(m) or super().is_leaf_module(m, module_qualified_name)


def _find_pairs(model: nn.Module, norms: list[Site], maps: Mapping[int, Site], *, has_example: bool) -> Pairs:
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # Whatever the model's own code raises at a stand-in for a tensor.
        if not has_example:
            reason = str(error).partition("\n")[0]
            raise BadInput(
                f"torch.fx cannot trace this {type(model).__name__} ({reason}); give an example input, by"
                " which what is found in nn.Sequential can be checked"
            ) from error
        wanted = {id(site.layer) for site in norms}
        return Pairs(dict(_pairs_in_sequence(model, wanted, maps)), "order in Sequential")
    return Pairs(dict(_pairs_in_graph(model, graph)), "tracing")


def _pairs_in_graph(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[int, nn.Module]]:
    called = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    uses = Counter(id(layer) for layer in called.values())
    # Weights that the model reads past their layer, as tied ones are.
    read = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    for node, layer in called.items():
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source not in called or not concerns_norms(layer):
            continue
        before, path = called[source], str(source.target)
        alone = len(source.users) == 1 and uses[id(before)] == 1 and uses[id(layer)] == 1
        if alone and not any(name.startswith(f"{path}.") for name in read):
            yield id(layer), before


def _pairs_in_sequence(
    model: nn.Module, norms: set[int], maps: Mapping[int, Site]
) -> Iterator[tuple[int, nn.Module]]:
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for module in model.modules():
        if type(module).forward is nn.Sequential.forward:
            for before, layer in itertools.pairwise(module._modules.values()):
                once = places[id(before)] == places[id(layer)] == 1
                if before is not None and once and id(layer) in norms and id(before) in maps:
                    yield id(layer), before


# The folded map


@torch.no_grad()
def _scaled(layer: Any, slope: Tensor, shift: Tensor) -> nn.Module:
    """A new map that gives slope · y + shift, a channel, where the given one gives y."""
    kind: Any = parametrize.type_before_parametrizations(layer)
    # Built without values, since both parameters are set below.
    if isinstance(layer, nn.Linear):
        new: Any = kind(layer.in_features, layer.out_features, device="meta")
    else:
        names = ["stride", "padding", "dilation", "groups", "padding_mode"]
        names += ["output_padding"] if isinstance(layer, _TRANSPOSED) else []
        options = {name: getattr(layer, name) for name in names}
        new = kind(layer.in_channels, layer.out_channels, layer.kernel_size, **options, device="meta")
    weight = layer.weight.detach()
    wide = weight.cpu().double()
    if isinstance(layer, _TRANSPOSED):
        # (in, out / groups, *): which outputs these are depends on the group that the input is in.
        by_group = slope.view(layer.groups, 1, -1, *(1,) * (wide.ndim - 2))
        scaled = (wide.unflatten(0, (layer.groups, -1)) * by_group).flatten(0, 1)
    else:
        scaled = wide * slope.view(-1, *(1,) * (wide.ndim - 1))
    bias = shift if layer.bias is None else slope * layer.bias.detach().cpu().double() + shift
    learns = layer.weight.requires_grad
    new.weight = nn.Parameter(torch.empty_like(weight).copy_(scaled), requires_grad=learns)
    new.bias = nn.Parameter(bias.to(device=weight.device, dtype=weight.dtype), requires_grad=learns)
    new.train(layer.training)
    return new  # type: ignore[no-any-return]


@torch.no_grad()
def _compare(source: Site, norm: Site, new: nn.Module) -> float:
    """The difference between a folded map and the two layers, in units of the greatest output.

    Raises BadInput where an output differs by more than rounding the folded weights explains.
    """
    layer: Any = source.layer
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (4, layer.in_features)
    else:
        spans = zip(layer.kernel_size, layer.dilation, strict=True)
        shape = (4, layer.in_channels, *(dilation * (size - 1) + 2 for size, dilation in spans))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = copy_for_evaluation(norm.layer)(copy_for_evaluation(layer)(x))
    twin = copy_for_evaluation(new)
    after = twin(x)
    for parameter in twin.parameters():
        parameter.abs_()
    precision = max(torch.finfo(next(new.parameters()).dtype).eps, 1e-9)
    if not bool(((before - after).abs() <= precision * twin(x.abs())).all()):
        raise BadInput(f"{norm.path} folded into {source.path} gives other outputs; nothing was changed")
    return float((before - after).abs().max() / before.abs().max().clamp_min(1e-300))


def _compare_outputs(before: list[Tensor], after: list[Tensor]) -> float:
    """The greatest difference in units of the greatest output. Raises BadInput for more than √precision."""
    worst = 0.0
    for one, other in zip(before, after, strict=True):
        difference = float((one - other).abs().max() / one.abs().max().clamp_min(torch.finfo(one.dtype).tiny))
        # Not `>`, since NaN must not pass.
        if not difference <= torch.finfo(one.dtype).eps ** 0.5:
            raise BadInput(
                f"the folded model's output for the example differs by {difference:.1e} of the greatest; a"
                " map's output is used elsewhere too, or the model is not deterministic; nothing was changed"
            )
        worst = max(worst, difference)
    return worst


def _tensors(output: object) -> list[Tensor]:
    """The floating point tensors in what a model gives."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = list(output.values()) if isinstance(output, Mapping) else output
    return [tensor for part in parts for tensor in _tensors(part)] if isinstance(parts, list | tuple) else []
