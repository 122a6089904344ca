"""What every probe is: the registry, and the callback with its schedule."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bnbench.probes.passes import Loss, same_draws, untouched
from bnbench.probes.trace import Reading, Trace, trace_of
from bnbench.registry import BadInput, Registry, check_options, nearest

#: A run spends at most this share of its steps on a probe at its default schedule.
DEFAULT_SHARE = 0.05

_Probe = TypeVar("_Probe", bound="type[Probe]")


@dataclass(frozen=True)
class Moment:
    """When a probe measures: after `step` optimizer steps, with this learning rate and batch of one device.

    `held_out` is a batch of validation data, where there is one.
    """

    step: int
    lr: float
    batch_size: int
    held_out: tuple[Tensor, Tensor] | None = None


class Probe(L.Callback):
    """Measures a network in training, on a fixed sample of its training data, and changes nothing.

    It works with any LightningModule whose `forward` gives one tensor and whose training batches are pairs
    (x, y). The loss is `loss`, else the module's method `loss(output, y)`, else cross-entropy. The sample is
    `batch`, else the first `samples` of the training data (by default so many as a reading needs, a multiple
    of the training batch), as they come without shuffling; of a data set without an index the first batch.

    Readings are taken after each of `steps` optimizer steps, or every `every` steps, 0 among them; by
    default so seldom that a run which is long enough for two spends at most 5 % of its steps on them. `trace`
    has them all, and the single numbers go to the Trainer's loggers as `probe/<name>/<value>`.

    Readings are made in the precision of the weights, with autocast off. Under DDP all processes take part,
    with the same sample, and the first one keeps the readings. Raises BadInput for a schedule that cannot
    be, for strategies that split the parameters of a module (FSDP, DeepSpeed), and where there is no sample.
    """

    name: ClassVar[str]
    #: What a reading costs, in training steps; the default schedule follows from it.
    passes: ClassVar[float]
    #: A reading needs this many training batches of samples.
    batches: ClassVar[int] = 1

    def __init__(
        self,
        *,
        every: int | None = None,
        steps: Sequence[int] | None = None,
        samples: int | None = None,
        batch: tuple[Tensor, Tensor] | None = None,
        loss: Loss | None = None,
    ) -> None:
        if every is not None and steps is not None:
            raise BadInput(f"probe {self.name!r} takes `every` or `steps`, not both")
        if every is not None and every < 1:
            raise BadInput(f"probe {self.name!r}: every must be 1 or more, not {every!r}")
        if steps is not None and (not steps or any(not isinstance(s, int) or s < 0 for s in steps)):
            raise BadInput(f"probe {self.name!r}: steps must be whole numbers of 0 or more, not {steps!r}")
        if samples is not None and samples < 1:
            raise BadInput(f"probe {self.name!r}: samples must be 1 or more, not {samples!r}")
        self.every = every or math.ceil(2 * self.passes / DEFAULT_SHARE)
        self.steps = None if steps is None else tuple(sorted(steps))
        self.samples = samples
        self.given_loss = loss
        self.readings: dict[int, Reading] = {}
        self._sample = batch
        self._held_out: tuple[Tensor, Tensor] | None = None
        self._seen = -1

    @abstractmethod
    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        """Measure on a batch; called where everything is put back afterwards (:func:`untouched`)."""

    @property
    def trace(self) -> Trace:
        """All readings so far."""
        return trace_of(self.readings)

    def due_steps(self, steps: int) -> list[int]:
        """The steps of a run of so many after which a reading is due; 0 is before the first."""
        due = range(0, steps + 1, self.every) if self.steps is None else self.steps
        return [step for step in due if step <= steps]

    def samples_for(self, batch_size: int) -> int:
        """How many samples a reading takes beside training batches of that size."""
        return self.samples or self.batches * batch_size

    def _is_due(self, step: int) -> bool:
        if self.steps is None:
            return step // self.every > self._seen // self.every
        return any(self._seen < due <= step for due in self.steps)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse strategies under which no process has the whole module."""
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise BadInput(
                f"probe {self.name!r} needs the whole module on each device, and"
                f" {type(trainer.strategy).__name__} splits it; use one device or ddp"
            )

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any
    ) -> None:
        """Keep the first validation batch."""
        if self._held_out is None and _is_pair(batch):
            self._held_out = (batch[0].detach().clone(), batch[1].detach().clone())

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Find the sample, and take the reading before the first step."""
        if self._sample is None:
            self._sample = self._find_sample(trainer, pl_module, batch)
        if self._seen < 0:
            self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a reading where one is due."""
        self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if not self._is_due(step):
            return
        self._seen = step
        assert self._sample is not None
        x, y = (part.to(module.device) for part in self._sample)
        if x.is_floating_point():
            # The module's own dtype is not that of a part of it that was made double.
            x = x.to(next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype))
        held_out = self._held_out or _ask(module, "held_out_batch", len(x))
        moment = Moment(
            step, _learning_rate(trainer, module, step), _batch_size(trainer, module, x), held_out
        )
        with untouched(module):
            # Norms that follow the training, or keep a reference, are as they would be in an evaluation.
            _ask(module, "bring_up_to_date", step)
            try:
                reading = self.measure(module, x, y, moment)
            except BadInput as error:
                named = "" if str(error).startswith("probe ") else f"probe {self.name!r}: "
                raise BadInput(f"{named}{error}") from None
        if not trainer.is_global_zero:
            return
        self.readings[step] = reading
        for logger in trainer.loggers:
            logger.log_metrics({f"probe/{self.name}/{k}": v for k, v in reading.values.items()}, step)

    def _find_sample(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any
    ) -> tuple[Tensor, Tensor]:
        own: Any = getattr(module, "probe_batch", None)
        if own is not None:
            return cast(tuple[Tensor, Tensor], own(self.samples_for(module.global_batch)))  # type: ignore[arg-type]
        if not _is_pair(batch):
            raise BadInput(
                f"probe {self.name!r} needs training batches (x, y) of tensors; give it one as batch=(x, y)"
            )
        found = _first_of(trainer.train_dataloader, self.samples_for(len(batch[0])))
        x, y = found if found is not None and _is_pair(found) else batch
        return x.detach().clone(), y.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on with."""
        return {"seen": self._seen, "sample": self._sample, "trace": self.trace.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a training was."""
        self._seen, self._sample = state_dict["seen"], state_dict["sample"]
        trace = Trace.from_json(state_dict["trace"])
        self.readings = {step: trace.at(step) for step in trace.steps}


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch)


