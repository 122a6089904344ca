"""Measure what each probe adds to the time of a training, at its default schedule.

    python benchmarks/probes.py                          every registered probe
    python benchmarks/probes.py build/probes.json rank   some of them, and the numbers in this file

A training by the engine, with the probe and without it, takes turns with itself; the overhead is the median
over pairs. Counted is the processor time between the first step and the last, on one thread. Runs are so long
that at least two readings happen. Other work on the machine spoils differences between two trainings, and
less what is timed within one: the share of a reading, from which follows the worst case, a run that ends with
its second reading.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch

from bnbench.data import Split, default_folder, load_split
from bnbench.engine.chunked import Blocks, ChunkedClassifier
from bnbench.engine.distributed import quiet_lightning, trainer_for
from bnbench.engine.rows import module_arguments
from bnbench.probes import PROBES, Probe, build_probe
from bnbench.study.trial import Trial

PAIRS = 5
FEWEST_STEPS = 300
ALLOWED = 0.05
ROWS = {"MLP": Trial(data="digits", model="mlp"), "CNN": Trial(data="digits", model="cnn")}


class Mark(L.Callback):
    """The processor time when a training starts and ends, and the sum of those when its hooks run.

    Callbacks run in their order: the difference of two sums is the time of what stands between two marks.
    """

    def __init__(self) -> None:
        self.start = self.end = self.hooks = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.start = time.process_time()

    def on_train_batch_start(self, *_: Any) -> None:
        self.hooks += time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.hooks += time.process_time()

    def on_train_end(self, *_: Any) -> None:
        self.end = time.process_time()


@dataclass(frozen=True)
class Cost:
    """What a probe costs one network.

    `overhead` is the share of its time that the probe adds to a training, the median over `pairs`; `passes`
    the cost of a reading in training steps, and `declared` what the probe says that it is.
    """

    probe: str
    network: str
    every: int
    steps: int
    readings: int
    pairs: tuple[float, ...]
    overhead: float
    passes: float
    declared: float

    @property
    def worst(self) -> float:
        """The overhead, by the cost of a reading, in a run that ends with its second one."""
        return 2 * self.passes / self.every


def seconds_of(row: Trial, split: Split, probes: Sequence[Probe] = ()) -> tuple[float, float]:
    """Train a row as the engine does; the processor seconds of it all, and of the readings among them."""
    before, after = Mark(), Mark()
    module = ChunkedClassifier(
        train=split.train,
        batch_size=row.batch_size,
        training_seed=row.training_seed,
        **module_arguments(row),
    )
    module.held_out = split.val
    if row.model == "cnn":
        module.to(memory_format=torch.channels_last)
    cuts = [step for probe in probes for step in probe.due_steps(row.steps)]
    trainer = trainer_for(row, "cpu", callbacks=[before, *probes, after])
    with quiet_lightning():
        trainer.fit(module, train_dataloaders=Blocks(0, row.steps, cuts, lambda: False))
    return before.end - before.start, after.hooks - before.hooks


def measure(name: str, network: str, split: Split) -> Cost:
    """What a probe costs a network."""
    every = build_probe(name).every
    row = ROWS[network].replace(steps=every * math.ceil(FEWEST_STEPS / every))
    pairs, shares = [], []
    for pair in range(PAIRS):
        # Which of the two comes first takes turns as well.
        without = seconds_of(row, split)[0] if pair % 2 else 0.0
        probe = build_probe(name)
        whole, reading = seconds_of(row, split, [probe])
        without = without or seconds_of(row, split)[0]
        pairs.append(whole / without - 1)
        shares.append(reading / (whole - reading))
    readings = len(probe.trace.steps)
    passes = statistics.median(shares) * row.steps / readings
    overhead = statistics.median(pairs)
    return Cost(name, network, every, row.steps, readings, tuple(pairs), overhead, passes, probe.passes)


def main(path: Path | None, names: Sequence[str]) -> None:
    """Print the table, and write the numbers where a file is named."""
    torch.set_num_threads(1)
    versions = {name: version(name) for name in ("bnbench", "torch", "lightning")}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}, {', '.join(f'{name} {number}' for name, number in versions.items())}\n")
    split = load_split("digits", 0, folder=default_folder())
    for row in ROWS.values():
        # The first training of a kind finds memory, and picks kernels, for all that follow.
        seconds_of(row.replace(steps=FEWEST_STEPS), split)
    print("| probe | network | steps | readings | overhead | range of pairs | a reading, in steps | worst |")
    print("| --- | --- | ---: | ---: | ---: | --- | ---: | ---: |")
    costs = []
    for name in names or PROBES:
        for network in ROWS:
            cost = measure(name, network, split)
            costs.append(cost)
            low, high = 100 * min(cost.pairs), 100 * max(cost.pairs)
            over = " (over)" if cost.worst > ALLOWED else ""
            print(
                f"| {name} | {network} | {cost.steps} | {cost.readings} | {100 * cost.overhead:.1f} %"
                f" | {low:.1f} to {high:.1f} % | {cost.passes:.1f} (declared {cost.declared:g})"
                f" | {100 * cost.worst:.1f} %{over} |",
                flush=True,
            )
    if path is not None:
        found = [{**asdict(cost), "worst": cost.worst} for cost in costs]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine, "versions": versions, "costs": found}, indent=1))
        print(f"\n{path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None, sys.argv[2:])
