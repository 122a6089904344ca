"""The command line: its exit codes, its verbs that only read, and the list of all verbs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from bnbench.cli.options import DataFolder, Runs, Studies, TrackingUri, folder_of_data
from bnbench.cli.training import doctor, plan, probe, rerun, run, search, selfcheck, train
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


def list_studies() -> None:
    """List the studies and the questions that they ask."""
    from bnbench.study.load import load_studies

    for study in load_studies().values():
        print(f"{study.name:<16} {study.question}")


def show(study: str, preset: Annotated[str, typer.Option()] = "quick") -> None:
    """Print a study's definition as it is registered."""
    import json

    from bnbench.study.load import load_study

    found = load_study(study)
    print(json.dumps({"hash": found.hash(preset), **found.definition(preset)}, indent=2, ensure_ascii=False))


def status(runs: Runs = Path("runs")) -> int:
    """Say what is recorded, study by study, and what each lacks."""
    from bnbench.cli.recorded import print_status

    return print_status(runs)


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


def ui(
    runs: Runs = Path("runs"),
    tracking_uri: TrackingUri = None,
    port: Annotated[int, typer.Option(help="Where the MLflow UI listens, on loopback only.")] = 5000,
) -> int:
    """Open the MLflow UI over the runs, on this machine's loopback address."""
    from bnbench.tracking import serve_ui
    from bnbench.tracking import tracking_uri as resolve

    return serve_ui(runs, resolve(tracking_uri, os.environ, runs), port)


def data(
    names: Annotated[
        list[str] | None, typer.Argument(help="Data sets; by default all that need a download.")
    ] = None,
    data_folder: DataFolder = None,
) -> None:
    """Download data sets, for machines that will have no internet."""
    from bnbench.data import DATASETS, fetch

    folder = folder_of_data(data_folder)
    for name in names or [name for name, entry in DATASETS.items() if entry.fetch is not None]:
        fetch(name, folder)
        print(f"{name}: ready in {folder}")


def publish(runs: Runs = Path("runs"), tracking_uri: TrackingUri = None) -> int:
    """Send everything that is recorded, and not there yet, to an MLflow store or server."""
    from bnbench.cli.recorded import print_publishing

    return print_publishing(runs, tracking_uri)


def export(
    file: Annotated[Path, typer.Argument(help="A .parquet file to write.")], runs: Runs = Path("runs")
) -> int:
    """Write all recorded rows to one file."""
    from bnbench.cli.recorded import export_rows

    return export_rows(file, runs)


def import_rows(
    file: Annotated[Path, typer.Argument(help="A file of `bnbench export`.")], runs: Runs = Path("runs")
) -> int:
    """Merge the rows of an export into the record, by their keys."""
    from bnbench.cli.recorded import import_rows as merge

    return merge(file, runs)


norms = typer.Typer(help="List the normalizers, or explain one.", add_completion=False, rich_markup_mode=None)


@norms.callback(invoke_without_command=True)
def list_norms(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/norms.md.")] = False,
) -> None:
    """List the normalizers: paper, dependence on the batch, parameters. `norms show NAME` explains one."""
    if context.invoked_subcommand is None:
        from bnbench.cli.norms import print_norms

        print_norms(as_json=as_json, as_markdown=as_markdown)


@norms.command("show")
def show_norm(name: str, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Explain a normalizer: formula, pitfalls, options, traits, and the BibTeX entry of its paper."""
    from bnbench.cli.norms import print_norm

    print_norm(name, as_json)


def probes(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List the probes: name, steps between readings, paper, what each measures and its options."""
    from bnbench.cli.probe import print_probes

    print_probes(as_json)


_VERBS: dict[str, Callable[..., int | None]] = {
    "run": run,
    "plan": plan,
    "list": list_studies,
    "show": show,
    "status": status,
    "report": report,
    "ui": ui,
    "doctor": doctor,
    "selfcheck": selfcheck,
    "data": data,
    "train": train,
    "search": search,
    "probe": probe,
    "rerun": rerun,
    "publish": publish,
    "export": export,
    "import": import_rows,
    "probes": probes,
}
for _name, _verb in _VERBS.items():
    app.command(_name)(_verb)
app.add_typer(norms, name="norms")
