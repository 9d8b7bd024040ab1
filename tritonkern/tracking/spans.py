"""Long clips in bounded memory: features span by span, and every span matched against the queries' frames."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tritonkern.models.matching import MatchingTracker
from tritonkern.models.tracker import Features, Tracker
from tritonkern.tracking.raster import Raster

Progress = Callable[[str, int, int | None], None]
Frames = Tensor | Raster

# Queries that are matched together; fewer where the model does more with each.
_CHUNK, _CHUNK_OWN_TRACK = 4096, 512
# Frames with queries that are put before a span together, for models that need them in one clip.
_QUERY_FRAMES = 16
CYCLE_DISTANCE = 6 / 256
"""Distance from the query at which a match back still closes the cycle, as a fraction of the raster's sides."""
# Bytes of the feature vectors that are matched back at a time.
_CYCLE_BYTES = 1 << 24


def track_in_spans(
    model: Tracker, raster: Frames, queries: Tensor, device: torch.device, report: Progress
) -> tuple[Tensor, Tensor]:
    """Tracks and confidence of `queries` in a clip at the model's resolution.

    Clips of up to `model.span` frames are encoded as a whole. Longer ones are encoded in spans of so many, of which
    `model.context` frames at either end only serve as context; every span is tracked on its own, together with the
    features of the queries' frames.

    A model that matches every frame on its own (its `track` is the one of `MatchingTracker`) has no memory by which it
    could notice that a point is hidden and something similar is elsewhere. Its matches are therefore followed back: the
    feature at the position found in a frame is matched with the frame of the query, and where this ends more than
    `CYCLE_DISTANCE` (6 pixels of a 256x256 raster) from the query, the confidence is 0. Models with a `track` of their
    own are expected to estimate visibility themselves; their confidence is `TrackerOutput.confidence`.

    Args:
        raster: frames at `model.resolution`: a tensor uint8 `[T, H, W, 3]` or a `tritonkern.tracking.raster.Raster`.
        queries: float32 `[N, 3]`, rows (t, y, x): frame and raster pixels, as models take them.
        report: called as `report("tracking", steps done, steps)`.

    Returns:
        Tracks float32 `[N, T, 2]` (x, y) in raster pixels and confidence float32 `[N, T]`, on the CPU.
    """
    spans = _spans(len(raster), model.span, model.context)
    frames, index = torch.unique(queries[:, 0].long(), return_inverse=True)
    wanted = [span for span in spans if span.holds(frames).any()]
    steps = len(wanted) + len(spans)
    report("tracking", 0, steps)

    encoded: tuple[_Span, Features] | None = None

    def encode(span: _Span) -> Features:
        """Features `[1, stop - start, ...]` of a span, computed with its context."""
        nonlocal encoded
        if encoded is None or encoded[0] != span:
            # The old features are freed before the new ones are made.
            encoded = None
            video = raster[span.context_start : span.context_stop].to(device)[None].float().div_(127.5).sub_(1)
            features = model.features(video)
            encoded = (
                span,
                some_frames(features, slice(span.start - span.context_start, span.stop - span.context_start)),
            )
        return encoded[1]

    # Two passes, as a query may be in any span. `encoded` avoids the second encoding of a clip of one span.
    sources = []
    for done, span in enumerate(wanted, start=1):
        sources.append(some_frames(encode(span), frames[span.holds(frames)] - span.start))
        report("tracking", done, steps)
    source = joined(*sources)
    # The same queries in the clip that consists of the queries' frames.
    local = torch.cat([index[:, None].to(queries), queries[:, 1:]], 1).to(device)

    tracks = torch.empty(len(queries), len(raster), 2, dtype=torch.float32)
    confidence = torch.empty(len(queries), len(raster), dtype=torch.float32)
    matcher = model if isinstance(model, MatchingTracker) and type(model).track is MatchingTracker.track else None
    for done, span in enumerate(spans, start=len(wanted) + 1):
        for rows in _chunks(index, _CHUNK if matcher else _CHUNK_OWN_TRACK):
            if matcher:
                positions, certainty = match_part(
                    matcher, cast(Tensor, source), cast(Tensor, encode(span)), local[rows]
                )
            elif len(spans) == 1:
                output = model.track(encode(span), queries[None, rows].to(device))
                positions, certainty = output.tracks[0], output.confidence[0]
            else:
                positions, certainty = track_part(model, source, encode(span), local[rows])
            tracks[rows, span.start : span.stop] = positions.float().cpu()
            confidence[rows, span.start : span.stop] = certainty.float().cpu()
        report("tracking", done, steps)
    return tracks, confidence


