"""Tests of installation: the pinned versions, and the Makefile with a made-up Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
    if not line.startswith("bnbench")
]

# Says its version, makes environments of copies of itself, and writes down what else it is asked to do.
PYTHON = """#!/bin/sh
case "$*" in
-c*version_info*) echo VERSION ;;
-m\\ venv\\ *) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "venv $3" >> "$LOG" ;;
*) echo "$*" >> "$LOG" ;;
esac
case "$*" in *bnbench.cli\\ run*) exit "${CODE:-0}" ;; esac
"""

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a folder with what an installation reads, and a Python 3.12 that only pretends."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    pretend(tmp_path, "3.12")
    return tmp_path


def pretend(folder: Path, version: str) -> None:
    """Put a program named "snake" into the folder that takes itself for this version of Python."""
    program = folder / "snake"
    program.write_text(PYTHON.replace("VERSION", version))
    program.chmod(0o755)


def make(clone: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Call make as on a fresh machine, where neither variables of this run nor other Pythons are known."""
    environ = {"PATH": os.environ["PATH"], "LOG": str(clone / "log"), "CODE": str(code)}
    command = ["make", f"PYTHON={clone / 'snake'}", *arguments]
    return subprocess.run(command, cwd=clone, env=environ, capture_output=True, text=True)


def calls(clone: Path) -> list[str]:
    """Return what the made-up Python was asked to do since the last look."""
    log = clone / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_every_package_is_pinned_exactly_and_once() -> None:
    names = [line.split("==")[0] for line in PINS]
    assert names == sorted(set(names))
    assert len(names) > 50
    # A version such as 2.13.0+cpu exists on some machines only.
    assert [line for line in PINS if not re.fullmatch(r"[\w.-]+==\d[\w.]*", line)] == []


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_pins_are_what_pyproject_allows(requirement: Requirement) -> None:
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in PINS)}
    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_releases_of_an_attacker_are_excluded() -> None:
    (lightning,) = [requirement for requirement in REQUIREMENTS if requirement.name == "lightning"]
    assert not lightning.specifier.contains("2.6.2")
    assert not lightning.specifier.contains("2.6.3")


@needs_make
def test_the_first_study_installs_and_the_second_starts_at_once(clone: Path) -> None:
    assert make(clone, "study").returncode == 0
    first = calls(clone)
    assert first[0] == "venv .venv"
    assert re.fullmatch(r"-m pip install .*-c constraints.txt -e \.\[study\]", first[1])
    assert first[2] == "-m bnbench.cli run --preset auto --gpus all --runs runs"
    assert make(clone, "study").returncode == 0
    assert calls(clone) == first[2:]


@needs_make
def test_an_installation_for_tests_is_one_for_studies(clone: Path) -> None:
    assert make(clone, "test").returncode == 0
    assert [line.split()[-1] for line in calls(clone)] == [".venv", ".[dev]", "-q"]
    assert make(clone, "study").returncode == 0
    assert len(calls(clone)) == 1


@needs_make
@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_installs_again(clone: Path, name: str) -> None:
    make(clone, "install")
    calls(clone)
    stamp = (clone / ".venv" / ".installed-study").stat().st_mtime
    os.utime(clone / name, (stamp + 5, stamp + 5))
    assert make(clone, "install").returncode == 0
    assert [line.split()[:3] for line in calls(clone)] == [["-m", "pip", "install"]]


@needs_make
def test_an_installation_that_failed_is_tried_again(clone: Path) -> None:
    (clone / "snake").write_text(PYTHON.replace("VERSION", "3.12") + 'case "$*" in *pip*) exit 1 ;; esac\n')
    assert make(clone, "install").returncode == 2
    assert not (clone / ".venv" / ".installed-study").exists()


@needs_make
def test_variables_reach_the_command(clone: Path) -> None:
    make(clone, "install", "PIP_ARGS=--no-index", "VENV=elsewhere")
    assert any("--no-index" in line for line in calls(clone))
    values = {
        "PRESET": "quick",
        "GPUS": "0,2",
        "WORKERS": "3",
        "DEVICES": "2",
        "BUDGET": "2h",
        "FLEET": "off",
    }
    given = [f"{name}={value}" for name, value in values.items()]
    make(clone, "study", "STUDY=one two.py", "RUNS=a folder", "VENV=elsewhere", *given)
    assert calls(clone) == [
        "-m bnbench.cli run one two.py --preset quick --gpus 0,2 --runs a folder "
        "--workers 3 --devices 2 --budget 2h --fleet off"
    ]


