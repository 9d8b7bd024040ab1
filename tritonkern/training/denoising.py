"""Training of `difftrack-nano`: a transformer learns to denoise generated clips. No track is shown to it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from tritonkern.files import atomic_path
from tritonkern.models.cogvideox import CogVideoX
from tritonkern.models.difftrack_nano import CONTRAST, FRAMES, PIXELS
from tritonkern.training.loop import fitting, read_checkpoint, write_weights
from tritonkern.training.synthetic import generate_clip
from tritonkern.training.textures import procedural_texture

# Clips are rendered at twice the size, and motion is given in pixels of 256 x 256.
_RENDERED = 2 * PIXELS[0]
# Share of the steps in which the learning rate falls.
_FALL = 0.25


@dataclass(frozen=True)
class DenoisingPlan:
    """Everything that decides the result of a run: the same plan gives the same clips and noise, step by step.

    The first `textures` steps are on `moving_textures`, in which only another frame tells what noise hides: there
    matching emerges in minutes, while rendered surfaces are smooth enough to be denoised without it for long. The next
    `drifts` steps are on `drifting_textures`, for motion between cells and smoother surfaces.

    A later step takes `rendered` clips, half of them with `blurred_texture`. Their frames are dealt into clips of 2, 4
    or all 8 frames, so that every step has as many; few frames cost less attention and give more different moves. In
    the share `clean` of these clips the first frame has no noise.

    The learning rate is constant and falls to a hundredth in the last quarter of the steps. So an interrupted run may
    be continued with another number of steps: those before the fall are the same.
    """

    steps: int = 6000
    textures: int = 600
    drifts: int = 800
    rendered: int = 1
    clean: float = 0.75
    learning_rate: float = 1.5e-3
    weight_decay: float = 1e-2
    warmup: int = 100
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of step 1, 2, ...: a rise, a constant, and a linear fall."""
        left = (self.steps - step) / (_FALL * self.steps)
        return self.learning_rate * min(1.0, step / self.warmup, max(0.01, left))


class DenoisingClips(Dataset):
    """The clips `[B, T, 3, h, w]` of every step, of standard deviation near 1; B T is the same in all steps."""

    def __init__(self, plan: DenoisingPlan):
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)
        if step < self.plan.textures:
            return moving_textures(16, generator, patch=4, most=1 + 2 * (step % 2))[0]
        if step < self.plan.textures + self.plan.drifts:
            return drifting_textures(*((16, 32), (16, 32), (4, 64))[step % 3], generator)[0]
        frames = int(np.random.default_rng((self.plan.seed, 56, step)).choice([2, 2, 4, FRAMES]))
        clips = []
        for number in range(self.plan.rendered):
            seed = (self.plan.seed, 55, step, number)
            rng = np.random.default_rng(seed)
            # Up to the speed at which the passes over a clip of 24 frames see evaluation clips, and more.
            speed = float(rng.uniform(0.2, 3.0)) * _RENDERED / 256
            texture = blurred_texture if rng.random() < 0.5 else procedural_texture
            clip = generate_clip(seed, frames=FRAMES, size=_RENDERED, points=1, speed=speed, texture=texture)
            video = F.avg_pool2d(torch.from_numpy(clip.video).permute(0, 3, 1, 2).float(), 2)
            video = CONTRAST * (video / 127.5 - 1)
            for dealt in rng.permutation(FRAMES).reshape(-1, frames):
                # As a pass of the tracker: any frame leads the others, which are in order.
                order = sorted(dealt.tolist(), reverse=rng.random() < 0.5)
                lead = int(rng.integers(frames)) if rng.random() < 0.5 else 0
                clips.append(video[[order[lead], *order[:lead], *order[lead + 1 :]]])
        return torch.stack(clips)


def moving_textures(count: int, generator: torch.Generator, patch: int = 2, most: int = 1) -> tuple[Tensor, Tensor]:
    """Two frames of periodic textures of 8 x 8 cells that move by up to `most` cells in y and x.

    Returns:
        clips `[count, 2, 3, 8 patch, 8 patch]` of standard deviation 1, and the moves `[count, 2]` (y, x) in cells.
    """
    noise = F.pad(torch.randn(count, 3, 16, 16, generator=generator), (1,) * 4, mode="circular")
    kernel = torch.tensor([0.25, 0.5, 0.25])
    images = F.conv2d(noise, (kernel[:, None] * kernel).expand(3, 1, 3, 3), groups=3)
    images = (images / images.std((1, 2, 3), keepdim=True)).repeat_interleave(patch // 2, 2)
    images = images.repeat_interleave(patch // 2, 3)
    moves = torch.randint(-most, most + 1, (count, 2), generator=generator)
    second = [image.roll(tuple((patch * move).tolist()), (1, 2)) for image, move in zip(images, moves, strict=True)]
    return torch.stack([images, torch.stack(second)], 1), moves


def blurred_texture(rng: np.random.Generator, size: int) -> Tensor:
    """A surface `[3, size, size]` in [0, 1] with waves as long as a cell of a rendered frame and longer."""
    y, x = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)
    blur = np.exp(-(y**2 + x**2) / rng.uniform(0.04, 0.125) ** 2)
    surface = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, size, size))) * blur, s=(size, size))
    mixed = np.einsum("cd,dyx->cyx", rng.uniform(-1, 1, (3, 3)), surface)
    return torch.from_numpy(0.5 + rng.uniform(0.1, 0.25) * mixed / mixed.std()).clamp(0, 1).float()


