"""NormClassifier: a classifier with a pluggable normalization as a LightningModule for any Trainer."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from bnbench.data.randomness import generator, seed_of
from bnbench.models import Slot, build_model, check_last_norm, initialize, norm_scales, output_layer
from bnbench.norms import FollowsProgress, TakesReference, build_norm
from bnbench.norms.reference import (
    layers_with_reference,
    reference_size,
    refresh_reference,
    run_with_reference,
)
from bnbench.optimization import (
    SCHEDULES,
    ParameterGroup,
    clip_by_unit,
    learning_rate_factor,
    split_parameters,
)
from bnbench.registry import BadInput, nearest


def own_model_class(path: str) -> tuple[Callable[..., Any], Mapping[str, inspect.Parameter]]:
    """The class or function `package.module:name` with its parameters.

    Raises BadInput where it cannot be had.
    """
    module_name, _, attribute = path.partition(":")
    try:
        make = getattr(importlib.import_module(module_name), attribute)
        return make, inspect.signature(make).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        wanted = "write it as package.module:Class, a class or a function"
        raise BadInput(f"model {path!r} cannot be had: {error}; {wanted}") from None


def _own_model(
    path: str, in_shape: Sequence[int], num_classes: int, slot: Slot, options: Mapping[str, Any]
) -> nn.Module:
    """Build `package:Class`, giving it of in_shape, num_classes, norm_layer and slot what it asks for."""
    make, parameters = own_model_class(path)
    offered = {
        "in_shape": tuple(in_shape),
        "num_classes": num_classes,
        "norm_layer": partial(build_norm, slot.norm, dim=len(in_shape) - 1, **slot.norm_options),
        "slot": slot,
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in options:
        if name not in parameters and not takes_any:
            raise BadInput(f"model {path!r} has no option {name!r}{nearest(name, parameters)}")
    given = {name: value for name, value in offered.items() if name in parameters} | dict(options)
    for parameter in parameters.values():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.default is parameter.empty and parameter.name not in given:
            raise BadInput(f"model {path!r} needs {parameter.name!r}; give it among the model's options")
    try:
        model = make(**given)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"model {path!r} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise BadInput(f"model {path!r} made a {type(model).__name__}, not an nn.Module")
    return model


class NormClassifier(L.LightningModule):
    """A classifier whose normalization, placement and regularization are plain arguments.

    `model` is a name of the registry, `"package.module:Class"`, or an `nn.Module`. A class of your own gets
    those of `in_shape`, `num_classes`, `norm_layer` (a function of num_features) and `slot` that it has as
    parameters, beside `model_options`; it keeps its own initialization, drawn from `seed`. A module is
    taken as it is.

    Inputs (N, *in_shape), logits (N, num_classes). The loss is cross-entropy in nats. SGD with momentum;
    weight decay acts on weights, and on norm parameters and biases only with `decay_norm`; `gamma_decay` acts
    on the scales γ of the registered norms, beside that. The model's output times `logit_scale` are the
    logits. `last_norm_options` are changes to `norm_options` for the norm of the last hidden layer
    (:class:`bnbench.models.Slot`). `adaptive_clip` clips the gradients of all but the classifier by
    :func:`clip_by_unit`, before the Trainer's own clipping. What a module of the model learns, it learns at
    the share `lr_scale` of the learning rate, where it has such an attribute. `steps` is the length of the
    schedule; by default it is taken from the Trainer. Logs `train/loss`, and for validation and test `loss`,
    `acc` and `ece` (expected calibration error over 15 bins; Guo et al., 2017, eq. 3).

    Raises BadInput for names, options and sizes that cannot be, for `last_norm_options` where the model has
    no norm that it calls the last, for `gamma_decay` where no γ is learned, and for `adaptive_clip` where the
    model has no classifier `head` to leave out.
    """

    #: The reference batch (R, *in_shape) of norms that take one; where it is not set before `fit`, the first
    #: training batch.
    reference: Tensor | None = None

    #: Arguments of a subclass that are not to be copied into its hyperparameters, such as data.
    not_saved: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: str | nn.Module = "mlp",
        norm: str = "batch",
        *,
        in_shape: Sequence[int],
        num_classes: int,
        model_options: dict[str, Any] | None = None,
        norm_options: dict[str, Any] | None = None,
        last_norm_options: dict[str, Any] | None = None,
        reparam: str | None = None,
        order: str = "norm-act",
        activation: str = "relu",
        dropout: float = 0.0,
        dropout_at: str = "all",
        init: str = "he",
        init_scale: float = 1.0,
        bias_init: str | float = "zero",
        logit_scale: float = 1.0,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay_norm: bool = False,
        gamma_decay: float = 0.0,
        schedule: str = "cosine",
        warmup: float = 0.0,
        adaptive_clip: float | None = None,
        label_smoothing: float = 0.0,
        steps: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            ignore=[*self.not_saved, *(["model"] if isinstance(model, nn.Module) else [])]
        )
        if schedule not in SCHEDULES:
            raise BadInput(f"no schedule named {schedule!r}{nearest(schedule, SCHEDULES)}")
        for name, value, fits, wanted in (
            ("lr", lr, lr > 0, "above 0"),
            ("momentum", momentum, 0 <= momentum < 1, "at least 0 and below 1"),
            ("weight_decay", weight_decay, weight_decay >= 0, "0 or more"),
            ("gamma_decay", gamma_decay, gamma_decay >= 0, "0 or more"),
            ("logit_scale", logit_scale, logit_scale > 0, "above 0"),
            ("warmup", warmup, 0 <= warmup <= 1, "a share of the steps, 0 to 1"),
            ("adaptive_clip", adaptive_clip, adaptive_clip is None or adaptive_clip > 0, "above 0, or None"),
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "at least 0 and below 1"),
            ("steps", steps, steps is None or steps >= 1, "1 or more, or None"),
        ):
            if not fits:
                raise BadInput(f"{name} must be {wanted}, not {value!r}")
        slot = Slot(
            norm=norm,
            norm_options=norm_options or {},
            order=order,
            activation=activation,
            dropout=dropout,
            dropout_at=dropout_at,
            reparam=reparam,
            last_norm_options=last_norm_options or {},
        )
        options = model_options or {}
        if isinstance(model, nn.Module):
            self.model = model
        elif ":" in model:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(seed, "init"))
                self.model = _own_model(model, in_shape, num_classes, slot, options)
        else:
            self.model = build_model(model, in_shape, num_classes, slot, **options)
            if torch.get_default_device().type != "meta":
                initialize(
                    self.model, init, scale=init_scale, bias=bias_init, generator=generator(seed, "init")
                )
        if isinstance(model, nn.Module) or ":" in model:
            name = model if isinstance(model, str) else type(model).__name__
            check_last_norm(name, self.model, slot.last_norm_options)
        if gamma_decay and not any(scale.requires_grad for scale in norm_scales(self.model)):
            raise BadInput(f"gamma_decay is {gamma_decay}, but norm {norm!r} learns no scale here; use 0")
        self.adaptive_clip = adaptive_clip
        if adaptive_clip is not None:
            output_layer(self.model)
        self._ramped: list[FollowsProgress] = []
        self._referring: list[TakesReference] = []

    def setup(self, stage: str) -> None:
        """Add the metrics of validation and test, where no earlier stage has."""
        # Here, since they take longer to build than a small model.
        if not hasattr(self, "val_loss"):
            num_classes = self.hparams["num_classes"]
            for phase in ("val", "test"):
                self.add_module(f"{phase}_loss", MeanMetric())
                self.add_module(f"{phase}_acc", MulticlassAccuracy(num_classes, average="micro"))
                self.add_module(f"{phase}_ece", MulticlassCalibrationError(num_classes, n_bins=15))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of a batch."""
        logits: Tensor = self.model(x)
        scale: float = self.hparams["logit_scale"]
        return logits if scale == 1 else scale * logits

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of a training batch, smoothed as asked."""
        return F.cross_entropy(logits, y, label_smoothing=self.hparams["label_smoothing"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step of automatic optimization."""
        x, y = batch
        self.tell_progress(self.trainer.global_step)
        loss = self.loss(self.run_training_batch(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_fit_start(self) -> None:
        """Find the norms that follow the training."""
        self.find_followers()

    def find_followers(self) -> None:
        """Find the norms that are told how far the training is, and those with a reference batch."""
        self._ramped = [m for m in self.model.modules() if isinstance(m, FollowsProgress)]
        self._referring = layers_with_reference(self.model)
        if self.reference is not None:
            dtype = cast(torch.dtype, self.dtype)
            self.reference = self.reference.to(self.device, dtype, non_blocking=True)

    def tell_progress(self, step: int) -> None:
        """Tell the norms that follow the training that so many of its steps are done."""
        if self._ramped:
            steps = self.hparams["steps"] or int(self.trainer.estimated_stepping_batches)
            for module in self._ramped:
                module.set_progress(min(1.0, step / steps))

    def bring_up_to_date(self, step: int) -> None:
        """Tell norms how far the training is, and renew reference statistics, for an evaluation."""
        self.tell_progress(step)
        if self._referring and self.reference is not None:
            refresh_reference(self.model, self._referring, self.reference)

    def run_training_batch(self, x: Tensor) -> Tensor:
        """Logits of a training batch; norms that take a reference batch see it beside this one."""
        if not self._referring:
            logits: Tensor = self(x)
            return logits
        if self.reference is None:
            self.reference = self._reference_from(x)
        return run_with_reference(self, self._referring, self.reference, x)

    def _reference_from(self, x: Tensor) -> Tensor:
        size = reference_size(self._referring, len(x))
        if self.trainer.world_size > 1 or size > len(x):
            why = f"reference_size is {size}, the first batch {len(x)}"
            if self.trainer.world_size > 1:
                why = "each device would take its own first batch"
            raise BadInput(f"{why}: set `module.reference` to {size} training samples before fit")
        return x[:size].detach().clone()

    def on_validation_start(self) -> None:
        """Renew reference statistics."""
        self.bring_up_to_date(self.trainer.global_step)

    def on_train_end(self) -> None:
        """Renew reference statistics."""
        self.bring_up_to_date(self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the reference batch, so that a resumed training goes on with it."""
        if self.reference is not None:
            checkpoint["reference"] = self.reference

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the reference batch of the checkpoint."""
        self.reference = checkpoint.get("reference", self.reference)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Collect loss, accuracy and calibration error of a validation batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Collect loss, accuracy and calibration error of a test batch."""
        self._evaluate("test", batch)

    def _evaluate(self, phase: str, batch: Any) -> None:
        x, y = batch
        logits = self(x)
        # Probabilities, since torchmetrics takes logits that happen to lie within [0, 1] for such.
        probabilities = logits.float().softmax(1)
        losses = F.cross_entropy(logits, y, reduction="none")
        for name, values in (("loss", (losses,)), ("acc", (logits, y)), ("ece", (probabilities, y))):
            metric = cast(Metric, getattr(self, f"{phase}_{name}"))
            metric.update(*values)
            self.log(f"{phase}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "acc")

    def decay_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Groups of parameters with the L2 decay λ that acts on each, in g + λ·w; none is empty.

        `gamma_decay` is added on the scales of norms to what `decay_norm` gives them.
        """
        h = self.hparams
        decayed, free = split_parameters(self.model, h["decay_norm"])
        scales = {id(scale) for scale in norm_scales(self.model)} if h["gamma_decay"] else set()
        groups = []
        for parameters, decay in ((decayed, h["weight_decay"]), (free, 0.0)):
            groups.append(([p for p in parameters if id(p) not in scales], decay))
            groups.append(([p for p in parameters if id(p) in scales], decay + h["gamma_decay"]))
        return [group for group in groups if group[0]]

    def parameter_groups(self) -> list[ParameterGroup]:
        """The groups of `decay_groups`, divided further by the share of the learning rate; none is empty.

        A module's attribute `lr_scale` is the share of its parameters and of those below it, where these have
        none of their own; it is 1 without one.
        """
        scales: dict[int, float] = {}
        for module in self.model.modules():
            if (scale := getattr(module, "lr_scale", None)) is not None:
                scales |= dict.fromkeys(map(id, module.parameters()), float(scale))
        groups = []
        for parameters, decay in self.decay_groups():
            shares = [scales.get(id(p), 1.0) for p in parameters]
            for share in dict.fromkeys(shares):
                own = [p for p, its in zip(parameters, shares, strict=True) if its == share]
                groups.append(ParameterGroup(own, decay, share))
        return groups

    def clip_adaptively(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Clip the gradients of these parameters by `adaptive_clip`; those of the classifier stay."""
        assert self.adaptive_clip is not None
        head = {id(parameter) for parameter in output_layer(self.model).parameters()}
        clipped = clip_by_unit(parameters, gradients, self.adaptive_clip)
        return [
            gradient if id(parameter) in head else own
            for parameter, gradient, own in zip(parameters, gradients, clipped, strict=True)
        ]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip the gradients of automatic optimization adaptively, where that is asked for."""
        if self.adaptive_clip is not None:
            trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            clipped = self.clip_adaptively(trained, [p.grad for p in trained])
            for parameter, gradient in zip(trained, clipped, strict=True):
                parameter.grad = gradient

    def configure_optimizers(self) -> Any:
        """SGD over weights and, apart, norm parameters and biases, with the schedule stepped every step."""
        h = self.hparams
        groups = [
            {"params": group.parameters, "weight_decay": group.decay, "lr": h["lr"] * group.lr_scale}
            for group in self.parameter_groups()
        ]
        optimizer = torch.optim.SGD(groups, lr=h["lr"], momentum=h["momentum"])
        steps = h["steps"] or int(self.trainer.estimated_stepping_batches)
        factor = partial(learning_rate_factor, steps=steps, schedule=h["schedule"], warmup=h["warmup"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def load(folder: str | Path) -> NormClassifier:
    """Load a model that a study saved: a folder with `model.safetensors` and `module.json`.

    The module is in eval mode. Raises BadInput where a file is missing or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        arguments = json.loads((folder / "module.json").read_text())
        weights = load_file(folder / "model.safetensors")
        module = NormClassifier(**arguments)
    except BadInput as error:
        raise BadInput(f"{folder}: {error}") from None
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        wanted = "give a folder of module.json and model.safetensors"
        raise BadInput(f"{folder} holds no saved model: {error}; {wanted}") from None
    try:
        module.model.load_state_dict(weights)
    except RuntimeError as error:
        what = " ".join(str(error).split())
        raise BadInput(f"{folder}: the weights are of another model: {what}") from None
    return module.eval()


def check_model(model: str, norm: str, **arguments: Any) -> None:
    """Raise BadInput where such a module cannot be built; allocates nothing for a model of the registry."""
    with contextlib.nullcontext() if ":" in model else torch.device("meta"):
        NormClassifier(model, norm, **arguments)
