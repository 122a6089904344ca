"""Other norms in a model that exists, and the way back: convert_norm and revert."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from bnbench.norms.base import NORMS, NormEntry, build_norm
from bnbench.norms.surgery.evaluation import evaluates_as_batch_norm, first_float
from bnbench.norms.surgery.handover import compare, hand_over, must_agree
from bnbench.norms.surgery.layers import (
    TORCH_BATCH_NORMS,
    Site,
    Skip,
    concerns_norms,
    count_channels,
    find_sites,
    foreign,
    full_name,
    input_ranks,
    is_lazy,
    is_norm,
    may_do_more,
    name_hooks,
    over_last_axis,
    put,
    read_skip,
    registered_name,
    spatial_axes,
)
from bnbench.norms.surgery.report import Change, Conversion, Left
from bnbench.registry import BadInput, check_options

#: Options with which the new layer may evaluate otherwise than the old one does, with the same state.
CHANGES_FUNCTION = frozenset({"eps", "num_groups", "over", "affine", "gamma", "gamma_init", "learn_beta"})
_CLASSES = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

Swap = tuple[Site, nn.Module, Change]


class OverLastAxis(nn.Module):
    """A norm for inputs (N, *, C): the channels are moved from the last axis to axis 1, and back."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.movedim(-1, 1)).movedim(1, -1)
        return y


def convert_norm(
    model: nn.Module, name: str, *, skip: Skip = (), example: Any = None, **options: Any
) -> Conversion:
    """Swap the norms of any model for a registered one, in place, and report it; `.model` is the model.

    Takes torch's BatchNorm, SyncBatchNorm, InstanceNorm and GroupNorm, LayerNorm and RMSNorm over the last
    axis, the frozen batch norm of torchvision, LayerNorm2d of torchvision and timm, and the norms of this
    package. A norm over the last axis becomes :class:`OverLastAxis` of the new one; the first axis of its
    input is then taken as the samples. What is no norm stays as it is.

    Kept: γ and β (the same Parameter objects where both layers learn them), running statistics where the new
    norm has such, num_groups, and eps and momentum between norms that compute the same, if `options` do not
    give them; train and eval mode, device, dtype and requires_grad. A layer that is used at two places stays
    one. Convert before an optimizer takes the parameters, since the new layers may have others. Evaluations
    are compared where they must not change: between norms that evaluate as batch normalization (batch,
    sync_batch, frozen_batch, ghost_batch, ...), and from a layer of torch to the same one of ours.

    name, options: as for :func:`bnbench.norms.build_norm`.
    skip: names of modules, which are left with all that is in them; or a predicate of (name, norm layer).
    example: an input of the model (a tuple: its arguments). It runs once, in evaluation mode, to see how many
    axes the input of each norm has, as not all classes tell (BatchNorm1d, SyncBatchNorm, GroupNorm, ours).

    Raises BadInput, and has changed nothing then, for an unknown name or option, a layer that the norm cannot
    stand in for, a class that may do more than normalize (timm's BatchNormAct2d), a layer with hooks or
    parametrizations, one on the meta device, and where an evaluation differs that must not.
    """
    entry = NORMS[name]
    check_options(f"norm {name!r}", entry.layer, options)
    is_skipped = read_skip(model, skip)
    sites = find_sites(model, concerns_norms)
    ranks = input_ranks(model, sites, example)
    swaps: list[Swap] = []
    left: list[Left] = []
    for site in sites:
        reason = _reason_to_leave(site, entry, options)
        if any(is_skipped(path, site.layer) for path in site.paths):
            reason = "skipped, as asked"
        if reason is not None:
            left.append(Left(site.path, site.class_name, reason))
            continue
        _check_swappable(site)
        rank = ranks.get(id(site.layer))
        inner = _build(site, entry, options, rank, first_float(site.layer, model))
        new = OverLastAxis(inner) if over_last_axis(site.layer) and rank != 2 else inner
        chosen = {"weight"} if options.keys() & {"gamma", "gamma_init"} else set()
        agrees = not CHANGES_FUNCTION & options.keys() and must_agree(site.layer, inner, name)
        swaps.append((site, new, _change(site, new, inner, name, chosen | options.keys(), agrees)))
    return _finish(model, swaps, left, entry)


