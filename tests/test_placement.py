"""Tests of who gets which device, against made-up nvidia-smi programs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnbench.placement import (
    Slot,
    choose_gpus,
    confine,
    count_places,
    device_here,
    enter,
    most_gpus,
    pick_places,
    plan_workers,
    usable_cores,
    visible_gpus,
)
from bnbench.registry import BadInput

FOUR = "".join(f"GPU {index}: NVIDIA H100 (UUID: GPU-{index}aaa-bbb)\n" for index in range(4))
CUT = (
    "GPU 0: NVIDIA A100 (UUID: GPU-0aaa)\n"
    "  MIG 3g.20gb     Device  0: (UUID: MIG-one)\n"
    "  MIG 3g.20gb     Device  1: (UUID: MIG-two)\n"
    "GPU 1: NVIDIA A100 (UUID: GPU-1aaa)\n"
)


def machine(folder: Path, listing: str = "", code: int = 0, **environ: str) -> dict[str, str]:
    """Return the environment of a machine whose nvidia-smi prints this listing."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{listing}'\nexit {code}\n")
    program.chmod(0o755)
    return {"PATH": str(folder), **environ}


def test_a_machine_without_nvidia_smi_has_no_gpus(tmp_path: Path) -> None:
    assert visible_gpus({"PATH": str(tmp_path)}) == ()


@pytest.mark.parametrize("code", [6, 9])
def test_a_machine_without_a_card_or_driver_has_no_gpus(tmp_path: Path, code: int) -> None:
    assert visible_gpus(machine(tmp_path, "NVIDIA-SMI has failed", code)) == ()


def test_a_broken_driver_is_no_machine_without_gpus(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"exit code 18 \(Driver/library version mismatch\).*--gpus none"):
        visible_gpus(machine(tmp_path, "Driver/library version mismatch", 18))


def test_all_cards_are_visible_by_default(tmp_path: Path) -> None:
    assert visible_gpus(machine(tmp_path, FOUR)) == ("0", "1", "2", "3")


def test_a_card_under_mig_is_used_through_its_instances(tmp_path: Path) -> None:
    assert visible_gpus(machine(tmp_path, CUT)) == ("MIG-one", "MIG-two", "1")


@pytest.mark.parametrize(
    ("inherited", "visible"),
    [
        ("2,3", ("2", "3")),
        ("3, 1", ("3", "1")),
        ("GPU-2aaa,0", ("GPU-2aaa", "0")),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("1,-1,2", ("1",)),
    ],
)
def test_what_was_inherited_is_kept(tmp_path: Path, inherited: str, visible: tuple[str, ...]) -> None:
    assert visible_gpus(machine(tmp_path, FOUR, CUDA_VISIBLE_DEVICES=inherited)) == visible


def test_inherited_mig_names_are_kept(tmp_path: Path) -> None:
    assert visible_gpus(machine(tmp_path, CUT, CUDA_VISIBLE_DEVICES="MIG-two")) == ("MIG-two",)


@pytest.mark.parametrize("inherited", ["4", "0,7", "GPU-9", "first", "1,1"])
def test_inherited_devices_that_are_not_there_are_refused(tmp_path: Path, inherited: str) -> None:
    # CUDA would drop them without a word, and the study would run on fewer cards or on none.
    with pytest.raises(BadInput, match=f"CUDA_VISIBLE_DEVICES={inherited}") as caught:
        visible_gpus(machine(tmp_path, FOUR, CUDA_VISIBLE_DEVICES=inherited))
    assert "\n" not in str(caught.value)


