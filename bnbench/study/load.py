"""Find studies: those of the project by name, and anybody's by file."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from bnbench.registry import BadInput, nearest
from bnbench.study import design, space, spec, trial
from bnbench.study.spec import Claim, Study
from bnbench.study.trial import shown

#: Under this name the folder of studies is a package, so that one study file can import another.
_PACKAGE = "studies"


def studies_folder() -> Path:
    """The folder of the project's own studies: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).parent.parent
    beside = package.parent / "studies"
    return beside if beside.is_dir() else package / "_studies"


def load_studies() -> dict[str, Study]:
    """The project's own studies by name."""
    found: dict[str, Study] = {}
    for path in sorted(studies_folder().glob("*.py")):
        if path.stem != "article":
            study = _study_of(_import(path), path)
            found[study.name] = study
    return found


def load_study(word: str) -> Study:
    """A study by name, or from a file that assigns one to `STUDY`.

    Raises BadInput in one line, with file, line and the nearest right name, where the file is not a study.
    """
    if word.endswith(".py") or "/" in word:
        path = Path(word)
        if not path.is_file():
            raise BadInput(f"no study file {word!r}")
        return _study_of(_import(path), path)
    folder = studies_folder()
    if not (folder / f"{word}.py").is_file() or word == "article":
        names = [path.stem for path in folder.glob("*.py") if path.stem != "article"]
        raise BadInput(f"no study named {word!r}{nearest(word, names)}")
    return _study_of(_import(folder / f"{word}.py"), folder / f"{word}.py")


def load_claims() -> dict[str, Claim]:
    """The article's sentences by number."""
    claims: dict[str, Claim] = {claim.id: claim for claim in _import(studies_folder() / "article.py").CLAIMS}
    return claims


def _study_of(module: types.ModuleType, path: Path) -> Study:
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        found = f"STUDY is {shown(study)}" if hasattr(module, "STUDY") else "there is no STUDY"
        raise BadInput(f"{path}: a study file assigns a Study to STUDY; here {found}")
    return study


def _import(path: Path) -> types.ModuleType:
    folder = studies_folder()
    if _PACKAGE not in sys.modules or getattr(sys.modules[_PACKAGE], "__path__", None) != [str(folder)]:
        package = types.ModuleType(_PACKAGE)
        package.__path__ = [str(folder)]
        sys.modules[_PACKAGE] = package
    try:
        if path.parent.resolve() == folder.resolve():
            return importlib.import_module(f"{_PACKAGE}.{path.stem}")
        # Not imported: that would leave a cache beside the file, and could take it for the next version.
        module = types.ModuleType(f"study_{path.stem}")
        module.__file__ = str(path.absolute())
        sys.modules[module.__name__] = module  # where dataclasses look for the types of their fields
        exec(compile(path.read_bytes(), module.__file__, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise BadInput(f"{_place(path, error)}: {explain(error)}") from None
    return module


def _place(path: Path, error: BaseException) -> str:
    """The file and the line of it that an error comes from."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        own = Path(error.filename) == path.absolute()
        return f"{path if own else error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    return f"{path}:{lines[-1]}" if lines else str(path)


def explain(error: BaseException) -> str:
    """One line on what is wrong: a misspelt argument of one of our types gets the nearest right name."""
    if isinstance(error, BadInput):
        return str(error)
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}"
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if match and (fields := _fields(match[1])):
        return f"{match[1]} has no field {match[2]!r}{nearest(match[2], fields)}"
    match = re.search(r"(\w+)\.__init__\(\) missing .* arguments?: (.*)", str(error))
    if match and _fields(match[1]):
        return f"{match[1]} needs {match[2]}"
    return " ".join(f"{type(error).__name__}: {error}".split())


def _fields(name: str) -> list[str]:
    homes = (spec, design, space, trial)
    kind: Any = next((getattr(home, name) for home in homes if hasattr(home, name)), None)
    return list(getattr(kind, "__dataclass_fields__", {}))
