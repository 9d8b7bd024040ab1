"""Turns an image network into a video network with Tracktention, and shows what that does to flicker.

    python examples/tracktention.py depth  --out docs/tracktention-depth.png    # a small DINOv2 with a DPT head
    python examples/tracktention.py colour --out docs/tracktention-colour.png   # a small U-Net

The image network is trained on single frames of generated videos. Then it is trained on for as many steps twice: as it
is, and with Tracktention layers inserted. Held-out clips are scored along true tracks that neither network is given.
"""

import argparse
import copy
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tritonkern.models import DepthModel, insert_tracktention
from tritonkern.models.dinov2 import DINOv2Config
from tritonkern.tracking import PointTracker
from tritonkern.training import generate_clip
from tritonkern.training.textures import procedural_texture

SIZE = 64
HAZE = 0.7


class Hazy:
    """Surfaces of one clip, back to front: the farther, the hazier. Depth shows in single frames,
    but vaguely, as surfaces differ in contrast by themselves."""

    def __init__(self) -> None:
        self.painted = 0

    def __call__(self, rng: np.random.Generator, size: int) -> Tensor:
        clear = 0.8 ** (5 - self.painted)
        self.painted += 1
        return HAZE + (procedural_texture(rng, size) - HAZE) * clear


def coloured_by_roughness(rng: np.random.Generator, size: int) -> Tensor:
    """A surface whose colour follows from its texture: green where smooth, blue between, red where rough."""
    roughness = rng.uniform()
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1 / size
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * frequency ** -(2.0 - 1.4 * roughness)
    grey = np.fft.irfft2(spectrum, s=(size, size))
    grey = torch.from_numpy(0.5 + 0.12 * (grey - grey.mean()) / grey.std()).float()
    angle = math.pi * (roughness - 0.5)
    red, blue = 0.25 * math.sin(angle), 0.25 * math.cos(angle) - 0.125
    green = -(0.299 * red + 0.114 * blue) / 0.587  # leaves the brightness as it is
    return torch.stack([grey + red, grey + green, grey + blue]).clamp(0, 1)