def _chunks(index: Tensor, size: int) -> list[Tensor]:
    """Rows of the queries, at most `size` together and from at most `_QUERY_FRAMES` frames."""
    order = index.argsort(stable=True)
    group = index[order] // _QUERY_FRAMES
    return [part for rows in order.split(torch.bincount(group).tolist()) for part in rows.split(size)]


def match_part(model: MatchingTracker, source: Tensor, features: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Frame by frame, with the way back. `queries` `[n, 3]` (frame of `source`, y, x)."""
    output = model.match(model.query_features(source, queries[None]), features)
    tracks, confidence = output.tracks[0], output.confidence[0]
    closed = torch.empty_like(confidence, dtype=torch.bool)
    height, width = model.resolution
    frames, channels = features.shape[1], features.shape[-1]
    t = torch.arange(frames, device=features.device)
    step = max(1, _CYCLE_BYTES // (4 * channels * frames))
    for frame in queries[:, 0].unique():
        for rows in torch.nonzero(queries[:, 0] == frame)[:, 0].split(step):
            x, y = tracks[rows].unbind(-1)
            found = torch.stack([t.to(y).expand_as(y), y, x], -1).flatten(0, 1)  # [n * T, 3]
            vectors = model.query_features(features, found[None])
            back = model.match(vectors, source[:, int(frame), None]).tracks.view(len(rows), frames, 2)
            away = back - queries[rows, None, 1:].flip(-1)
            distance = torch.hypot(away[..., 0] / width, away[..., 1] / height)
            closed[rows] = distance <= CYCLE_DISTANCE
    return tracks, torch.where(closed, confidence, 0)


def track_part(
    model: Tracker, source: Features, features: Features, queries: Tensor, evidence: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By the model's own `track`, in the clip of the queries' frames followed by the span.

    `evidence` is what `model.evidence` says of this clip, if it is known already.
    """
    frames, index = torch.unique(queries[:, 0].long(), return_inverse=True)
    local = torch.cat([index[:, None].to(queries), queries[:, 1:]], 1)
    known = () if evidence is None else (evidence,)
    output = model.track(joined(some_frames(source, frames), features), local[None], *known)
    return output.tracks[0, :, len(frames) :], output.confidence[0, :, len(frames) :]


def some_frames(features: Features, index: slice | Tensor) -> Features:
    """Some frames of features, whether they are one tensor or several."""
    return tree_map(lambda x: x[:, index], features)


def joined(*parts: Features) -> Features:
    """The same features of all frames of `parts`."""
    return tree_map(lambda *x: torch.cat(x, 1), *parts)


class _Span(NamedTuple):
    start: int
    stop: int
    context_start: int
    context_stop: int

    def holds(self, frames: Tensor) -> Tensor:
        return (frames >= self.start) & (frames < self.stop)


def _spans(frame_count: int, span: int, context: int) -> list[_Span]:
    if frame_count <= span:
        return [_Span(0, frame_count, 0, frame_count)]
    inner = span - 2 * context
    spans = []
    for start in range(0, frame_count, inner):
        stop = min(start + inner, frame_count)
        spans.append(_Span(start, stop, max(start - context, 0), min(stop + context, frame_count)))
    return spans
