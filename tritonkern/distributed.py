"""One long clip on several processes: each rank holds a stretch of the frames and receives only what its windows need.

Ranks hold consecutive stretches, in the order of their ranks; stretches may have different lengths. All ranks of a
group must make the same calls in the same order, forward and backward, as with every collective of
`torch.distributed`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tritonkern.functional._arguments import autocast, check_types, window_extent
from tritonkern.functional.attention import temporal_window_attention
from tritonkern.ops._checks import check_same_dtype, check_tensors
from tritonkern.ops._dtypes import DTYPES


def halo_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | tuple[int, int] = 13,
    group: dist.ProcessGroup | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`temporal_window_attention` of a clip whose frames are distributed over the ranks of a process group.

    A rank receives the keys and values of the ``left`` frames before its stretch and of the ``right`` frames after it:
    ``2 * (left + right) * B * N * H * D`` numbers, however long the clip (fewer at the ends of the clip), and as many
    in the backward pass. Where stretches are shorter than the window they come from several neighbours. ``query`` is
    never sent. Results are those of one process up to the order of sums in the gradients of keys and values.

    Args:
        query, key, value: this rank's frames, ``[B, T, H, D]`` or ``[B, T, N, H, D]``, as in
            `temporal_window_attention`; T may differ between ranks and be 0, everything else must agree. DTensors on a
            mesh of one dimension are accepted if they are sharded along T (``Shard(1)``); the result is one, too.
        window, scale, backend: as in `temporal_window_attention`, the same on all ranks.
        group: the process group; None means the default one, and for DTensors that of their mesh. A group of one rank
            is legal.

    Returns:
        Contiguous tensor of query's shape and dtype: the output frames of this rank.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        TypeError, ValueError, NotImplementedError: as `temporal_window_attention`; also a process outside `group`,
            ranks whose arguments disagree, and a gradient that only some ranks want. What one rank finds wrong with its
            tensors is an error on all ranks, so that none waits for the others.

    Tested with gloo on CPUs; NCCL takes the same calls but has not been run. Every call gathers ten integers, which
    waits for the device. The first derivative is supported.

    The exchange of halos is that of stencil codes and of ring attention (Liu et al., "Ring Attention with Blockwise
    Transformers for Near-Infinite Context", 2023), of which a sliding window needs only the neighbouring blocks.
    """
    left, right = window_extent(window)
    if "torch.distributed.tensor" in sys.modules:  # otherwise there are no DTensors
        from torch.distributed.tensor import DTensor

        if any(isinstance(x, DTensor) for x in (query, key, value)):
            return _of_dtensors(query, key, value, (left, right), group, scale, backend)
    halo = _agree(query, key, value, left, right, group)
    query, key, value = autocast(query, key, value)
    keys, values = _Exchange.apply(key, value, halo)
    return temporal_window_attention(
        query, keys, values, (left, right), scale=scale, query_offset=halo.before, backend=backend
    )


