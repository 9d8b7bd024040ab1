"""Clips labelled by processes of this machine. A process that dies takes no other clip with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow.parquet as pq
import torch

from tritonkern.files import atomic_path
from tritonkern.tracking.labels import Clip, LabelFolder, LabelOptions, error_row, label_clip
from tritonkern.tracking.predictor import PointTracker


def label_in_processes(
    clips: Sequence[Clip],
    base: Path,
    folder: LabelFolder,
    options: LabelOptions,
    workers: int = 1,
    finished: Callable[[Clip], None] = lambda clip: None,
) -> None:
    """Label `clips` with one model in each of `workers` processes, which share the threads of PyTorch between them.

    Every worker is an executor of one process, so that it is known which clip a process was working on when it died:
    the clip is tried once more, and then recorded with an error. The processes end with this one, even if it is killed.
    On a machine with GPUs the workers take them in turn.
    """
    context = multiprocessing.get_context("spawn")
    # The processes exit when this end is closed, by this function or by the death of this process.
    lifeline, held = context.Pipe(duplex=False)
    threads = max(1, torch.get_num_threads() // workers)
    devices = _devices(options)
    waiting: dict[Future[None], tuple[int, Clip | None]] = {}
    executors: dict[int, ProcessPoolExecutor] = {}
    queue, again, suspects = iter(clips), list[Clip](), set[str]()

    def start(worker: int) -> None:
        own = replace(options, device=devices[worker % len(devices)])
        executors[worker] = ProcessPoolExecutor(1, context, _start, (lifeline, own, threads))
        waiting[executors[worker].submit(_ready)] = worker, None

    def died(worker: int, clip: Clip) -> None:
        if clip.id in suspects:
            _write(
                folder.clip_path(clip),
                error_row(clip, "the process of this clip ended twice: out of memory, killed, or a crash in a decoder"),
            )
            folder.add(clip)
            finished(clip)
        else:
            suspects.add(clip.id)
            again.append(clip)
        executors[worker].shutdown(wait=False)
        start(worker)

    try:
        for worker in range(min(workers, len(clips))):
            start(worker)
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                worker, clip = waiting.pop(future)
                try:
                    future.result()
                except BrokenProcessPool as error:
                    if clip is None:
                        raise RuntimeError(
                            "a worker process ended before its first clip: is the memory full?"
                        ) from error
                    died(worker, clip)
                    continue
                if clip is not None:
                    folder.add(clip)
                    finished(clip)
                clip = again.pop() if again else next(queue, None)
                if clip is None:
                    executors[worker].shutdown(wait=False)
                    continue
                try:
                    job = executors[worker].submit(_label, clip, base, folder.clip_path(clip))
                except BrokenProcessPool:
                    died(worker, clip)
                else:
                    waiting[job] = worker, clip
    finally:
        held.close()
        lifeline.close()
        for executor in executors.values():
            executor.shutdown(wait=True, cancel_futures=True)


def _devices(options: LabelOptions) -> list[str | None]:
    if options.device in (None, "cuda") and torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [options.device]


# What runs in a worker process.

_tracker: PointTracker
_options: LabelOptions


def _start(lifeline: Connection, options: LabelOptions, threads: int) -> None:
    global _tracker, _options
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which closes the lifeline
    threading.Thread(target=_exit_after, args=(lifeline,), daemon=True).start()
    torch.set_num_threads(threads)
    _tracker, _options = options.tracker(), options


def _exit_after(lifeline: Connection) -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _ready() -> None:
    """Its result is there once the model is loaded."""


def _label(clip: Clip, base: Path, path: Path) -> None:
    _write(path, label_clip(_tracker, clip, base, _options))


def _write(path: Path, table) -> None:
    with atomic_path(path) as part:
        pq.write_table(table, part)
