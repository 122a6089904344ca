"""The fleet: replicas of one network that are trained together, each as if it were alone.

On small networks Python is the bottleneck, and a step of many replicas costs hardly more Python than a step
of one. Replicas share their shape (network, norm, batch size, number of steps) and differ in seeds, data,
learning rate, weight decay, momentum, initialization, dropout's strength and label noise.
"""

from __future__ import annotations

import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnbench.data import Arrays, generator, seed_of, shape_of, step_indices
from bnbench.engine.captured import Differentiate, RecordedStep, chosen, recorder_for
from bnbench.engine.checkpoint import changing_tensors
from bnbench.engine.chunked import ChunkedClassifier, FusedSGD, count_steps, seed_device
from bnbench.engine.rows import classifier_of
from bnbench.engine.stacked import StackedLoss
from bnbench.study.smoke import smallest
from bnbench.study.trial import Trial

#: The most replicas that train together.
FLEET_SIZE = 16
#: One replica by itself would take other convolutions, with other rounding, than several.
FEWEST_PLACES = 2

#: Fields in which the rows of a fleet may differ.
_FREE = {
    *("seed", "data_seed", "repeat", "score_on", "label_noise", "n_train"),
    *("lr", "momentum", "weight_decay", "decay_norm", "gamma_decay", "schedule", "warmup"),
    *("clip_norm", "adaptive_clip"),
    *("init", "init_scale", "bias_init"),
}


def fleet_shape(trial: Trial) -> str:
    """Rows with the same text may train in one fleet, if they may in any (`can_fleet`)."""
    fields = {name: value for name, value in trial.changed().items() if name not in _FREE}
    # Where units are dropped, the networks have the same layers whatever the strength.
    fields["dropout"] = trial.dropout > 0
    return json.dumps(fields, sort_keys=True)


def can_fleet(trial: Trial) -> bool:
    """Whether rows of this shape may train in a fleet: tried on the row's network with made-up data.

    Two replicas of different seeds, learning rates and weight decays do two steps in float64 on the smallest
    batch that the norms take; losses, parameters, buffers and momentum must equal those of separate trainings
    to 1e-10 of a tensor's largest value (of 1 where that is less). Rows that are probed or timed, or that
    train on several devices, train alone.
    """
    if trial.probes or trial.alone or trial.world_size > 1:
        return False
    row = smallest(trial).replace(
        **{name: getattr(_NEUTRAL, name) for name in _FREE - {"clip_norm", "adaptive_clip"}},
        curve_points=0,
        until_train_nll=None,
        precision="64-true",
        backend="single",
        dropout=0.5 if trial.dropout else 0.0,
        steps=2,
    )
    return _equals_separate(json.dumps(row.changed(), sort_keys=True))


# So small a rate that a deep network, whose gradients explode, does not magnify rounding in its second step.
_NEUTRAL = Trial(lr=1e-6)


@functools.lru_cache(maxsize=1024)
def _equals_separate(text: str) -> bool:
    trial = Trial(**json.loads(text))

    def members() -> list[ChunkedClassifier]:
        made = []
        for number in range(2):
            row = trial.replace(seed=number, lr=trial.lr * (1 + number), weight_decay=1e-3 * number)
            shape, classes = shape_of(row.data, **row.data_options)
            draw = generator("can_fleet", number)
            count = max(row.batch_size, row.norm_options.get("reference_size") or 0)
            x = torch.randn(count, *shape, generator=draw, dtype=torch.float64)
            y = torch.randint(classes, (count,), generator=draw)
            member = classifier_of(row, Arrays(x, y)).double()
            member.prepare()
            made.append(member)
        return made

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap tells of operations that it does one replica after the other
        alone = members()
        lonely = torch.stack([torch.stack(member.do_steps(0, 2)) for member in alone])
        together = members()
        try:
            fleet = FleetClassifier(together)
            losses = torch.stack(fleet.do_steps(0, 2), dim=1)
        except Exception:  # whatever a layer's code or vmap says against it
            return False
    pairs = [(lonely, losses)]
    for one, other in zip(alone, together, strict=True):
        pairs += zip(_changing(one), _changing(other), strict=True)
    return all(_largest(one - other) <= 1e-10 * max(1.0, _largest(one)) for one, other in pairs)


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def _changing(member: ChunkedClassifier) -> list[Tensor]:
    assert member.optimizer_state is not None
    return changing_tensors(member.model, member.optimizer_state)


_compiled: dict[tuple[Any, ...], StackedLoss] = {}


