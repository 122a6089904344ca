"""The engine's trainer: NormClassifier with manual optimization, many steps a `training_step`.

On small networks Python is the bottleneck. A batch of the loader is here a block of up to 32 steps; the
steps inside it cost a forward pass, one `torch.autograd.grad` and one fused update each, and nothing in
them waits for the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bnbench.data import Arrays, augmentation, generator, seed_of, step_indices
from bnbench.engine.captured import Differentiate, RecordedStep, chosen, recorder_for
from bnbench.engine.distributed import Group
from bnbench.lit import NormClassifier
from bnbench.norms.reference import layers_with_reference, reference_size
from bnbench.optimization import ParameterGroup, learning_rate_factor
from bnbench.registry import BadInput

BLOCK_STEPS = 32


class Blocks:
    """The steps [start, stop) as blocks of up to 32, cut at every one of `cuts`; ends early when told to.

    `splits` cut a block further and move no other edge; `edges` has the ends of the blocks without them.
    """

    def __init__(
        self,
        start: int,
        stop: int,
        cuts: Sequence[int],
        ended: Callable[[], bool],
        splits: Collection[int] = (),
    ) -> None:
        edges = {stop, *(cut for cut in cuts if start < cut < stop)}
        self.blocks: list[tuple[int, int]] = []
        self.edges: set[int] = set()
        at = start
        while at < stop:
            end = min(min(edge for edge in edges if edge > at), at + BLOCK_STEPS)
            inner = [at, *sorted(split for split in splits if at < split < end), end]
            self.blocks += pairwise(inner)
            at = end
            self.edges.add(end)
        #: Asked before each block.
        self.ended = ended

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for block in self.blocks:
            if self.ended():
                return
            yield block


def count_steps(trainer: L.Trainer, steps: int) -> None:
    """Add optimizer steps to `trainer.global_step`, which by itself counts calls of its optimizers."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.total.ready += steps
    progress.total.completed += steps