def revert(model: nn.Module | Conversion, *, example: Any = None) -> Conversion:
    """Swap norms that evaluate as batch normalization for torch's BatchNorm1d, 2d or 3d, with their state.

    Takes those of this package, torchvision's frozen one and SyncBatchNorm, and leaves all else. From a
    Conversion, every layer becomes of the class that it was, where that was a batch norm of torch. Else an
    `example` tells the class: it runs once, as in :func:`convert_norm`. γ, β and the running statistics stay;
    where γ and β were constants, they become parameters that learn. Evaluations are compared.
    Raises BadInput, and has changed nothing then, where nothing tells the class, for a layer with hooks or
    parametrizations, one on the meta device, and where an evaluation differs.
    """
    kinds: dict[str, type[nn.Module]] = {}
    what_tells = "example=, an input of the model, or the Conversion"
    if isinstance(model, Conversion):
        what_tells = "example=, an input of the model; of the Conversion, this one was no batch norm of torch"
        kinds = {change.path: change.kind for change in model.changed if change.kind in TORCH_BATCH_NORMS}
        model = model.model
    sites = find_sites(model, concerns_norms)
    ranks = input_ranks(model, sites, example)
    swaps: list[Swap] = []
    left: list[Left] = []
    for site in sites:
        layer = site.layer
        reason = None
        if type(layer) in _CLASSES.values():
            reason = "it is torch's batch norm already"
        elif may_do_more(layer):
            reason = "its class may do more than normalize"
        elif not is_norm(layer) or first_float(layer).is_meta or not evaluates_as_batch_norm(layer):
            reason = "it does not evaluate as batch normalization"
        if reason is not None:
            left.append(Left(site.path, site.class_name, reason))
            continue
        _check_swappable(site)
        new = _build_torch_batch_norm(site, kinds.get(site.path), ranks.get(id(layer)), what_tells)
        swaps.append((site, new, _change(site, new, new, type(new).__name__, set(), True)))
    return _finish(model, swaps, left, None)


def _finish(model: nn.Module, swaps: list[Swap], left: list[Left], entry: NormEntry | None) -> Conversion:
    """Swap the layers, now that nothing can fail any more."""
    for site, layer, _ in swaps:
        model = put(model, site, layer)
    changed = tuple(change for _, _, change in swaps)
    return Conversion(model, changed, tuple(left), _notes(changed, entry))


def _reason_to_leave(site: Site, entry: NormEntry, options: Mapping[str, Any]) -> str | None:
    layer = site.layer
    if is_lazy(layer):
        return "it has no shape yet; run the model once, then convert"
    if may_do_more(layer):
        return None
    if not is_norm(layer):
        return "convert_norm does not know this class"
    if isinstance(layer, nn.Identity):
        return "the identity does not know how many channels it has"
    if len(getattr(layer, "normalized_shape", ())) > 1:
        return "it normalizes several axes, with a scale for each element"
    if any(isinstance(parent, nn.TransformerEncoderLayer) for parent, _ in site.parents):
        return "in evaluation TransformerEncoderLayer normalizes by a kernel of its own, not by this layer"
    is_same = all(getattr(layer, option, None) == value for option, value in options.items())
    return f"it is {entry.name} already" if type(layer) is entry.layer and is_same else None


def _check_swappable(site: Site) -> None:
    if may_do_more(site.layer):
        raise BadInput(
            f"{site.path} is a {full_name(site.layer)}, which may do more than normalize (an activation,"
            " dropout); leave it by skip=, or put a plain norm there first"
        )
    hanging = name_hooks(site.layer, harmless=True)
    if hanging is not None:
        raise BadInput(
            f"{site.path} has {hanging}, which would be lost with the layer; remove them first (unfreeze_norm"
            " does those of freeze_norm), or leave it by skip="
        )
    if first_float(site.layer).is_meta:
        raise BadInput(f"{site.path} is on the meta device and has no values; load them first")


