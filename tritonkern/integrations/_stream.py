"""CoTracker3 online as a faster, inexact schedule.

Successive windows share one half of their frames. The exact schedule computes all iterations of all frames in every
window. This one reuses what the last window has made of the shared frames, their features and their correlation
embeddings, and takes one iteration from its result, as LiteTracker does frame by frame (Karaoglu et al., MICCAI 2025).
No line of its code is in this file.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, MutableMapping
from functools import partial
from inspect import BoundArguments
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

ITERATIONS = 1


class Difference(NamedTuple):
    """Distance between the tracks of the faster and the exact schedule, in pixels of the model's resolution."""

    mean: float
    largest: float


class _Window:
    """The correlation embeddings of a window, which the model computes level by level in every iteration."""

    def __init__(self, shape: tuple[int, int, int], levels: int, before: list[Tensor]) -> None:
        self.shape = shape
        """Batch, frames, points."""
        self.before = before
        """Of the first half of the frames, `[B, T / 2, N, C]` for each level; empty if they are to be computed."""
        self.now = [torch.empty(0)] * levels
        """Of the second half, in the last iteration."""
        self.calls = 0


class Stream:
    """The schedule of the models of one patch; copies of a model share it, but have windows of their own."""

    def __init__(self, track: Callable[..., Any], features: MutableMapping[nn.Module, Any], verify: bool) -> None:
        self._track, self._features, self._unreported = track, features, verify
        self._last: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor, list[Tensor]]] = WeakKeyDictionary()
        """Frames, queries and embeddings."""
        self._windows: WeakKeyDictionary[nn.Module, _Window] = WeakKeyDictionary()
        self.difference: Difference | None = None
        """In the first window that had something to reuse."""

    def forget(self, tracker: Any, own: Any) -> None:
        """Replaces `init_video_online_processing`."""
        self._last.pop(tracker, None)
        self._features.pop(tracker.fnet, None)
        own()

    def track(self, tracker: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces the online model's `forward`."""
        call = inspect.signature(own).bind(*args, **kwargs)
        call.apply_defaults()
        if not call.arguments["is_online"] or torch.is_grad_enabled():
            return self._track(tracker, own, *args, **kwargs)
        video, half = call.arguments["video"], tracker.window_len // 2
        before = self._shared(tracker, video[:, :half], call.arguments["queries"])
        exact = self._exact(tracker, own, call) if before and self._unreported else None
        if before:
            call.arguments["iters"] = min(ITERATIONS, call.arguments["iters"])
        window = _Window((len(video), 2 * half, call.arguments["queries"].shape[1]), tracker.corr_levels, before)
        self._windows[tracker.corr_mlp] = window
        try:
            result = self._track(tracker, own, *call.args, **call.kwargs)
        finally:
            del self._windows[tracker.corr_mlp]
        if video.shape[1] == 2 * half:
            self._last[tracker] = video[:, half:].clone(), call.arguments["queries"].clone(), window.now
        if exact is not None:
            # The model gives the tracks of all frames so far.
            self._report(*(tracks[:, -video.shape[1] :] for tracks, *_ in (result, exact)))
        return result

    def embed(self, mlp: Any, own: Any, rows: Tensor) -> Tensor:
        """Replaces `corr_mlp.forward`: correlations `[B * T * N, 2401]` -> embeddings `[B * T * N, C]`."""
        window = self._windows.get(mlp)
        if window is None:
            return own(rows)
        (batch, frames, points), half = window.shape, window.shape[1] // 2
        level, window.calls = window.calls % len(window.now), window.calls + 1
        if window.before:
            later = getattr(rows, "frames_from", partial(_frames_from, rows, window.shape))
            fresh = own(later(half)).unflatten(0, (batch, frames - half, points))
            whole = torch.cat([window.before[level], fresh], 1)
        else:
            whole = own(rows).unflatten(0, window.shape)
        window.now[level] = whole[:, half:].clone()
        return whole.flatten(0, 2)

    def _shared(self, tracker: Any, start: Tensor, queries: Tensor) -> list[Tensor]:
        """The embeddings of the frames `start`, if the last window ended with them and had the same queries."""
        nothing = start.new_empty(0)
        frames, points, embeddings = self._last.pop(tracker, (nothing, nothing, []))
        # Points whose query is in a new frame need their correlations in all frames, and all iterations.
        new = queries[..., 0] >= tracker.online_ind + tracker.window_len // 2
        new &= queries[..., 0] < tracker.online_ind + tracker.window_len
        return embeddings if not new.any() and _equal(points, queries) and _equal(frames, start) else []

    def _exact(self, tracker: Any, own: Any, call: BoundArguments) -> Any:
        """What the exact schedule makes of a window, without a trace in the state of the model."""
        encoder, state = tracker.fnet, {name: x for name, x in vars(tracker).items() if name.startswith("online_")}
        features = self._features.get(encoder)
        try:
            vars(tracker).update(copy.deepcopy(state))
            return self._track(tracker, own, *call.args, **call.kwargs)
        finally:
            vars(tracker).update(state)
            if features is not None:
                self._features[encoder] = features

    def _report(self, tracks: Tensor, exact: Tensor) -> None:
        distance = (tracks - exact).norm(dim=-1)
        self.difference, self._unreported = Difference(distance.mean().item(), distance.max().item()), False
        warnings.warn(
            "tritonkern.patch(stream=True): in the first window with frames of the last one, tracks differ from those "
            f"of the exact schedule by {self.difference.mean:.3g} pixels on average and {self.difference.largest:.3g} "
            "at most",
            stacklevel=4,
        )


def _equal(before: Tensor, now: Tensor) -> bool:
    return before.shape == now.shape and before.device == now.device and torch.equal(before, now)


def _frames_from(rows: Tensor, shape: tuple[int, int, int], start: int) -> Tensor:
    return rows.unflatten(0, shape)[:, start:].flatten(0, 2)
