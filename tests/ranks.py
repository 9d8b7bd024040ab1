"""Processes of one process group on gloo, which stay alive and run functions of the tests."""

from __future__ import annotations

import datetime
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing


class Ranks:
    """`count` spawned processes; `run(function, *arguments)` calls a function of a module on each of them at once."""

    def __init__(self, count: int, store: str) -> None:
        context = torch.multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(count)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(theirs, rank, count, store), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *arguments):
        """What `function` returns on every rank. An error on one is raised here, with its traceback."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for pipe in self.pipes:
            assert pipe.poll(120), "a rank does not answer"
            answers.append(pipe.recv())
        for rank, (_, error) in enumerate(answers):
            assert error is None, f"on rank {rank}:\n{error}"
        return [value for value, _ in answers]

    def close(self):
        for process in self.processes:
            process.kill()  # at once: leaving the group in an orderly way takes seconds
            process.join()


def _serve(pipe, rank: int, count: int, store: str) -> None:
    torch.set_num_threads(1)
    torch._C._set_deterministic_algorithms(True, warn_only=True)  # `torch.empty` is filled with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timeout)
    while True:
        function, arguments = pipe.recv()
        torch.manual_seed(0)
        try:
            pipe.send((function(*arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
