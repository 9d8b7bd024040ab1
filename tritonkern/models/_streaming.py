"""Features frame by frame, for models whose frames meet in temporal adapters alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tritonkern.models.tracker import Features, Tracker
from tritonkern.nn import TemporalAdapter
from tritonkern.nn.adapter import AdapterState

Frames = tuple[Tensor, ...]
"""Of some frames, `[B, T, ...]`: the tokens of the next adapter, and what goes past it."""


class FeatureState(NamedTuple):
    """What `StreamedTracker.step` carries from frame to frame."""

    adapters: list[AdapterState]
    passing: list[list[Frames]]
    """For each adapter, what goes past it, of the frames whose output waits."""

    @property
    def lookahead(self) -> int:
        """Frames that the features of a frame wait for."""
        return sum(adapter.attention.lookahead for adapter in self.adapters)


class StreamedTracker(Tracker):
    """Base class of trackers whose features are functions of one frame, with a `TemporalAdapter` between any two."""

    def _stages(self) -> list[Callable[[Frames], Any]]:
        """What is done before, between and after the adapters. The first one gets `(video,)`, the last one returns
        features."""
        raise NotImplementedError

    def _adapters(self) -> list[tuple[TemporalAdapter, tuple[int, int]]]:
        """The adapters, each with its grid of patches."""
        raise NotImplementedError

    def begin(
        self,
        lookahead: int | None = None,
        *,
        statistics: Sequence[Tensor] | None = None,
        statistics_window: int = 24,
    ) -> FeatureState:
        """The state before the first frame of a stream, for `step`.

        Args:
            lookahead: frames that the features of a frame wait for. The windows of the adapters reach ahead as far as
                this allows; it is dealt out to them from the last one to the first. None, or as many as all windows
                together have, leaves the windows as they are.
            statistics: what the norms of the adapters use in all frames, as `clip_statistics` returns it.
            statistics_window: without `statistics`, the norms of a frame have the statistics of so many frames, itself
                and those before it. Offline they have those of the whole clip.

        Raises:
            ValueError: a negative lookahead, a window of less than 1 frame, or statistics of another model.
        """
        adapters = self._adapters()
        if lookahead is not None and lookahead < 0:
            raise ValueError(f"lookahead must be 0 or more frames, got {lookahead}")
        if statistics_window < 1:
            raise ValueError(f"statistics_window must be 1 frame or more, got {statistics_window}")
        if statistics is not None and len(statistics) != len(adapters):
            raise ValueError(
                f"statistics must have one tensor for each of {len(adapters)} adapters, got {len(statistics)}"
            )
        states: list[AdapterState] = []
        left = lookahead
        for number, (adapter, _) in reversed(list(enumerate(adapters))):
            given = None if statistics is None else statistics[number]
            states.insert(0, adapter.begin(left, statistics=given, statistics_window=statistics_window))
            if left is not None:
                left -= states[0].attention.lookahead
        return FeatureState(states, [[] for _ in adapters])

    @torch.no_grad()
    def step(self, state: FeatureState, frames: Tensor) -> tuple[FeatureState, Any]:
        """Features of a stream, frame by frame.

        ::

            state = model.begin(lookahead=6)
            for frame in video.split(1, dim=1):
                state, features = model.step(state, frame)
            features = model.finish(state)

        With a lookahead of all windows and the statistics of the clip (`clip_statistics`), a stream of a clip has the
        features of one call of `features`. Forward only.

        Args:
            state: from `begin` or the step before; it is used up.
            frames: `[B, T, H, W, 3]` in [-1, 1] at `resolution`, the frames that follow, one or more.

        Returns:
            The state, and the features of the frames whose lookahead is complete: `[B, <= T, ...]` as `features`
            returns them, or None where there are none.
        """
        self.check_video(frames)
        done = []
        for frame in frames.split(1, 1):
            state, features = self._push(state, 0, (frame,))
            done += features
        return state, _joined(done)

    @torch.no_grad()
    def finish(self, state: FeatureState) -> Any:
        """Features of the frames that still wait for others, whose windows end with the stream; None where there are
        none. It uses the state up."""
        done = []
        for number, (adapter, grid) in enumerate(self._adapters()):
            tokens = adapter.finish(state.adapters[number], grid)
            waiting = [] if tokens is None else tokens.split(1, 1)
            for out, passing in zip(waiting, state.passing[number], strict=True):
                state, features = self._push(state, number + 1, (out, *passing))
                done += features
        return _joined(done)

    @torch.no_grad()
    def clip_statistics(self, video: Tensor) -> list[Tensor]:
        """What the norms of the adapters use in `features(video)`: a tensor for each, for `begin`."""
        found: list[Tensor] = []

        def recorded(adapter: TemporalAdapter) -> Callable[[Tensor, tuple[int, int]], Tensor]:
            def add_to(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
                found.append(adapter.clip_statistics(tokens, grid))
                return TemporalAdapter.add_to(adapter, tokens, grid)

            return add_to

        adapters = [adapter for adapter, _ in self._adapters()]
        try:
            for adapter in adapters:
                adapter.__dict__["add_to"] = recorded(adapter)
            self.features(video)
        finally:
            for adapter in adapters:
                adapter.__dict__.pop("add_to", None)
        return found

    def _push(self, state: FeatureState, first: int, frame: Frames) -> tuple[FeatureState, list[Features]]:
        """One frame from stage `first` on, as far as it gets."""
        stages, adapters = self._stages(), self._adapters()
        states, passing = list(state.adapters), list(state.passing)
        for number in range(first, len(adapters)):
            tokens, *past = stages[number](frame)
            adapter, grid = adapters[number]
            states[number], out = adapter.step(states[number], tokens, grid)
            passing[number] = [*passing[number], tuple(past)]
            if out is None:
                return FeatureState(states, passing), []
            frame = (out, *passing[number][0])
            passing[number] = passing[number][1:]
        return FeatureState(states, passing), [stages[len(adapters)](frame)]


def _joined(features: list[Features]) -> Any:
    return tree_map(lambda *x: torch.cat(x, 1), *features) if features else None