def _ask(module: nn.Module, method: str, *arguments: Any) -> Any:
    own = getattr(module, method, None)
    return None if own is None else own(*arguments)


def _learning_rate(trainer: L.Trainer, module: L.LightningModule, step: int) -> float:
    own = _ask(module, "learning_rate_at", step)
    if own is None and trainer.optimizers:
        own = trainer.optimizers[0].param_groups[0]["lr"]
    return math.nan if own is None else float(own)


def _batch_size(trainer: L.Trainer, module: L.LightningModule, x: Tensor) -> int:
    together = getattr(module, "global_batch", None)
    if isinstance(together, int):
        return together // trainer.world_size
    own = getattr(trainer.train_dataloader, "batch_size", None)
    return own if isinstance(own, int) else len(x)


def _first_of(loader: Any, samples: int) -> Any:
    """The first samples of a loader's data set, or None where it has no index."""
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__getitem__"):
        return None
    data = loader.dataset
    with same_draws():
        rows = [data[place] for place in range(min(samples, len(cast(Any, data))))]
        return loader.collate_fn(rows)


@dataclass(frozen=True)
class ProbeEntry:
    """A probe of the registry: its callback, the paper, and the options that it alone has, with defaults."""

    name: str
    probe: type[Probe]
    paper: str
    options: Mapping[str, Any]


PROBES: Registry[ProbeEntry] = Registry("probe", "bnbench.probes")


def probe(name: str, *, passes: float, batches: int = 1, paper: str = "") -> Callable[[_Probe], _Probe]:
    """Register a subclass of :class:`Probe`.

    `passes` is what a reading costs, in training steps on a batch; `batches` how many training batches of
    samples it needs.
    """

    def register(cls: _Probe) -> _Probe:
        cls.name, cls.passes, cls.batches = name, passes, batches
        PROBES.add(name, ProbeEntry(name, cls, paper, _own_options(cls)))
        return cls

    return register


def _own_options(cls: type[Probe]) -> dict[str, Any]:
    shared = inspect.signature(Probe.__init__).parameters
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in shared}


def build_probe(name: str, **options: Any) -> Probe:
    """Build a registered probe from plain options. Raises BadInput for unknown names, options and values."""
    entry = PROBES[name]
    shared = list(inspect.signature(_schedule).parameters)
    for option in options:
        if option not in shared and option not in entry.options:
            known = [*shared, *entry.options]
            raise BadInput(f"probe {name!r} has no option {option!r}{nearest(option, known)}")
    check_options(f"probe {name!r}", _schedule, {k: v for k, v in options.items() if k in shared})
    check_options(f"probe {name!r}", entry.probe, {k: v for k, v in options.items() if k not in shared})
    return entry.probe(**options)


def _schedule(
    *,
    every: int | None = None,
    steps: list | tuple | None = None,  # type: ignore[type-arg]
    samples: int | None = None,
) -> None:
    """The plain options that every probe has."""
