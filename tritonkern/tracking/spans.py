"""Long clips in bounded memory: features span by span, and every span matched against the queries' frames."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tritonkern.models.matching import MatchingTracker
from tritonkern.models.tracker import Features, Tracker

Progress = Callable[[str, int, int | None], None]

# Queries that are matched together; fewer where the model does more with each.
_CHUNK, _CHUNK_OWN_TRACK = 4096, 512
# Frames with queries that are put before a span together, for models that need them in one clip.
_QUERY_FRAMES = 16
CYCLE_DISTANCE = 6 / 256
"""Distance from the query at which a match back still closes the cycle, as a fraction of the raster's sides."""
# Bytes of the feature vectors that are matched back at a time.
_CYCLE_BYTES = 1 << 24


class SpanTracks(NamedTuple):
    """Tracks and confidence in consecutive frames, on the CPU."""

    start: int
    """The first of these frames."""
    tracks: Tensor
    """float32 `[N, t, 2]` (x, y) in raster pixels."""
    confidence: Tensor
    """float32 `[N, t]`."""


def track_in_spans(
    model: Tracker,
    read: Callable[[], Iterable[np.ndarray]],
    queries: Tensor,
    device: torch.device,
    report: Progress,
    total: int | None = None,
) -> Iterator[SpanTracks]:
    """Tracks and confidence of `queries` in a clip at the model's resolution, span by span while the clip is read.

    Clips of up to `model.span` frames are encoded as a whole. Longer ones are encoded in spans of so many, of which
    `model.context` frames at either end only serve as context; every span is tracked on its own, together with the
    features of the queries' frames. The frames of one span are in memory.

    A clip is read once if all queries are in the first span. Otherwise the features of the queries' frames are computed
    first, and the clip is read again from the start.

    A model that matches every frame on its own (its `track` is the one of `MatchingTracker`) has no memory by which it
    could notice that a point is hidden and something similar is elsewhere. Its matches are therefore followed back: the
    feature at the position found in a frame is matched with the frame of the query, and where this ends more than
    `CYCLE_DISTANCE` (6 pixels of a 256x256 raster) from the query, the confidence is 0. Models with a `track` of their
    own are expected to estimate visibility themselves; their confidence is `TrackerOutput.confidence`.

    Args:
        read: starts to read the clip: frames uint8 `[H, W, 3]` at `model.resolution`, at least one, and all frames of
            the queries.
        queries: float32 `[N, 3]`, rows (t, y, x): frame and raster pixels, as models take them.
        report: called as `report("tracking", frames done, total)`.
        total: number of frames, if it is known before the clip ends.

    Raises:
        ValueError: a clip of more than `model.span` frames, and `model.span` is not more than twice `model.context`.
    """
    frames, index = torch.unique(queries[:, 0].long(), return_inverse=True)
    # The same queries in the clip that consists of the queries' frames.
    local = torch.cat([index[:, None].to(queries), queries[:, 1:]], 1).to(device)
    matcher = model if isinstance(model, MatchingTracker) and type(model).track is MatchingTracker.track else None

    def encode(span: _Span) -> Features:
        """Features `[1, stop - start, ...]` of a span, computed with its context."""
        video = torch.from_numpy(span.frames).to(device)[None].float().div_(127.5).sub_(1)
        features = model.features(video)
        return some_frames(features, slice(span.start - span.first, span.stop - span.first))

    def tracked(span: _Span, features: Features) -> SpanTracks:
        tracks = torch.empty(len(queries), span.stop - span.start, 2, dtype=torch.float32)
        confidence = torch.empty(len(queries), span.stop - span.start, dtype=torch.float32)
        for rows in _chunks(index, _CHUNK if matcher else _CHUNK_OWN_TRACK):
            if matcher:
                found = match_part(matcher, cast(Tensor, source), cast(Tensor, features), local[rows])
            elif span.start == 0 and span.last:
                output = model.track(features, queries[None, rows].to(device))
                found = output.tracks[0], output.confidence[0]
            else:
                found = track_part(model, source, features, local[rows])
            tracks[rows], confidence[rows] = (x.float().cpu() for x in found)
        return SpanTracks(span.start, tracks, confidence)

    sources: list[Features] = []
    features: Features | None = None
    spans: Iterator[_Span] = _spans(iter(read()), model.span, model.context)
    for span in spans:
        wanted = frames[(frames >= span.start) & (frames < span.stop)] - span.start
        if len(wanted):
            report("tracking", 0, total)
            # The old features are freed before the new ones are made.
            features = None
            features = encode(span)
            sources.append(some_frames(features, wanted))
        if frames[-1] < span.stop:
            break
    source = joined(*sources)
    if span.start == 0:
        spans = chain([span], spans)
    else:
        features, spans = None, _spans(iter(read()), model.span, model.context)
    for span in spans:
        features = encode(span) if features is None else features
        found = tracked(span, features)
        features = None
        report("tracking", span.stop, span.stop if span.last else total)
        yield found


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
    """Frames `start` to `stop` of a clip, together with their context."""

    start: int
    stop: int
    last: bool
    """Whether the clip ends with this span."""
    first: int
    """The frame of the clip that `frames` begin with."""
    frames: np.ndarray
    """uint8 `[T, H, W, 3]`, until the next span is asked for."""


def _spans(frames: Iterator[np.ndarray], length: int, context: int) -> Iterator[_Span]:
    """The spans of a clip, each as soon as its frames have been read, and at least one more, if there is one.

    A clip of up to `length` frames is one span; of a longer one each span has `length` frames with its context.
    """
    # One block of memory for all spans: frames by themselves would be stored between the large blocks that a model
    # allocates, which the allocator could then neither join nor return.
    head = next(frames, None)
    if head is None:
        raise ValueError("the video had frames when it was read before, and has none now")
    kept = np.empty((length + 1, *head.shape), dtype=np.uint8)
    first = known = 0

    def read(until: int) -> None:
        nonlocal known
        for frame in islice(frames, max(0, until - known)):
            kept[known - first] = frame
            known += 1

    kept[0], known = head, 1
    read(length + 1)
    inner = length if known <= length else length - 2 * context
    if inner < 1:
        raise ValueError(f"span of the model must be more than twice its context, got {length} and {context}")
    start = 0
    while True:
        read(start + inner + max(context, 1))
        stop, begin = min(start + inner, known), max(start - context, 0)
        yield _Span(start, stop, known == stop, begin, kept[begin - first : min(stop + context, known) - first])
        if known == stop:
            return
        start = stop
        drop = max(start - context, 0) - first
        kept[: known - first - drop] = kept[drop : known - first].copy()
        first += drop
