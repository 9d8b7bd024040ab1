"""Runs one part in processes of its own and starts them again after a crash, a dead CUDA context or a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rows import DEAD_CONTEXT, append, read, running_file


def run_part(
    name: str, command: Sequence[str], out: Path, seconds: float, shares: int = 1, item_seconds: float = 60.0
) -> None:
    """Run `command` in `shares` processes that divide the items among them, for at most `seconds`.

    A process that ends badly, or whose item takes longer than `item_seconds`, costs that item alone.
    """
    deadline = time.time() + seconds
    threads = [
        threading.Thread(target=_run_share, args=(name, command, out, deadline, share, shares, item_seconds))
        for share in range(shares)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _run_share(
    name: str, command: Sequence[str], out: Path, deadline: float, share: int, shares: int, item_seconds: float
) -> None:
    running = running_file(out, name, share)
    environment = {**os.environ, "OUT": str(out), "PART_DEADLINE": str(deadline)}
    environment |= {"PART_SHARE": str(share), "PART_SHARES": str(shares)}
    while time.time() < deadline:
        running.unlink(missing_ok=True)
        with open(out / "log.txt", "a") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        reason = _wait(process, running, deadline, item_seconds)
        if reason is None and process.returncode == 0:
            return
        if not running.exists():  # between items, so that the next one would end the same way
            append(out, {"part": name, "name": "process", "error": reason or f"ended with status {process.returncode}"})
            return
        item = running.read_text()
        running.unlink()
        if process.returncode != DEAD_CONTEXT or not any(r["part"] == name and r["name"] == item for r in read(out)):
            error = reason or f"the process ended with status {process.returncode}"
            append(out, {"part": name, "name": item, "error": error})


def _wait(process: subprocess.Popen, running: Path, deadline: float, item_seconds: float) -> str | None:
    """Until the process ends, or why it was killed."""
    while True:
        try:
            process.wait(0.2)
            return None
        except subprocess.TimeoutExpired:
            pass
        reason = None
        if time.time() > deadline + 5:
            reason = "killed: the part's time is over"
        elif _age(running) > item_seconds:
            reason = f"killed: no result after {item_seconds:.0f} s"
        if reason is not None:
            os.killpg(process.pid, signal.SIGINT)  # pytest reports what it has done
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return reason


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
