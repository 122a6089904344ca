"""Tests of the benchmarks: each runs at a tiny size, and ratios, goals and files follow from given times."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import __main__ as bench
from benchmarks import conducted, imports, norms, plain_script, probes, steps, studies, workers
from benchmarks.bare import BareLoop
from benchmarks.rounds import Spent, now, run_program, speedups, take_turns, timed
from benchmarks.table import Line, describe_machine, print_table, write_json
from bnbench.lit import NormClassifier
from bnbench.norms import NORMS
from bnbench.registry import BadInput
from bnbench.study.load import load_study
from bnbench.study.trial import Trial

TINY = Trial(data="digits", model="mlp", model_options={"depth": 1, "width": 8})
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="no /proc, and processes cannot be confined")


@pytest.fixture(autouse=True)
def data_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits are copied once, and the user's folder stays as it is."""
    folder = tmp_path_factory.getbasetemp() / "data"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("BNBENCH_DATA", str(folder))


def test_contenders_take_turns_and_each_round_begins_with_another() -> None:
    order: list[str] = []

    def contender(name: str, wall: float) -> Spent:
        order.append(name)
        return Spent(wall, wall)

    turns = take_turns({name: partial(contender, name, len(name)) for name in ("a", "bb", "ccc")}, 4)
    assert "".join(name[0] for name in order) == "abcbcacababc"
    assert [spent.wall for spent in turns["bb"]] == [2, 2, 2, 2]


def test_a_speedup_is_of_the_same_round() -> None:
    turns = {"slow": [Spent(2.0, 3.0), Spent(12.0, 4.0)], "fast": [Spent(1.0, 2.0), Spent(3.0, 8.0)]}
    assert speedups(turns, "fast", than="slow") == ((2.0, 4.0), (1.5, 0.5))


def test_both_clocks_run_as_they_do() -> None:
    asleep = timed(lambda: time.sleep(0.05), 2)
    assert asleep.wall >= 0.05 > asleep.processor

    def work_for_a_while() -> None:
        start = time.process_time()
        while time.process_time() < start + 0.05:
            pass

    assert timed(work_for_a_while).processor == pytest.approx(0.05, rel=0.2)


@on_linux
def test_a_program_is_timed_confined_and_heard() -> None:
    cores = sorted(os.sched_getaffinity(0))[:1]
    busy = (
        "import os, time\nprint(*os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'])\n"
        "while time.process_time() < 0.2: pass"
    )
    spent, said = run_program([sys.executable, "-c", busy], cores)
    assert said.split() == [str(cores[0]), "1"]
    assert 0.2 <= spent.processor <= spent.wall + 0.05
    with pytest.raises(RuntimeError, match=r"exit code 3:\n.*no luck"):
        run_program([sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)"])


def test_a_line_knows_its_median_and_whether_its_goal_is_reached() -> None:
    assert Line("a", (3.0, 1.0, 2.0), least=2.0).reached is True
    assert Line("a", (3.0, 1.0, 1.9), least=2.0).reached is False
    assert Line("a", (9.0, 1.0, 2.0), most=1.9).reached is False
    assert Line("a", (0.0, 1.0, 9.0), most=1.0).reached is True
    assert Line("a", (5.0,)).reached is None
    assert Line("a", (5.0,), least=2.0).goal == "at least 2 x"
    assert Line("a", (5.0,), most=10, unit="%").goal == "at most 10 %"


def lines_of_a_busy_machine() -> tuple[list[Line], dict[str, object]]:
    lines = [
        Line("step", (1.25, 1.5, 4.0), (1.0, 2.0, 3.0), least=1.3),
        Line("help", (0.7,), most=0.5, unit="s"),
    ]
    return lines, {**describe_machine(), "load": 3.25}


def test_the_table_has_medians_extremes_goals_and_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    lines, machine = lines_of_a_busy_machine()
    print_table(lines, machine, Console(width=160))
    said = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in said.splitlines() if line.startswith(("step", "help"))]
    assert rows == [
        "step 1.5 x 1.25 x 4 x 2 x 3 at least 1.3 x yes",
        "help 0.7 s 0.7 s 0.7 s 1 at most 0.5 s no",
    ]
    assert "busy (a load of 3.2" in said
    print_table(lines, {**machine, "load": 0.5}, Console(width=160))
    assert "busy" not in capsys.readouterr().out


