"""The Triton kernels of track attention, run line by line in NumPy by Triton's interpreter.

`test_track_attention_triton.py` runs this file in a process of its own. No bfloat16: the interpreter multiplies it
wrongly.
"""

import mmap

import pytest
import test_track_attention as attention
import torch
from test_track_attention import BOTH, INF, NAN, case, check, far_giant, run

from tritonkern.ops.track_attention import configs, triton_culling
from tritonkern.ops.track_attention.op import Points

WHERE = ("triton", "cpu")
DTYPES = (torch.float64, torch.float32, torch.float16)
# Overflow and invalid values that a mask of the kernels takes care of.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(B=2, T=1, M=20, grid=(5, 7), H=3, D=32),
        dict(M=1, grid=(1, 1), H=1, D=8),
        dict(T=1, M=40, grid=(1, 23), D=24, H=1),
        dict(T=1, M=5, grid=(17, 2), D=72, H=1),
        dict(T=1, M=3, grid=(4, 4), D=256, H=1),
    ],
    ids=str,
)
def test_result_and_gradients(splat, dtype, sizes):
    if dtype == torch.float64 and sizes:
        pytest.skip("its small tiles take long here")
    check(WHERE, case(splat, dtype=dtype, **sizes))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_several_blocks_of_both_sides(splat, dtype):
    check(WHERE, case(splat, T=1, M=40, grid=(9, 12), H=1, D=16, dtype=dtype))


@BOTH
def test_tensor_cores_with_tf32(splat, monkeypatch):
    """The interpreter multiplies in float32, so that only the way through the kernels is another."""
    monkeypatch.setattr(configs, "tf32_allowed", lambda: True)
    check(WHERE, case(splat, T=1, M=35, grid=(9, 10)))


@BOTH
@pytest.mark.parametrize("sigma", [0.05, 2.0, 1e4, INF])
def test_sigma(splat, sigma):
    check(WHERE, case(splat, T=1, grid=(9, 8), M=12, H=1, sigma=sigma))


@BOTH
@pytest.mark.parametrize("scale", [0.0, -0.7, 5.0])
def test_scale(splat, scale):
    check(WHERE, case(splat, T=1, scale=scale))


@BOTH
def test_vanishing_and_infinite_sigma(splat):
    attention.test_vanishing_sigma_takes_the_nearest(WHERE, splat)
    attention.test_infinite_sigma_is_plain_attention(WHERE, splat)


def test_tracks_outside_coincident_and_in_a_corner():
    """These and the next in one direction each, as they take ten to twenty seconds."""
    attention.test_tracks_far_outside_and_coincident(WHERE, False)
    attention.test_every_track_in_one_corner(WHERE, True)


@BOTH
def test_absurd_coordinates(splat):
    """Distances whose squares overflow are far, as those of tracks some grids away."""
    this = case(splat, T=1, M=5)
    tracks = this.tensors[3]
    tracks[:, :, 1] = torch.tensor([1e30, 2.5])
    tracks[:, :, 3] = torch.tensor([-1e25, -1e25])
    results = run(WHERE, this)
    tracks[:, :, 1] = torch.tensor([100.0, 2.5])
    tracks[:, :, 3] = torch.tensor([-100.0, -100.0])
    for x, y in zip(results[:4], run(WHERE, this), strict=False):
        torch.testing.assert_close(x, y)


@BOTH
def test_visibility(splat):
    """A frame with some tracks, and one with none."""
    this = case(splat, M=6, grid=(3, 4), H=1, D=8)
    visibility = torch.tensor([[[True, False, True, True, False, True], [False] * 6]])
    results = check(WHERE, this.changed(visibility=visibility))
    for x in results[2:5] if splat else (results[0], results[1], results[4]):
        assert (x[~visibility] == 0).all()
    assert all((x[0, 1] == 0).all() for x in results[:5])