@contextmanager
def shard_frames(model: nn.Module, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Within this context each rank calls `model` with its stretch of the frames of one clip.

    The temporal adapters of the model attend by `halo_window_attention` and take the statistics of their GroupNorm over
    the whole clip, for which the ranks exchange three numbers per adapter and clip; everything else in Chrono's
    `features` treats frames one by one. The features are those of one process up to the order of sums::

        with shard_frames(model):
            features = model.features(video[:, first:last])

    Gradients pass through. Each rank then has its stretch's share of the gradients of the weights: `all_reduce` them
    with the sum.

    Args:
        model: a `Chrono`, `ChronoNano` or `Nano`, or any module with a `TemporalAdapter`.
        group: the process group whose ranks hold consecutive stretches, of at least one frame each; None means the
            default one.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        TypeError: an adapter's `norm` or `attn_temp` was replaced by a layer that knows nothing of stretches.
        ValueError: the model has no `TemporalAdapter`, this process is not in `group`, or it is inside such a context
            already.
    """
    from tritonkern.nn import TemporalAdapter  # imports this module

    group = _joined(group)
    adapters = [part for part in model.modules() if isinstance(part, TemporalAdapter)]
    if not adapters:
        raise ValueError(f"model must have a TemporalAdapter, got {type(model).__name__} without one")
    if any(part.frames_group is not None for part in adapters):
        raise ValueError("model is inside shard_frames already: leave that context first")
    for adapter in adapters:
        adapter.check_can_shard()
    parts = [part for adapter in adapters for part in (adapter, adapter.attn_temp)]
    for part in parts:
        part.frames_group = group
    try:
        yield
    finally:
        for part in parts:
            del part.frames_group


class Moments(NamedTuple):
    """Mean and variance `[B]` in float64 of this rank's numbers and of those of all ranks; differentiable."""

    mean: Tensor
    variance: Tensor
    mean_of_all: Tensor
    variance_of_all: Tensor


def moments(x: Tensor, group: dist.ProcessGroup) -> Moments:
    """Moments of `x` `[B, T, ...]` over all but the first axis, of this rank and of the whole clip.

    The variance of all ranks is put together from means and variances (Chan et al., 1979), not from sums of squares,
    which cancel.

    Raises:
        ValueError: a rank has no frames; on all ranks.
    """
    axes = tuple(range(1, x.dim()))
    variance, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), axes, correction=0)
    mean, variance = mean.double(), variance.double()
    count = torch.full_like(mean, x[0].numel() if len(x) else 0)
    # [ranks, 3, B]
    counts, means, variances = _Gather.apply(torch.stack([count, mean, variance]), group).unbind(1)
    if not counts.all():
        raise ValueError(f"every rank must have frames, got {counts[:, 0].tolist()} numbers on the ranks of the group")
    share = counts / counts.sum(0)
    mean_of_all = (share * means).sum(0)
    return Moments(mean, variance, mean_of_all, (share * (variances + (means - mean_of_all).square())).sum(0))


class _Halo(NamedTuple):
    """What this rank exchanges: frames of its own, and how many it receives, in the order of the ranks."""

    group: dist.ProcessGroup
    sends: list[tuple[int, slice]]
    receives: list[tuple[int, int]]
    before: int
    """Frames received that are before its stretch."""


