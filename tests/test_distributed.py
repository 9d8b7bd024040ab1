"""Halo exchange and models on several processes, against one process."""

import re

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_stream_models import tiny_chrono
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tritonkern import TemporalAdapter, distributed, temporal_window_attention
from tritonkern.distributed import halo_window_attention, shard_frames
from tritonkern.models.chrono import Chrono
from tritonkern.models.chrono_nano import ChronoNano
from tritonkern.models.dinov2 import DINOv2Config
from tritonkern.models.nano import Nano

EXACT = dict(rtol=0, atol=1e-12)


def ranks_of(count):
    @pytest.fixture(scope="module")
    def ranks(tmp_path_factory):
        ranks = Ranks(count, str(tmp_path_factory.mktemp("ranks") / "store"))
        yield ranks
        ranks.close()

    return ranks


two, four = ranks_of(2), ranks_of(4)


def stretch_of(lengths):
    start = sum(lengths[: dist.get_rank()])
    return slice(start, start + lengths[dist.get_rank()])


def total(x):
    dist.all_reduce(x)
    return x


# Each runs on every rank.


def compare_attention(lengths, window, positions=(3,)):
    """Output and gradients of this rank's frames against those of the whole clip."""
    shape = (2, sum(lengths), *positions, 2, 8)
    whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    cotangent, own = torch.randn(shape, dtype=torch.float64), stretch_of(lengths)
    expected = temporal_window_attention(*whole, window)
    grads = torch.autograd.grad(expected, whole, cotangent)
    # Strides of a head-major layout, which no part of the exchange may assume away.
    parts = [x.detach()[:, own].transpose(1, -2).contiguous().transpose(1, -2).requires_grad_() for x in whole]
    actual = halo_window_attention(*parts, window)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected[:, own], **EXACT)
    for mine, theirs in zip(torch.autograd.grad(actual, parts, cotangent[:, own]), grads, strict=True):
        torch.testing.assert_close(mine, theirs[:, own], **EXACT)


def numbers_received(frames, window):
    """By this rank, forward and backward."""
    query, key, value = torch.randn(3, 2, frames, 3, 2, 8, requires_grad=True).unbind(0)
    counts, swap = [], distributed._swap

    def count(outgoing, incoming, group):
        counts.append(sum(x.numel() for _, x in incoming))
        swap(outgoing, incoming, group)

    distributed._swap = count
    try:
        halo_window_attention(query, key, value, window).sum().backward()
    finally:
        distributed._swap = swap
    return counts


