"""ditracker-nano: DiTracker on the transformer of difftrack-nano, small enough to train on a CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tritonkern.models.checkpoints import load_strict, read_state_dict
from tritonkern.models.difftrack_nano import CONTRAST, FRAMES, PIXELS, small_transformer
from tritonkern.models.ditracker import DiTracker, DiTrackerHead

HEADS = {1: 2, 2: 1}
"""The head of each layer whose queries and keys are the maps, side by side. They match best before training."""
TIMESTEP = 19.0


class NanoEncoder(nn.Module):
    """Queries and keys of two heads of difftrack-nano's transformer: `[B, T, H, W, 3]` in [-1, 1] -> `[B, T, 16, 16,
    64]` twice.

    Frames are resized to 64 x 64 pixels and pass through the transformer eight together. Longer clips take several
    passes: every pass but the first begins with the first frame of the clip, whose maps are dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.transformer = small_transformer(max(HEADS) + 1)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        images = rearrange(video, "b t h w c -> (b t) c h w").to(self.transformer.proj_out.weight.dtype)
        images = F.interpolate(images, PIXELS, mode="bilinear", antialias=True, align_corners=False)
        latents = rearrange(CONTRAST * images, "(b t) c h w -> b t c h w", b=len(video))
        query, key = self._pass(latents[:, :FRAMES])
        queries, keys = [query], [key]
        if latents.shape[1] > FRAMES:
            for part in latents[:, FRAMES:].split(FRAMES - 1, 1):
                query, key = self._pass(torch.cat([latents[:, :1], part], 1))
                queries.append(query[:, 1:])
                keys.append(key[:, 1:])
        return torch.cat(queries, 1), torch.cat(keys, 1)

    def _pass(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        text = latents.new_zeros(len(latents), 1, self.transformer.text_dim)
        time = latents.new_full((len(latents),), TIMESTEP)
        pairs = self.transformer.query_key(latents, text, time, list(HEADS), list(HEADS.values()))
        query, key = (torch.cat([x[..., i, :] for i, x in enumerate(side)], -1) for side in zip(*pairs, strict=True))
        grid = self.transformer.grid(latents)
        return query.unflatten(2, grid), key.unflatten(2, grid)


class DiTrackerNano(DiTracker):
    """`DiTracker` of 2.6 M parameters, for a raster of 256 x 256 pixels, of which the head sees 128 x 128.

    Weights are random; see `from_checkpoint`.
    """

    encoder: NanoEncoder

    def __init__(self, fuse: str | None = "concat") -> None:
        head = DiTrackerHead(
            (128, 128), 32, fuse=fuse, cost_dims=(128, 64), dim=96, num_heads=2, rounds=1, virtual_tracks=8
        )
        super().__init__(NanoEncoder(), head, (256, 256), iterations=4)

    @classmethod
    def from_difftrack(cls, path: str | Path, fuse: str | None = "concat") -> DiTrackerNano:
        """An untrained head on the transformer of the difftrack-nano of `path`.

        Raises `FileNotFoundError` if there is no such file, `ValueError` if it does not hold difftrack-nano's weights.
        """
        model, whole = cls(fuse), small_transformer()
        load_strict(whole, read_state_dict(path), str(path))
        names = model.encoder.transformer.state_dict()
        model.encoder.transformer.load_state_dict({n: x for n, x in whole.state_dict().items() if n in names})
        return model

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> DiTrackerNano:
        """The model with the weights that `tritonkern train --model ditracker-nano` wrote to `path`, in float32.

        Raises `FileNotFoundError` if there is no such file, `ValueError` if it does not hold this model's weights.
        """
        model = cls()
        load_strict(model, read_state_dict(path), str(path))
        return model.eval()

    def ablations(self, difftrack: str | Path) -> dict[str, DiTrackerNano]:
        """What the evaluation compares this model with: itself without its adapters or one of its two costs.

        The adapters are left out by the transformer of the difftrack-nano of `difftrack`. A cost is left out by its
        mean, 1 / 49, in place of all its values; the head is not trained again.
        """
        off, transformer, network = (copy.deepcopy(self) for _ in range(3))
        off.encoder.load_state_dict(self.from_difftrack(difftrack).encoder.state_dict())
        for model, constant in ((transformer, slice(2401, None)), (network, slice(2401))):
            first = model.head.corr_mlp.fc1
            with torch.no_grad():
                first.bias.add_(first.weight[:, constant].sum(1) / 49)
                first.weight[:, constant] = 0
        names = "adapters off", "transformer only", "network only"
        return {f"ditracker-nano, {name}": x for name, x in zip(names, (off, transformer, network), strict=True)}