@needs_make
def test_a_study_on_ray_installs_it_first(clone: Path) -> None:
    make(clone, "study", "STUDY=one", "RAY=auto")
    install, run = calls(clone)[1:]
    assert install.endswith("-e .[ray]")
    assert run.endswith("run one --preset auto --gpus all --runs runs --ray auto")
    # The extra contains what a study needs.
    make(clone, "study", "STUDY=one")
    assert len(calls(clone)) == 1


@needs_make
@pytest.mark.parametrize("goal", ["study", "test", "ui", "report", "data", "doctor", "plan"])
def test_the_environment_that_is_there_can_be_used(clone: Path, goal: str) -> None:
    assert make(clone, goal, "VENV=none").returncode == 0
    assert len(calls(clone)) == 1
    assert sorted(path.name for path in clone.iterdir()) == [
        "Makefile",
        "constraints.txt",
        "pyproject.toml",
        "snake",
    ]


@needs_make
@pytest.mark.parametrize("version", ["2.7", "3.1", "3.9", "3.10"])
@pytest.mark.parametrize("venv", [".venv", "none"])
def test_an_old_python_is_refused_with_its_remedy(clone: Path, version: str, venv: str) -> None:
    pretend(clone, version)
    answer = make(clone, "study", f"VENV={venv}")
    assert answer.returncode == 2
    line, after = answer.stderr.splitlines()
    assert re.search(rf"3\.11 or newer.* is {re.escape(version)};.*make study PYTHON=", line)
    assert after.startswith("make: ***")
    assert calls(clone) == []


@needs_make
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.20", "3.9"])
def test_only_a_new_environment_asks_for_the_version(clone: Path, version: str) -> None:
    make(clone, "install")
    pretend(clone, version)
    assert make(clone, "study").returncode == 0


@needs_make
def test_a_missing_python_is_told(clone: Path) -> None:
    answer = make(clone, "study", "PYTHON=no-such-python")
    assert answer.returncode == 2
    assert "no-such-python is not there" in answer.stderr


@needs_make
def test_the_exit_code_of_a_study_can_be_read(clone: Path) -> None:
    # make has only one exit code for failure.
    answer = make(clone, "study", code=143)
    assert answer.returncode == 2
    assert "Error 143" in answer.stderr


@needs_make
def test_smoke_leaves_nothing_behind_and_passes_its_failure_on(clone: Path) -> None:
    answer = make(clone, "smoke", code=1)
    assert "Error 1" in answer.stderr
    (run,) = [line for line in calls(clone) if "bnbench.cli run" in line]
    folder = Path(run.split("--runs ")[1])
    assert "--preset smoke" in run
    assert not folder.exists()


@needs_make
def test_every_target_is_explained(clone: Path) -> None:
    text = (ROOT / "Makefile").read_text()
    (declared,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    explained = re.findall(r"^  make ([a-z-]+) ", make(clone).stdout, re.MULTILINE)
    assert sorted([*explained, "help", "check-python"]) == sorted(declared.split())
    for variable in re.findall(r"^([A-Z_]+) \?=", text, re.MULTILINE):
        assert f"{variable}=" in make(clone, "help").stdout


@needs_make
def test_pins_are_written_from_what_was_resolved(clone: Path) -> None:
    make(clone, "install", "test")
    # From here on a real Python, with a resolution that was made before.
    python = clone / ".venv" / "bin" / "python"
    resolved = (("torch", "2.13.0+cpu"), ("Flask", "3.1"), ("bnbench", "0.1.0"))
    rows = [{"metadata": {"name": name, "version": version}} for name, version in resolved]
    report = json.dumps({"install": rows})
    python.write_text(f"""#!/bin/sh
case "$*" in
*pip*) echo '{report}' > build/resolution.json ;;
*) exec python3 "$@" ;;
esac
""")
    answer = make(clone, "constraints")
    assert answer.returncode == 0, answer.stderr
    assert (clone / "constraints.txt").read_text().splitlines()[1:] == ["flask==3.1", "torch==2.13.0"]


def test_the_checks_of_a_change_can_be_started() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["Makefile", ".ci/run", "constraints.txt"])
def test_no_index_is_built_in(name: str) -> None:
    assert "://" not in (ROOT / name).read_text()
