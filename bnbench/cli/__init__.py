"""The command line: bad input is one line and exit code 2, an interrupt is one line and its signal."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise Terminated


def main() -> None:
    """Run the command line and end the process with its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    try:
        _quiet_environment()
        # A model, norm or data set of one's own is looked for where the command is called, after all else.
        sys.path.append(str(Path.cwd()))
        from bnbench.cli.app import call

        code = call(sys.argv[1:])
        sys.stdout.flush()
    except (KeyboardInterrupt, Terminated) as stop:
        _end_by(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _end_by(signum: signal.Signals) -> None:
    """One line, then end by the same signal, so that whoever started us sees what happened."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    word = "interrupted" if signum == signal.SIGINT else "terminated"
    print(f"\n{word}: what is recorded is kept; the same command goes on from there", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def _quiet_environment() -> None:
    """Telemetry off and update checks off, unless the user has said otherwise."""
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "true")
