"""The time of a training step: alone and in a fleet, against a bare PyTorch loop on the same network.

Timed is from the first step to the last, on one thread; what a Trainer does before and after is not in it.
Every contender goes on with its own training in each of its turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch

from benchmarks.bare import BareLoop
from benchmarks.rounds import ROUNDS, Spent, Turns, as_times, now, speedups, take_turns
from benchmarks.table import Line
from bnbench.data import Arrays, shape_of
from bnbench.engine.chunked import BLOCK_STEPS, Blocks, ChunkedClassifier
from bnbench.engine.distributed import quiet_lightning, trainer_for
from bnbench.engine.fleet import FLEET_SIZE, FleetClassifier
from bnbench.engine.rows import module_arguments
from bnbench.lit import NormClassifier
from bnbench.study.trial import Trial

BARE, ONE = "bare loop", "one training"

#: On a GPU: a step to a bare loop that is tuned, and a fleet to as many trainings one after the other.
GPU_STEP, GPU_FLEET = 0.95, 8.0


@dataclass(frozen=True)
class Net:
    """A network that is measured: its row, how many samples there are, and the goals of its contenders.

    `goals` are the speeds, as multiples of the bare loop's, of "one training" and of the fleets, "eager" and
    "compiled", on a processor. `warm` steps come before anything is timed.
    """

    name: str
    row: Trial
    samples: int
    goals: Mapping[str, float] = field(default_factory=dict)
    fleets: tuple[str, ...] = ("eager", "compiled")
    fleet: int = FLEET_SIZE
    warm: int = 64


NETS = (
    Net(
        "MLP on digits",
        Trial(data="digits", model="mlp"),
        1077,
        {ONE: 1.3, "eager": 2.0, "compiled": 3.5},
    ),
    Net(
        "MLP on mnist1d",
        Trial(data="mnist1d", model="mlp"),
        4000,
        {ONE: 1.3, "eager": 2.0, "compiled": 3.5},
    ),
    Net(
        "CNN on digits",
        Trial(data="digits", model="cnn", model_options={"channels": 16}),
        1077,
        {ONE: 1.05, "compiled": 1.5},
    ),
    Net("ResNet-20 at 8x8", Trial(data="digits", model="resnet20"), 1077, {ONE: 1.0}, warm=8),
    # On one core a step of 16 of these takes 10 s; a compiled fleet always has so many places.
    Net(
        "ResNet-20 at 32x32",
        Trial(data="cifar10", model="resnet20"),
        512,
        {ONE: 1.0},
        fleets=("eager",),
        fleet=4,
        warm=2,
    ),
)


def random_arrays(row: Trial, samples: int, seed: int, device: str) -> Arrays:
    """Noise in the shape of a row's data set: the time of a step does not depend on what is in it."""
    in_shape, num_classes = shape_of(row.data, **row.data_options)
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *in_shape, generator=source)
    return Arrays(x, torch.randint(num_classes, (samples,), generator=source)).to(device)


def classifier_of(row: Trial, train: Arrays, device: str = "cpu") -> ChunkedClassifier:
    """The module that the engine trains for a row, ready to be trained."""
    module = ChunkedClassifier(
        train=train, batch_size=row.batch_size, training_seed=row.training_seed, **module_arguments(row)
    )
    if train.x.ndim == 4:
        module.to(memory_format=torch.channels_last)
    module.to(device)
    module.prepare()
    return module


class Mark(L.Callback):
    """Both clocks before the first step and after the last one."""

    def __init__(self) -> None:
        self.began: Spent | None = None
        self.ended = now()

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = self.began or now()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended = now()


class Training:
    """A module under the engine's trainer; a second call of `run` goes on with the training."""

    def __init__(self, row: Trial, module: L.LightningModule, replicas: int = 1, device: str = "cpu") -> None:
        self.row, self.module, self.replicas, self.device = row, module, replicas, device
        self.done = 0

    def run(self, steps: int) -> Spent:
        """Train for so many steps; what each of them spends for each replica."""
        mark = Mark()
        trainer = trainer_for(self.row, self.device, callbacks=[mark])
        blocks = Blocks(self.done, self.done + steps, [], lambda: False)
        devices = [torch.cuda.current_device()] if self.device == "cuda" else []
        with quiet_lightning(), torch.random.fork_rng(devices):
            trainer.fit(self.module, train_dataloaders=blocks)
        self.done += steps
        assert mark.began is not None
        return (mark.ended - mark.began) / (steps * self.replicas)


def contenders_of(net: Net, device: str) -> dict[str, BareLoop | Training]:
    """The loops that take turns on a network."""
    # So long that no slice reaches the end of the schedule.
    row = net.row.replace(steps=10**6, precision="bf16-mixed" if device == "cuda" else "32-true")

    def replica(number: int) -> ChunkedClassifier:
        arrays = random_arrays(row, net.samples, number, device)
        return classifier_of(row.replace(seed=number), arrays, device)

    arrays = random_arrays(row, net.samples, 0, device)
    model = NormClassifier(**module_arguments(row)).model
    found: dict[str, BareLoop | Training] = {
        BARE: BareLoop(model, arrays.x, arrays.y, row.batch_size, row.lr, device),
        ONE: Training(row, replica(0), device=device),
    }
    for kind in net.fleets:
        fleet = FleetClassifier([replica(k) for k in range(net.fleet)], compiled=kind == "compiled")
        found[kind] = Training(row, fleet, net.fleet, device)
    return found


def slice_of(loop: BareLoop | Training, warm: int, seconds: float) -> tuple[Callable[[], Spent], float]:
    """A turn of about so many seconds, in whole blocks where it is longer than one; what warming up took."""
    began = time.perf_counter()
    loop.run(warm)
    warmed = time.perf_counter() - began
    began = time.perf_counter()
    loop.run(warm)
    steps = max(2, round(seconds * warm / (time.perf_counter() - began)))
    if steps > BLOCK_STEPS:
        steps -= steps % BLOCK_STEPS
    return lambda: loop.run(steps), warmed


def lines_of(net: Net, turns: Turns, warmed: Mapping[str, float], device: str) -> Iterator[Line]:
    """The lines of a network from what its contenders spent on a step."""
    for name in (name for name in turns if name != BARE):
        label = name if name == ONE else f"fleet of {net.fleet}, {name}"
        least = GPU_STEP if device == "cuda" and name == ONE else net.goals.get(name)
        if device == "cuda" and name != ONE:
            least = None
        wall, processor = speedups(turns, name, than=BARE)
        times = {
            "step": as_times({BARE: turns[BARE], name: turns[name]}),
            "first call, seconds": warmed[name],
        }
        yield Line(f"step on {device}, {net.name}: {label}", wall, processor, least, times=times)
        if device == "cuda" and name != ONE:
            wall, processor = speedups(turns, name, than=ONE)
            yield Line(f"step on {device}, {net.name}: {label}, to one by one", wall, processor, GPU_FLEET)


def measure(
    nets: Sequence[Net] = NETS, rounds: int = ROUNDS, seconds: float = 0.5, device: str | None = None
) -> Iterator[Line]:
    """The steps of each network on a processor, and on the GPU where there is one."""
    there = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    torch.set_num_threads(1)
    for place in there if device is None else (device,):
        for net in nets:
            slices, warmed = {}, {}
            for name, loop in contenders_of(net, place).items():
                slices[name], warmed[name] = slice_of(loop, net.warm, seconds)
            yield from lines_of(net, take_turns(slices, rounds), warmed, place)
