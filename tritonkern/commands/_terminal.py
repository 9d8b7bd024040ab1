"""What the commands share: errors in one line, progress bars, signals, and the folder for results."""

import errno
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tritonkern._optional import how_to_install
from tritonkern.files import ENDING

_REMEDIES = {
    errno.ENOSPC: "free some space, or give another folder to --out",
    errno.EDQUOT: "free some of your quota, or give another folder to --out",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or give another folder to --out",
    errno.EACCES: "change its permissions, or give another path",
    errno.EEXIST: "give a folder to --out, not a file",
    errno.ENOTDIR: "give a folder to --out, not a file",
    errno.ENAMETOOLONG: "give a shorter path",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived. It unwinds like Ctrl-C, so that unfinished files are removed."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report errors that a user can cause as one line on stderr with exit code 2.

    Ctrl-C ends with exit code 130, SIGTERM with 143 and SIGHUP (a closed terminal) with 129, all after the cleaning up.
    A warning is one line, too.
    """
    try:
        with warnings.catch_warnings(), _signals_raise():
            warnings.showwarning = _show_warning
            yield
    except Terminated as error:
        fail("terminated: nothing unfinished was kept", 128 + error.args[0])
    except KeyboardInterrupt:
        fail("interrupted: nothing unfinished was kept", 130)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tritonkern"):
            raise
        text = str(error)
        fail(text if "pip install" in text else f"the package {error.name} is missing: {how_to_install('track')}")
    except OSError as error:
        if error.errno in _REMEDIES:
            name = f"{error.filename}: " if error.filename else ""
            fail(f"{name}{os.strerror(error.errno)}: {_REMEDIES[error.errno]}")
        fail(str(error))
    except ValueError as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        # PyTorch's error is recognised by its name, so that PyTorch need not be imported.
        if type(error).__name__ not in ("MemoryError", "OutOfMemoryError"):
            raise
        fail("the memory is full: use --max-frames, fewer points, or another --device")


@contextmanager
def _signals_raise() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    # Not those that `nohup` or a parent process have switched off.
    numbers = [n for n in ENDING if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    sys.stderr.write(f"tritonkern: warning: {' '.join(str(message).split())}\n")


def fail(message: str, code: int = 2) -> None:
    """End the command with `message` in one line on stderr."""
    sys.stderr.write(f"tritonkern: {' '.join(message.split())}\n")
    raise typer.Exit(code)


class Stages:
    """A progress bar on stderr for each stage of a job. Call it with `(stage, done, total or None)`.

    `seconds` holds the time spent in each stage, measured between the calls.
    """

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def note(self, text: str) -> None:
        self._bars.console.print(text)

    def __enter__(self) -> "Stages":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


def whole(least: int, most: int | None = None) -> Any:
    """Arguments of `typer.Option` for a whole number in ASCII digits; `int` takes 1_0 and digits of any script."""
    allowed = f"a whole number of {least} or more" if most is None else f"a whole number from {least} to {most}"

    def parse(text: str) -> int:
        number = int(text) if re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", str(text)) else None
        if number is None or number < least or (most is not None and number > most):
            raise typer.BadParameter(f"{text!r} is not {allowed}")
        return number

    return {"parser": parse, "metavar": "INTEGER"}


def output_path(option: str, value: str) -> Path:
    """The path that a user gave to `option`; an empty one, which would mean the current folder, is refused."""
    if not value.strip():
        raise ValueError(f"{option} is empty: give a path, or . for the current folder")
    return Path(value)


@contextmanager
def writable_folder(folder: Path) -> Iterator[None]:
    """Make `folder`, or fail before the work rather than after it. Folders made here that stay empty are removed."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        yield
    finally:
        for path in made:
            with suppress(OSError):  # not empty
                path.rmdir()


def print_path(path: Path) -> None:
    """Print a path as the bytes that it has in the file system: a name need not be valid UTF-8."""
    typer.echo(os.fsencode(path))
