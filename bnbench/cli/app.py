"""The verbs of the command line; each hands over to the file that does the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bnbench.cli.options import (
    Budget,
    DataFolder,
    DryRun,
    Gpus,
    Offline,
    PerGpu,
    Preset,
    Quiet,
    Runs,
    StorageUrl,
    Studies,
    TrackingUri,
    Workers,
)
from bnbench.registry import BadInput

app = typer.Typer(
    name="bnbench",
    help="What batch normalization does, measured: studies with pre-registered hypotheses and verdicts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def call(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    verb: Callable[[list[str]], object]
    if arguments and arguments[0] in ("fit", "validate", "test"):
        from bnbench.cli.lightning import run_lightning as verb
    else:
        verb = _run_verb
    try:
        code = verb(list(arguments))
    except BadInput as error:
        return _complain(str(error))
    except Exception as error:
        # Typer's own errors, whose class has another home in each of its versions, explain themselves.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if not arguments:
            print(message)
            return 0
        return _complain(message)
    if code == 130:
        # Typer turns Ctrl-C into this code and would say nothing.
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _run_verb(arguments: list[str]) -> object:
    return typer.main.get_command(app).main(arguments, prog_name="bnbench", standalone_mode=False)


def _complain(message: str) -> int:
    print(f"bnbench: {' '.join(message.split())}", file=sys.stderr)
    return 2


@app.command()
def run(
    studies: Studies = None,
    preset: Preset = "auto",
    gpus: Gpus = "all",
    workers: Workers = None,
    per_gpu: PerGpu = 1,
    devices: Annotated[int, typer.Option(help="Devices of one trial.")] = 1,
    budget: Budget = None,
    runs: Runs = Path("runs"),
    data_folder: DataFolder = None,
    tracking_uri: TrackingUri = None,
    storage: StorageUrl = None,
    offline: Offline = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON at the end.")] = False,
    ray: Annotated[
        str | None, typer.Option(metavar="auto|ADDRESS", help="Train on the nodes of this Ray cluster.")
    ] = None,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Take Ray nodes with other versions of bnbench or torch.")
    ] = False,
) -> int:
    """Run studies: train what is missing, print verdicts, write the report."""
    from bnbench.cli import run as running

    if devices != 1:
        raise BadInput(
            f"--devices {devices}: a study says how many devices each of its rows takes;"
            " the study `distributed` compares one with two"
        )
    return running.run(
        running.Request(
            words=tuple(studies or ()),
            preset=preset,
            gpus=gpus,
            workers=workers,
            per_gpu=per_gpu,
            budget=None if budget is None else running.seconds(budget),
            runs=runs,
            data=_data(data_folder),
            tracking_uri=tracking_uri,
            storage=storage,
            offline=offline,
            dry_run=dry_run,
            quiet=quiet,
            as_json=as_json,
            ray=ray,
            allow_mixed=allow_mixed,
        )
    )


@app.command()
def plan(
    studies: Studies = None,
    preset: Preset = "auto",
    gpus: Gpus = "all",
    workers: Workers = None,
    per_gpu: PerGpu = 1,
    runs: Runs = Path("runs"),
    data_folder: DataFolder = None,
) -> int:
    """Say what would be trained and about how long that takes on this machine."""
    return run(studies, preset, gpus, workers, per_gpu, runs=runs, data_folder=data_folder, dry_run=True)


@app.command(name="list")
def list_studies() -> None:
    """List the studies and the questions that they ask."""
    from bnbench.study.load import load_studies

    for study in load_studies().values():
        print(f"{study.name:<16} {study.question}")


@app.command()
def show(study: str, preset: Annotated[str, typer.Option()] = "quick") -> None:
    """Print a study's definition as it is registered."""
    import json

    from bnbench.study.load import load_study

    found = load_study(study)
    print(json.dumps({"hash": found.hash(preset), **found.definition(preset)}, indent=2, ensure_ascii=False))