class _Exchange(torch.autograd.Function):
    """Keys and values of this rank -> those of its stretch with its halo, `[B, before + T + after, ...]`."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, halo: _Halo) -> tuple[Tensor, Tensor]:
        ctx.halo, ctx.frames = halo, key.shape[1]
        outgoing = [(peer, torch.stack((key[:, frames], value[:, frames]))) for peer, frames in halo.sends]
        incoming = [(peer, _frames_like(key, count)) for peer, count in halo.receives]
        _swap(outgoing, incoming, halo.group)
        received = torch.cat([_frames_like(key, 0), *(x for _, x in incoming)], 2)
        before, after = received[:, :, : halo.before], received[:, :, halo.before :]
        keys, values = (torch.cat((before[i], x, after[i]), 1) for i, x in enumerate((key, value)))
        return keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_keys: Tensor, grad_values: Tensor) -> tuple[Tensor, Tensor, None]:
        halo, frames = ctx.halo, ctx.frames
        own = slice(halo.before, halo.before + frames)
        both = torch.stack((grad_keys, grad_values))
        grads = both[:, :, own].contiguous()
        halves = both[:, :, : own.start], both[:, :, own.stop :]
        counts = [count for _, count in halo.receives]
        outgoing = [
            (peer, part.contiguous())
            for (peer, _), part in zip(halo.receives, torch.cat(halves, 2).split(counts, 2), strict=True)
        ]
        incoming = [(peer, _frames_like(grad_keys, part.stop - part.start)) for peer, part in halo.sends]
        _swap(outgoing, incoming, halo.group)
        for (_, part), (_, received) in zip(halo.sends, incoming, strict=True):
            grads[:, :, part] += received
        return grads[0], grads[1], None


class _Gather(torch.autograd.Function):
    """`x` of every rank, `[ranks, ...]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def _swap(
    outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Tensor]], group: dist.ProcessGroup
) -> None:
    """Send and receive one tensor per pair of ranks, all at once."""
    operations = [
        dist.P2POp(call, x, dist.get_global_rank(group, peer), group)
        for call, pairs in ((dist.isend, outgoing), (dist.irecv, incoming))
        for peer, x in pairs
    ]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def _frames_like(x: Tensor, count: int) -> Tensor:
    """An uninitialised pair of tensors with `count` frames, `[2, B, count, ...]`."""
    return x.new_empty((2, len(x), count, *x.shape[2:]))


def _agree(query: Tensor, key: Tensor, value: Tensor, left: int, right: int, group: dist.ProcessGroup | None) -> _Halo:
    """What to exchange, once all ranks know each other's shapes; raises on all ranks if one has wrong arguments."""
    group = _joined(group)
    error: TypeError | ValueError | None = None
    try:
        check_types(None, query=query, key=key, value=value)
        check_tensors(query=query, key=key, value=value)
        check_same_dtype(query=query, key=key, value=value)
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() not in (4, 5) or x.shape != query.shape:
                raise ValueError(
                    f"{name} must have the shape of query, [B, T, H, D] or [B, T, N, H, D], got {tuple(x.shape)} and "
                    f"query {tuple(query.shape)}"
                )
        wants_grad = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        batch, frames, *rest = query.shape
        rest = [-1] * (3 - len(rest)) + rest
        mine = [0, frames, batch, *rest, DTYPES.index(autocast(query[:0])[0].dtype), left, right, int(wants_grad)]
    except (TypeError, ValueError) as found:
        error, mine = found, [1] + [0] * 9
    gathered = _gather_integers(mine, group)
    if error is not None:
        raise error
    for rank, (failed, _, *theirs) in enumerate(gathered):
        if failed:
            raise ValueError(f"rank {rank} of the group has wrong arguments; its own error says which")
        if theirs != mine[2:]:
            names = "batch", "N", "H", "D", "dtype", "left", "right", "gradient wanted"
            differing = ", ".join(name for name, x, y in zip(names, mine[2:], theirs, strict=True) if x != y)
            raise ValueError(
                f"query, key, value and window must agree on all ranks except in the number of frames, but rank {rank} "
                f"differs from rank {dist.get_rank(group)} in: {differing}"
            )
    return _plan([row[1] for row in gathered], left, right, group)


def _plan(lengths: list[int], left: int, right: int, group: dist.ProcessGroup) -> _Halo:
    starts = list(itertools.accumulate(lengths, initial=0))
    me = dist.get_rank(group)

    def needed(reader: int, owner: int) -> tuple[int, int]:
        """First and last (exclusive) frame of the clip that `reader` needs of those that `owner` holds."""
        if reader == owner or not lengths[reader]:
            return 0, 0
        first = max(starts[owner], starts[reader] - left)
        return first, max(first, min(starts[owner + 1], starts[reader + 1] + right))

    sends, receives, before = [], [], 0
    for rank in range(len(lengths)):
        first, last = needed(rank, me)
        if first < last:
            sends.append((rank, slice(first - starts[me], last - starts[me])))
        first, last = needed(me, rank)
        if first < last:
            receives.append((rank, last - first))
            before += last - first if rank < me else 0
    return _Halo(group, sends, receives, before)


def _joined(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    group = cast(dist.ProcessGroup, dist.group.WORLD) if group is None else group
    if dist.get_rank(group) < 0:
        raise ValueError("group must contain this process: call it on the ranks of the group only")
    return group


def _gather_integers(mine: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    on_cpu = "gloo" in str(dist.get_backend(group)) or not torch.accelerator.is_available()
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    sent = torch.tensor(mine, device=device)
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, sent, group)
    return torch.stack(parts).tolist()


def _of_dtensors(
    query: Any, key: Any, value: Any, window: tuple[int, int], group: Any, scale: float | None, backend: str | None
) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, DTensor) or x.device_mesh != query.device_mesh:
            raise TypeError(f"{name} must be a DTensor on the mesh of query, as one of the three is a DTensor")
        if x.device_mesh.ndim != 1 or tuple(x.placements) != (Shard(1),):
            raise ValueError(
                f"{name} must be sharded along T on a mesh of one dimension, got {x.placements} on a mesh of "
                f"{x.device_mesh.ndim}; call {name}.redistribute(placements=[Shard(1)]) on such a mesh"
            )
    if group is not None:
        raise ValueError("group must be None for DTensors, which carry the group of their mesh")
    mesh = query.device_mesh
    q, k, v = (x.to_local() for x in (query, key, value))
    out = halo_window_attention(q, k, v, window, mesh.get_group(), scale=scale, backend=backend)
    stride = torch.empty(query.shape, device="meta").stride()
    return DTensor.from_local(out, mesh, [Shard(1)], run_check=False, shape=query.shape, stride=stride)