def _build(
    site: Site, entry: NormEntry, options: Mapping[str, Any], rank: int | None, like: Tensor
) -> nn.Module:
    """Build the new layer with what options the old one hands on, on the device and in the type of `like`."""
    layer: Any = site.layer
    handed = {"num_groups": layer.num_groups} if hasattr(layer, "num_groups") else {}
    if hasattr(layer, "weight") and layer.weight is None and getattr(layer, "bias", None) is None:
        handed["affine"] = False
    known = foreign(layer)
    if known is not None and known.twin in ("layer", "rms"):
        handed["over"] = "channels"
    axes = rank - 2 if rank is not None else 1 if over_last_axis(layer) else spatial_axes(layer)
    channels, dim = count_channels(layer), 2 if axes is None else axes
    try:
        options = _add_options(entry, options, handed)
        new = build_norm(entry.name, channels, dim, **options)
        if must_agree(layer, new, entry.name):
            # In other norms these are other quantities, with defaults of their own.
            handed = {name: getattr(layer, name) for name in ("eps", "momentum") if hasattr(layer, name)}
            if handed.get("eps", 0.0) is None:
                handed["eps"] = torch.finfo(like.dtype).eps  # So torch's RMSNorm takes it.
            new = build_norm(entry.name, channels, dim, **_add_options(entry, options, handed))
    except BadInput as error:
        raise BadInput(f"{site.path}: {error}") from error
    return new.to(device=like.device, dtype=like.dtype)


def _add_options(entry: NormEntry, given: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The given options, and what more the norm has and takes: frozen_batch takes no momentum=None."""
    options = dict(given)
    for name in more.keys() & inspect.signature(entry.layer).parameters.keys() - given.keys():
        with suppress(BadInput):
            check_options(entry.name, entry.layer, {**given, name: more[name]})
            options[name] = more[name]
    return options


def _build_torch_batch_norm(
    site: Site, kind: type[nn.Module] | None, rank: int | None, what_tells: str
) -> nn.Module:
    layer: Any = site.layer
    if kind is None:
        if rank is None:
            raise BadInput(
                f"{site.path}: nothing tells whether BatchNorm1d, 2d or 3d belongs here; give {what_tells}"
            )
        kind = _CLASSES[max(rank - 2, 1)]
    momentum = getattr(layer, "momentum", 0.1)
    new = kind(count_channels(layer), eps=layer.eps, momentum=momentum, affine=layer.weight is not None)
    if layer.bias is None:
        new.register_parameter("bias", None)
    like = first_float(layer)
    return new.to(device=like.device, dtype=like.dtype)


def _change(
    site: Site, new: nn.Module, inner: nn.Module, name: str, chosen: set[str], agrees: bool
) -> Change:
    """Give the new layer the old one's state and mode, and write down what came of it."""
    state = hand_over(site.layer, inner, chosen)
    new.train(site.layer.training)
    return Change(
        path=site.path,
        before=registered_name(site.layer) or site.class_name,
        after=name if inner is new else f"{name} over the last axis",
        kept=state.kept,
        new=state.new,
        dropped=state.dropped,
        difference=compare(site, new) if agrees else None,
        kind=type(site.layer),
    )


def _notes(changed: tuple[Change, ...], entry: NormEntry | None) -> tuple[str, ...]:
    notes = []
    if changed and entry is not None and entry.replaces_activation:
        notes.append(f"{entry.name} is nonlinear by itself, and the activations behind it are still there")
    fresh = sorted({name for change in changed for name in change.new if name.startswith("running_")})
    if fresh:
        notes.append(f"{', '.join(fresh)}: these start anew; train or recalibrate before you evaluate")
    dropped = Counter(name for change in changed for name in change.dropped if name in ("weight", "bias"))
    notes += [f"{count} of the new layers have no {name} any more" for name, count in sorted(dropped.items())]
    return tuple(notes)