def test_bad_coordinates_and_invisible_tracks():
    attention.test_bad_coordinates_are_invisible(WHERE, True, NAN)
    attention.test_nothing_of_an_invisible_track_is_read(WHERE, False, NAN)


@BOTH
@pytest.mark.parametrize(("name", "bad"), [("query", NAN), ("key", NAN), ("key", INF), ("value", NAN)])
def test_non_finite_input_is_not_hidden(splat, name, bad):
    attention.test_non_finite_input_is_not_hidden(WHERE, splat, name, bad)


@BOTH
def test_scores_of_minus_infinity_alone_are_not_hidden(splat):
    this = case(splat, M=1, grid=(1, 1), H=1, D=8)
    this.tensors[0].fill_(1.0)
    this.tensors[1].fill_(-INF)
    assert this.attend(WHERE[0], *this.tensors).isnan().all()


@pytest.mark.parametrize(
    ("splat", "dtype", "size"), [(True, torch.float16, 1000.0), (False, torch.float32, 480.0)], ids=str
)
def test_culling_keeps_what_a_huge_key_makes_matter(splat, dtype, size):
    attention.test_culling_keeps_what_a_huge_key_makes_matter(WHERE, splat, dtype, size)


@BOTH
def test_many_far_columns_matter_together(splat):
    this = case(splat, T=1, M=60, grid=(12, 12), H=1, D=8, sigma=6.0, scale=0.0)
    this.tensors[3].clamp_(min=0.0, max=12.0)
    check(WHERE, this)


def meetings(this, culling=True):
    """Scene, tiles and which blocks meet, as the launchers have them; the lists of rows and of columns agree."""
    from tritonkern.ops.track_attention import triton_geometry

    query, key, _, tracks, sigma = this.tensors
    grid = (query if this.splat else key).shape[2:4]
    points = Points(tracks, None, 0.5 / sigma.square())
    scene = triton_culling.scene(points, query.shape[-2], grid, this.splat)
    tiles = configs.forward_tiles(query.shape[-1], query.dtype)
    (query, q), (key, k) = map(triton_geometry.readable, (query, key))
    eps = torch.finfo(query.dtype).eps if culling else 0.0
    met = triton_culling.meetings(query, key, q, k, scene, this.scale, eps, tiles, True)
    of_rows = visits_of(met.lists, met.counts)
    assert torch.equal(of_rows, met.visits.mT.bool())
    assert torch.equal(of_rows, visits_of(*triton_culling.listed(met.visits, met.list_visits)).mT)
    return scene, tiles, of_rows


def visits_of(lists, counts):
    """Whether each pair of blocks is computed, from lists whose entries beyond `counts` are anything."""
    listed = torch.arange(lists.shape[-1]) < counts[..., None]
    result = torch.zeros(*lists.shape[:-1], lists.shape[-1] + 1, dtype=torch.bool)
    return result.scatter_(-1, torch.where(listed, lists, lists.shape[-1]).long(), True)[..., :-1]


