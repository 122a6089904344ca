"""Probes in rows of several devices: all processes take part, the first one keeps the readings."""

from __future__ import annotations

from pathlib import Path

import pytest

from bnbench.engine.train import Place, train
from bnbench.probes import PROBES
from bnbench.study.trial import Trial

ROW = Trial(data="digits", model_options={"depth": 2, "width": 16}, batch_size=8, n_train=256, n_eval=64)


@pytest.mark.parametrize("norm", ["sync_batch", "batch"])
def test_a_row_of_two_devices_with_all_probes_has_the_numbers_of_the_row_without(
    norm: str, tmp_path: Path
) -> None:
    place = Place(tmp_path / "data", tmp_path / "runs")
    row = ROW.replace(norm=norm, devices=2, steps=4)
    probes = {name: {"steps": [0, 3]} for name in PROBES}
    without, probed = (train(r, place, timeout=60) for r in (row, row.replace(probes=probes)))
    assert without.status == probed.status == "done", probed.reason
    assert probed.measured() == without.measured()
    assert {name: trace.steps for name, trace in probed.traces.items()} == dict.fromkeys(PROBES, (0, 3))


def test_two_devices_with_synchronized_statistics_read_what_one_reads(tmp_path: Path) -> None:
    """At initialization the sample is the same, and so is what is normalized together."""
    place = Place(tmp_path / "data", tmp_path / "runs")
    probes = {name: {"steps": [0], "samples": 16} for name in ("gradient_flow", "rank", "landscape")}
    row = ROW.replace(precision="64-true", probes=probes, steps=1)
    one = train(row.replace(norm="batch", batch_size=16), place)
    two = train(row.replace(norm="sync_batch", batch_size=8, devices=2), place, timeout=60)
    for name in probes:
        for value, numbers in one.traces[name].values.items():
            assert two.traces[name].values[value] == pytest.approx(numbers, rel=1e-6), (name, value)