class UNet(nn.Module):
    """Brightness `[N, 1, H, W]` -> colour differences `[N, 2, H, W]`."""

    def __init__(self, channels: tuple[int, ...] = (8, 16, 32, 64)) -> None:
        super().__init__()
        self.down = nn.ModuleList(self.stage(a, b) for a, b in zip((1, *channels), channels, strict=False))
        pairs = list(zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.up = nn.ModuleList(self.stage(a + b, b) for a, b in pairs)
        self.head = nn.Conv2d(channels[0], 2, 1)

    @staticmethod
    def stage(inner: int, outer: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1), nn.GroupNorm(8, outer), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.down:
            x = stage(F.avg_pool2d(x, 2) if skips else x)
            skips.append(x)
        for stage, skip in zip(self.up, skips[-2::-1], strict=True):
            x = stage(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return self.head(x)


@dataclass(frozen=True)
class Sample:
    """A clip: `images` `[T, C, H, W]` for the network, `target` `[T, K, H, W]`, `tracks` `[T, M, 2]`, `visible`."""

    images: Tensor
    target: Tensor
    tracks: Tensor
    visible: Tensor
    video: np.ndarray


def make_sample(task: str, seed: tuple[int, ...], frames: int, points: int) -> Sample:
    texture = Hazy() if task == "depth" else coloured_by_roughness
    clip = generate_clip(seed, frames=frames, size=SIZE, points=points, texture=texture)
    video = torch.from_numpy(clip.video).movedim(-1, 1) / 255
    if task == "depth":
        images, target = (video - 0.5) / 0.25, (torch.from_numpy(clip.depth)[:, None] + 1) / 6
    else:
        brightness = (video * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        images, target = (brightness - 0.5) / 0.25, video[:, ::2] - brightness
    tracks = torch.from_numpy(clip.points).transpose(0, 1)
    return Sample(images, target, tracks, ~torch.from_numpy(clip.occluded).T, clip.video)


def image_network(task: str) -> nn.Module:
    if task == "depth":
        model = DepthModel(DINOv2Config(64, 4, 4, patch_size=8, grid=8), features=16, channels=(16, 16, 32, 32))
        nn.init.constant_(model.depth_head.scratch.output_conv2[2].bias, 0.5)  # the ReLU behind it must not start dead
        return model
    return UNet()


def with_tracktention(task: str, image: nn.Module) -> nn.Module:
    if task == "depth":
        return insert_tracktention(image, [1, 3], dim=64, num_heads=4)
    return insert_tracktention(image, ["down.2", "down.3"], dim=[32, 64], num_heads=4)


def predict(network: nn.Module, images: Tensor, tracks: Tensor, visible: Tensor) -> Tensor:
    """`[B, T, K, H, W]`; an image network is shown the frames one by one."""
    if isinstance(network, (DepthModel, UNet)):
        out = network(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    else:
        out = network(images, tracks, visible)
    return out if out.ndim == 5 else out[:, :, None]


def train(network: nn.Module, samples: list[Sample], steps: int, seed: int, frames: int = 6, batch: int = 2) -> None:
    """The mean absolute error of every pixel; the same clips, frames and tracks for the same seed."""
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        parts = []
        for index in rng.integers(0, len(samples), batch):
            sample = samples[index]
            start = rng.integers(0, len(sample.images) - frames + 1)
            chosen = rng.choice(sample.tracks.shape[1], min(96, sample.tracks.shape[1]), replace=False)
            span = slice(start, start + frames)
            parts.append(
                [sample.images[span], sample.target[span], sample.tracks[span, chosen], sample.visible[span, chosen]]
            )
        images, target, tracks, visible = map(torch.stack, zip(*parts, strict=True))
        loss = (predict(network, images, tracks, visible) - target).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()


def flicker(pictures: Tensor, tracks: Tensor, visible: Tensor) -> float:
    """Mean change of `[T, K, H, W]` from frame to frame along the tracks that are visible in both."""
    grid = (tracks / SIZE * 2 - 1)[:, None]
    values = F.grid_sample(pictures.float(), grid, padding_mode="border", align_corners=False)[:, :, 0]  # [T, K, M]
    change = (values[1:] - values[:-1]).abs().mean(1)
    return change[visible[1:] & visible[:-1]].mean().item()


@torch.no_grad()
def evaluate(
    network: nn.Module, samples: list[Sample], given: list[tuple[Tensor, Tensor]]
) -> tuple[dict, list[Tensor]]:
    """Scores over clips, and the predictions. `given`: the tracks that each clip comes with."""
    network.eval()
    rows, pictures = [], []
    for sample, (tracks, visible) in zip(samples, given, strict=True):
        out = predict(network, sample.images[None], tracks[None], visible[None])[0]
        half = sample.tracks.shape[1] // 2  # the other half is what networks are given
        error = (out - sample.target).abs().mean().item()
        rows.append((error, flicker(out, sample.tracks[:, half:], sample.visible[:, half:])))
        pictures.append(out)
    error, change = np.array(rows).mean(0)
    return {"error": error, "flicker": change, "per clip": rows}, pictures


def predicted_tracks(sample: Sample) -> tuple[Tensor, Tensor]:
    """Tracks by chrono-nano, from grids on three frames, in place of the generator's own."""
    side = (np.arange(8) + 0.5) / 8 * SIZE
    frames = [0, len(sample.images) // 2, len(sample.images) - 1]
    queries = np.array([(t, x, y) for t in frames for y in side for x in side])
    result = PointTracker("chrono-nano")(sample.video, queries=queries)
    return torch.from_numpy(result.tracks).transpose(0, 1), torch.from_numpy(result.visibility).T


def picture(task: str, sample: Sample, rows: list[Tensor]) -> Image.Image:
    """Four frames of video, truth and predictions, and at the right one line of pixels over time."""

    def paint(x: Tensor) -> np.ndarray:
        if task == "depth":
            image = x[:, 0].clamp(0, 1)[..., None].expand(-1, -1, -1, 3)
        else:
            brightness = sample.images[:, 0] * 0.25 + 0.5
            red, blue = x.unbind(1)
            green = -(0.299 * red + 0.114 * blue) / 0.587
            image = (brightness[..., None] + torch.stack([red, green, blue], -1)).clamp(0, 1)
        return (image * 255).byte().numpy()

    first = sample.video if task == "depth" else paint(torch.zeros_like(sample.target))
    strips = []
    for frames in (first, *map(paint, (sample.target, *rows))):
        chosen = [frames[t] for t in np.linspace(0, len(frames) - 1, 4).astype(int)]
        over_time = np.repeat(frames[:, SIZE // 2], SIZE // len(frames), axis=0)
        over_time = np.pad(over_time, ((0, SIZE - len(over_time)), (8, 0), (0, 0)), constant_values=255)
        strips.append(np.concatenate([*chosen, over_time], 1))
    strip = np.concatenate([np.pad(s, ((0, 4), (0, 0), (0, 0)), constant_values=255) for s in strips])
    return Image.fromarray(strip).resize((strip.shape[1] * 2, strip.shape[0] * 2), Image.Resampling.NEAREST)


def seconds(network: nn.Module, sample: Sample) -> float:
    """Median of one clip's prediction."""
    half = sample.tracks.shape[1] // 2
    times = []
    for _ in range(7):
        start = time.perf_counter()
        evaluate(network, [sample], [(sample.tracks[:, :half], sample.visible[:, :half])])
        times.append(time.perf_counter() - start)
    return sorted(times)[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["depth", "colour"])
    parser.add_argument("--steps", type=int, default=400, help="of the image network, and then of each of the two")
    parser.add_argument("--clips", type=int, default=100, help="for training")
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=None, help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.clips, options.held_out = 2, 2, 1

    task, seed = options.task, options.seed
    torch.manual_seed(seed)
    training = [make_sample(task, (seed, 1, n), frames=12, points=128) for n in range(options.clips)]
    held_out = [make_sample(task, (seed, 2, n), frames=16, points=256) for n in range(options.held_out)]
    true = [(s.tracks[:, :128], s.visible[:, :128]) for s in held_out]

    start = time.perf_counter()
    image = image_network(task)
    train(image, training, options.steps, seed)
    video = with_tracktention(task, copy.deepcopy(image))
    train(image, training, options.steps, seed + 1)
    train(video, training, options.steps, seed + 1)
    print(f"{task}: {options.steps} + {options.steps} steps, {options.clips} clips, seed {seed}, ", end="")
    print(f"trained in {(time.perf_counter() - start) / 60:.1f} minutes on {torch.get_num_threads()} threads\n")

    half = [(s.tracks[:, 128:], s.visible[:, 128:]) for s in held_out]
    truth = np.mean([flicker(s.target, *tracks) for s, tracks in zip(held_out, half, strict=True)])
    scores = {
        "image network": evaluate(image, held_out, true),
        "with Tracktention, true tracks": evaluate(video, held_out, true),
    }
    scores["with Tracktention, tracks by chrono-nano"] = evaluate(video, held_out, [*map(predicted_tracks, held_out)])
    print("| | error | flicker |\n|---|---|---|")
    print(f"| truth | 0 | {truth:.4f} |")
    for name, (score, _) in scores.items():
        print(f"| {name} | {score['error']:.4f} | {score['flicker']:.4f} |")
    (image_score, image_pictures), (video_score, video_pictures), *_ = scores.values()
    better = np.array(video_score["per clip"]) < np.array(image_score["per clip"])
    print(f"\nTracktention is better in error on {better[:, 0].sum()} and in flicker on {better[:, 1].sum()} ", end="")
    print(f"of {len(held_out)} clips. ", end="")
    sizes = [sum(x.numel() for x in network.parameters()) / 1e3 for network in (image, video)]
    print(f"Parameters {sizes[0]:.0f}k and {sizes[1]:.0f}k; ", end="")
    print(f"time of a clip {seconds(video, held_out[0]) / seconds(image, held_out[0]):.2f}x.")
    if options.out:
        shown = int(np.argmax([score[1] for score in image_score["per clip"]]))
        rows = [image_pictures[shown], video_pictures[shown]]
        picture(task, held_out[shown], rows).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
