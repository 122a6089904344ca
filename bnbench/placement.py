"""Which worker gets which device: the only file that reads or sets CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bnbench.registry import BadInput

# How nvidia-smi ends where there is no card (6) or no driver (9): a machine without GPUs, not a broken one.
_NO_CARD = (6, 9)


@dataclass(frozen=True)
class Slot:
    """The place of one worker: a GPU as CUDA_VISIBLE_DEVICES names it, or none on a processor core."""

    index: int
    gpus: tuple[str, ...] = ()


def usable_cores() -> int:
    """Count the processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ask_nvidia_smi(environ: Mapping[str, str], *arguments: str) -> str | None:
    """Return what nvidia-smi prints, or None on a machine without it, without a driver or without a card.

    A separate program counts the cards, because a process that has started CUDA can no longer be confined.

    Raises:
        BadInput: nvidia-smi is there but broken or hangs, so that nobody can tell which GPUs exist.
    """
    program = shutil.which("nvidia-smi", path=environ.get("PATH", os.defpath))
    if program is None:
        return None
    remedy = "mend the driver (after an update of it: reboot) or pass --gpus none"
    try:
        answer = subprocess.run(
            [program, *arguments], env=dict(environ), capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadInput(f"nvidia-smi does not answer ({error}); {remedy}") from None
    if answer.returncode in _NO_CARD:
        return None
    if answer.returncode != 0:
        said = " ".join(f"{answer.stdout} {answer.stderr}".split())[:200]
        raise BadInput(f"nvidia-smi fails with exit code {answer.returncode} ({said}); {remedy}")
    return answer.stdout


def _list_cards(environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the names that CUDA takes for the devices, and the identifiers of all cards and MIG parts."""
    devices: list[str] = []
    uuids: list[str] = []
    cards = -1
    for line in (ask_nvidia_smi(environ, "-L") or "").splitlines():
        found = re.match(r"(?P<card>GPU \d+:)?.*\(UUID: (?P<uuid>[^)]+)\)", line.strip())
        if not found:
            continue
        uuids.append(found["uuid"])
        if found["card"]:
            cards += 1
            devices.append(str(cards))
        elif devices and devices[-1] == str(cards):
            # A card cut into MIG instances can be used through these only.
            devices[-1] = found["uuid"]
        else:
            devices.append(found["uuid"])
    return devices, uuids


def _entries(devices: str) -> Iterator[str]:
    """Yield the names in a CUDA_VISIBLE_DEVICES up to where CUDA stops reading."""
    for name in (entry.strip() for entry in devices.split(",")):
        if not name or name.startswith("-") or name == "NoDevFiles":
            return
        yield name


def visible_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Name the GPUs that this process was given, each as CUDA_VISIBLE_DEVICES names it.

    Without CUDA_VISIBLE_DEVICES these are all cards of nvidia-smi ("0", "1", ..., or the names of the
    instances of a card under MIG). With it they are its entries as they stand ("4", "GPU-8932f937-...",
    "MIG-..."), up to the first empty or negative one, where CUDA stops reading. Numbers are nvidia-smi's.

    Raises:
        BadInput: CUDA_VISIBLE_DEVICES names a device that nvidia-smi does not list, or one device twice.
    """
    devices, uuids = _list_cards(environ)
    inherited = environ.get("CUDA_VISIBLE_DEVICES")
    if inherited is None or not devices:
        return tuple(devices)
    cards = sum(not uuid.startswith("MIG") for uuid in uuids)
    names: list[str] = []
    for name in _entries(inherited):
        known = int(name) < cards if name.isdecimal() else any(uuid.startswith(name) for uuid in uuids)
        if not known or name in names:
            fault = "twice" if name in names else "but nvidia-smi does not list it"
            raise BadInput(
                f"CUDA_VISIBLE_DEVICES={inherited} names {name!r} {fault}; "
                f"known are 0 to {cards - 1} and {', '.join(uuids)}"
            )
        names.append(name)
    return tuple(names)


def choose_gpus(wanted: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Pick from the visible GPUs by "all", "none" or positions such as "0,2".

    Positions count within the inherited CUDA_VISIBLE_DEVICES: with "4,5,6,7" position 0 is card 4.

    Raises:
        BadInput: a position that is no number, given twice, or not there.
    """
    if wanted == "none":
        return ()
    if wanted != "all" and not re.fullmatch(r"\d+(,\d+)*", wanted):
        raise BadInput(f"--gpus {wanted!r} is unknown; give all, none, or positions such as 0,2")
    visible = visible_gpus(environ)
    if wanted == "all":
        return visible
    positions = [int(word) for word in wanted.split(",")]
    for position in positions:
        if position >= len(visible):
            there = f"0 to {len(visible) - 1}" if visible else "none"
            raise BadInput(f"--gpus {wanted} names GPU {position}; visible here: {there}")
    if len(set(positions)) < len(positions):
        raise BadInput(f"--gpus {wanted} names a GPU twice; several workers on one GPU are --per-gpu 2")
    return tuple(visible[position] for position in positions)


def confine(gpus: Sequence[str]) -> dict[str, str]:
    """Return the environment in which a process sees these GPUs only and computes with one CPU thread.

    Small networks on several threads mostly wait for each other: the suite runs in parallel by process.
    """
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        # Cards are numbered as in nvidia-smi; CUDA's own order puts the fastest first.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def plan_workers(
    gpus: Sequence[str], workers: int | None = None, per_gpu: int = 1, cpu_count: int | None = None
) -> tuple[Slot, ...]:
    """Give each worker a place: a GPU, or a share of one, or a CPU core where there are no GPUs.

    By default every GPU gets `per_gpu` workers, and a machine without GPUs one for each usable core. GPUs
    are dealt in turn, so that fewer workers than places spread over the cards.

    Raises:
        BadInput: no worker, or more workers than `per_gpu` allows.
    """
    if workers is not None and workers < 1:
        raise BadInput(f"--workers {workers} leaves nobody to train; give 1 or more")
    if per_gpu < 1:
        raise BadInput(f"--per-gpu {per_gpu} leaves nobody to train; give 1 or more")
    places = len(gpus) * per_gpu if gpus else (cpu_count or usable_cores())
    count = workers or places
    if gpus and count > places:
        raise BadInput(
            f"{count} workers do not fit on {len(gpus)} GPUs with {per_gpu} each; "
            f"give --per-gpu {-(-count // len(gpus))}"
        )
    return tuple(Slot(index, (gpus[index % len(gpus)],) if gpus else ()) for index in range(count))


def most_gpus(slots: Sequence[Slot]) -> int:
    """Count the GPUs that one task can have here; 0 where there are none and tasks run on the processor.

    The parts of a card under MIG serve tasks of one device only: CUDA shows a process no more than one.
    """
    named = {gpu for slot in slots for gpu in slot.gpus}
    return max(1, sum(not gpu.startswith("MIG") for gpu in named)) if named else 0


def count_places(slots: Sequence[Slot], devices: int) -> int:
    """Count the places that a task takes: one a GPU; on processors at most all that there are.

    Raises:
        BadInput: the task needs more GPUs than there are.
    """
    gpus = most_gpus(slots)
    if gpus and devices > gpus:
        raise BadInput(f"a row on {devices} GPUs does not fit here, where it can have {gpus}")
    return min(devices, len(slots))


def pick_places(free: Sequence[Slot], count: int) -> tuple[Slot, ...]:
    """Pick so many of the free places, on GPUs that differ, or none where these are not free."""
    if count == 1:
        return tuple(free[:1])
    distinct: dict[object, Slot] = {}
    for slot in free:
        if not any(gpu.startswith("MIG") for gpu in slot.gpus):
            distinct.setdefault(slot.gpus or slot.index, slot)
    return tuple(distinct.values())[:count] if len(distinct) >= count else ()


def enter(*slots: Slot) -> None:
    """Confine this process to its place, or places; the first thing that a worker does.

    Raises:
        RuntimeError: CUDA has started here already, and would keep the devices that it found then.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError("CUDA started before the worker took its place; enter the slot first")
    os.environ.update(confine([gpu for slot in slots for gpu in slot.gpus]))
    if torch is not None:
        # A preloaded torch has read OMP_NUM_THREADS already.
        torch.set_num_threads(1)


def given_gpus() -> tuple[str, ...]:
    """Name the GPUs that a slot, or Ray, gave to this process; none where nobody confined it."""
    return tuple(_entries(os.environ.get("CUDA_VISIBLE_DEVICES", "")))


def device_here() -> str:
    """The device of a task, "cuda" or "cpu": whether its process was given a GPU. CUDA is not started."""
    return "cuda" if given_gpus() else "cpu"
