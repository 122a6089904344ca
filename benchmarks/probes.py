"""What a probe adds to the time of a training, at its default schedule.

Timed are the readings within a training by the engine, against the steps of that same training: so other work
on the machine spoils little. The share is that of the worst case, a run that ends with its second reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch

from benchmarks.rounds import ROUNDS, Spent, now
from benchmarks.steps import classifier_of
from benchmarks.table import Line
from bnbench.data import Split, default_folder, load_split
from bnbench.engine.chunked import Blocks
from bnbench.engine.distributed import quiet_lightning, trainer_for
from bnbench.probes import PROBES, Probe, build_probe
from bnbench.study.trial import Trial

#: The share of its time, in percent, that a training may spend on a probe.
ALLOWED = 5.0
ROWS = {"MLP": Trial(data="digits", model="mlp"), "CNN": Trial(data="digits", model="cnn")}


class Mark(L.Callback):
    """The clocks when a training starts and ends, and the sum of those when its hooks run.

    Callbacks run in their order: the difference of two sums is the time of what stands between two marks.
    """

    def __init__(self) -> None:
        self.start = self.end = self.hooks = Spent(0.0, 0.0)

    def on_train_start(self, *_: Any) -> None:
        self.start = now()

    def on_train_batch_start(self, *_: Any) -> None:
        self.hooks = self.hooks + now()

    def on_train_batch_end(self, *_: Any) -> None:
        self.hooks = self.hooks + now()

    def on_train_end(self, *_: Any) -> None:
        self.end = now()


def train_with(probe: Probe, row: Trial, split: Split) -> tuple[Spent, Spent]:
    """Train a row as the engine does; what all of it spends, and the readings among it."""
    before, after = Mark(), Mark()
    module = classifier_of(row, split.train)
    module.held_out = split.val
    trainer = trainer_for(row, "cpu", callbacks=[before, probe, after])
    with quiet_lightning():
        trainer.fit(module, train_dataloaders=Blocks(0, row.steps, probe.due_steps(row.steps), lambda: False))
    return before.end - before.start, after.hooks - before.hooks


def reading_in_steps(whole: float, readings: float, steps: int, count: int) -> float:
    """What one of `count` readings takes, in steps of the same training of so many."""
    return readings / count / ((whole - readings) / steps)


def measure(
    names: Sequence[str] = (),
    rows: Mapping[str, Trial] = ROWS,
    rounds: int = ROUNDS,
    steps: int = 192,
) -> Iterator[Line]:
    """Every probe on every network; its declared cost is among the times."""
    torch.set_num_threads(1)
    split = load_split("digits", 0, folder=default_folder())
    for name in names or PROBES:
        for network, row in rows.items():
            found = []
            for _ in range(rounds):
                probe = build_probe(name, steps=[steps // 3, steps])
                whole, reading = train_with(probe, row.replace(steps=steps), split)
                count = len(probe.trace.steps)
                found.append(
                    (
                        reading_in_steps(whole.wall, reading.wall, steps, count),
                        reading_in_steps(whole.processor, reading.processor, steps, count),
                    )
                )
            every = build_probe(name).every
            wall, processor = (
                tuple(100 * 2 * cost / every for cost in costs) for costs in zip(*found, strict=True)
            )
            times = {
                "reading, in steps": [cost for cost, _ in found],
                "declared": PROBES[name].probe.passes,
                "every": every,
            }
            yield Line(f"probe {name}, {network}", wall, processor, most=ALLOWED, unit="%", times=times)
