"""nano: chrono-nano's matches, refined by local correlation at three scales and by mixing along time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from tritonkern.functional import correlation_soft_argmax, local_correlation_linear, temporal_mixer
from tritonkern.models._streaming import Frames
from tritonkern.models.checkpoints import load_strict, read_state_dict
from tritonkern.models.chrono_nano import ChronoNano, frames_in_blocks
from tritonkern.nn import TemporalWindowAttention
from tritonkern.nn._plain import input_dtype, is_plain
from tritonkern.nn.correlation import TrackerOutput, put_queries, sample_features

_RADIUS = 3
_SIDE = 2 * _RADIUS + 1
_CELLS = _SIDE**2
_STRIDES = (2, 4, 8)
"""Pixels per cell of the three maps."""
_NEIGHBOURS = (1.5, 5.0)
"""Frames in which the weight of a neighbouring frame falls to 1 / e, of the two proposals from neighbours."""
_SCALARS = 39
_POSITIONS = 8192
"""Points times frames that are refined together."""
_CERTAIN = 8.0
"""Logit of what is known."""
_CALIBRATION = 0.5
"""Subtracted from the logits of `track`, which say "hidden" too often: on validation clips the decision "visible" is
then right in 1.6 % more of the cases, and the average Jaccard index is 0.2 % higher."""
# What `temporal_mixer` assumes of the convolutions.
_ALONG_TIME: dict[str, Any] = dict(kernel_size=(3,), stride=(1,), padding=(0,), dilation=(1,))


class Maps(NamedTuple):
    """Feature maps of unit norm `[B, T, h, w, C]`, finest first."""

    fine: Tensor
    cells: Tensor
    blocks: Tensor


class Step(NamedTuple):
    """A `TrackerOutput`, and what it came from."""

    output: TrackerOutput
    start: Tensor
    """[B, N, T, 2] positions before the step, in pixels."""
    logits: Tensor | None
    """[B, N, T, 3, 49] of the displacement at each scale, in whole cells from -3 to 3 in y and x (x varies fastest);
    None of the match."""


class Nano(ChronoNano):
    """`ChronoNano`, and a refiner that improves its positions and decides which are visible.

    Each of `steps` iterations correlates 7x7 supports around the query with 7x7 samples around the present position,
    on a convolutional map of 128x128 cells, on chrono-nano's 64x64 cells and on their 2x2 averages
    (`local_correlation`). At every scale the correlations of equal displacement are averaged, and their soft-argmax
    proposes a step. All this, the last two frames' motion, the similarity of the global match and whether it leads back
    to the query enter a network of `temporal_mixer`, `TemporalWindowAttention` and perceptrons for each point, which
    weighs the proposals, adds a correction, and updates the two logits.

    `features(video)`: float `[B, T, 256, 256, 3]` in [-1, 1] -> `Maps`, in float16 where no gradient is recorded, as
    long clips fill the memory (a model converted to float64 keeps that).

    Local 4-D correlation: Cho et al., "Local All-Pair Correspondence for Point Tracking", ECCV 2024; temporal mixing:
    Doersch et al., "TAPIR", ICCV 2023; start: Kim et al., CVPR 2025.
    """

    steps = 4
    span = 112  # a process that tracks 100 points stays below 1 GB

    def __init__(self, dim: int = 192, depth: int = 4, num_heads: int = 4, local_dim: int = 64, out_dim: int = 128):
        super().__init__(dim, depth, num_heads, local_dim, out_dim)
        self.fine = FineFeatures()
        self.refiner = Refiner()

    @classmethod
    def from_chrono(cls, path: str | Path) -> Nano:
        """An untrained refiner on the chrono-nano of `path`, whose first convolution the fine map starts with.

        Raises `FileNotFoundError` if there is no such file, `ValueError` if it does not hold chrono-nano's weights.
        """
        model, chrono = cls(), ChronoNano.from_checkpoint(path)
        model.load_state_dict(chrono.state_dict(), strict=False)
        model.fine.conv1.load_state_dict(chrono.stem[0].state_dict())
        model.fine.norm1.load_state_dict(chrono.stem[1].state_dict())
        return model

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Nano:
        """The model with the weights that `tritonkern train --model nano` wrote to `path`, in float32.

        Raises `FileNotFoundError` if there is no such file, `ValueError` if it does not hold this model's weights.
        """
        # Not on the meta device: normal numbers there import PyTorch's decompositions, which take 150 MB.
        model = cls()
        load_strict(model, read_state_dict(path), str(path))
        return model.eval()

    def cells(self, video: Tensor) -> Tensor:
        """chrono-nano's features `[B, T, 64, 64, 128]`."""
        return super().features(video)

    def features(self, video: Tensor) -> Maps:  # type: ignore[override]
        # First what needs the most memory on the way
        cells = self.cells(video)
        fine = frames_in_blocks(lambda x: self._stored(self.fine(x[None])[0]), [self.fine], video.flatten(0, 1))
        return make_maps(fine.unflatten(0, video.shape[:2]), cells)

    def _stages(self) -> list[Callable[[Frames], Any]]:
        stages = super()._stages()
        if len(stages) == 1:
            return stages
        first, *others, last = stages
        return [
            lambda frame: (*first(frame), self._stored(self.fine(frame[0]))),
            *others,
            lambda frame: make_maps(frame[1], last(frame)),
        ]

    def _unit_features(self, cells: Tensor) -> Tensor:
        return self._stored(super()._unit_features(cells))

    def _stored(self, features: Tensor) -> Tensor:
        return features if torch.is_grad_enabled() or features.dtype == torch.float64 else features.half()

    def track(  # type: ignore[override]
        self, features: Maps, queries: Tensor, evidence: Tensor | None = None
    ) -> TrackerOutput:
        """Tracks of `queries` `[B, N, 3]` (t, y, x), of `features` as the method of this name returns them.

        `evidence` is what `evidence(features, queries)` returns, if it is known already.
        """
        few = max(1, _POSITIONS // features.cells.shape[1])
        parts = []
        for start in range(0, max(queries.shape[1], 1), few):
            rows = slice(start, start + few)
            known = None if evidence is None else evidence[:, rows]
            parts.append(self.refine(features, queries[:, rows], known)[-1].output)
        tracks, *logits = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return TrackerOutput(tracks, *(x - _CALIBRATION for x in logits))

    @torch.no_grad()
    def evidence(self, features: Maps, queries: Tensor) -> Tensor:
        """`[B, N, T, 6]`: the positions of the global match, its similarities, and how far from the query its own match
        is. Those of a frame depend on no other frame but the query's."""
        queries = queries.to(torch.promote_types(features.cells.dtype, torch.float32))
        match = super().track(features.cells, queries).tracks
        return torch.cat([match, self._evidence(features.cells, queries, match)], -1)

    def refine(self, maps: Maps, queries: Tensor, evidence: Tensor | None = None) -> list[Step]:
        """The match, and the result of every step."""
        queries = queries.to(torch.promote_types(maps.cells.dtype, torch.float32))
        found = self.evidence(maps, queries) if evidence is None else evidence
        match, evidence = found[..., :2], found[..., 2:]
        guess = self._at_queries(TrackerOutput(match, *self.refiner.first_logits(evidence)), queries)
        supports = [_supports(grid, queries, stride) for grid, stride in zip(maps, _STRIDES, strict=True)]
        steps = [Step(guess, match, None)]
        for _ in range(self.steps):
            guess = TrackerOutput(*(x.detach() for x in guess))
            step = self.refiner(maps, supports, evidence, match, guess)
            guess = self._at_queries(step.output, queries)
            steps.append(step._replace(output=guess))
        return steps

    def _at_queries(self, output: TrackerOutput, queries: Tensor) -> TrackerOutput:
        """`output` that is certain of the queries, in their own frames."""
        own = queries[..., :1].round() == torch.arange(output.tracks.shape[2], device=queries.device)
        logits = (torch.where(own, -_CERTAIN, x) for x in output[1:])
        return TrackerOutput(put_queries(output.tracks, queries), *logits)

    def _evidence(self, cells: Tensor, queries: Tensor, tracks: Tensor) -> Tensor:
        """`[B, N, T, 4]`: similarities at the global match, and how far from the query its own match is."""
        query = self.query_features(cells, queries)
        match = correlation_soft_argmax(query.to(cells.dtype), cells, temperature=self.temperature, radius=self.radius)
        back = self.way_back(cells, queries, tracks)
        distance = (back - queries[:, :, None, [2, 1]]).norm(dim=-1)
        return torch.stack([match.mean, match.max, match.min, (1 + distance).log() / 2], -1)


class FineFeatures(nn.Module):
    """`[B, T, 256, 256, 3]` in [-1, 1] -> unit-norm `[B, T, 128, 128, 32]`, each frame on its own."""

    def __init__(self, dim: int = 32):
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim, 7, 2, 3)
        self.norm1 = nn.GroupNorm(8, dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1)
        self.norm2 = nn.GroupNorm(8, dim)
        self.head = nn.Linear(2 * dim, dim)

    def forward(self, video: Tensor) -> Tensor:
        images = rearrange(video.to(input_dtype(self, video.dtype)), "b t h w c -> (b t) c h w")
        edges = F.relu(self.norm1(self.conv1(images)))
        shapes = F.relu(self.norm2(self.conv2(edges)))
        features = self.head(torch.cat([edges, shapes], 1).movedim(1, -1))
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.normalize(features, dim=-1).unflatten(0, video.shape[:2])


