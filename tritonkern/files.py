"""Files that never exist half-written under their final name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


@contextmanager
def atomic_path(path: str | PathLike[str]) -> Iterator[Path]:
    """A hidden name in the folder of `path` for a file that takes the name `path` only once it is complete.

    On any error, or Ctrl-C, the file is removed, and what stood at `path` before stays as it was.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