def _stacked_loss(classifier: ChunkedClassifier, compiled: bool) -> StackedLoss:
    if not compiled:
        return StackedLoss(classifier)
    # A process that trains many fleets of a shape compiles it once.
    own = ("logit_scale", "label_smoothing", "steps")
    key = (
        str(classifier.model),
        *(classifier.hparams[name] for name in own),
        *(classifier.global_batch, classifier.train_arrays.x.shape[1:]),
        *((p.dtype, p.device) for p in [next(classifier.model.parameters())]),
    )
    if key not in _compiled:
        _compiled[key] = StackedLoss(classifier)
        _compiled[key].compile()
    return _compiled[key]


class FleetClassifier(L.LightningModule):
    """Replicas of one network under one Trainer, by blocks of steps.

    `members` are made as each would be for a training of its own, and stay usable: their parameters and
    buffers are views of the stacked ones. After each block `after_block(step, seconds)` is called, and may
    `keep` fewer. What a member draws and how it is updated is its own code: data order, augmentation, dropout
    masks, learning rate, weight decay, clipping.

    In float64 a member equals its separate training to rounding; its bits depend neither on the others nor on
    its place. A fleet has at least two places, and a compiled one always `FLEET_SIZE`, since another size is
    another program; those left over repeat the first member.
    """

    def __init__(self, members: Sequence[ChunkedClassifier], compiled: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.after_block: Callable[[int, float], None] = lambda step, seconds: None
        self.compiled = compiled
        self.stacked_loss = _stacked_loss(members[0], compiled)
        self._join_data(members)
        self.members: list[ChunkedClassifier] = []
        self.keep(members)
        self._began = self._clock = self._ended = 0.0

    @property
    def _missing(self) -> int:
        """How many places repeat the first member."""
        return max(0, (FLEET_SIZE if self.compiled else FEWEST_PLACES) - len(self.members))

    def configure_optimizers(self) -> None:
        """No optimizer that Lightning could step: every member has its own."""

    def _join_data(self, members: Sequence[ChunkedClassifier]) -> None:
        """Lay the members' data behind each other, each set once, and note where a member's begins."""
        sets: dict[tuple[int, int], tuple[int, ChunkedClassifier]] = {}
        length = 0
        self._offsets: dict[int, int] = {}
        for member in members:
            arrays = member.train_arrays
            place = arrays.x.data_ptr(), arrays.y.data_ptr()
            if place not in sets:
                sets[place] = (length, member)
                length += len(arrays)
            self._offsets[id(member)] = sets[place][0]
        owners = [member.train_arrays for _, member in sets.values()]
        alone = len(owners) == 1
        self._x = owners[0].x if alone else torch.cat([arrays.x for arrays in owners])
        self._y = owners[0].y if alone else torch.cat([arrays.y for arrays in owners])

    _stacked: dict[str, Tensor]
    _trained: list[Tensor]
    _reference: Tensor | None
    _recorded: RecordedStep | None

    @torch.no_grad()
    def keep(self, members: Sequence[ChunkedClassifier]) -> None:
        """Go on with these members; the others keep the weights that they have, in memory of their own."""
        if len(members) == len(self.members):
            return
        staying = {id(member) for member in members}
        for member in self.members:
            if id(member) not in staying:
                for tensor in _tensors_of(member).values():
                    tensor.data = tensor.data.clone()
        self.members = list(members)
        self._stacked, self._trained, self._reference = {}, [], None
        if not members:
            # Trainer and module hold each other, and a cycle may live long: it is to hold no data.
            self._x = self._y = torch.empty(0)
            return
        rows = [_tensors_of(member) for member in members]
        places = rows + rows[:1] * self._missing
        # A linear map's gradient comes out transposed under vmap. Where its weight lies in memory in the same
        # way, nothing needs to be copied for the update.
        turned = {f"{name}.weight" for name, m in members[0].model.named_modules() if type(m) is nn.Linear}
        self._stacked = {
            name: torch.stack([row[name].t() for row in places]).transpose(1, 2)
            if name in turned
            else torch.stack([row[name] for row in places])
            for name in rows[0]
        }
        for k, row in enumerate(rows):
            for name, tensor in row.items():
                tensor.data = self._stacked[name][k]
        for member in members:
            cast(FusedSGD, member.optimizer_state).lay_out()
        trained = {name for name, p in members[0].model.named_parameters() if p.requires_grad}
        self._trained = [self._stacked[name].requires_grad_() for name in rows[0] if name in trained]
        position = {name: i for i, name in enumerate(name for name in rows[0] if name in trained)}
        self._orders = [_order_of(member, position) for member in members]
        if self.stacked_loss.referring:
            own = [cast(Tensor, member.reference) for member in members]
            self._reference = torch.stack(own + own[:1] * self._missing)
        recorder = recorder_for(self._x.device)
        self._recorded = None if recorder is None else RecordedStep(self._differentiate, recorder)

    def training_step(self, batch: tuple[int, int], batch_idx: int) -> None:
        """Do the steps [start, stop) of a block."""
        self._began = self._began or time.perf_counter()
        start, stop = (int(edge) for edge in batch)
        losses = self.do_steps(start, stop)
        count_steps(self.trainer, stop - start)
        for member, own in zip(self.members, torch.stack(losses, dim=1).tolist(), strict=True):
            member.last_losses = own
            member.diverged = member.diverged or not all(map(math.isfinite, own))
        self._ended = time.perf_counter()

    def do_steps(self, start: int, stop: int) -> list[Tensor]:
        """Do the steps [start, stop) and return the members' losses (K,) of each."""
        differentiate = chosen(self._recorded, self._differentiate, self.stacked_loss.template)
        indices = torch.stack(
            [
                step_indices(len(m.train_arrays), m.global_batch, start, stop, *m.training_seed)
                + self._offsets[id(m)]
                for m in self.members
            ],
            dim=1,
        ).to(self._x.device)
        return [self._step(step, index, differentiate) for step, index in enumerate(indices, start)]

    def on_train_batch_end(self, outputs: Any, batch: tuple[int, int], batch_idx: int) -> None:
        """Report the block, here where Lightning's autocast no longer reigns."""
        for member in self.members:
            member.bring_up_to_date(int(batch[1]))
        self.after_block(int(batch[1]), self._ended - max(self._began, self._clock))
        self._clock = time.perf_counter()

    def _step(self, step: int, index: Tensor, differentiate: Differentiate | None = None) -> Tensor:
        x, y = (
            t.index_select(0, index.flatten()).view(*index.shape, *t.shape[1:]) for t in (self._x, self._y)
        )
        if self.members[0].augment is not None:
            x = torch.stack([m.augmented(step, own) for m, own in zip(self.members, x, strict=True)])
        masks: dict[str, Tensor] = {}
        if layers := self.stacked_loss.masks:
            if next(iter(layers.values())).like is None:
                self.stacked_loss.find_masks(x[0], self.members[0].reference)
            masks = self._masks(step, x.device)
        if missing := self._missing:
            x, y = (torch.cat([t, t[:1].expand(missing, *t.shape[1:])]) for t in (x, y))
        self.stacked_loss.tell_progress(min(1.0, step / self.members[0].hparams["steps"]))
        if self.stacked_loss.followers:
            # A ramp may be a buffer, and theirs are views of the stacked ones.
            for member in self.members:
                member.tell_progress(step)
        # An autocast that spans a block may keep its copies of the weights, which a step makes out of date.
        torch.clear_autocast_cache()
        losses, gradients = (differentiate or self._differentiate)(x, y, *masks.values())
        rows = zip(*(gradient.unbind() for gradient in gradients), strict=True)
        for member, order, row in zip(self.members, self._orders, rows, strict=False):
            member.update(step, [row[i] for i in order])
        return losses[: len(self.members)]

    def _differentiate(self, x: Tensor, y: Tensor, *masks: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        tensors = self._stacked | dict(zip(self.stacked_loss.masks, masks, strict=True))
        losses = self.stacked_loss.run(tensors, self._reference, x, y)
        gradients = torch.autograd.grad(losses.sum(), self._trained, materialize_grads=True)
        return losses.detach(), gradients

    def _masks(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """Every member's dropout masks of a step, drawn as `nn.Dropout` would have drawn them."""
        layers = self.stacked_loss.masks
        drawn: list[list[Tensor]] = []
        for member in self.members:
            seed_device(device, seed_of(*member.own_seed, "dropout", step))
            p = member.hparams["dropout"]
            ones = [torch.ones_like(cast(Tensor, layer.like), device=device) for layer in layers.values()]
            drawn.append([F.dropout(kept, p, training=True) for kept in ones])
        drawn += drawn[:1] * self._missing
        return {
            name: torch.stack(masks) for name, masks in zip(layers, zip(*drawn, strict=True), strict=True)
        }


def _tensors_of(member: ChunkedClassifier) -> dict[str, Tensor]:
    """The parameters and buffers of a member's network."""
    return {**dict(member.model.named_parameters()), **dict(member.model.named_buffers())}


def _order_of(member: ChunkedClassifier, position: Mapping[str, int]) -> list[int]:
    """Where the gradients stand that a member's optimizer wants, in its order."""
    optimizer = member.optimizer_state
    assert optimizer is not None
    names = {id(parameter): name for name, parameter in member.model.named_parameters()}
    return [position[names[id(parameter)]] for parameter in optimizer.parameters]