def test_positions_count_within_what_was_inherited(tmp_path: Path) -> None:
    environ = machine(tmp_path, FOUR * 2, CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert choose_gpus("0,2", environ) == ("4", "6")
    assert choose_gpus("all", environ) == ("4", "5", "6", "7")


def test_none_asks_nobody(tmp_path: Path) -> None:
    assert choose_gpus("none", machine(tmp_path, "broken", 18)) == ()


@pytest.mark.parametrize("wanted", ["", "0,", "-1", "two", "0;1", "ALL", "4", "0,0"])
def test_gpus_that_cannot_be_had_are_refused_in_one_line(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(BadInput, match="--gpus") as caught:
        choose_gpus(wanted, machine(tmp_path, FOUR))
    assert "\n" not in str(caught.value)


def test_each_gpu_gets_a_worker() -> None:
    slots = plan_workers(("4", "GPU-x"))
    assert [slot.gpus for slot in slots] == [("4",), ("GPU-x",)]


def test_without_gpus_each_usable_core_gets_a_worker_that_sees_no_gpu() -> None:
    slots = plan_workers(())
    assert len(slots) == usable_cores() == len(os.sched_getaffinity(0))
    assert {slot.gpus for slot in slots} == {()}
    assert len(plan_workers((), cpu_count=7)) == 7
    assert len(plan_workers((), workers=3, cpu_count=1)) == 3


@given(st.integers(1, 9), st.integers(1, 4), st.data())
def test_workers_spread_evenly_and_never_beyond_the_share(
    cards: int, per_gpu: int, data: st.DataObject
) -> None:
    workers = data.draw(st.none() | st.integers(1, cards * per_gpu))
    gpus = tuple(f"GPU-{index}" for index in range(cards))
    slots = plan_workers(gpus, workers, per_gpu)
    assert [slot.index for slot in slots] == list(range(workers or cards * per_gpu))
    loads = [sum(slot.gpus == (gpu,) for slot in slots) for gpu in gpus]
    assert sum(loads) == len(slots)
    assert max(loads) - min(loads) <= 1
    assert max(loads) <= per_gpu


def test_too_many_or_too_few_workers_are_refused() -> None:
    with pytest.raises(BadInput, match="give --per-gpu 3"):
        plan_workers(("0", "1"), workers=5)
    with pytest.raises(BadInput, match="--workers 0"):
        plan_workers((), workers=0)
    with pytest.raises(BadInput, match="--per-gpu 0"):
        plan_workers(("0",), per_gpu=0)


def test_a_slot_crosses_to_another_process() -> None:
    slot = plan_workers(("0",))[0]
    assert pickle.loads(pickle.dumps(slot)) == slot


def test_several_gpus_can_be_given_to_one_process() -> None:
    assert confine(("4", "6"))["CUDA_VISIBLE_DEVICES"] == "4,6"


def test_entering_a_slot_confines_a_process_whether_torch_is_loaded_or_not() -> None:
    show = "import os, sys; from bnbench.placement import enter, plan_workers; "
    act = "enter(plan_workers(('5',))[0]); print(os.environ['CUDA_VISIBLE_DEVICES'], 'torch' in sys.modules, "
    without = subprocess.run(
        [sys.executable, "-c", f"{show}{act} os.environ['OMP_NUM_THREADS'])"], capture_output=True, text=True
    )
    assert without.stdout.split() == ["5", "False", "1"]
    environ = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    preloaded = subprocess.run(
        [sys.executable, "-c", f"import torch; {show}{act} torch.get_num_threads())"],
        capture_output=True,
        text=True,
        env=environ,
    )
    assert preloaded.stdout.split() == ["5", "True", "1"]


def test_a_process_that_has_started_cuda_cannot_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    before = dict(os.environ)
    with pytest.raises(RuntimeError, match="CUDA started"):
        enter(Slot(0, ("0",)))
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("value", "device"),
    [
        ("4", "cuda"),
        ("GPU-x,1", "cuda"),
        ("MIG-y", "cuda"),
        ("", "cpu"),
        ("-1", "cpu"),
        ("NoDevFiles", "cpu"),
    ],
)
def test_a_task_learns_its_device_from_what_its_process_was_given(
    monkeypatch: pytest.MonkeyPatch, value: str, device: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert device_here() == device
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert device_here() == "cpu"


def test_a_process_enters_several_places_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in confine(()):
        monkeypatch.setenv(name, "before")
    enter(Slot(0, ("4",)), Slot(3, ("GPU-x",)))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,GPU-x"


@given(st.lists(st.sampled_from(["0", "1", "2", "MIG-a", "MIG-b"]), max_size=10), st.integers(1, 4))
def test_places_are_on_gpus_that_differ_or_there_are_none(gpus: list[str], count: int) -> None:
    free = [Slot(index, (gpu,)) for index, gpu in enumerate(gpus)]
    places = pick_places(free, count)
    whole = {gpu for gpu in gpus if not gpu.startswith("MIG")}
    if count == 1:
        assert places == tuple(free[:1])
    elif len(whole) < count:
        assert places == ()
    else:
        chosen = {slot.gpus[0] for slot in places}
        assert len(places) == len(chosen) == count
        assert chosen <= whole and set(places) <= set(free)


def test_cores_are_counted_up_to_what_is_there_and_gpus_are_not() -> None:
    cores, cards = plan_workers((), 3), plan_workers(("0", "1"), per_gpu=2)
    assert [count_places(cores, devices) for devices in (1, 2, 3, 9)] == [1, 2, 3, 3]
    assert pick_places(cores, 3) == cores
    assert count_places(cards, 2) == 2
    with pytest.raises(BadInput, match="3 GPUs"):
        count_places(cards, 3)
    assert [most_gpus(slots) for slots in (cores, cards, plan_workers(("MIG-a", "MIG-b")))] == [0, 2, 1]


@pytest.mark.parametrize(
    "start", [torch.cuda.init, torch.cuda.current_device, lambda: torch.zeros(1).to("cuda")]
)
def test_a_coordinator_that_starts_cuda_trips_the_wire(start: Callable[[], object]) -> None:
    # The tripwire of conftest.py; no `except Exception` of a coordinator hides it.
    with pytest.raises(BaseException, match="CUDA was started") as caught:
        start()
    assert not isinstance(caught.value, Exception)
