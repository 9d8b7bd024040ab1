"""Results as lines of JSON, written and flushed one by one, so that a run that is cut off keeps all it has measured."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

DEAD_CONTEXT = 3  # exit status of a process whose CUDA context no longer answers


def append(out: Path, row: dict) -> None:
    """Append one row to rows.jsonl, to the disk. One write, so that several processes may append at a time."""
    file = os.open(out / "rows.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, (json.dumps(row, default=str) + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)


def read(out: Path) -> list[dict]:
    path = out / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Part:
    """The items of one part that this process runs: every `PART_SHARES`th, without those that have a row already.

    A process that is started again after a crash therefore goes on with the item after the one that crashed.
    """

    def __init__(self, name: str) -> None:
        self.name, self.out = name, Path(os.environ["OUT"])
        self.share, self.shares = int(os.environ["PART_SHARE"]), int(os.environ["PART_SHARES"])
        self.deadline = float(os.environ["PART_DEADLINE"])  # seconds of time.time()
        self.done = {row["name"] for row in read(self.out) if row["part"] == name}
        self.count = 0

    def item(self, name: str, function: Callable[[], dict | None], needs: float = 2.0) -> None:
        """Run `function` and write the row that it returns; an exception is a row too, and so is too little time.

        needs: seconds without which the item does not start.
        """
        self.count += 1
        if (self.count - 1) % self.shares != self.share or name in self.done:
            return
        if time.time() + needs > self.deadline:
            self._emit(name, {"skipped": "no time"}, 0.0)
            return
        running_file(self.out, self.name, self.share).write_text(name)
        start = time.monotonic()
        try:
            row = function() or {}
        except Exception as error:
            self._emit(name, {"error": f"{type(error).__name__}: {str(error)[:400]}"}, time.monotonic() - start)
            with open(self.out / "errors.txt", "a") as file:
                file.write(f"== {self.name} {name}\n{traceback.format_exc()}\n")
            if not _device_answers():
                os._exit(DEAD_CONTEXT)
        else:
            self._emit(name, row, time.monotonic() - start)
        running_file(self.out, self.name, self.share).unlink()

    def _emit(self, name: str, row: dict, seconds: float) -> None:
        append(self.out, {"part": self.name, "name": name, **row, "seconds": round(seconds, 2)})


def running_file(out: Path, part: str, share: int) -> Path:
    """Holds the name of the item that a process is running."""
    return out / f"running-{part}-{share}"


def _device_answers() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except Exception:
        return False
    return True
