"""Preflight: a little of everything that a study will do, tried on this machine before the first training."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bnbench import doctor
from bnbench.data import DATASETS
from bnbench.doctor import Finding
from bnbench.engine import known_step, tryouts
from bnbench.engine.cost import probe_of, shape_of
from bnbench.engine.executors import LocalPool
from bnbench.engine.known_step import TOLERANCE
from bnbench.placement import Slot, choose_gpus, count_places, plan_workers
from bnbench.registry import BadInput
from bnbench.study.table import Result
from bnbench.study.trial import Trial
from bnbench.tracking import mask, tracking_uri

#: Steps of each shape, and its training samples where the data set can be made up.
STEPS, SAMPLES = 2, 256
#: Seconds after which a task on a device is given up, and another one.
DEVICE_TIMEOUT, SLOW_TIMEOUT = 180.0, 600.0
#: Seconds that a worker gets to end; it has nothing to save.
GRACE = 0.5

_Gpus = tuple[str, ...]
_Ask = Callable[..., "_Answer"]


@dataclass(frozen=True)
class Preflight:
    """What was found: on the machine, and on each GPU that is left out; and what each shape of a row costs.

    `gpus` are those that compute right, as :func:`bnbench.placement.choose_gpus` names them.
    """

    findings: tuple[Finding, ...]
    gpus: _Gpus
    left_out: tuple[Finding, ...]
    shapes: tuple[tuple[Trial, Result], ...]


class _Answer:
    """What a fresh worker, confined to some GPUs or to none, will answer to one task."""

    def __init__(self, gpus: _Gpus, task: Callable[..., Any], *arguments: Any) -> None:
        self.pool = LocalPool([Slot(0, gpus)], grace=GRACE)
        self.future = self.pool.submit(task, *arguments)

    def get(self, timeout: float) -> tuple[Any, str]:
        """The answer, or in one line why there is none; the worker is gone afterwards."""
        wait([self.future], timeout)
        problem = _problem(self.future, timeout)
        self.pool.shutdown()
        return (None, problem) if problem else (self.future.result(), "")


def _problem(future: Future[Any], timeout: float) -> str:
    if not future.done() or future.cancelled():
        return f"no answer within {timeout:.0f} s"
    error = future.exception()
    if error is None:
        return ""
    if isinstance(error, BrokenExecutor):
        return "its process died (out of memory?)"
    said = " ".join(str(error).split())[:300]
    return said if isinstance(error, BadInput) else f"{type(error).__name__}: {said}"


def look(
    rows: Iterable[Trial],
    runs: Path,
    data: Path,
    gpus: str = "all",
    *,
    environ: Mapping[str, str],
    uri: str | None = None,
    offline: bool = False,
    known: Collection[str] = (),
    told: Callable[[Finding], None] = lambda finding: None,
    step: Callable[[], known_step.Step] = known_step.step_here,
) -> Preflight:
    """Look at the machine as :func:`bnbench.doctor.check` does, and try what the rows need.

    Each GPU (or the processor) computes a batch-norm step that is compared with the processor's in float64,
    and a step in bfloat16; two of them share a step of SyncBN; a function is compiled; the data sets are
    loaded; MLflow takes a run, unless `offline`; each shape of the rows that is not among the `known` ones
    trains for two steps. All of it happens in workers, so that this process never starts CUDA. `told` gets
    each finding as soon as it is there. A GPU that fails is a fault, which stops a study only where no GPU is
    left. `step` is the task that computes the step.
    """
    rows = list(rows)
    findings: list[Finding] = []
    left_out: list[Finding] = []
    shapes: list[tuple[Trial, Result]] = []

    def tell(found: Iterable[Finding], kept: list[Finding] = findings) -> None:
        for finding in found:
            kept.append(finding)
            told(finding)

    with ExitStack() as stack:

        def ask(gpus: _Gpus, task: Callable[..., Any], *arguments: Any) -> _Answer:
            answer = _Answer(gpus, task, *arguments)
            stack.callback(answer.pool.shutdown)
            return answer

        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="bnbench-", ignore_cleanup_errors=True))
        )
        try:
            chosen = choose_gpus(gpus, environ)
        except BadInput:
            chosen = ()  # the doctor says why
        loading = _ask_data(ask, rows, data)
        writing = None if offline else _ask_mlflow(ask, stack, uri, environ, runs)
        devices: list[_Gpus] = [(card,) for card in chosen] or [()]
        steps = [ask(device, step) for device in devices]
        compared = [_compare(device, answer) for device, answer in zip(devices, steps, strict=True)]
        right = [device for device, found in zip(devices, compared, strict=True) if found.level == "ok"]
        fit = tuple(card for device in right for card in device)
        compiling = ask(
            right[0] if right else (),
            tryouts.compile_function,
            environ.get("PATH", os.defpath),
            str(scratch / "compiled"),
        )

        tell(_check_machine(runs, gpus, fit, environ))
        tell(one for one in compared if one.level == "ok" or not chosen)
        tell((one for one in compared if one.level != "ok" and chosen), left_out)
        if right:
            tell(_check_bf16(ask, rows, right))
            tell(_check_sync(ask, rows, fit))
        tell(_check_compiler(compiling))
        tell(_check_data(loading, data))
        if writing is not None:
            tell(_check_mlflow(writing))
        if right:
            tell(_check_shapes(rows, known, fit, data, scratch, stack, shapes))
    return Preflight(tuple(findings), fit, tuple(left_out), tuple(shapes))


def positions(gpus: _Gpus, environ: Mapping[str, str]) -> str:
    """What --gpus says for some of the visible GPUs."""
    visible = choose_gpus("all", environ)
    return ",".join(str(visible.index(gpu)) for gpu in gpus)


def _named(device: _Gpus) -> str:
    """What people call a device."""
    return " and ".join(f"GPU {card}" if card.isdecimal() else card for card in device) or "the processor"


def _level(needed: bool) -> Literal["fault", "warn"]:
    return "fault" if needed else "warn"


def _check_machine(runs: Path, gpus: str, fit: _Gpus, environ: Mapping[str, str]) -> Iterator[Finding]:
    """What the doctor says, with the GPUs that compute right; with all of them where none does."""
    for finding in doctor.check(runs, positions(fit, environ) if fit else gpus, environ=environ):
        if finding.topic != "compiler":  # which is really used here
            yield finding


def _compare(device: _Gpus, answer: _Answer) -> Finding:
    got, problem = answer.get(DEVICE_TIMEOUT)
    if not problem:
        apart, name = known_step.difference(got, known_step.take_step(dtype=torch.float64))
        if apart <= TOLERANCE:
            text = f"{_named(device)} computes a batch-norm step to {apart:.0e} (at most {TOLERANCE:g})"
            return Finding("ok", "numbers", text)
        problem = f"the {name} is off by {apart:.2g} of its largest value (at most {TOLERANCE:g})"
    remedy = (
        "leave it out by --gpus, and look at nvidia-smi -q and at the messages of the driver (dmesg)"
        if device
        else "install torch anew (make clean install)"
    )
    return Finding("fault", "numbers", f"{_named(device)} fails in a batch-norm step: {problem}", remedy)


def _check_bf16(ask: _Ask, rows: Sequence[Trial], devices: Sequence[_Gpus]) -> Iterator[Finding]:
    needed = any(trial.precision == "bf16-mixed" for trial in rows)
    answers = [(device, ask(device, known_step.bf16_fault_here)) for device in devices]
    for device, answer in answers:
        fault, problem = answer.get(DEVICE_TIMEOUT)
        if reason := fault or problem:
            text = f"{_named(device)} fails in a bfloat16 step: {reason}"
            yield Finding(_level(needed), "bf16", text, "train in float32 (precision='32-true')")
        else:
            text = f"a bfloat16 step on {_named(device)} is finite, with float32 statistics"
            yield Finding("ok", "bf16", text)


def _check_sync(ask: _Ask, rows: Sequence[Trial], fit: _Gpus) -> Iterator[Finding]:
    """Two processes with synchronized batch norm against one on the joined batch."""
    # CUDA shows a process one MIG instance at most.
    cards = [card for card in fit if not card.startswith("MIG")]
    pair = tuple(cards[:2]) if len(cards) > 1 else ()
    way = f"NCCL on {_named(pair)}" if pair else "gloo on the processor"
    shares, problem = ask(pair, known_step.sync_here).get(DEVICE_TIMEOUT)
    if not problem:
        wanted = known_step.take_step(dtype=torch.float64)
        apart, name = max(known_step.difference(joined, wanted) for joined in known_step.join(shares))
        if apart <= TOLERANCE:
            yield Finding("ok", "SyncBN", f"2 processes ({way}) equal one on the joined batch to {apart:.0e}")
            return
        problem = f"the {name} is off by {apart:.2g} of its largest value"
    needed = any(trial.world_size > 1 for trial in rows)
    remedy = (
        "NCCL_DEBUG=INFO tells more; NCCL_P2P_DISABLE=1 helps where cards cannot reach each other's memory"
        if pair
        else "processes of this machine must be able to talk on its loopback interface"
    )
    yield Finding(_level(needed), "SyncBN", f"2 processes ({way}) fail: {problem}", remedy)


def _check_compiler(answer: _Answer) -> Iterator[Finding]:
    apart, problem = answer.get(SLOW_TIMEOUT)
    if not problem and not apart <= TOLERANCE:
        problem = f"a compiled function is off by {apart:.2g}"
    if problem:
        text = f"torch.compile does not work, so training is eager: {problem}"
        yield Finding("warn", "compiler", text, "install gcc and g++, or name compilers in CC and CXX")
    else:
        yield Finding("ok", "compiler", "torch.compile works")


def _ask_data(ask: _Ask, rows: Sequence[Trial], data: Path) -> dict[str, list[_Answer]]:
    """Load each data set of the rows, with each of their options."""
    needed = {json.dumps([t.data, t.data_options], sort_keys=True): t for t in rows}
    loading: dict[str, list[_Answer]] = {}
    for trial in needed.values():
        answer = ask((), tryouts.load, trial.data, dict(trial.data_options), str(data))
        loading.setdefault(trial.data, []).append(answer)
    return loading


def _check_data(loading: Mapping[str, Sequence[_Answer]], data: Path) -> Iterator[Finding]:
    present = []
    for name, answers in loading.items():
        problems = [problem for answer in answers if (problem := answer.get(SLOW_TIMEOUT)[1])]
        if not problems:
            present.append(name)
        elif DATASETS[name].fetch is None:
            yield Finding("fault", "data", f"{name}: {problems[0]}")
        else:
            fault = problems[0].removeprefix(f"{name}: ").partition(";")[0]
            yield Finding(
                "fault", "data", f"{name}: {fault}", f"run `bnbench data {name}` where there is internet"
            )
    if present:
        yield Finding("ok", "data", f"{', '.join(sorted(present))} in {data}")


def _ask_mlflow(
    ask: _Ask, stack: ExitStack, uri: str | None, environ: Mapping[str, str], runs: Path
) -> tuple[str, _Answer | str]:
    """Write to the store that is named, or else to a new one beside that of `runs`: its name, the answer."""
    try:
        address = tracking_uri(uri, environ, runs)
        if address != tracking_uri(None, {}, runs):
            return mask(address), ask((), tryouts.write_run, address, str(runs))
        database = runs / "mlflow.db"
        if database.exists():
            database.open("r+b").close()
        place = next(folder for folder in (runs, *runs.absolute().parents) if folder.is_dir())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".preflight-", dir=place)))
        return f"a store in {runs}", ask((), tryouts.write_run, tracking_uri(None, {}, folder), str(folder))
    except BadInput as error:
        return "", str(error)
    except OSError as error:
        return "", f"cannot write to {error.filename} ({error.strerror})"


def _check_mlflow(writing: tuple[str, _Answer | str]) -> Iterator[Finding]:
    name, answer = writing
    problem = answer if isinstance(answer, str) else answer.get(SLOW_TIMEOUT)[1]
    if problem:
        remedy = "name another store (--tracking-uri), or publish later (bnbench run --offline)"
        yield Finding("fault", "MLflow", mask(problem), remedy)
    else:
        yield Finding("ok", "MLflow", f"{name} takes a run")


def _probe(trial: Trial) -> Trial:
    """A row of the same shape that takes two steps and needs no download."""
    probe = probe_of(trial, STEPS)
    if not DATASETS[trial.data].offline:
        return probe
    return probe.replace(n_train=max(SAMPLES, trial.global_batch))


def _check_shapes(
    rows: Iterable[Trial],
    known: Collection[str],
    fit: _Gpus,
    data: Path,
    scratch: Path,
    stack: ExitStack,
    shapes: list[tuple[Trial, Result]],
) -> Iterator[Finding]:
    """Train each shape for two steps; adds to `shapes` what could be trained."""
    slots = plan_workers(fit)
    # Of rows that differ in whether they drop units, one that does stands for all.
    distinct = {
        shape: trial
        for trial in sorted(rows, key=lambda trial: trial.dropout)
        if (shape := shape_of(trial)) not in known
    }
    shaped = sorted(distinct.values(), key=lambda trial: trial.devices)
    here = [trial for trial in shaped if _fits(trial, slots)]
    elsewhere = [trial for trial in shaped if trial not in here]
    results = dict(_train(here, slots, data, scratch, stack))
    reasons: dict[str, list[Trial]] = {}
    for trial in here:
        result = results[trial]
        if isinstance(result, Result) and result.status != "failed":
            shapes.append((trial, result))
        else:
            reason = result if isinstance(result, str) else result.reason.strip().splitlines()[-1][:300]
            reasons.setdefault(reason, []).append(trial)
    for reason, failed in reasons.items():
        remedy = "leave out the study of these rows, or mend what is named"
        yield Finding("fault", "shapes", f"{_names(failed)}: {reason}", remedy)
    if elsewhere:
        yield Finding("warn", "shapes", f"{_names(elsewhere)}: needs more devices than are here")
    if shapes:
        most = max(result.metrics["memory/peak_mib"] for _, result in shapes)
        text = f"{len(shapes)} trained for {STEPS} steps each, in up to {most:.0f} MiB"
        yield Finding("ok", "shapes", text)


def _fits(trial: Trial, slots: Sequence[Slot]) -> bool:
    try:
        count_places(slots, trial.devices)
    except BadInput:
        return False
    return trial.num_nodes == 1


def _train(
    trials: Sequence[Trial], slots: Sequence[Slot], data: Path, scratch: Path, stack: ExitStack
) -> Iterator[tuple[Trial, Result | str]]:
    """Each row with its result, or why there is none."""
    left = list(trials)
    while left:
        # CUDA tells the peak of each training; a process on a processor only its own, so there each is new.
        wide = left[0].devices > 1
        count = len(left) if slots[0].gpus else 1 if wide else len(slots)
        pool = LocalPool(slots, grace=GRACE)
        stack.callback(pool.shutdown)
        pending = {}
        for trial in left[:count]:
            row = _probe(trial).as_dict()
            future = pool.submit(tryouts.train_twice, row, str(data), str(scratch), devices=trial.devices)
            pending[future] = trial
        left = left[count:]
        while pending:
            done, _ = wait(pending, DEVICE_TIMEOUT, FIRST_COMPLETED)
            if not done:
                # Those that wait behind what hangs are tried again.
                done = {future for future in pending if future.running()} or set(pending)
                left += [trial for future, trial in pending.items() if future not in done]
                pending = {future: pending[future] for future in done}
            for future in done:
                yield pending.pop(future), _problem(future, DEVICE_TIMEOUT) or future.result()
        pool.shutdown()


def _names(trials: Sequence[Trial]) -> str:
    """What people call some shapes: the first one, and how many more there are."""
    first = trials[0]
    several = first.world_size
    name = f"{first.model} · {first.norm} · B={first.batch_size} · {first.data}"
    name += f" on {several} devices" if several > 1 else ""
    return f"{name} and {len(trials) - 1} more" if len(trials) > 1 else name