def errors_of(calls):
    """What the calls with arguments by rank raise here."""
    messages = []
    for by_rank in calls:
        query, key, value, window = by_rank[dist.get_rank()]
        try:
            halo_window_attention(query, key, value, window)
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def compare_dtensors():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = [torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    expected = temporal_window_attention(*whole, 3)
    parts = [distribute_tensor(x.detach(), mesh, [Shard(1)]).requires_grad_() for x in whole]
    out = halo_window_attention(*parts, 3)
    assert out.placements == (Shard(1),)
    torch.testing.assert_close(out.full_tensor(), expected, **EXACT)
    expected.square().sum().backward()
    out.square().sum().backward()
    for mine, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, **EXACT)
    for wrong, message in (
        (lambda x: distribute_tensor(x.detach(), mesh, [Replicate()]), "redistribute"),
        (lambda x: distribute_tensor(x.detach(), mesh, [Shard(3)]), "redistribute"),
        (lambda x: x.detach(), "must be a DTensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            halo_window_attention(parts[0], wrong(whole[1]), parts[2], 3)
    with pytest.raises(ValueError, match="group must be None for DTensors"):
        halo_window_attention(*parts, 3, dist.group.WORLD)


def made(name):
    """A small model with weights away from zero, the same at every call."""
    torch.manual_seed(0)
    if name == "chrono":
        Chrono.cells = 8
        model = Chrono(DINOv2Config(dim=64, depth=3, num_heads=1), hidden=32)
    else:
        model = {"chrono-nano": ChronoNano, "nano": Nano}[name](dim=64, depth=2, num_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def compare_features(name, lengths, batch):
    """Features of this rank's frames and the sum of all ranks' gradients against one process."""
    model = made(name).double()
    video = torch.rand(batch, sum(lengths), 256, 256, 3, dtype=torch.float64) * 2 - 1
    own = stretch_of(lengths)
    whole = model.features(video)
    cotangent = torch.randn(whole.shape, dtype=torch.float64)
    whole.backward(cotangent)
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    with shard_frames(model):
        part = model.features(video[:, own])
    torch.testing.assert_close(part, whole[:, own], rtol=0, atol=1e-9)
    part.backward(cotangent[:, own])
    mine = [total(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    for actual, expected in zip(mine, grads, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * max(scale, 1))
    assert all(part.frames_group is None for part in model.modules() if isinstance(part, TemporalAdapter))
    return (part - whole[:, own]).abs().max().item()


def compare_long_clip(frames):
    """Float64 features of this rank's frames against one process; their largest difference."""
    model = tiny_chrono().double()
    model.cells = 4
    video = torch.rand(1, frames, 32, 32, 3, dtype=torch.float64) * 2 - 1  # the model resizes frames of any size
    count, rank = dist.get_world_size(), dist.get_rank()
    own = stretch_of([frames // count + (number < frames % count) for number in range(count)])
    with torch.no_grad():
        with shard_frames(model):
            part = model.features(video[:, own])
        whole = model.features(video) if rank == 0 else part.new_empty(1, frames, *part.shape[2:])
    dist.broadcast(whole, 0)
    torch.testing.assert_close(part, whole[:, own], rtol=0, atol=1e-9)
    return (part - whole[:, own]).abs().max().item()


def compare_layer_by_layer(batch):
    """A hook makes the adapter call its layers one by one."""
    adapter = made_adapter()
    tokens = torch.randn(batch, 5, 4, 4, 16, dtype=torch.float64)
    expected = adapter(tokens)
    adapter.conv1.register_forward_hook(lambda *_: None)
    own = stretch_of((2, 3))
    with shard_frames(adapter):
        torch.testing.assert_close(adapter(tokens[:, own]), expected[:, own], **EXACT)
    with pytest.raises(ValueError, match="every rank must have frames"), shard_frames(adapter):
        adapter(tokens[:, stretch_of((5, 0))])


def made_adapter():
    adapter = TemporalAdapter(16, hidden=32, pool=2).double()
    nn.init.normal_(adapter.conv2.weight)
    return adapter


def losses(model, forward, clips, reduce=lambda x: x):
    """Of three steps."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    values = []
    for _ in range(3):
        optimiser.zero_grad()
        output = forward(*clips)
        loss = sum(x.square().mean() * scale for x, scale in zip(output, (1e-4, 1, 1), strict=True))
        loss.backward()
        optimiser.step()
        values.append(reduce(loss.detach().clone()).item())
    return values


def compare_training(name):
    """Three steps of DistributedDataParallel and of `fully_shard`, with half of the clips on each rank."""
    count, rank = dist.get_world_size(), dist.get_rank()
    clips = torch.rand(count, 2, 256, 256, 3) * 2 - 1, torch.tensor([[[0.0, 90, 120], [1, 30, 200]]] * count)
    mine = [x[rank : rank + 1] for x in clips]
    model = made(name)
    expected = losses(model, model, clips)
    assert abs(expected[2] - expected[0]) > 1e-3 * expected[0]  # the weights have moved
    # No gradient reaches the parameters of nano's coarse match.
    parallel = nn.parallel.DistributedDataParallel(made(name), find_unused_parameters=name == "nano")
    actual = losses(parallel, parallel, mine, lambda x: total(x) / count)
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    sharded, mesh = made(name), init_device_mesh("cpu", (count,))
    for part in list(sharded.modules())[:0:-1]:
        if isinstance(part, TemporalAdapter):
            dist.fsdp.fully_shard(part, mesh=mesh)
    dist.fsdp.fully_shard(sharded, mesh=mesh)
    actual = losses(sharded, sharded, mine, lambda x: total(x) / count)
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-6, atol=1e-6)


# The tests.


@pytest.mark.parametrize(
    ("lengths", "window", "positions"),
    [((6, 5), 5, (3,)), ((5, 5), (4, 2), ()), ((1, 8), (0, 6), (3,)), ((9, 2), (6, 0), (3,)), ((0, 4), 3, (3,))],
)
def test_two_ranks(two, lengths, window, positions):
    two.run(compare_attention, lengths, window, positions)


@pytest.mark.slow
def test_four_ranks(four):
    """Stretches shorter than the window, without frames, and longer ones."""
    for lengths in ((1, 2, 1, 3), (0, 2, 0, 5), (4, 4, 4, 4), (1, 1, 1, 1)):
        for window in (9, (3, 1), (0, 5), 1):
            four.run(compare_attention, lengths, window)
    # B N H D = 96: the inner ranks receive both halos of keys and values, whatever T.
    for frames in (4, 8):
        assert four.run(numbers_received, frames, (3, 2)) == [
            [2 * halo * 96 for halo in halos] for halos in ((2, 3), (5, 5), (5, 5), (3, 2))
        ]
    four.run(compare_features, "chrono", (1, 2, 1, 2), 1)


def test_numbers_received(two):
    """Forward `right` or `left` frames of keys and values, backward those of the gradients that come back."""
    for frames in (4, 16):
        first, last = two.run(numbers_received, frames, (3, 2))
        assert first == [2 * 2 * 96, 2 * 3 * 96]
        assert last == [2 * 3 * 96, 2 * 2 * 96]
    assert two.run(numbers_received, 4, 1) == [[0, 0]] * 2


def test_every_rank_raises(two):
    good = [torch.zeros(1, 3, 2, 8)] * 3
    wanting = [torch.zeros(1, 3, 2, 8, requires_grad=True)] * 3
    calls = [
        [(*good, 3), (*good, 5)],
        [(*good, 3), (*good[:2], torch.zeros(1, 4, 2, 8), 3)],
        [(*good, 3), (*(x.double() for x in good), 3)],
        [(*good, 3), (*(x[:, :, :1] for x in good), 3)],
        [(*good, 3), (*wanting, 3)],
        [(1, *good[1:], 3), (*good, 3)],
    ]
    first, last = two.run(errors_of, calls)
    for mine, theirs, expected in zip(
        first,
        last,
        [
            "left, right",
            "wrong arguments|value must have the shape",
            "dtype",
            "in: H",
            "gradient wanted",
            "query must be",
        ],
        strict=True,
    ):
        assert re.search(f"{expected}|wrong arguments", mine), mine
        assert re.search(f"{expected}|wrong arguments", theirs), theirs


def test_dtensors(two):
    two.run(compare_dtensors)


def test_features_of_stretches(two):
    errors = two.run(compare_features, "chrono", (2, 1), 2)
    assert 0 < max(errors) < 1e-9  # not the computation of one process


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lengths"), [("chrono", (8, 9)), ("chrono-nano", (1, 1))])
def test_features_of_more_stretches(two, name, lengths):
    """Those of Chrono are longer than half of the window, so that no rank sees the whole clip."""
    two.run(compare_features, name, lengths, 1)


@pytest.mark.slow
@pytest.mark.parametrize("count", ["two", "four"])
def test_features_of_a_long_clip(request, count):
    errors = request.getfixturevalue(count).run(compare_long_clip, 2000)
    assert 0 < max(errors) < 1e-9


def test_adapter_layer_by_layer(two):
    two.run(compare_layer_by_layer, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chrono", "nano"])
def test_training(two, name):
    two.run(compare_training, name)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one(one_process):
    compare_attention((5,), 3)


def test_without_process_group():
    x = torch.zeros(1, 3, 2, 8)
    with pytest.raises(RuntimeError, match="init_process_group first"):
        halo_window_attention(x, x, x)
    with pytest.raises(RuntimeError, match="init_process_group first"), shard_frames(made_adapter()):
        pass


def test_wrong_models(one_process):
    with pytest.raises(ValueError, match="must have a TemporalAdapter, got Linear"), shard_frames(nn.Linear(2, 2)):
        pass
    adapter = made_adapter()
    with shard_frames(adapter), pytest.raises(ValueError, match="inside shard_frames already"), shard_frames(adapter):
        pass
    for name, layer in (("norm", nn.GroupNorm(2, 16)), ("norm", nn.Identity()), ("attn_temp", nn.Identity())):
        adapter = made_adapter()
        setattr(adapter, name, layer)
        with pytest.raises(TypeError, match=f"the layer {name} of a TemporalAdapter cannot"), shard_frames(adapter):
            pass