def test_the_file_has_the_machine_the_versions_and_all_times(tmp_path: Path) -> None:
    lines, machine = lines_of_a_busy_machine()
    write_json(tmp_path / "new" / "bench.json", lines, machine)
    found = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["machine"]["processor"]
    assert found["versions"]["torch"] == torch.__version__
    step = found["lines"][0]
    assert (step["median"], step["lowest"], step["highest"], step["rounds"]) == (1.5, 1.25, 4.0, 3)
    assert step["goal"] == "at least 1.3 x" and step["reached"] is True
    assert step["values"] == [1.25, 1.5, 4.0] and step["by_processor"] == [1.0, 2.0, 3.0]


def test_the_bare_loop_is_stochastic_gradient_descent_on_every_sample_once_an_epoch() -> None:
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    model = nn.Linear(4, 3, bias=False)
    places: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: places.extend(_places(x, inputs[0])))
    before = model.weight.detach().clone()
    loop = BareLoop(model, x, y, batch_size=4, lr=0.5)
    loop.run(1)
    # The mean gradient of the cross-entropy, (softmax(wx) − onehot(y))ᵀ x / n.
    batch = x[places]
    error = (batch @ before.T).softmax(1) - nn.functional.one_hot(y[places], 3)
    torch.testing.assert_close(model.weight.detach(), before - 0.5 * error.T @ batch / 4)
    loop.run(2)
    assert sorted(places) == list(range(12))


def _places(x: torch.Tensor, batch: torch.Tensor) -> list[int]:
    return [int((x == row).all(1).nonzero()) for row in batch]


@pytest.mark.filterwarnings("ignore")
def test_a_step_is_measured_alone_and_in_a_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    # The back end that writes C++ takes seconds, and looks for CUDA.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    net = steps.Net("tiny", TINY, 130, {steps.ONE: 0.001}, fleet=2, warm=2)
    lines = list(steps.measure([net], rounds=2, seconds=0.01, device="cpu"))
    names = ["one training", "fleet of 2, eager", "fleet of 2, compiled"]
    assert [line.name for line in lines] == [f"step on cpu, tiny: {name}" for name in names]
    assert all(len(line.values) == len(line.by_processor) == 2 and min(line.values) > 0 for line in lines)
    assert [line.reached for line in lines] == [True, None, None]
    bare, one = (lines[0].times["step"][name] for name in (steps.BARE, steps.ONE))
    assert lines[0].values[1] == pytest.approx(bare[1]["wall"] / one[1]["wall"])


def test_a_training_that_is_measured_goes_on_where_it_was_and_a_step_is_shared_by_replicas() -> None:
    row = TINY.replace(steps=100)
    module = steps.classifier_of(row, steps.random_arrays(row, 130, 0, "cpu"))
    training = steps.Training(row, module, replicas=4)
    before = now()
    spent = training.run(5)
    assert 0 < spent.wall * 5 * 4 < (now() - before).wall
    first = [p.detach().clone() for p in module.parameters()]
    training.run(3)
    straight = steps.classifier_of(row, steps.random_arrays(row, 130, 0, "cpu"))
    steps.Training(row, straight).run(8)
    assert training.done == 8
    assert not all(map(torch.equal, first, module.parameters()))
    assert all(map(torch.equal, straight.parameters(), module.parameters()))


def test_goals_on_a_gpu_are_those_of_a_tuned_loop_and_of_one_training_after_the_other() -> None:
    net = steps.Net("net", TINY, 130, {steps.ONE: 1.3, "eager": 2.0})
    turns = {steps.BARE: [Spent(1.0, 1.0)], steps.ONE: [Spent(0.5, 1.0)], "eager": [Spent(0.1, 1.0)]}
    warmed = dict.fromkeys(turns, 0.0)
    on_gpu = {line.name: line for line in steps.lines_of(net, turns, warmed, "cuda")}
    one, fleet, to_one = on_gpu.values()
    assert (one.values, one.least) == ((2.0,), steps.GPU_STEP)
    assert (fleet.values, fleet.least) == ((10.0,), None)
    assert (to_one.values, to_one.least) == ((5.0,), steps.GPU_FLEET)
    on_cpu = list(steps.lines_of(net, turns, warmed, "cpu"))
    assert [line.least for line in on_cpu] == [1.3, 2.0]


