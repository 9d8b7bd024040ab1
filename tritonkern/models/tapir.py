"""TAPIR (Doersch et al., ICCV 2023) and BootsTAPIR (Doersch et al., ACCV 2024), offline and causal."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tritonkern.models.checkpoints import load_strict, read_state_dict
from tritonkern.models.resnet import ResNet, frame_maps
from tritonkern.models.tracker import Tracker
from tritonkern.nn._plain import input_dtype
from tritonkern.nn._tapir import is_mixer_block, match_filtered, mix_block, refine
from tritonkern.nn.correlation import TrackerOutput, sample_features

_FINE, _COARSE = 128, 256
_MATCHED, _REFINED = 1024, 8192
"""Points times frames that are matched and refined together, with 130 and 30 KB each."""

State = list[list[tuple[Tensor, Tensor]]]
"""Of every step of refinement and every block of the mixer: the state of `tritonkern.temporal_mixer`, `[B, N, ...]`."""


class TAPIRFeatures(NamedTuple):
    """Unit-norm maps of frames of 256 x 256 pixels."""

    fine: Tensor
    """[B, T, 64, 64, 128]"""
    coarse: Tensor
    """[B, T, 32, 32, 256]"""


class TAPIR(Tracker):
    """Matches every query on a coarse map of every frame, then refines all frames of its track together.

    A step of refinement correlates the query's features with 7 x 7 cells around the present position on maps of two or
    three resolutions, and a mixer along time turns the correlations into corrections of position, visibility and the
    query's features in each frame. Parameters have the names of the official PyTorch code, whose checkpoints load and
    whose results on frames of 256 x 256 pixels these are.

    Args:
        extra_convs: five further blocks of convolutions on the coarse map, as in BootsTAPIR.
        pyramid_level: how many times the coarse map is halved for one more resolution of the refinement.
        causal: frames see no later ones, as in the online BootsTAPIR; see `step`.

    Weights are random; see `from_checkpoint`.

    Doersch et al., "TAPIR: Tracking Any Point with per-frame Initialization and temporal Refinement", ICCV 2023;
    Doersch et al., "BootsTAP: Bootstrapped Training for Tracking-Any-Point", ACCV 2024.
    """

    resolution = (256, 256)
    context = 0
    temperature = 20.0
    steps = 4

    def __init__(self, extra_convs: bool = True, pyramid_level: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.pyramid_level = pyramid_level
        self.resnet_torch = ResNet()
        self.torch_cost_volume_track_mods = nn.ModuleDict(
            {
                "hid1": nn.Conv2d(1, 16, 3, 1, 1),
                "hid2": nn.Conv2d(16, 1, 3, 1, 1),
                "hid3": nn.Conv2d(16, 32, 3, 2),
                "hid4": nn.Linear(32, 16),
                "occ_out": nn.Linear(16, 2),
            }
        )
        # As in the official code no gradient reaches it (`match_filtered`). DistributedDataParallel refuses trainable
        # parameters without one.
        self.torch_cost_volume_track_mods["hid2"].requires_grad_(False)
        outputs = 4 + _FINE + _COARSE
        self.torch_pips_mixer = _Mixer(outputs + 49 * (2 + pyramid_level), outputs, causal)
        self.extra_convs = _ExtraConvs() if extra_convs else None

    @classmethod
    def from_checkpoint(cls, path: str | Path, extra_convs: bool | None = None, causal: bool = False) -> TAPIR:
        """The model of an official PyTorch checkpoint, in evaluation mode on the CPU.

        Args:
            path: the file.
            extra_convs: whether it is BootsTAPIR; None infers it.
            causal: the file contains weights of a causal model, which have the same names and shapes.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file cannot be read, or its keys or shapes are not exactly those of the model; the message
                lists what is missing, unexpected or of another shape.
        """
        state = read_state_dict(path)
        inputs = state.get("torch_pips_mixer.linear.weight")
        cells = 0 if inputs is None or inputs.ndim != 2 else inputs.shape[1] - (4 + _FINE + _COARSE)
        level = {"pyramid_level": cells // 49 - 2} if cells > 0 and cells % 49 == 0 else {}
        if extra_convs is None:
            extra_convs = any(key.startswith("extra_convs.") for key in state)
        with torch.device("meta"):
            model = cls(extra_convs, causal=causal, **level)
        load_strict(model, state, str(path))
        return model.eval()

    def features(self, video: Tensor) -> TAPIRFeatures:
        """The maps of a video `[B, T, 256, 256, 3]` in [-1, 1]; frames are independent of each other."""
        return TAPIRFeatures(*frame_maps(self.resnet_torch, video, self._fine_and_coarse))

    def _fine_and_coarse(self, units: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return units[1], units[3] if self.extra_convs is None else self.extra_convs(units[3])

    def query_features(self, features: TAPIRFeatures, queries: Tensor) -> Tensor:
        """The features `[B, N, 384]` of the maps at `queries` `[B, N, 3]` (t, y, x)."""
        t, y, x = queries.to(torch.promote_types(features[0].dtype, torch.float32)).unbind(-1)
        height, width = self.resolution
        samples = [
            sample_features(grid, t, y * (grid.shape[2] / height), x * (grid.shape[3] / width)).to(grid.dtype)
            for grid in features
        ]
        return torch.cat(samples, -1)

    def track(self, features: TAPIRFeatures, queries: Tensor) -> TrackerOutput:
        """Tracks of `queries` `[B, N, 3]` (t, y, x), of `features` as the method of this name returns them."""
        return self._follow(features, self.query_features(features, queries), queries, None)[0]

    def initial_state(self, batch: int, points: int) -> State:
        """The state before the first frame of a clip, for `step`."""
        mixer = self.torch_pips_mixer
        width, like = mixer.linear.out_features, mixer.linear.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        zeros, wide = (like.new_zeros(batch, points, 2, channels, dtype=dtype) for channels in (width, 4 * width))
        return [[(zeros, wide)] * len(mixer.blocks) for _ in range(self.steps)]

    @torch.no_grad()
    def step(self, features: TAPIRFeatures, query: Tensor, state: State) -> tuple[TrackerOutput, State]:
        """Tracks in the frames that follow those of `state`; of causal models only.

        ::

            query = model.query_features(model.features(first_frames), queries)
            state = model.initial_state(1, queries.shape[1])
            for frames in video.split(1, dim=1):
                output, state = model.step(model.features(frames), query, state)

        Args:
            features: of the new frames, one or more.
            query: `[B, N, 384]` from `query_features`, perhaps of other frames.
            state: `initial_state(B, N)`, or what the step before returned; it takes 1 MB per point.

        Returns:
            The tracks in the new frames, the same as those of one long clip (but that no frame has the position of the
            query itself), and the state after them.

        Raises:
            ValueError: the model is not causal.
        """
        if not self.torch_pips_mixer.causal:
            raise ValueError("step needs a causal model: TAPIR(causal=True)")
        return self._follow(features, query, None, state)

    def _follow(
        self, features: TAPIRFeatures, query: Tensor, queries: Tensor | None, state: State | None
    ) -> tuple[TrackerOutput, State]:
        pyramid = [*features]
        for _ in range(self.pyramid_level):
            pyramid.append(reduce(pyramid[-1], "b t (h r) (w s) c -> b t h w c", "mean", r=2, s=2))
        few = max(1, _REFINED // features.coarse.shape[1])
        parts = []
        for start in range(0, max(query.shape[1], 1), few):
            rows = slice(start, start + few)
            before = None if state is None else tree_map(lambda x, rows=rows: x[:, rows], state)
            guess = self._match(features, query[:, rows], None if queries is None else queries[:, rows])
            parts.append(self._refined(pyramid, query[:, rows], guess, before))
        return tree_map(lambda *x: torch.cat(x, 1), *parts)

    def _match(self, features: TAPIRFeatures, query: Tensor, queries: Tensor | None) -> TrackerOutput:
        heads, few = self.torch_cost_volume_track_mods, max(1, _MATCHED // features.coarse.shape[1])
        parts = []
        for start in range(0, max(query.shape[1], 1), few):
            rows = slice(start, start + few)
            own = None if queries is None else queries[:, rows]
            coarse = query[:, rows, _FINE:]
            parts.append(match_filtered(coarse, features.coarse, heads, self.temperature, self.resolution, own))
        return TrackerOutput(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))

    def _refined(
        self, pyramid: list[Tensor], query: Tensor, guess: TrackerOutput, state: State | None
    ) -> tuple[TrackerOutput, State]:
        found, after = query, []
        for step in range(self.steps):
            mix = partial(self.torch_pips_mixer, state=state and state[step])
            guess, found, blocks = refine(mix, pyramid, found, guess, self.resolution, self.resolution)
            after.append([tuple(x.unflatten(0, query.shape[:2]) for x in pair) for pair in blocks])
        return guess, after


class _ExtraConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_ExtraConvBlock(_COARSE) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _ExtraConvBlock(nn.Module):
    """`[M, C, h, w]` -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(channels)
        self.conv, self.conv_1 = nn.Conv2d(channels, 4 * channels, 3, 1, 1), nn.Conv2d(4 * channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        # The residual is that of the normalised input.
        x = self.layer_norm(x.movedim(1, -1)).movedim(-1, 1)
        return x + self.conv_1(F.gelu(self.conv(x), approximate="tanh"))


class _Mixer(nn.Module):
    """`[M, T, C]` -> `[M, T, outputs]`, and the states after it, of each block."""

    def __init__(self, inputs: int, outputs: int, causal: bool, width: int = 512, blocks: int = 12) -> None:
        super().__init__()
        self.causal = causal
        self.linear, self.linear_1 = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.layer_norm = nn.LayerNorm(width, bias=False)
        self.blocks = nn.ModuleList(_MixerBlock(width, causal) for _ in range(blocks))

    def forward(
        self, tokens: Tensor, state: list[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x, after = self.linear(tokens.to(input_dtype(self.linear, tokens.dtype))), []
        for index, block in enumerate(self.blocks):
            before = None if state is None else tuple(past.flatten(0, 1) for past in state[index])
            x, left = block(x, before)
            if left is not None:
                after.append(left)
        return self.linear_1(self.layer_norm(x)), after


class _MixerBlock(nn.Module):
    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        padding = 0 if causal else 1
        self.layer_norm, self.layer_norm_1 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.mlp1_up = nn.Conv1d(width, 4 * width, 3, padding=padding, groups=width)
        self.mlp1_up_1 = nn.Conv1d(4 * width, 4 * width, 3, padding=padding, groups=4 * width)
        self.conv_channels_mixer = _ChannelsMixer(width)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        if is_mixer_block(self, self.causal):
            return mix_block(self, x, self.causal, state)
        if state is not None:
            raise ValueError("step needs the mixer's layer_norm, mlp1_up and mlp1_up_1 as they were made")
        hidden = F.gelu(self._along_time(self.mlp1_up, self.layer_norm(x)), approximate="tanh")
        mixed = x + self._along_time(self.mlp1_up_1, hidden).unflatten(-1, (-1, 4)).sum(-1)
        return mixed + self.conv_channels_mixer(self.layer_norm_1(mixed)), None

    def _along_time(self, conv: nn.Module, x: Tensor) -> Tensor:
        return conv(F.pad(x.mT, (2, 0)) if self.causal else x.mT).mT


class _ChannelsMixer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp2_up, self.mlp2_down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp2_down(F.gelu(self.mlp2_up(x), approximate="tanh"))
