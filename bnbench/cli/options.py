"""The options that several verbs of the command line share, with what `--help` says of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Runs = Annotated[Path, typer.Option(help="Folder of the record, the MLflow store and the report.")]
Preset = Annotated[
    str, typer.Option(help="quick, full, smoke, or auto: quick, then full where there are GPUs.")
]
Studies = Annotated[
    list[str] | None, typer.Argument(metavar="[STUDY|FILE.py]...", help="All studies by default.")
]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow store or server; by default one in the folder of runs.")
]
Gpus = Annotated[str, typer.Option(help="all, none, or positions such as 0,2.")]
Workers = Annotated[int | None, typer.Option(help="Worker processes; by default one a GPU, or one a core.")]
PerGpu = Annotated[int, typer.Option(help="Workers that share one GPU.")]
Budget = Annotated[
    str | None, typer.Option(help="Start no training after 90m or 2h; auto gives 2h to the preset full.")
]
StorageUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Where optuna-dashboard finds the searches; by default in --runs."),
]
Fleet = Annotated[
    str,
    typer.Option(
        help="Train rows of one shape together: auto, off, eager or compiled; auto does so with small models."
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Publish nothing; `bnbench publish` does later.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and stop.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Verdicts only.")]
DataFolder = Annotated[
    Path | None,
    typer.Option("--data-folder", help="Folder of data sets; by default BNBENCH_DATA or the user's cache."),
]
OwnData = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="NAME|FOLDER", help="Ask the studies of this data set, or folder of images."
    ),
]
OwnModel = Annotated[
    str | None, typer.Option("--model", metavar="NAME|PACKAGE:CLASS", help="Ask them of this model.")
]
OwnNorm = Annotated[
    str | None, typer.Option("--norm", metavar="NAME", help="This norm in place of batch normalization.")
]
Seeds = Annotated[
    int | None, typer.Option("--seeds", help="Replicates, in place of the studies' own number.")
]
Target = Annotated[
    float | None,
    typer.Option("--target", help="The validation accuracy, such as 0.9, that studies of speed count to."),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="A field of every row, as in n_train=200; repeat it."),
]


def folder_of_data(folder: Path | None) -> Path:
    """The folder of data sets: the one that was named, or the default one."""
    from bnbench.data import default_folder

    return folder or default_folder()