def drifting_textures(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two frames of blurred periodic textures, which move by up to 12 pixels in y and x, a third by whole cells.

    Returns:
        clips `[count, 2, 3, size, size]`, and the moves `[count, 2]` (y, x) in pixels.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    y, x = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)
    # Waves as long as a cell and longer: what a cell shows changes little where the motion is a part of a cell.
    blur = torch.exp(-(y.square() + x.square()) / uniform(0.08, 0.25, 1, 1, 1).square())
    spectrum = torch.fft.rfft2(torch.randn(count, 3, size, size, generator=generator)) * blur
    mixed = torch.einsum("ncd,ndyx->ncyx", uniform(-1, 1, 3, 3).to(spectrum.dtype), spectrum)
    moves = uniform(-12, 12, 2)
    moves = torch.where(uniform(0, 1, 1) < 0.3, 4 * (moves / 4).round(), moves)
    turn = torch.exp(-2j * torch.pi * (moves[:, 0, None, None] * y + moves[:, 1, None, None] * x))[:, None]
    clips = torch.stack([torch.fft.irfft2(z, s=(size, size)) for z in (mixed, mixed * turn)], 1)
    clips = (clips - clips.mean((1, 3, 4), keepdim=True)) / clips.std((1, 2, 3, 4), keepdim=True)
    return uniform(0.4, 1.0, 1, 1, 1, 1) * clips + uniform(-0.6, 0.6, 1, 1, 1, 1), moves


def denoising_loss(transformer: CogVideoX, clips: Tensor, clean: float, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted velocity e - x of a straight path x_s = (1 - s) x + s e, at timestep 1000 s.

    Args:
        clips: `[B, T, C, h, w]`, the x.
        clean: share of the clips whose first frame has no noise; it does not count.
        generator: of s, uniform in [0, 1), and of the noise e.
    """
    s, chosen = torch.rand(2, len(clips), 1, 1, 1, 1, generator=generator).to(clips)
    noise = torch.randn(clips.shape, generator=generator).to(clips)
    first = torch.arange(clips.shape[1], device=clips.device).view(1, -1, 1, 1, 1) == 0
    kept = (chosen < clean) & first
    text = clips.new_zeros(len(clips), 1, transformer.text_dim)
    found = transformer(torch.where(kept, clips, (1 - s) * clips + s * noise), text, 1000 * s.flatten())
    wrong = (found - (noise - clips)).square().masked_fill(kept, 0.0)
    return wrong.sum() / (~kept).expand_as(wrong).sum()


def train_denoiser(
    transformer: CogVideoX,
    output: Path,
    plan: DenoisingPlan,
    *,
    save_every: int = 50,
    report: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> None:
    """Train `transformer` in place and write `output` (safetensors, float16) when done.

    `output` with the suffix `.checkpoint` is written every `save_every` steps and resumes an interrupted run of the
    same plan, but for `steps`; `report(step, losses)` is called after each step. Raises `ValueError` if
    the checkpoint is damaged, belongs to another plan or has more steps behind it than the plan.
    """
    checkpoint, device = output.with_suffix(".checkpoint"), next(transformer.parameters()).device
    optimiser = torch.optim.AdamW(
        transformer.parameters(), plan.learning_rate, (0.9, 0.99), weight_decay=plan.weight_decay
    )
    done = 0
    if checkpoint.exists():
        saved = read_checkpoint(checkpoint, {"plan", "step", "model", "optimiser"}, plan, free=("steps",))
        with fitting(checkpoint):
            transformer.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
            done = operator.index(saved["step"])
        if done > plan.steps:
            raise ValueError(f"steps must be {done} or more, which {checkpoint} has behind it, got {plan.steps}")

    transformer.train()
    clips = Subset(DenoisingClips(plan), range(done, plan.steps))
    loader = DataLoader(clips, batch_size=None, num_workers=1, prefetch_factor=4)
    for step, batch in enumerate(loader, start=done + 1):
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(step)
        loss = denoising_loss(transformer, batch.to(device), plan.clean, generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimiser.step()
        report(step, {"loss": float(loss.detach())})
        if step % save_every == 0 or step == plan.steps:
            state = {"plan": asdict(plan), "step": step, "model": transformer.state_dict()}
            with atomic_path(checkpoint) as part:
                torch.save(state | {"optimiser": optimiser.state_dict()}, part)
    transformer.eval()
    write_weights(output, transformer.state_dict(), "DiffTrackNano", plan)