@pytest.mark.filterwarnings("ignore")
def test_every_norm_is_measured_both_ways_eager_and_compiled() -> None:
    compiled = partial(torch.compile, backend="eager")
    names = ["batch", "group", "virtual_batch"]
    lines = list(norms.measure(names, shape=(4, 8, 3, 3), rounds=2, compile_layer=compiled))
    assert [line.name.split(",")[0] for line in lines] == [f"norm {name}" for name in names] * 3
    errors, eager, compiled_lines = lines[:3], lines[3:6], lines[6:]
    assert all(0 < line.median < 1e-5 for line in errors)
    # As long as torch's, not as fast.
    times = eager[0].times["both ways"]
    assert eager[0].values[0] == pytest.approx(times["batch"][0]["wall"] / times[norms.TORCH][0]["wall"])
    assert [line.most for line in eager] == [None] * 3
    assert [line.most for line in compiled_lines] == [None, None, 2.0]
    table = norms.markdown([line.to_json() for line in lines]).splitlines()
    assert [row.split(" | ")[0] for row in table[2:]] == ["| batch", "| group", "| virtual_batch"]
    assert table[2].split(" | ")[2] == f"{eager[0].median:.2f}"
    assert table[2].endswith(" yes |") and table[4].split(" | ")[1].endswith(" *")


def test_the_error_of_a_norm_is_its_distance_from_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = norms.max_error("rms")
    assert 0 < honest < 1e-6
    entry = NORMS["rms"]
    wrong = dataclasses.replace(entry, reference=lambda x, **options: entry.reference(x, **options) + 0.5)
    monkeypatch.setitem(NORMS._entries, "rms", wrong)
    assert norms.max_error("rms") == pytest.approx(0.5, abs=1e-5)


def test_the_share_of_a_probe_is_that_of_its_readings() -> None:
    # 100 steps of 0.01 s and two readings of 0.05 s each.
    assert probes.reading_in_steps(1.1, 0.1, 100, 2) == pytest.approx(5.0)
    (line,) = probes.measure(["rank"], {"tiny": TINY}, rounds=2, steps=6)
    assert line.name == "probe rank, tiny"
    every, costs = line.times["every"], line.times["reading, in steps"]
    assert len(costs) == 2 and min(costs) > 0
    assert line.values == pytest.approx([200 * cost / every for cost in costs])