@app.command()
def status(runs: Runs = Path("runs")) -> int:
    """Say what is recorded, study by study, and what each lacks."""
    from bnbench.cli.recorded import print_status

    return print_status(runs)


@app.command()
def report(
    studies: Studies = None,
    preset: Annotated[
        str | None, typer.Option(help="One preset only; by default all that are recorded.")
    ] = None,
    format: Annotated[str, typer.Option(help="html, md, json or csv.")] = "html",
    runs: Runs = Path("runs"),
) -> int:
    """Write the report from what is recorded; md, json and csv go to the terminal."""
    from bnbench.cli.recorded import print_report

    return print_report(tuple(studies or ()), preset, format, runs)


@app.command()
def ui(
    runs: Runs = Path("runs"),
    tracking_uri: TrackingUri = None,
    port: Annotated[int, typer.Option(help="Where the MLflow UI listens, on loopback only.")] = 5000,
) -> int:
    """Open the MLflow UI over the runs, on this machine's loopback address."""
    from bnbench.tracking import serve_ui
    from bnbench.tracking import tracking_uri as resolve

    return serve_ui(runs, resolve(tracking_uri, os.environ, runs), port)


@app.command()
def doctor(
    studies: Studies = None,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke", help="Also try devices, data, MLflow and two steps of each shape of the studies."
        ),
    ] = False,
    preset: Preset = "auto",
    gpus: Gpus = "all",
    runs: Runs = Path("runs"),
    data_folder: DataFolder = None,
    tracking_uri: TrackingUri = None,
) -> int:
    """Say whether this machine can run the studies, and what to mend."""
    from bnbench import doctor as checks

    if not smoke:
        if studies:
            raise BadInput(f"`bnbench doctor` tries the study {studies[0]} only with --smoke")
        findings = checks.check(runs, gpus, environ=os.environ)
        for finding in findings:
            print(finding.line())
        return 1 if any(finding.level == "fault" for finding in findings) else 0

    from bnbench.cli.preflight import print_preflight
    from bnbench.cli.run import Request

    return print_preflight(
        Request(
            words=tuple(studies or ()),
            preset=preset,
            gpus=gpus,
            workers=None,
            per_gpu=1,
            budget=None,
            runs=runs,
            data=_data(data_folder),
            tracking_uri=tracking_uri,
        )
    )


@app.command()
def data(
    names: Annotated[
        list[str] | None, typer.Argument(help="Data sets; by default all that need a download.")
    ] = None,
    data_folder: DataFolder = None,
) -> None:
    """Download data sets, for machines that will have no internet."""
    from bnbench.data import DATASETS, fetch

    folder = _data(data_folder)
    for name in names or [name for name, entry in DATASETS.items() if entry.fetch is not None]:
        fetch(name, folder)
        print(f"{name}: ready in {folder}")


@app.command()
def train(
    trial: Annotated[Path, typer.Argument(help="A trial.json.")],
    gpus: Gpus = "all",
    data_folder: DataFolder = None,
) -> int:
    """Train one row from its trial.json and print what was measured."""
    from bnbench.cli.recorded import print_training

    return print_training(trial, gpus, _data(data_folder))


