"""What a stream keeps of the frames: features of the last ones, and of those in which its points were picked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from tritonkern.models._streaming import FeatureState, StreamedTracker
from tritonkern.models.matching import MatchingTracker
from tritonkern.models.tapir import TAPIR
from tritonkern.models.tracker import Features, Tracker
from tritonkern.nn.adapter import AdapterState
from tritonkern.nn.temporal import AttentionState
from tritonkern.tracking.spans import joined, match_part, some_frames, track_part

BACK = 8
"""Frames before the one that is tracked that a model with a `track` of its own sees together with it."""
_STATES: dict[str, Any] = {state.__name__: state for state in (FeatureState, AdapterState, AttentionState)}
_CHUNK = 512


class StreamFeatures:
    """Features of the last frames of a stream, from which it tracks; see `tritonkern.tracking.stream`.

    Attributes:
        encoded: frames whose features exist, of which the last ones are kept.
        sources: by frame, or by a negative number of descriptors, what describes the points that were picked there.
    """

    def __init__(
        self, model: Tracker, device: torch.device, lookahead: int, statistics: Sequence[Tensor] | None
    ) -> None:
        self._model, self._device = model, device
        self._matcher = model if isinstance(model, MatchingTracker) and _only_matches(model) else None
        self._state: FeatureState | None = None
        ahead = lookahead
        if isinstance(model, StreamedTracker):
            self._state = model.begin(lookahead, statistics=statistics)
            ahead = lookahead - self._state.lookahead
        self._back, self._ahead = (0, 0) if self._matcher else (BACK, ahead)
        self._kept = self._back + 1 + ahead
        self._window: list[list[Tensor]] = []
        self._spec: TreeSpec | None = None
        self.encoded = 0
        self.sources: dict[int, list[Tensor]] = {}
        # By point and frame, or -1 for the frame it was picked in: what `Tracker.evidence` says.
        self._evidence: dict[int, dict[int, Tensor]] = {}
        # By point, of a causal TAPIR: features of the query, and the state after the last frame.
        self._causal = model if isinstance(model, TAPIR) and model.torch_pips_mixer.causal else None
        self._carried: dict[int, list[Any]] = {}

    @property
    def oldest(self) -> int:
        """The first frame whose features are kept."""
        return self.encoded - len(self._window)

    def push(self, raster: Tensor) -> None:
        """The next frame, uint8 `[H, W, 3]`; its features may wait for others."""
        video = raster.to(self._device)[None, None].float().div_(127.5).sub_(1)
        if self._state is None:
            self._append(self._model.features(video))
        else:
            self._state, features = cast(StreamedTracker, self._model).step(self._state, video)
            if features is not None:
                self._append(features)

    def finish(self, frames: int) -> None:
        """No frame comes after these `frames`: all have features after this."""
        if self._state is not None:
            features = cast(StreamedTracker, self._model).finish(self._state)
            for number in range(frames - self.encoded):
                self._append(some_frames(features, slice(number, number + 1)), drop=False)

    def keep(self, frame: int) -> None:
        """Keep the features of a frame that points are picked in, if they exist already."""
        number = frame - self.oldest
        if 0 <= number < len(self._window) and frame not in self.sources:
            self.sources[frame] = [x.clone() for x in self._window[number]]

    def forget(self, ids: Sequence[int], used: set[int]) -> None:
        """These points, and the sources that no others use."""
        for number in ids:
            self._evidence.pop(number, None)
            self._carried.pop(number, None)
        self.sources = {source: features for source, features in self.sources.items() if source in used}

    def state_dict(self) -> dict[str, Any]:
        return {
            "encoded": self.encoded,
            "state": _plain(self._state),
            "window": _plain(self._window),
            "sources": [[source, _plain(features)] for source, features in self.sources.items()],
            "carried": [[number, _plain(carried)] for number, carried in self._carried.items()],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        move = lambda x: x.to(self._device) if isinstance(x, Tensor) else x  # noqa: E731
        names = ("state", "window", "sources", "carried")
        restored = tree_map(move, _restored({name: saved[name] for name in names}))
        self.encoded, self._state, self._window = saved["encoded"], restored["state"], restored["window"]
        self.sources = {source: features for source, features in restored["sources"]}
        self._carried = {number: carried for number, carried in restored["carried"]}
        self._evidence = {}  # is computed again
        self._spec = self._blank()[1] if self._window else None

    def track(self, frame: int, ids: list[int], sources: list[int], places: list[Any]) -> tuple[Tensor, Tensor]:
        """Positions `[n, 2]` in the raster and confidence `[n]` in one frame, of points that were picked at `places`
        (y, x) of these sources."""
        if self._causal is not None:
            return self._advance(self._causal, frame, ids, sources, places)
        begin, end = max(self.oldest, frame - self._back), min(self.encoded, frame + self._ahead + 1)
        spec = cast(TreeSpec, self._spec)
        kept = self._window[begin - self.oldest : end - self.oldest]
        window = joined(*(tree_unflatten(leaves, spec) for leaves in kept))
        queries = torch.tensor([[0, *place] for place in places], dtype=torch.float32, device=self._device)
        tracks, confidence = torch.empty(len(ids), 2), torch.empty(len(ids))
        for key in set(sources):
            # One source at a time: no track depends on what other points there are.
            source = tree_unflatten(self.sources[key], spec)
            rows = torch.tensor([number for number, other in enumerate(sources) if other == key])
            for part in rows.split(_CHUNK):
                if self._matcher:
                    found = match_part(self._matcher, source, cast(Tensor, window), queries[part])
                else:
                    evidence = self._known([ids[row] for row in part.tolist()], source, window, queries[part], begin)
                    found = track_part(self._model, source, window, queries[part], evidence)
                tracks[part] = found[0][:, frame - begin].float().cpu()
                confidence[part] = found[1][:, frame - begin].float().cpu()
        return tracks, confidence

    def _advance(
        self, model: TAPIR, frame: int, ids: list[int], sources: list[int], places: list[Any]
    ) -> tuple[Tensor, Tensor]:
        """`track` by the state that a causal TAPIR carries: each frame is seen once, and none before the query's."""
        spec = cast(TreeSpec, self._spec)
        for number, source, place in zip(ids, sources, places, strict=True):
            if number not in self._carried:
                query = torch.tensor([[[0, *place]]], dtype=torch.float32, device=self._device)
                found = model.query_features(tree_unflatten(self.sources[source], spec), query)
                self._carried[number] = [found, model.initial_state(1, 1)]
        queries, states = zip(*(self._carried[number] for number in ids), strict=True)
        state = tree_map(lambda *x: torch.cat(x, 1), *states)
        features = tree_unflatten(self._window[frame - self.oldest], spec)
        output, state = model.step(features, torch.cat(queries, 1), state)
        for row, number in enumerate(ids):
            self._carried[number][1] = tree_map(lambda x, row=row: x[:, row : row + 1].clone(), state)
        return output.tracks[0, :, 0].float().cpu(), output.confidence[0, :, 0].float().cpu()

    def shapes(self) -> list[Any]:
        """Of the features of one frame."""
        if self._window:
            return [(x.shape, x.dtype) for x in self._window[0]]
        return [(x.shape, x.dtype) for x in self._blank()[0]]

    def _blank(self) -> tuple[list[Tensor], TreeSpec]:
        """Features of a frame without anything, and what they are made of."""
        blank = torch.zeros(1, 1, *self._model.resolution, 3, device=self._device)
        return tree_flatten(self._model.features(blank))

    def _append(self, features: Features, drop: bool = True) -> None:
        """Features of the next frame."""
        leaves, self._spec = tree_flatten(features)
        self._window.append(leaves)
        if drop and len(self._window) > self._kept:
            self._window.pop(0)
        self.encoded += 1
        for known in self._evidence.values():
            known.pop(self.oldest - 1, None)

    def _known(self, ids: list[int], source: Features, window: Features, places: Tensor, begin: int) -> Tensor | None:
        """`Tracker.evidence` of the clip of the source and the window, which begins with frame `begin`; computed of
        frames in which it is not known yet."""
        if type(self._model).evidence is Tracker.evidence:
            return None
        frames = [-1, *range(begin, begin + len(cast(Tensor, tree_flatten(window)[0][0])[0]))]
        missing = [f for f in frames if any(f not in self._evidence.get(number, {}) for number in ids)]
        if missing:
            wanted = torch.tensor([frame - begin for frame in missing if frame >= 0], dtype=torch.long)
            found = self._model.evidence(joined(source, some_frames(window, wanted)), places[None])
            assert found is not None
            columns = [0] * (missing[0] == -1) + [1 + at for at in range(len(wanted))]
            for row, number in enumerate(ids):
                known = self._evidence.setdefault(number, {})
                known.update({f: found[0, row, column].clone() for f, column in zip(missing, columns, strict=True)})
        return torch.stack([torch.stack([self._evidence[number][f] for f in frames]) for number in ids])[None]


def _only_matches(model: MatchingTracker) -> bool:
    """Whether it tracks every frame on its own."""
    return type(model).track is MatchingTracker.track


def _plain(x: Any) -> Any:
    """States as lists that begin with their name, and copies of tensors."""
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return ["state", type(x).__name__, [_plain(y) for y in x]]
    if isinstance(x, tuple):
        return ["tuple", "", [_plain(y) for y in x]]
    return ["list", "", [_plain(y) for y in x]] if isinstance(x, list) else x


def _restored(x: Any) -> Any:
    """What `_plain` was made of."""
    if isinstance(x, dict):
        return {key: _restored(y) for key, y in x.items()}
    if isinstance(x, list) and len(x) == 3 and x[0] in ("state", "tuple", "list"):
        values = [_restored(y) for y in x[2]]
        return _STATES[x[1]](*values) if x[0] == "state" else tuple(values) if x[0] == "tuple" else values
    if isinstance(x, list):
        return [_restored(y) for y in x]
    return x.clone() if isinstance(x, Tensor) else x