@BOTH
@pytest.mark.parametrize("size", [1.0, 480.0, 1000.0])
def test_what_is_skipped_weighs_less_than_an_eighth_of_an_ulp(splat, size):
    """The claim of the README, per block, against the exact weights."""
    this = far_giant(splat, "cpu", torch.float32, size)
    scene, tiles, visits = meetings(this)
    assert not visits.all()
    query, key, _, tracks, sigma = (x.double() for x in this.tensors)
    query, key = query.flatten(2, -3)[..., 0, :], key.flatten(2, -3)[..., 0, :]
    height, width = (this.tensors[0] if splat else this.tensors[1]).shape[2:4]
    side, across = configs.tile_width(tiles.cells), -(-width // configs.tile_width(tiles.cells))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = torch.stack([x, y], -1).flatten(0, 1) + 0.5
    tile = (y // (tiles.cells // side) * across + x // side).flatten()
    for frame in range(scene.frames):
        block = torch.empty(len(tracks[0, 0]), dtype=torch.long)
        block[scene.order[frame]] = torch.arange(len(block)) // tiles.tracks
        distance = torch.cdist(tracks[0, frame], cells.double()).square()
        distance, of_rows, of_columns = (distance.T, tile, block) if splat else (distance, block, tile)
        scores = this.scale * query[0, frame] @ key[0, frame].T - distance / (2 * sigma * sigma)
        skipped = visits[frame][of_rows][:, of_columns] == 0
        assert (scores.softmax(-1) * skipped).sum(-1).max() < torch.finfo(torch.float32).eps / 8


@BOTH
def test_most_blocks_of_a_large_grid_are_skipped(splat):
    this = case(splat, T=1, M=600, grid=(64, 64), H=1, D=8, dtype=torch.float16)
    assert meetings(this)[-1].double().mean() < 0.2


@pytest.mark.parametrize("others", [1, 128, 300])
def test_lists_are_complete_and_small(others):
    visits = (torch.rand(2, 3, others) < 0.3).byte()
    visits[0, 1], visits[1, 2] = 0, 1
    numbers, counts = triton_culling.listed(visits, triton_culling.lists_launch(6, others))
    # In float64 the lists are most of the memory: those of a sort would take twice as much.
    assert numbers.dtype == torch.int32
    for met, listed, count in zip(visits.flatten(0, 1), numbers.flatten(0, 1), counts.flatten(), strict=True):
        assert listed[:count].tolist() == met.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("M", [1, 40, 200])
def test_nearest_track_of_each_cell(dtype, M):
    """Against all distances, with ties, tracks far outside, invisible ones, and a frame without any."""
    generator = torch.Generator().manual_seed(M)
    tracks = torch.rand(1, 3, M, 2, generator=generator, dtype=dtype) * torch.tensor([19.0, 11.0], dtype=dtype)
    tracks[:, 0] = (2 * tracks[:, 0]).round() / 2
    tracks[:, 1, ::3] *= 1e6
    visible = torch.rand(1, 3, M, generator=generator) < 0.7
    visible[:, 2] = False
    visible[:, :2, 0] = True
    points = Points(tracks, visible, tracks.new_ones(()))
    scene = triton_culling.scene(points, 1, (11, 19), True)
    assert scene.num_visible.tolist() == visible.sum(-1)[0].tolist()
    y, x = torch.meshgrid(torch.arange(11), torch.arange(19), indexing="ij")
    cells = torch.stack([x, y], -1).flatten(0, 1).to(dtype) + 0.5
    for frame in range(2):
        count = int(scene.num_visible[frame])
        order = scene.order[frame, :count]
        assert torch.equal(order.sort().values, visible[0, frame].nonzero()[:, 0])
        assert torch.equal(scene.positions[frame, :count], tracks[0, frame, order])
        distance = (cells[:, None] - tracks[0, frame, order]).square().sum(-1)
        assert torch.equal(scene.nearest[frame].long(), distance.argmin(-1))
    assert (scene.nearest[2] == 0).all()


@BOTH
def test_without_culling_all_blocks_meet(splat):
    assert meetings(far_giant(splat, "cpu", torch.float32, 1.0), culling=False)[-1].all()


@BOTH
def test_options_and_positions_at_the_ends_of_their_ranges(splat):
    attention.test_options_and_positions_at_the_ends_of_their_ranges(WHERE, splat, torch.float32)


@BOTH
def test_offsets_beyond_32_bits(splat):
    """Two frames of keys 2**32 numbers apart: 8 GiB of addresses, of which the kernels touch a few pages."""
    this = case(splat, M=3, grid=(2, 3), H=1, D=8, dtype=torch.float16)
    key = this.tensors[1]
    strides = list(key.stride())
    strides[1] = 2**32
    memory = mmap.mmap(-1, 2 * (2**32 + key.numel()), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided(key.shape, strides).copy_(key)
    check(WHERE, this.changed(key=far))