def make_maps(fine: Tensor, cells: Tensor) -> Maps:
    """The three maps of a fine one and chrono-nano's."""
    blocks = frames_in_blocks(_pooled, [], cells.flatten(0, 1))
    return Maps(fine, cells, blocks.unflatten(0, cells.shape[:2]))


def _pooled(cells: Tensor) -> Tensor:
    return F.normalize(reduce(cells, "n (h r) (w s) c -> n h w c", "mean", r=2, s=2), dim=-1)


class Refiner(nn.Module):
    """One step of refinement: `(maps, supports, evidence, match, guess) -> Step`.

    `supports` of each map `[B, N, 49, C]`, `evidence` `[B, N, T, 4]`, `match` the positions of the global match
    `[B, N, T, 2]` in pixels, `guess` the present positions and logits.
    """

    def __init__(self, dim: int = 128, depth: int = 2, codes: int = 96, rank: int = 16):
        super().__init__()
        scales = len(_STRIDES)
        distance = (_offsets(torch.zeros(0)).square().sum(-1) / (2 * 1.5**2)).expand(scales, -1)
        self.window = nn.Parameter(-distance.clone())
        self.sharpness = nn.Parameter(torch.full((scales,), 3.0))
        self.support_code = nn.Parameter(torch.randn(rank, _CELLS) / _SIDE)
        self.pair_code = nn.Parameter(torch.randn(codes, _CELLS, rank) / _SIDE)
        self.code_bias = nn.Parameter(torch.zeros(scales, codes))
        self.input = nn.Linear(scales * (_CELLS + codes) + _SCALARS, dim)
        self.blocks = nn.ModuleList(RefinerBlock(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.first = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 2))
        # Two of position, two logits, and the shares of staying, of the scales and of the neighbours.
        self.output = nn.Linear(dim, 4 + 1 + scales + len(_NEIGHBOURS))
        nn.init.zeros_(self.output.weight)
        with torch.no_grad():
            self.output.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, -1.0, -1.0, -1.0]))

    def first_logits(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[B, N, T]` of the global match: hidden, and far off."""
        logits = self.first(evidence.to(input_dtype(self.first, evidence.dtype))).to(evidence.dtype)
        occlusion, expected_distance = logits.unbind(-1)
        return occlusion, expected_distance

    def forward(
        self, maps: Maps, supports: Sequence[Tensor], evidence: Tensor, match: Tensor, guess: TrackerOutput
    ) -> Step:
        tracks, occlusion, expected_distance = guess
        pair_weights = torch.einsum("kpr,rs->kps", self.pair_code, self.support_code)
        sharpness = self.sharpness.exp()
        pairs, offsets = _pairs(self.window), _offsets(self.window)
        confidence = ((1 - occlusion.sigmoid()) * (1 - expected_distance.sigmoid())).square()
        logits, inputs, proposals = [], [], []
        for level, (grid, support, stride) in enumerate(zip(maps, supports, _STRIDES, strict=True)):
            window = pairs * self.window[level].exp()
            window = window / window.sum((1, 2), keepdim=True)
            weight = torch.cat([window, pair_weights]).flatten(1)
            read = (
                local_correlation_linear(
                    grid,
                    support,
                    (tracks / stride).transpose(1, 2),
                    weight.to(grid.dtype),
                    radius=_RADIUS,
                    padding="zeros",
                    align_corners=False,
                    axis_order="yx",
                )
                .transpose(1, 2)
                .to(tracks.dtype)
            )
            # [B, N, T, 49] and [B, N, T, codes]
            cost, code = read.split([_CELLS, read.shape[-1] - _CELLS], -1)
            logits.append(sharpness[level] * cost)
            chance = logits[-1].softmax(-1)
            ahead = chance @ offsets.to(chance.dtype)
            proposals.append(stride * ahead)
            inputs += [cost, F.gelu(code + self.code_bias[level]), ahead, chance.amax(-1, keepdim=True)]

        step = tracks[..., 1:, :] - tracks[..., :-1, :]
        motion = torch.cat([F.pad(-step, (0, 0, 0, 1)), F.pad(step, (0, 0, 1, 0)), match - tracks], -1)
        for reach in _NEIGHBOURS:
            proposal, known = _from_neighbours(tracks, confidence, reach)
            proposals.append(proposal)
            inputs += [(proposal / 4).tanh(), (proposal / 32).tanh(), known[..., None]]
        inputs += [
            evidence,
            (occlusion / 4).tanh()[..., None],
            (expected_distance / 4).tanh()[..., None],
            (motion / 4).tanh(),
            (motion / 32).tanh(),
            (tracks / 128 - 1).clamp(-1.5, 1.5),
        ]
        hidden = torch.cat([x.to(tracks.dtype) for x in inputs], -1)
        hidden = self.input(hidden.to(input_dtype(self, hidden.dtype))).flatten(0, 1)
        for block in self.blocks:
            hidden = block(hidden)
        update = self.output(self.norm(hidden)).unflatten(0, tracks.shape[:2]).to(tracks.dtype)

        shares = update[..., 4:].softmax(-1)[..., 1:]
        moved = tracks + 2 * update[..., :2] + (torch.stack(proposals, -2) * shares[..., None]).sum(-2)
        output = TrackerOutput(
            moved.clamp(-128, 384), occlusion + 2 * update[..., 2], expected_distance + 2 * update[..., 3]
        )
        return Step(output, tracks, torch.stack(logits, -2))


class RefinerBlock(nn.Module):
    """Temporal mixing, window attention and a perceptron over `[M, T, C]`, each with its own residual."""

    def __init__(self, dim: int, num_heads: int = 4, reach: int = 24, wide: int = 3):
        super().__init__()
        self.mix_norm = nn.Parameter(torch.ones(dim))
        self.conv1 = nn.Conv1d(dim, 4 * dim, 3, groups=dim)
        self.conv2 = nn.Conv1d(4 * dim, 4 * dim, 3, groups=4 * dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = TemporalWindowAttention(dim, num_heads, (reach, reach), qkv_bias=True)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, wide * dim), nn.GELU(), nn.Linear(wide * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self._mix(x)
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.norm(x))

    def _mix(self, x: Tensor) -> Tensor:
        """`temporal_mixer`, or what it computes by calls of the convolutions where these are not plain."""
        conv1, conv2, dim = self.conv1, self.conv2, len(self.mix_norm)
        plain = is_plain(conv1, nn.Conv1d, groups=dim, **_ALONG_TIME) and is_plain(
            conv2, nn.Conv1d, groups=4 * dim, **_ALONG_TIME
        )
        if plain and conv1.bias is not None and conv2.bias is not None:
            parameters = (self.mix_norm, conv1.weight, conv1.bias, conv2.weight, conv2.bias)
            return cast(Tensor, temporal_mixer(x, *parameters))
        normed = F.layer_norm(x, (dim,), self.mix_norm)
        hidden = F.gelu(conv1(F.pad(normed.mT, (1, 1))), approximate="tanh")
        return x + reduce(conv2(F.pad(hidden, (1, 1))), "m (c j) t -> m t c", "sum", j=4)


# Made at every call: a checkpoint does not hold them, so as buffers they would be lost on the meta device.
def _pairs(like: Tensor) -> Tensor:
    """`[49, 49, 49]`, 1 where the pair (sample p, support s) belongs to displacement d: p = s + d."""
    along = torch.arange(-_RADIUS, _RADIUS + 1, device=like.device)
    line = along[:, None, None] == along[None, :, None] - along[None, None, :]
    pairs = line[:, None, :, None, :, None] & line[None, :, None, :, None, :]
    return pairs.reshape(_CELLS, _CELLS, _CELLS).to(like.dtype)


def _offsets(like: Tensor) -> Tensor:
    """`[49, 2]` (x, y), the displacements d."""
    along = torch.arange(-_RADIUS, _RADIUS + 1, device=like.device)
    y, x = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1).to(like.dtype)


def _from_neighbours(tracks: Tensor, confidence: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Steps `[B, N, T, 2]` from `tracks` to where the other frames put the points, and the weight of those frames.

    The place of frame t is that of the straight line through the positions of frames s, weighted by `confidence`
    `[B, N, T]` times exp(-|s - t| / reach); its slope is drawn to zero, the more so the fewer frames there are.
    """
    time = torch.arange(tracks.shape[2], device=tracks.device, dtype=tracks.dtype)
    apart = time[None, :] - time[:, None]
    kernel = (-apart.abs() / reach).exp() * (apart != 0)
    moments = torch.stack([kernel, kernel * apart, kernel * apart.square()])
    # [3, B, N, T]
    s0, s1, s2 = torch.einsum("kts,bns->kbnt", moments, confidence)
    q0, q1 = torch.einsum("kts,bnsc->kbntc", moments[:2], confidence[..., None] * tracks)
    s0, s2 = s0 + 1e-4, s2 + 0.5 * s0 + 1e-4
    place = (s2[..., None] * q0 - s1[..., None] * q1) / (s0 * s2 - s1.square())[..., None]
    return torch.where((s0 > 1e-2)[..., None], place - tracks, 0), s0 / (1 + s0)


def _supports(grid: Tensor, queries: Tensor, stride: int) -> Tensor:
    """`[B, N, 49, C]` (y, x) around the queries."""
    t, y, x = queries.unbind(-1)
    offset = torch.arange(-_RADIUS, _RADIUS + 1, device=queries.device)
    y = (y / stride)[..., None, None] + offset[:, None]
    x = (x / stride)[..., None, None] + offset
    y, x, t = torch.broadcast_tensors(y, x, t[..., None, None])
    t, y, x = (place.flatten(1) for place in (t, y, x))
    samples = sample_features(grid, t, y, x, grid.dtype)
    return samples.unflatten(1, (-1, _CELLS))
