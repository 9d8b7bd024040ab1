"""Training of DiTracker: its head, and adapters in a frozen transformer. The loop is that of ditracker-nano."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from tritonkern.files import atomic_path
from tritonkern.models.ditracker import DiTracker
from tritonkern.models.ditracker_nano import DiTrackerNano
from tritonkern.models.low_rank import add_low_rank, attention_targets, low_rank_parameters, merge_low_rank
from tritonkern.training.denoising import blurred_texture
from tritonkern.training.loop import resume, save_checkpoint, write_weights
from tritonkern.training.losses import iteration_losses
from tritonkern.training.synthetic import generate_clip
from tritonkern.training.textures import procedural_texture

CLIP_FRAMES = 24
_POINTS = 256


@dataclass(frozen=True)
class AdaptingPlan:
    """Everything that decides the result of a run.

    Every step takes one example: a random clip of `clips`, of which a random number of frames out of `frames` at a
    random pace, mirrored, turned, with exchanged colours or backwards; and as many points as make `positions` points
    times frames. A query is a random visible frame of its point, or the first one.

    The learning rate follows one cycle (AdamW, a rise over 5 % of the steps). Up to step `adapt_from` only the head
    learns, which then needs no backward pass through the transformer.
    """

    steps: int = 1500
    adapt_from: int = 700
    clips: int = 400
    frames: tuple[int, ...] = (8, 8, 8, 8, 15, 22)
    positions: int = 384
    iterations: int = 3
    rank: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 5e-4
    bfloat16: bool = False
    checkpointing: bool = False
    seed: int = 0


class Example(NamedTuple):
    """video uint8 `[T, 128, 128, 3]`, queries `[N, 3]` (t, y, x), points `[N, T, 2]` (x, y), occluded `[N, T]`.

    Positions are in pixels of 256 x 256.
    """

    video: Tensor
    queries: Tensor
    points: Tensor
    occluded: Tensor


class Examples(Dataset):
    """Example i of a plan, a pure function of both. Rendered clips are kept in `folder`, 1.2 MB each."""

    def __init__(self, plan: AdaptingPlan, folder: Path) -> None:
        self.plan, self.folder = plan, folder

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, index: int) -> Example:
        plan, rng = self.plan, np.random.default_rng((self.plan.seed, 91, index))
        clip = self._clip(int(rng.integers(plan.clips)))
        frames = int(rng.choice(plan.frames))
        pace = int(rng.integers(1, (CLIP_FRAMES - 1) // (frames - 1) + 1))
        start = int(rng.integers(CLIP_FRAMES - (frames - 1) * pace))
        taken = slice(start, start + (frames - 1) * pace + 1, pace)
        video, points, occluded = clip["video"][taken], clip["points"][:, taken], clip["occluded"][:, taken]

        seen = (~occluded).any(1).nonzero()[:, 0]
        chosen = seen[torch.from_numpy(rng.permutation(len(seen))[: plan.positions // frames])]
        points, occluded = points[chosen], occluded[chosen]
        video = video[..., torch.from_numpy(rng.permutation(3))]
        if rng.random() < 0.5:
            video, points, occluded = video.flip(0), points.flip(1), occluded.flip(1)
        if rng.random() < 0.5:
            video, points = video.transpose(1, 2), points.flip(-1)
        for axis in (0, 1):
            if rng.random() < 0.5:
                video = video.flip(2 - axis)
                points = torch.where(torch.arange(2) == axis, 256 - points, points)
        draw = torch.from_numpy(rng.random(occluded.shape)).masked_fill(occluded, -1).argmax(1)
        first = (~occluded).float().argmax(1)
        own = torch.where(torch.from_numpy(rng.random(len(points)) < 0.5), first, draw)
        place = points[torch.arange(len(points)), own]
        queries = torch.stack([own.float(), place[:, 1], place[:, 0]], -1)
        return Example(video.contiguous(), queries, points.contiguous(), occluded.contiguous())

    def _clip(self, number: int) -> dict[str, Tensor]:
        path = self.folder / f"{self.plan.seed}-{number:05d}.safetensors"
        if not path.exists():
            seed = (self.plan.seed, 92, number)
            rng = np.random.default_rng(seed)
            # Half of the size of the raster in which the speed is measured.
            speed = 0.5 * float(rng.uniform(0.2, 1.6))
            texture = blurred_texture if rng.random() < 0.2 else procedural_texture
            clip = generate_clip(seed, frames=CLIP_FRAMES, size=128, points=_POINTS, speed=speed, texture=texture)
            content = {
                "video": torch.from_numpy(clip.video),
                "points": 2 * torch.from_numpy(clip.points),
                "occluded": torch.from_numpy(clip.occluded),
            }
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as part:
                save_file(content, part)
        return load_file(path)


def adapt(model: DiTracker, example: Example, plan: AdaptingPlan, adapters: bool) -> dict[str, Tensor]:
    """The losses of an example, with a graph through the transformer if `adapters` learn."""
    parameter = next(model.head.parameters())
    video, queries, points, occluded = (tensor[None].to(parameter.device) for tensor in example)
    video = video.float() / 127.5 - 1
    with torch.autocast(parameter.device.type, torch.bfloat16, enabled=plan.bfloat16):
        with torch.set_grad_enabled(adapters):
            maps = model.encoder(video)
        network = model.head.network_maps(video)
        steps = model.refine((*maps, *(() if network is None else (network,))), queries)
    losses = iteration_losses(steps, points, occluded)
    error = (steps[-1].tracks.detach() - points).norm(dim=-1)
    losses["error"] = error[~occluded].mean()
    still = queries[:, :, None, 1:].flip(-1)
    losses["still"] = (still - points).norm(dim=-1)[~occluded].mean()
    return losses


def train_ditracker(
    model: DiTrackerNano,
    output: Path,
    clips: Path,
    plan: AdaptingPlan,
    *,
    save_every: int = 100,
    report: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> None:
    """Train the head of `model` and adapters on its transformer in place, and write `output` (safetensors, float16).

    The transformer's own weights stay as they are, and `output` holds them with the adapters merged into them. Every
    `save_every` steps `output` is written, and `output` with the suffix `.checkpoint`, which resumes an interrupted run
    of the same plan to the same bits. Rendered clips are kept in the folder `clips`. `report(step, losses)` is called
    after each step; "error" is the mean distance of visible points after the last iteration, "still" that of points
    that do not move, in pixels of 256 x 256. Raises `ValueError` if the checkpoint is damaged or belongs to another
    plan.
    """
    checkpoint = output.with_suffix(".checkpoint")
    transformer = model.encoder.transformer
    last = len(transformer.transformer_blocks) - 1
    add_low_rank(transformer, attention_targets(last), plan.rank, float(plan.rank))
    transformer.checkpointing = plan.checkpointing
    iterations, model.iterations = model.iterations, plan.iterations
    learnt = [*model.head.parameters(), *low_rank_parameters(transformer)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learnt if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in learnt if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=plan.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, plan.learning_rate, plan.steps + 1, pct_start=0.05)
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule}
    done = resume(checkpoint, plan, parts)

    def save(step: int) -> None:
        save_checkpoint(checkpoint, plan, step, parts)
        merged = copy.deepcopy(model)
        merge_low_rank(merged.encoder.transformer)
        write_weights(output, merged.state_dict(), "DiTrackerNano", plan, step=str(step))

    wanted = Subset(Examples(plan, clips), range(done, plan.steps))
    model.train()
    for step, example in enumerate(
        DataLoader(wanted, batch_size=None, num_workers=1, prefetch_factor=4), start=done + 1
    ):
        losses = adapt(model, Example(*example), plan, adapters=step > plan.adapt_from)
        optimiser.zero_grad(set_to_none=True)
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        schedule.step()
        report(step, {name: float(value.detach()) for name, value in losses.items()})
        if step % save_every == 0 or step == plan.steps:
            save(step)
    merge_low_rank(transformer)
    model.iterations = iterations
    model.eval()