@app.command()
def search(
    model: Annotated[str, typer.Option(help="A model's name, or package.module:Class of your own.")],
    data: Annotated[str, typer.Option(help="A data set's name.")],
    norm: Annotated[str, typer.Option(help="Norms to search with, as in batch,group.")] = "none,batch",
    space: Annotated[
        str, typer.Option(help="What to search beside lr, as in batch_size,dropout; by default all there is.")
    ] = "",
    trials: Annotated[int, typer.Option(help="Points of one search.")] = 30,
    steps: Annotated[
        int, typer.Option(help="Training steps at batch size 64; others read as many examples.")
    ] = 500,
    searches: Annotated[int, typer.Option(help="How often to repeat the search, 1 to 3.")] = 1,
    replicates: Annotated[int, typer.Option(help="Seeds on which the best recipes are compared.")] = 10,
    batch: Annotated[int, typer.Option(help="Points that are drawn at a time.")] = 8,
    lr_alone: Annotated[
        bool, typer.Option(help="Compare with as many trials spent on the learning rate alone.")
    ] = True,
    n_train: Annotated[int | None, typer.Option(help="Training samples; by default all.")] = None,
    model_options: Annotated[str, typer.Option(metavar="JSON", help='As in {"depth": 4}.')] = "{}",
    data_options: Annotated[str, typer.Option(metavar="JSON", help='As in {"folder": "images"}.')] = "{}",
    name: Annotated[str, typer.Option(help="A name for the study; by default one of model and data.")] = "",
    gpus: Gpus = "all",
    workers: Workers = None,
    per_gpu: PerGpu = 1,
    budget: Budget = None,
    runs: Runs = Path("runs"),
    data_folder: DataFolder = None,
    tracking_uri: TrackingUri = None,
    storage: StorageUrl = None,
    offline: Offline = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> int:
    """Search the best recipe of your own model, data and norms, and compare what was found."""
    from bnbench.cli.run import Request
    from bnbench.cli.run import seconds as seconds_of_text
    from bnbench.cli.search import Question, ask, options, words

    question = Question(
        model=model,
        data=data,
        norms=words(norm),
        space=words(space),
        trials=trials,
        steps=steps,
        searches=searches,
        replicates=replicates,
        batch=batch,
        lr_alone=lr_alone,
        n_train=n_train,
        model_options=options("--model-options", model_options),
        data_options=options("--data-options", data_options),
        name=name,
    )
    request = Request(
        words=(),
        preset="quick",
        gpus=gpus,
        workers=workers,
        per_gpu=per_gpu,
        budget=None if budget is None else seconds_of_text(budget),
        runs=runs,
        data=_data(data_folder),
        tracking_uri=tracking_uri,
        storage=storage,
        offline=offline,
        dry_run=dry_run,
        quiet=quiet,
    )
    return ask(question, request)


@app.command()
def rerun(
    what: Annotated[
        str, typer.Argument(metavar="RUN|KEY|trial.json", help="An MLflow run, a row's key, or a file.")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Compare with what is recorded; exit 1 where it differs.")
    ] = False,
    gpus: Gpus = "all",
    runs: Runs = Path("runs"),
    data_folder: DataFolder = None,
    tracking_uri: TrackingUri = None,
) -> int:
    """Train a recorded row again: recorded, now, and equal or how far apart."""
    from bnbench.cli.recorded import print_rerun

    return print_rerun(what, check, gpus, runs, _data(data_folder), tracking_uri)


@app.command()
def publish(runs: Runs = Path("runs"), tracking_uri: TrackingUri = None) -> int:
    """Send everything that is recorded, and not there yet, to an MLflow store or server."""
    from bnbench.cli.recorded import print_publishing

    return print_publishing(runs, tracking_uri)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A .parquet file to write.")], runs: Runs = Path("runs")
) -> int:
    """Write all recorded rows to one file."""
    from bnbench.cli.recorded import export_rows

    return export_rows(file, runs)


@app.command(name="import")
def import_rows(
    file: Annotated[Path, typer.Argument(help="A file of `bnbench export`.")], runs: Runs = Path("runs")
) -> int:
    """Merge the rows of an export into the record, by their keys."""
    from bnbench.cli.recorded import import_rows as merge

    return merge(file, runs)


@app.command()
def norms(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List the normalizers: name, paper, and whether they depend on the batch."""
    import json

    from bnbench.norms import NORMS

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "paper": entry.paper,
            "batch_dependent": entry.batch_dependent,
            "running_stats": entry.running_stats,
        }
        for name, entry in NORMS.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        kind = "batch statistics" if row["batch_dependent"] else "each sample alone"
        print(f"{row['name']:<16} {kind:<18} {row['paper']}")


def _data(folder: Path | None) -> Path:
    from bnbench.data import default_folder

    return folder or default_folder()