class FusedSGD:
    """SGD with momentum as one fused call a parameter group; buffers are plain tensors.

    v ← μ·v + (g + λ·w), w ← w − η·v, the first v being the first gradient: torch.optim.SGD's rule. A group
    is (parameters, λ) or (parameters, λ, its share of the learning rate).
    """

    def __init__(self, groups: Sequence[tuple[Any, ...]], momentum: float) -> None:
        self.groups = [ParameterGroup(*group) for group in groups if group[0]]
        self.momentum = momentum
        # The kernel takes no buffers where there is no momentum.
        self.buffers = [
            [torch.zeros_like(p) for p in group.parameters] if momentum else [] for group in self.groups
        ]
        self.parameters: list[Tensor] = [p for group in self.groups for p in group.parameters]
        self.lay_out()

    @torch.no_grad()
    def lay_out(self) -> None:
        """Give the buffers the memory layout of the parameters; to be called after these have been moved."""
        for group, buffers in zip(self.groups, self.buffers, strict=True):
            for parameter, buffer in zip(group.parameters, buffers, strict=False):
                if buffer.stride() != parameter.stride():
                    buffer.data = torch.empty_like(parameter).copy_(buffer)
        self._upright = [
            ([_upright(p) for p in group.parameters], [_upright(b) for b in buffers], group)
            for group, buffers in zip(self.groups, self.buffers, strict=True)
        ]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Update all parameters; the gradients come in the order of `parameters`."""
        # The kernel reads memory in order, and misreads a gradient that lies otherwise than its parameter.
        laid_out = [
            _upright(g if g.stride() == p.stride() else torch.empty_like(p).copy_(g))
            for g, p in zip(gradients, self.parameters, strict=True)
        ]
        at = 0
        for parameters, buffers, group in self._upright:
            own, rate = laid_out[at : at + len(parameters)], lr * group.lr_scale
            _update(parameters, own, buffers, group.decay, self.momentum, rate)
            at += len(parameters)


def _upright(tensor: Tensor) -> Tensor:
    """A matrix as it lies in memory: the kernel would copy one that is transposed."""
    return tensor.t() if tensor.ndim == 2 and not tensor.is_contiguous() else tensor


def _update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    decay: float,
    momentum: float,
    lr: float,
) -> None:
    if hasattr(torch, "_fused_sgd_"):
        # A zero buffer makes the first step v = g, as torch's does, without a case of its own.
        torch._fused_sgd_(
            parameters,
            gradients,
            buffers,
            weight_decay=decay,
            momentum=momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
        return
    # The fused kernel is private to torch: where it is missing, the same rule in public operations.
    steps = [gradient.add(p, alpha=decay) for gradient, p in zip(gradients, parameters, strict=True)]
    if momentum:
        steps = [b.mul_(momentum).add_(step) for b, step in zip(buffers, steps, strict=True)]
    for parameter, step in zip(parameters, steps, strict=True):
        parameter.sub_(step, alpha=lr)


class ChunkedClassifier(NormClassifier):
    """NormClassifier as the engine trains it: on data in memory, by blocks of steps, from a given seed.

    Every random draw is a pure function of the seed and the step, so a run that goes on from a checkpoint
    is bitwise the undisturbed one. `after_block(step)` is called after each block with the number of steps
    done; `last_losses` are those of its steps. A non-finite loss ends the training and sets `diverged`. A
    parameter that the model leaves unused gets a gradient of zero. The Trainer's own clipping and
    accumulation are refused by Lightning, as always with manual optimization.

    In a `group`, `batch_size` is that of each process: a step draws the global batch, every rank takes its
    share, and all use the mean of the losses and gradients. Running averages are those of rank 0; ranks
    beyond it draw dropout and augmentation for themselves. So with synchronized statistics, and without such
    draws, a group trains as one process on the global batch.

    Norms that take a reference batch get samples of the training data, not augmented, that are a function of
    the seed alone (on all ranks the same): as many as the norm asks for, or as the global batch has.

    Raises BadInput, beside what :class:`NormClassifier` raises, for an unknown augmentation, a batch or a
    reference larger than the data, and `steps` that are not given.
    """

    not_saved = ("train", "after_block", "group")

    def __init__(
        self,
        *,
        train: Arrays,
        batch_size: int,
        training_seed: tuple[int | str, ...],
        augment: str = "none",
        clip_norm: float | None = None,
        after_block: Callable[[int], None] = lambda step: None,
        group: Group = Group(),  # noqa: B008 (it is frozen)
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        if not self.hparams["steps"]:
            raise BadInput(
                f"steps is {self.hparams['steps']!r}; give the number of training steps, 1 or more"
            )
        if group.size > 1 and batch_size * group.size > len(train):
            raise BadInput(
                f"batch_size is {batch_size} on each of {group.size} devices, but there are {len(train)}"
                f" training samples; use 1 to {len(train) // group.size}"
            )
        step_indices(len(train), batch_size, 0, 0)
        self.automatic_optimization = False
        self.train_arrays = train
        self.group = group
        self.global_batch = batch_size * group.size
        self.training_seed = training_seed
        self.own_seed = (*training_seed, "rank", group.rank) if group.rank else training_seed
        self.augment = augmentation(augment, tuple(train.x.shape[1:])) if augment != "none" else None
        self.clip_norm = clip_norm
        self.after_block = after_block
        self.diverged = False
        self.last_losses: list[float] = []
        #: When the first block began (`time.perf_counter()`), after all that Lightning does before.
        self.began = 0.0
        #: When the steps of the last block had ended, before anyone looked at the module.
        self.ended = 0.0
        #: Samples (x, y) that are not trained on, for probes that compare.
        self.held_out: Arrays | None = None
        self.optimizer_state: FusedSGD | None = None
        self._recorded: RecordedStep | None = None
        if referring := layers_with_reference(self.model):
            size = reference_size(referring, self.global_batch)
            if size > len(train):
                raise BadInput(
                    f"reference_size is {size}, but there are {len(train)} training samples;"
                    f" use 2 to {len(train)}"
                )
            chosen = step_indices(len(train), size, 0, 1, *training_seed, "reference")[0]
            self.reference = train.x[chosen.to(train.x.device)]

    def setup(self, stage: str) -> None:
        """No metrics: the engine evaluates by itself."""

    def configure_optimizers(self) -> None:
        """No optimizer that Lightning could step: :class:`FusedSGD` is made when training starts."""

    def prepare(self) -> FusedSGD:
        """Make the optimizer for the parameters where they are now, and ready the norms."""
        self.optimizer_state = FusedSGD(self.parameter_groups(), self.hparams["momentum"])
        self.find_followers()
        self.bring_up_to_date(0)
        self._averages = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        recorder = recorder_for(self.device) if self.group.size == 1 else None
        self._recorded = None if recorder is None else RecordedStep(self._differentiate, recorder)
        return self.optimizer_state

    def on_fit_start(self) -> None:
        """Make the optimizer, unless someone has loaded a state into it already."""
        if self.optimizer_state is None:
            self.prepare()

    def on_train_start(self) -> None:
        """Seed what a probe draws before the first step."""
        seed_device(self.device, seed_of(*self.own_seed, "start"))

    def training_step(self, batch: tuple[int, int], batch_idx: int) -> None:  # type: ignore[override]
        """Do the steps [start, stop) of a block."""
        self.began = self.began or time.perf_counter()
        start, stop = (int(edge) for edge in batch)
        losses = self.do_steps(start, stop)
        count_steps(self.trainer, stop - start)
        self.last_losses = torch.stack(losses).tolist()
        self.diverged = self.diverged or not all(map(math.isfinite, self.last_losses))
        self.ended = time.perf_counter()

    def do_steps(self, start: int, stop: int) -> list[Tensor]:
        """Do the steps [start, stop) and return their losses."""
        x_all, y_all = self.train_arrays.x, self.train_arrays.y
        differentiate = chosen(self._recorded, self._differentiate, self.model)
        indices = step_indices(len(y_all), self.global_batch, start, stop, *self.training_seed)
        return [
            self._step(step, x_all.index_select(0, index), y_all.index_select(0, index), differentiate)
            for step, index in enumerate(self.group.share_of(indices, dim=1).to(x_all.device), start)
        ]

    def on_train_batch_end(self, outputs: Any, batch: tuple[int, int], batch_idx: int) -> None:
        """Report the block, here where Lightning's autocast no longer reigns."""
        self.bring_up_to_date(int(batch[1]))
        self.after_block(int(batch[1]))

    def on_train_end(self) -> None:
        """Nothing: after its last block the module is up to date."""

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        h = self.hparams
        return float(h["lr"] * learning_rate_factor(step, h["steps"], h["schedule"], h["warmup"]))

    def probe_batch(self, samples: int) -> tuple[Tensor, Tensor]:
        """The first training samples, or so many as there are, for probes."""
        return self.train_arrays.x[:samples], self.train_arrays.y[:samples]

    def held_out_batch(self, samples: int) -> tuple[Tensor, Tensor] | None:
        """The first samples that are not trained on, where there are any."""
        return None if self.held_out is None else (self.held_out.x[:samples], self.held_out.y[:samples])

    def _step(self, step: int, x: Tensor, y: Tensor, differentiate: Differentiate | None = None) -> Tensor:
        x = self.augmented(step, x)
        seed_device(x.device, seed_of(*self.own_seed, "dropout", step))
        self.tell_progress(step)
        # An autocast that spans a block may keep its copies of the weights, which a step makes out of date.
        torch.clear_autocast_cache()
        loss, gradients = self.group.average(*(differentiate or self._differentiate)(x, y), self._averages)
        self.update(step, gradients)
        return loss

    def _differentiate(self, x: Tensor, y: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        assert self.optimizer_state is not None
        loss = self.loss(self.run_training_batch(x), y)
        gradients = torch.autograd.grad(loss, self.optimizer_state.parameters, materialize_grads=True)
        return loss.detach(), gradients

    def augmented(self, step: int, x: Tensor) -> Tensor:
        """A batch as this training sees it at a step."""
        return x if self.augment is None else self.augment(x, generator(*self.own_seed, "augment", step))

    def update(self, step: int, gradients: Sequence[Tensor]) -> None:
        """Clip the gradients, which come in the order of the optimizer's parameters, and do a step."""
        assert self.optimizer_state is not None
        if self.adaptive_clip is not None:
            gradients = self.clip_adaptively(self.optimizer_state.parameters, gradients)
        if self.clip_norm is not None:
            norm = torch.nn.utils.get_total_norm(gradients)
            scale = torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0)
            gradients = [g * scale for g in gradients]
        self.optimizer_state.step(gradients, self.learning_rate_at(step))


def seed_device(device: torch.device, seed: int) -> None:
    """Seed what a training draws from torch's own generators on a device."""
    # torch.manual_seed looks at every kind of device and costs as much as a step of a small network.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
