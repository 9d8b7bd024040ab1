"""Training a tracker from scratch on generated videos: AdamW, one-cycle schedule, gradient clipping, resumable."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from tritonkern.files import atomic_path
from tritonkern.models.checkpoints import read_pytorch
from tritonkern.models.matching import MatchingTracker
from tritonkern.training.losses import tracking_loss
from tritonkern.training.synthetic import generate_clip


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides the result of a run: the same plan and steps give the same clips in the same order."""

    steps: int = 2400
    easy_steps: int = 800
    frames: int = 8
    points: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    seed: int = 0
    bfloat16: bool = True


class GeneratedClips(Dataset):
    """Clip `i` of a plan: video `[T, H, W, 3]` in [-1, 1], queries `[N, 3]` (t, y, x), points `[N, T, 2]`, occluded
    `[N, T]`.
    """

    def __init__(self, plan: TrainingPlan):
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        seed = (self.plan.seed, index)
        # Slow motion first: a match must be near right before the points can be pulled into place.
        fastest = 1.3 if index < self.plan.easy_steps else 3.0
        speed = float(np.random.default_rng(seed).uniform(0.3, fastest))
        clip = generate_clip(seed, frames=self.plan.frames, points=self.plan.points, speed=speed)
        video = torch.from_numpy(clip.video).float() / 127.5 - 1
        points, occluded = torch.from_numpy(clip.points), torch.from_numpy(clip.occluded)
        # A query is a random visible frame of its point, which shows at least in the frame that it was drawn in.
        # Seed 0, of the packaged weights, numbers its generators by the clip alone; 63 bits are what a generator takes.
        generator = torch.Generator().manual_seed((self.plan.seed * 1_000_003 + index) % 2**63)
        draw = torch.rand(occluded.shape, generator=generator)
        start = draw.masked_fill(occluded, -1).argmax(-1)
        place = points[torch.arange(len(points)), start]
        return video, torch.stack([start.float(), place[:, 1], place[:, 0]], -1), points, occluded


def train(
    model: MatchingTracker,
    output: Path,
    plan: TrainingPlan,
    *,
    save_every: int = 100,
    report: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> None:
    """Train `model` in place and write `output` (safetensors, float16) when done.

    `output` with the suffix `.checkpoint` is written every `save_every` steps and resumes an interrupted run of the
    same plan; `report(step, losses)` is called after each step. Raises `ValueError` if the checkpoint is damaged or
    belongs to another plan.
    """
    checkpoint = output.with_suffix(".checkpoint")
    # The visibility head reads cosines, of which small differences matter: its weights have a long way to go.
    visibility = list(model.occ_linear.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("occ_linear.")]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "lr": plan.learning_rate, "weight_decay": plan.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "lr": plan.learning_rate, "weight_decay": 0.0},
        {"params": visibility, "lr": 30 * plan.learning_rate, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups)
    peaks = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peaks, plan.steps, pct_start=0.05)
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule}
    first = resume(checkpoint, plan, parts)

    def save(step: int) -> None:
        save_checkpoint(checkpoint, plan, step, parts)

    # The frames arrive with channels last; so convolutions need no copies.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    device = next(model.parameters()).device
    clips = torch.utils.data.Subset(GeneratedClips(plan), range(first, plan.steps))
    model.train()
    for step, batch in enumerate(DataLoader(clips, batch_size=1, num_workers=1, prefetch_factor=4), start=first + 1):
        video, queries, points, occluded = (tensor.to(device) for tensor in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.bfloat16):
            features = model.features(video)
        losses = tracking_loss(model, features, queries, points, occluded)
        optimiser.zero_grad(set_to_none=True)
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        report(step, {name: float(value.detach()) for name, value in losses.items()})
        if step % save_every == 0 or step == plan.steps:
            save(step)
    model.eval()
    write_weights(output, model.state_dict(), type(model).__name__, plan)


def write_weights(output: Path, state: dict[str, torch.Tensor], model: str, plan: Any, **metadata: str) -> None:
    """Weights in float16, with the class of their model and the plan (a dataclass) of their training."""
    weights = {name: tensor.half().contiguous() for name, tensor in state.items()}
    with atomic_path(output) as part:
        save_file(weights, part, {"model": model, "plan": json.dumps(asdict(plan)), **metadata})


def save_checkpoint(path: Path, plan: Any, step: int, parts: Mapping[str, Any]) -> None:
    """What `resume` continues from: the states of `parts`, which have a `state_dict`, after `step`."""
    states = {name: part.state_dict() for name, part in parts.items()}
    with atomic_path(path) as part:
        torch.save({"plan": asdict(plan), "step": step, **states}, part)


def resume(path: Path, plan: Any, parts: Mapping[str, Any]) -> int:
    """Loads the states of `parts` from a checkpoint of the same plan; the step that it was saved after, 0 without one.

    Raises `ValueError` as `read_checkpoint` and `fitting` do.
    """
    if not path.exists():
        return 0
    saved = read_checkpoint(path, {"plan", "step", *parts}, plan)
    with fitting(path):
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        return operator.index(saved["step"])


def read_checkpoint(path: Path, keys: set[str], plan: Any = None, free: Sequence[str] = ()) -> dict[str, Any]:
    """What a training run saved.

    Raises `ValueError` if the file is damaged, lacks one of `keys`, or belongs to another plan than this dataclass; the
    fields `free` of the plan may differ.
    """
    try:
        saved = read_pytorch(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, so that the run cannot continue: delete it to start again") from error
    if not isinstance(saved, dict) or not saved.keys() >= keys:
        raise ValueError(f"{path} is no checkpoint of a training run: delete it, or give another --out")
    kept = saved["plan"] if isinstance(saved.get("plan"), dict) else {}
    if plan is not None and kept | {name: getattr(plan, name) for name in free} != asdict(plan):
        raise ValueError(f"{path} belongs to another plan ({saved['plan']}); delete it or give another --out")
    return saved


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Raise `ValueError` where the contents of a checkpoint do not fit the model or its optimiser."""
    try:
        yield
    # Foreign contents make `load_state_dict` fail with nearly any exception class.
    except Exception as error:
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        raise ValueError(
            f"{path} does not fit this training run ({reason}): delete it, or give another --out"
        ) from error
