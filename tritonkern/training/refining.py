"""Training of `nano`: the refiner and its fine map, on the features of a frozen chrono-nano."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tritonkern.files import atomic_path
from tritonkern.models.nano import Nano, Step, make_maps
from tritonkern.training.cache import CLIP_FRAMES, ClipCache
from tritonkern.training.loop import fitting, read_checkpoint, write_weights
from tritonkern.training.losses import cell_targets


@dataclass(frozen=True)
class RefiningPlan:
    """Everything that decides the result of a run.

    A step averages the gradients of `batch` examples. Those of step i are taken from the first
    `first_clips + i * clips_per_step` clips, at most `clips`: 12 frames of one, or the whole 24 in the share `long` of
    the examples after step `long_from`. Clips from number `soft_from` on have surfaces that are partly out of focus.
    The learning rate is constant up to the last `decay` steps, in which it falls to zero; so a run can be prolonged as
    long as it has not begun to fall.
    """

    steps: int = 4000
    decay: int = 1000
    warmup: int = 100
    first_clips: int = 280
    clips_per_step: float = 0.2
    clips: int = 800
    soft_from: int = 280
    batch: int = 2
    points: int = 96
    iterations: int = 3
    long_from: int = 300
    long: float = 0.5
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    averaging: float = 0.998
    seed: int = 1

    def rate(self, step: int) -> float:
        """The learning rate of step 1, 2, ..."""
        return self.learning_rate * min(1.0, step / self.warmup, (self.steps - step + 1) / self.decay)


class Example(NamedTuple):
    """video uint8 `[T, H, W, 3]`, features `[T, h, w, C]`, queries `[N, 3]` (t, y, x), points `[N, T, 2]`, occluded
    `[N, T]`.
    """

    video: Tensor
    features: Tensor
    queries: Tensor
    points: Tensor
    occluded: Tensor


class Examples(Dataset):
    """Example i of a plan, a pure function of both (and of the network behind `cache`)."""

    def __init__(self, plan: RefiningPlan, cache: ClipCache):
        self.plan, self.cache = plan, cache

    def __len__(self) -> int:
        return self.plan.steps * self.plan.batch

    def __getitem__(self, index: int) -> Example:
        plan, rng = self.plan, np.random.default_rng((self.plan.seed, 77, index))
        step = index // plan.batch
        pool = min(plan.clips, plan.first_clips + int(step * plan.clips_per_step))
        number = int(rng.integers(pool))
        whole = step >= plan.long_from and rng.random() < plan.long
        length = CLIP_FRAMES if whole else CLIP_FRAMES // 2
        # Half of the short ones leave every other frame out, which doubles the speed.
        pace = 1 if whole or rng.random() < 0.5 else 2
        start = 0 if pace == 2 else int(rng.integers(CLIP_FRAMES - length + 1))
        clip = self.cache.read(number, start, min(start + length * pace, CLIP_FRAMES), pace)
        backwards = rng.random() < 0.5

        # Points that are seen for a while, of which a third are seen again after they were hidden, where there are any.
        shown = ~clip.occluded
        seen = shown.sum(1)
        returns = (shown[:, 1:] & ~shown[:, :-1]).any(1) & (seen >= 2)
        chance = torch.where(returns, 3.0, 1.0) * (seen >= 2) + 1e-6
        count = min(plan.points // (2 if whole else 1), len(chance))
        share = (chance.double() / chance.double().sum()).numpy()
        chosen = torch.from_numpy(rng.choice(len(chance), count, replace=False, p=share))
        video, features = clip.video, clip.features
        points, occluded = clip.points[chosen], clip.occluded[chosen]
        if backwards:
            video, features, points, occluded = video.flip(0), features.flip(0), points.flip(1), occluded.flip(1)
        # A query is the first visible frame, or any of them; a point that is seen in none is asked about in the first.
        draw = torch.from_numpy(rng.random(occluded.shape)).masked_fill(occluded, -1)
        first = (~occluded).float().argmax(1)
        own = torch.where(torch.from_numpy(rng.random(count) < 0.5), first, draw.argmax(1))
        place = points[torch.arange(count), own]
        queries = torch.stack([own.float(), place[:, 1], place[:, 0]], -1)
        return Example(video.contiguous(), features.contiguous(), queries, points, occluded)


def refining_loss(steps: list[Step], queries: Tensor, points: Tensor, occluded: Tensor) -> dict[str, Tensor]:
    """Losses of one batch, each a scalar; their weighted sum is `total`.

    `steps` from `Nano.refine`, `queries` `[B, N, 3]` (t, y, x), true `points` `[B, N, T, 2]` xy in pixels and
    `occluded` `[B, N, T]`. With e the error in pixels of a step: `points` is log(1 + e) + e / 20 up to e = 64, on
    visible frames, which weighs the thresholds of TAP-Vid (powers of two) alike, and a tenth of it on hidden ones;
    `cells` is the cross-entropy of the displacement at each scale, where the true one is within reach;
    `occlusion` and `distance` are as in `tracking_loss`, but for e > 8. Later steps weigh more.
    """
    frames = torch.arange(points.shape[2], device=points.device)
    counted = frames != queries[..., :1].round()
    visible = ~occluded & counted
    share = visible.float() / visible.sum().clamp(min=1)
    # Far outside of the frame there is nothing to be learnt.
    near = ((points > -32) & (points < 288)).all(-1)
    weight = share + 0.1 * (occluded & counted & near).float() / visible.sum().clamp(min=1)
    every = counted.float() / counted.sum()
    losses: dict[str, Tensor] = {name: points.new_zeros(()) for name in ("points", "cells", "occlusion", "distance")}
    weights = 0.0
    for index, step in enumerate(steps):
        factor = 0.8 ** (len(steps) - 1 - index)
        weights += factor
        output = step.output
        error = (output.tracks - points).square().sum(-1).add(1e-4).sqrt()
        losses["points"] += factor * ((error.log1p() + error.clamp(max=64) / 20) * weight).sum()
        hidden = F.binary_cross_entropy_with_logits(output.occlusion, occluded.float(), reduction="none")
        losses["occlusion"] += factor * (hidden * every).sum()
        far = F.binary_cross_entropy_with_logits(output.expected_distance, (error > 8).float(), reduction="none")
        losses["distance"] += factor * (far * share).sum()
        if step.logits is None:
            continue
        for level, stride in enumerate((2, 4, 8)):
            ahead = (points - step.start) / stride
            reach = visible & (ahead.abs() < 3).all(-1)
            cells, shares = cell_targets(ahead + 3.5, 7, 7)
            logits = step.logits[..., level, :]
            surprise = logits.logsumexp(-1) - (logits.gather(-1, cells) * shares).sum(-1)
            losses["cells"] += factor * (surprise * reach).sum() / reach.sum().clamp(min=1)
    losses = {name: loss / weights for name, loss in losses.items()}
    losses["total"] = losses["points"] + 0.1 * losses["cells"] + losses["occlusion"] + 0.5 * losses["distance"]
    error = (steps[-1].output.tracks - points).norm(dim=-1)
    for limit in (1, 4):
        losses[f"within{limit}"] = ((error < limit).float() * share).sum()
    losses["start1"] = (((steps[0].output.tracks - points).norm(dim=-1) < 1).float() * share).sum()
    return losses


def train_nano(
    model: Nano,
    output: Path,
    clips: Path,
    plan: RefiningPlan,
    *,
    save_every: int = 100,
    report: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> None:
    """Train the refiner of `model` in place, and write `output` (safetensors, float16).

    `model` holds the weights of chrono-nano, which stay as they are. Rendered clips with their features are kept in the
    folder `clips` (28 MB each). Every `save_every` steps `output` is written with the running average of the weights,
    and `output` with the suffix `.checkpoint`, which resumes an interrupted run to the same bits, or prolongs it by a
    plan of more steps. `report(step, losses)` is called after each step. Raises `ValueError` if the checkpoint is
    damaged or belongs to another plan.
    """
    checkpoint = output.with_suffix(".checkpoint")
    model.steps = plan.iterations
    learnt = {n: p for n, p in model.named_parameters() if n.startswith(("fine.", "refiner."))}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learnt)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learnt.values() if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in learnt.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98))
    average = {name: parameter.detach().clone() for name, parameter in learnt.items()}
    done = 0
    if checkpoint.exists():
        saved = read_checkpoint(checkpoint, {"plan", "step", "model", "average", "optimiser"})
        _check_same_plan(saved, plan, checkpoint)
        with fitting(checkpoint):
            model.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
            if {name: x.shape for name, x in average.items()} != {n: x.shape for n, x in saved["average"].items()}:
                raise ValueError("the average belongs to other parameters")
            average, done = saved["average"], operator.index(saved["step"])

    def save(step: int) -> None:
        state = {
            "plan": asdict(plan),
            "step": step,
            "model": model.state_dict(),
            "average": average,
            "optimiser": optimiser.state_dict(),
        }
        with atomic_path(checkpoint) as part:
            torch.save(state, part)
        weights = {name: average.get(name, tensor) for name, tensor in model.state_dict().items()}
        write_weights(output, weights, "Nano", plan, step=str(step))

    examples = Examples(plan, ClipCache(clips, plan.seed, plan.soft_from, copy.deepcopy(model).cpu().eval().cells))
    wanted = torch.utils.data.Subset(examples, range(done * plan.batch, len(examples)))
    loader = iter(DataLoader(wanted, batch_size=None, num_workers=1, prefetch_factor=8))
    device = next(model.parameters()).device
    parameters = list(learnt.values())

    def gradients(example: Example) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        video, features, queries, points, occluded = (tensor[None].to(device) for tensor in example)
        maps = make_maps(model.fine(video.float() / 127.5 - 1), features.float())
        losses = refining_loss(model.refine(maps, queries), queries, points, occluded)
        found = torch.autograd.grad(losses["total"], parameters)
        return found, {name: float(value.detach()) for name, value in losses.items()}

    model.train()
    # An example per thread: on a busy machine far faster than the threads of one, which would wait for each other.
    with ThreadPoolExecutor(plan.batch) as pool:
        for step in range(done + 1, plan.steps + 1):
            for group in optimiser.param_groups:
                group["lr"] = plan.rate(step)
            results = list(pool.map(gradients, [Example(*next(loader)) for _ in range(plan.batch)]))
            for parameter, *grads in zip(parameters, *(found for found, _ in results), strict=True):
                parameter.grad = torch.stack(grads).mean(0)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            keep = min(plan.averaging, step / (step + 10))
            for name, parameter in learnt.items():
                average[name].lerp_(parameter.detach(), 1 - keep)
            report(step, {name: sum(losses[name] for _, losses in results) / plan.batch for name in results[0][1]})
            if step % save_every == 0 or step == plan.steps:
                save(step)
    model.eval()


def _check_same_plan(saved: dict[str, Any], plan: RefiningPlan, path: Path) -> None:
    before, now = saved["plan"], asdict(plan)
    falling = saved["step"] > before["steps"] - before["decay"]
    allowed = set() if falling else {"steps", "decay"}
    changed = [name for name in now if before.get(name) != now[name] and name not in allowed]
    if changed:
        raise ValueError(
            f"{path} belongs to another plan ({', '.join(f'{n} {before.get(n)}' for n in changed)}); delete it or give "
            "another --out"
        )