def test_a_pool_trains_all_that_it_is_given_or_says_what_went_wrong(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        before = now()
        spent = workers.train_all(pool, 2, TINY.replace(steps=2), tmp_path, tmp_path)
        assert 0 < 2 * spent.wall <= (now() - before).wall
        with pytest.raises(RuntimeError, match="a training ended as diverged"):
            workers.train_all(pool, 1, TINY.replace(steps=20, norm="none", lr=1e9), tmp_path, tmp_path)


@pytest.mark.slow
def test_workers_are_compared_by_the_trainings_that_they_do(tmp_path: Path) -> None:
    (line,) = workers.measure(TINY.replace(steps=2), trainings=2, rounds=1, data=tmp_path)
    assert line.least == 1.8
    assert line.values[0] == pytest.approx(line.times["1"][0]["wall"] / line.times["2"][0]["wall"])


def test_imports_are_compared_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = {"import torch": 2.0, "import bnbench": 1.0, "from bnbench import build_norm": 2.2}
    monkeypatch.setattr(imports, "run_python", lambda words: Spent(waits.get(words[-1], 0.4), 0.1))
    lines = list(imports.measure(rounds=3))
    assert [line.median for line in lines] == pytest.approx([0.5, 1.1, 0.4])
    assert [line.reached for line in lines] == [True, False, True]


def test_a_study_is_compared_by_what_a_training_takes_all_told() -> None:
    case = studies.CASES[0]
    ours = {"conducting": 1.0, "publishing": 0.5, "report": 0.5, "start": 2.0, "server": 1.0, "workers": 5.0}
    ran = {
        "auto": studies.Ran(Spent(20.0, 10.0), 10, ours),
        "off": studies.Ran(Spent(40.0, 30.0), 10, ours),
        studies.SCRIPT: studies.Ran(Spent(200.0, 100.0), 20, {}),
    }
    lines = list(studies.lines_of(case, 1, [ran]))
    assert [line.values for line in lines] == [(5.0,), (2.5,), (15.0,), (35.0,)]
    assert [line.goal for line in lines] == ["at least 8 x", "", "at most 10 %", ""]
    assert lines[0].by_processor == (5.0,)
    assert len(list(studies.lines_of(case, 2, [ran]))) == 2


def test_what_the_script_did_not_train_takes_as_long_as_what_it_did() -> None:
    # 10 s to start and 4 trainings of 5 s: 12 of them take 70 s.
    said = "batch  lr 0.1\n4 trainings in 20.00 s\n"
    assert 30.0 * studies.growth(30.0, said, 12) == pytest.approx(70.0)
    assert studies.growth(30.0, said, 4) == 1.0


def test_the_benchmarks_study_has_the_grid_and_the_replicates(tmp_path: Path) -> None:
    for case in (*studies.CASES, studies.LONG):
        study = load_study(str(case.write(tmp_path)))
        design = study.quick
        assert (design.lr, design.replicates, design.base.steps) == (case.rates, case.replicates, case.steps)
        assert (design.base.model, design.base.data) == (case.net, case.data)


@pytest.mark.parametrize("norm", plain_script.NORMS)
@pytest.mark.parametrize("case", studies.CASES, ids=lambda case: case.name)
def test_the_plain_script_trains_our_networks(case: studies.Case, norm: str) -> None:
    shape = (1, 40) if case.data == "mnist1d" else (1, 8, 8)
    options = case.options
    ours = NormClassifier(case.net, norm, in_shape=shape, num_classes=10, model_options=options, seed=3).model
    theirs = plain_script.build(case.net, torch.Size(shape).numel(), norm)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine)
    x = torch.randn(16, *shape)
    torch.testing.assert_close(theirs(x), ours(x))


@on_linux
def test_the_processor_time_of_a_process_is_what_it_says_itself() -> None:
    start = time.process_time()
    while time.process_time() < start + 0.05:
        pass
    assert conducted.processor_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.03)
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert sleeper.pid in conducted.child_processes()
    finally:
        sleeper.communicate(b"\n")
    assert conducted.processor_seconds(sleeper.pid) == 0.0


def test_calls_that_are_watched_add_up_by_phase() -> None:
    phases = conducted.Phases()

    def work_until(seconds: float) -> str:
        while time.process_time() < seconds:
            pass
        return "done"

    watched = phases.watch("work", work_until)
    assert watched(time.process_time() + 0.05) == "done"
    watched(seconds=time.process_time() + 0.05)
    assert phases.seconds["work"] == pytest.approx(0.1, rel=0.2)


def test_parts_are_chosen_by_name_and_kept_as_they_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(bench.chosen([])) == list(bench.PARTS)
    assert list(bench.chosen(["norms", "steps"])) == ["norms", "steps"]
    with pytest.raises(BadInput, match="no benchmark named 'step'; did you mean 'steps'"):
        bench.chosen(["step"])

    def measure(rounds: int = 5) -> Iterator[Line]:
        yield Line("first", (1.0,) * rounds)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run({"part": measure}, Console(), tmp_path / "bench.json", rounds=2)
    assert json.loads((tmp_path / "bench.json").read_text())["lines"][0]["values"] == [1.0, 1.0]
    assert "first: 1 x" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_study_and_the_script_do_as_many_trainings() -> None:
    case = studies.Case("cnn", "cnn", "digits", 20, {"channels": 16}, 2.0, (), (0.02, 0.05), 2)
    ran = studies.run_study(case, "auto", 1)
    script = studies.run_script(case, ran.trainings, 2)
    assert script.trainings == ran.trainings >= 2 * 3 * 2 + 4
    assert sorted(ran.phases) == ["conducting", "publishing", "report", "server", "start", "workers"]
    assert min(ran.phases.values()) > 0
    assert sum(ran.phases.values()) == pytest.approx(ran.spent.processor)
