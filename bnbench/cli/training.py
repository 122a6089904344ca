"""The verbs of the command line that train something; each hands over to the file that does the work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from bnbench.cli.options import (
    Budget,
    Changes,
    DataFolder,
    DryRun,
    Fleet,
    Gpus,
    Offline,
    OwnData,
    OwnModel,
    OwnNorm,
    PerGpu,
    Preset,
    Quiet,
    Runs,
    Seeds,
    StorageUrl,
    Studies,
    Target,
    TrackingUri,
    Workers,
    folder_of_data,
)
from bnbench.registry import BadInput


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
    data: OwnData = None,
    model: OwnModel = None,
    norm: OwnNorm = None,
    seeds: Seeds = None,
    target: Target = None,
    changes: Changes = None,
    fleet: Fleet = "auto",
) -> int:
    """Run studies: train what is missing, print verdicts, write the report.

    With --data, --model, --norm, --seeds, --target or --set, each study's design is asked your own question:
    a study by itself, which is exploratory.
    """
    from bnbench.cli import run as running
    from bnbench.cli.questions import question_of

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
            data=folder_of_data(data_folder),
            tracking_uri=tracking_uri,
            storage=storage,
            offline=offline,
            dry_run=dry_run,
            quiet=quiet,
            as_json=as_json,
            ray=ray,
            allow_mixed=allow_mixed,
            question=question_of(data, model, norm, seeds, target, changes or ()),
            fleet=fleet,
        )
    )


def plan(
    studies: Studies = None,
    preset: Preset = "auto",
    gpus: Gpus = "all",
    workers: Workers = None,
    per_gpu: PerGpu = 1,
    runs: Runs = Path("runs"),
    data_folder: DataFolder = None,
    data: OwnData = None,
    model: OwnModel = None,
    norm: OwnNorm = None,
    seeds: Seeds = None,
    target: Target = None,
    changes: Changes = None,
    fleet: Fleet = "auto",
) -> int:
    """Say what would be trained and about how long that takes on this machine."""
    return run(
        studies,
        preset,
        gpus,
        workers,
        per_gpu,
        runs=runs,
        data_folder=data_folder,
        dry_run=True,
        data=data,
        model=model,
        norm=norm,
        seeds=seeds,
        target=target,
        changes=changes,
        fleet=fleet,
    )


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
            data=folder_of_data(data_folder),
            tracking_uri=tracking_uri,
        )
    )


def train(
    trial: Annotated[Path, typer.Argument(help="A trial.json.")],
    gpus: Gpus = "all",
    data_folder: DataFolder = None,
) -> int:
    """Train one row from its trial.json and print what was measured."""
    from bnbench.cli.recorded import print_training

    return print_training(trial, gpus, folder_of_data(data_folder))


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
        data=folder_of_data(data_folder),
        tracking_uri=tracking_uri,
        storage=storage,
        offline=offline,
        dry_run=dry_run,
        quiet=quiet,
    )
    return ask(question, request)


def probe(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME|PACKAGE.MODULE:MAKE",
            help="A model's name, or a class or function of your own that makes one.",
        ),
    ],
    data: Annotated[str, typer.Option(help="A data set's name.")] = "digits",
    norm: Annotated[str, typer.Option(help="A norm's name, for a model that takes one.")] = "batch",
    probes: Annotated[str, typer.Option(help="As in gradient_flow,rank; by default all there are.")] = "",
    steps: Annotated[int, typer.Option(help="Training steps between the two readings.")] = 100,
    lr: Annotated[float, typer.Option(help="The learning rate, which stays as it is.")] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Samples of a training batch.")] = 64,
    seed: Annotated[int, typer.Option(help="Seeds initial weights and batches.")] = 0,
    model_options: Annotated[str, typer.Option(metavar="JSON", help='As in {"depth": 4}.')] = "{}",
    norm_options: Annotated[str, typer.Option(metavar="JSON", help='As in {"ghost_size": 8}.')] = "{}",
    data_options: Annotated[str, typer.Option(metavar="JSON", help='As in {"folder": "images"}.')] = "{}",
    probe_options: Annotated[
        str, typer.Option(metavar="JSON", help='As in {"hessian": {"count": 5}}; `bnbench probes` has all.')
    ] = "{}",
    layers: Annotated[
        bool, typer.Option("--layers", help="Also print what is read by layer, step size or eigenvalue.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all readings as JSON.")] = False,
    gpus: Gpus = "all",
    data_folder: DataFolder = None,
) -> int:
    """Show what the probes read in your own model, at initialization and after some steps of training."""
    from bnbench.cli.probe import print_probing
    from bnbench.cli.search import options, words
    from bnbench.study.trial import Trial

    trial = Trial(
        model=model,
        model_options=options("--model-options", model_options),
        data=data,
        data_options=options("--data-options", data_options),
        norm=norm,
        norm_options=options("--norm-options", norm_options),
        lr=lr,
        schedule="constant",
        batch_size=batch_size,
        steps=steps,
        seed=seed,
    )
    return print_probing(
        trial,
        words(probes),
        options("--probe-options", probe_options),
        gpus,
        folder_of_data(data_folder),
        layers=layers,
        as_json=as_json,
    )


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

    return print_rerun(what, check, gpus, runs, folder_of_data(data_folder), tracking_uri)


def selfcheck(
    tables: Annotated[int, typer.Option(help="Random tables of each kind that the judge is given.")] = 1000,
    gpus: Gpus = "all",
    workers: Workers = None,
    runs: Annotated[
        Path | None, typer.Option(help="Folder to keep the trainings in; by default a temporary one.")
    ] = None,
    data_folder: DataFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rates and verdicts as JSON.")] = False,
) -> int:
    """Measure how often verdicts err: on random tables, and on trainings whose answer is known."""
    from bnbench.cli.selfcheck import check

    return check(tables, gpus, workers, runs, folder_of_data(data_folder), as_json=as_json)
