"""Files that never exist half-written under their final name."""

import errno
import itertools
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a program in an orderly way, beside Ctrl-C. Windows does not have all."""
_numbers = itertools.count()


@contextmanager
def atomic_path(path: str | PathLike[str]) -> Iterator[Path]:
    """A hidden name, in the folder of `path`, for a file that takes the name `path` only once it is complete.

    On any error or Ctrl-C the unfinished file is removed, and an earlier file at `path` stays as it was. An `OSError`
    names `path`, never the hidden file.
    """
    with atomic_paths([path]) as (part,):
        yield part


@contextmanager
def atomic_paths(
    paths: Sequence[str | PathLike[str]], stale: Sequence[str | PathLike[str]] = ()
) -> Iterator[list[Path]]:
    """Hidden names for files that belong together: `atomic_path` for several, of which all or none are replaced.

    Every file is written to the disk before the first one gets its final name, so a full disk, an error or a signal
    leaves all earlier files as they were. Signals wait while the files are renamed. `stale` are files of an earlier run
    that the new files make wrong; they are removed together with the replacement.

    Raises:
        IsADirectoryError: one of `paths` is a folder. This is checked before anything is written.
    """
    targets = [Path(path) for path in paths]
    for path in targets:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # The name does not depend on the file's own, which may already be as long as the file system allows.
    parts = [path.with_name(f".tritonkern-{os.getpid()}-{next(_numbers)}.part") for path in targets]
    try:
        yield parts
        for part in parts:
            _sync(part)
        with _signals_wait():
            for part, path in zip(parts, targets, strict=True):
                os.replace(part, path)
            for old in stale:
                Path(old).unlink(missing_ok=True)
        for folder in {path.parent for path in targets}:
            _sync(folder)
    except OSError as error:
        names = dict(zip(map(str, parts), map(str, targets), strict=True))
        name = "" if error.filename is None else os.fsdecode(error.filename)
        name = names.get(name, name) or (str(targets[0]) if len(targets) == 1 else "")
        if error.errno is None or not name:
            raise
        # A new error, as the attribute `filename` of FFmpeg's cannot be set.
        raise OSError(error.errno, error.strerror, name) from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Deliver SIGINT, SIGTERM and SIGHUP after the block. Python handles signals in its main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, *ENDING)}
    try:
        yield
    finally:
        for changed, handler in before.items():
            # None stands for a handler that was not installed from Python, and cannot be put back from it.
            signal.signal(changed, signal.SIG_DFL if handler is None else handler)
        for number in arrived:
            signal.raise_signal(number)
