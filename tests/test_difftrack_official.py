"""DiffTrack's published code beside ours on random tensors, where a clone of it is in TRITONKERN_OFFICIAL_DIR."""

import ast
import math
import sys
import types
from pathlib import Path
from typing import Optional  # noqa: UP035
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from official import OFFICIAL_DIR
from torch import nn

from tritonkern import frame_local_attention, query_key_matching
from tritonkern.models import DiffTrack, Preset
from tritonkern.models._cells import Corners
from tritonkern.models.difftrack_folder import StraightPath
from tritonkern.tracking.analysis import METRICS, _Sample, _scores, _State
from tritonkern.tracking.matching_scores import harmonic_mean, tracks_of_latents

ROOT = Path(OFFICIAL_DIR or ".") / "DiffTrack"
pytestmark = pytest.mark.skipif(not (OFFICIAL_DIR and ROOT.is_dir()), reason="TRITONKERN_OFFICIAL_DIR has no DiffTrack")
GRID, RASTER = (30, 45), (480, 720)
PROCESSORS = "diffusers/src/diffusers/models/attention_processor.py"
HUNYUAN = "diffusers/src/diffusers/models/transformers/transformer_hunyuan_video.py"


def parts(path, names, change=lambda text: text, **given):
    """Some functions and classes of a file, run without its imports."""
    text = change((ROOT / path).read_text())
    kept = {}
    for node in ast.parse(text).body:
        if getattr(node, "name", None) in names:
            kept[node.name] = ast.get_source_segment(text, node)  # of two of a name the last one counts
    scope = dict(
        torch=torch, F=F, nn=nn, np=np, math=math, rearrange=rearrange, Optional=Optional, Tuple=tuple, Attention=object
    )
    scope |= dict(Variable=lambda x: x) | given
    exec("\n\n".join(kept.values()), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in names})


def processor(path, name, **options):
    matching = parts("utils/matching.py", ["corr_to_matches", "get_points_on_a_grid"])
    interpolate = parts("utils/track_vis.py", ["interpolate_trajectory"]).interpolate_trajectory
    given = vars(matching) | dict(interpolate_trajectory=interpolate)
    return getattr(parts(path, [name, *options.pop("more", [])], **options, **given), name)()


def attention(heads, dim):
    made = types.SimpleNamespace(heads=heads, is_cross_attention=False, add_q_proj=None)
    made.to_q, made.to_k, made.to_v = (nn.Linear(heads * dim, heads * dim) for _ in range(3))
    made.norm_q, made.norm_k = nn.LayerNorm(dim), nn.LayerNorm(dim)
    made.to_out = [nn.Linear(heads * dim, heads * dim), nn.Identity()]
    return made


def assert_close(ours, theirs):
    """Published places of queries are float32 from -1 to 1: two ulps, times a jump between the matches of two cells."""
    error = (ours - theirs).abs()
    assert error.max() < 5e-3 and error.median() < 1e-4


def projected(attn, x):
    query, key, value = (layer(x).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
    return attn.norm_q(query), attn.norm_k(key), value


class Cells:
    """In place of a transformer: the grid is all that the scores ask for."""

    text_dim, num_heads = 4, 2
    transformer_blocks = [None] * 3

    def grid(self, latents):
        return GRID


def points_and_visibility(count, frames):
    places = torch.rand(count, 2) * torch.tensor([740.0, 500.0]) - 10
    points = places[:, None] + torch.randn(count, frames, 2).cumsum(1) * 4
    points[:, 0] = places
    return points.double().numpy(), torch.rand(count, frames).numpy() < 0.8


@torch.no_grad()
@pytest.mark.parametrize("family", ["cogvideox", "hunyuan"])
def test_processors_and_scores(family):
    """Tracks by query-key and by features, attention rows, accuracy and both scores."""
    torch.manual_seed(0)
    hunyuan = family == "hunyuan"
    heads, dim, text, frames = (24, 48, 6, 2) if hunyuan else (3, 16, 5, 13)
    attn = attention(heads, dim)
    # What moves: cells of one image, so that matches are clear.
    cells = torch.randn(*GRID, heads * dim)
    video = torch.stack([cells.roll((2 * t, t), (0, 1)) for t in range(frames)]).flatten(0, 2)[None]
    video = video + 0.3 * torch.randn_like(video)
    words = torch.randn(1, text, heads * dim)
    attn.to_k.load_state_dict(attn.to_q.state_dict())
    # Flat costs of features are ties after the published second softmax.
    attn.to_v.weight.data *= 8
    points, visible = points_and_visibility(60, 1 + 4 * (frames - 1))
    coords = torch.from_numpy(points[:, 0]).float()[None]
    args = dict(trajectory=True, attn_weight=True, query_key=False, feature=False, query_coords=coords, video_mode="fg")
    if hunyuan:
        theirs = processor(HUNYUAN, "HunyuanVideoAttnProcessor2_0")
        theirs(attn, video, words, args=args)
        joined, order, start = torch.cat([video, words], 1), "hunyuan_t2v", 0
    else:
        theirs = processor(PROCESSORS, "CogVideoXAttnProcessor2_0")
        theirs(attn, video.expand(2, -1, -1), words.expand(2, -1, -1), args=args)
        joined, order, start = torch.cat([words, video], 1), "cogvideox", text
    query, key, value = projected(attn, joined)
    feature = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    feature = feature.transpose(1, 2).flatten(2)

    def split(x):
        return x[:, start : start + frames * 1350].unflatten(1, (frames, 1350))

    scale = (dim // heads) ** -0.5 if hunyuan else None
    corners = Corners.of(coords[0], GRID, RASTER, "zeros")
    features = split(feature)[..., None, :]
    for pair, options, found in (
        ((split(query), split(key)), dict(scale=scale), theirs.trajectory_qk),
        ((features, features), dict(scale=1.0, symmetric=False), theirs.trajectory_feat),
    ):
        match = query_key_matching(*pair, grid=GRID, cells=corners.cells.flatten()[None], **options)
        tracks = corners.blend(match.points[0].unflatten(1, corners.cells.shape))
        tracks[:, 0] = coords[0]
        ours = tracks_of_latents(tracks.double().numpy(), 49, official=True)
        assert_close(torch.from_numpy(ours), found[0].transpose(0, 1))
    if hunyuan:
        return
    # Scores, by the published classes.
    model = DiffTrack(Cells(), preset=Preset((0,), (19.0,), None, 13), scheduler=StraightPath(), resolution=RASTER)
    sample = _Sample(torch.zeros(1, frames, 4, 60, 90), coords[0], points, visible)
    ours = dict(zip(METRICS, _scores(model, sample, _State(query, key, feature), official=True), strict=True))
    seen = torch.from_numpy(visible).T[None]
    evaluator = parts("utils/evaluation.py", ["MatchingEvaluator"]).MatchingEvaluator(
        1, 1, torch.from_numpy(points).transpose(0, 1)[None], seen
    )
    evaluator.update(theirs.trajectory_qk, 0, 0)
    assert ours["query_key_accuracy"] == pytest.approx(evaluator.pck.item(), abs=1e-3)
    table = MagicMock()
    scores = parts("utils/confidence_attention_score.py", ["ConfidenceAttentionScore"], pd=table, os=None)
    scores = scores.ConfidenceAttentionScore(order, 1, 1, visibility=seen, text_len=text, latent_f=frames)
    for kind, made in (("confidence", scores._update_max), ("attention", scores._update_sum)):
        for part, values in zip(("text", "self", "cross"), made(theirs.attn_weight), strict=True):
            assert ours[f"{kind}_{part}"] == pytest.approx(values.mean().item(), abs=1.01e-4), (kind, part)


def test_harmonic_mean():
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    tables = [rng.random((5, 4)) for _ in range(3)]
    normalize = parts("utils/harmonic_mean.py", ["normalize"], pd=pd).normalize
    accuracy, confidence, attention = (normalize(pd.DataFrame(x)) for x in tables)
    expected = (3 / (1 / accuracy + 1 / confidence + 1 / attention)).replace([np.inf, -np.inf], np.nan).fillna(0)
    np.testing.assert_allclose(harmonic_mean(tables), expected)


class Stored:
    """In place of a transformer: queries and keys depend on the numbers of the frames alone."""

    text_dim, num_heads = 4, 3
    transformer_blocks = [None] * 3

    def __init__(self, frames):
        cells = torch.randn(*GRID, 3, 16)
        base = torch.stack([cells.roll((t, 2 * t), (0, 1)) for t in range(frames)]).flatten(1, 2)
        self.query, self.key = (base + 0.5 * torch.randn_like(base) for _ in range(2))

    def grid(self, latents):
        return GRID

    def query_key(self, latents, text, timestep, layers, heads=None):
        numbers = latents[0, :, 0, 0, 0].round().long()
        # A frame looks a little different in every pass.
        shade = 1 + 0.02 * numbers[1]
        return [(shade * self.query[numbers][None], self.key[numbers][None])]


@torch.no_grad()
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("frames, interleaved", [(26, True), (16, False)])
def test_tracking_script(frames, interleaved, average, monkeypatch):
    """The script's own lines, with the model replaced by stored queries and keys."""
    torch.manual_seed(0)
    stored = Stored(frames)
    places = torch.rand(40, 2) * torch.tensor([720.0, 480.0])
    script = _script(monkeypatch)
    metrics = MagicMock()

    def chunk(chunk_video, first_frame, **_):
        numbers = torch.cat([first_frame, chunk_video], 1)[0, :, 0, 0, 0].float()
        latents = numbers.view(1, -1, 1, 1, 1)
        query, key = stored.query_key(latents, None, None, None)[0]
        return query.permute(0, 3, 1, 2, 4), key.permute(0, 3, 1, 2, 4)

    video = torch.arange(frames).view(1, -1, 1, 1, 1).expand(-1, -1, 3, *RASTER)
    queries = torch.cat([torch.zeros(40, 1), places], 1)[None]
    clip = video, torch.zeros(1, frames, 40, 2), torch.ones(1, frames, 40, dtype=torch.bool), queries, video
    monkeypatch.setattr(script, "process_chunk", chunk)
    monkeypatch.setattr(script, "load_pipe", MagicMock())
    monkeypatch.setattr(script, "TAPVid", MagicMock())
    monkeypatch.setattr(script, "Evaluator", MagicMock())
    monkeypatch.setattr(script, "compute_tapvid_metrics", metrics)
    monkeypatch.setattr(script.os, "makedirs", MagicMock())
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *_, **__: [clip])
    script.main(
        types.SimpleNamespace(
            model="cogvideox_t2v_2b",
            chunk_stride=12,
            chunk_frame_interval=interleaved,
            chunk_len=13,
            inverse_step=49,
            matching_timestep=[49],
            matching_layer=[17],
            output_dir="out",
            add_noise=False,
            do_inversion=False,
            eval_dataset="davis_first",
            pipe_device="cpu",
            video_max_len=-1,
            vis_video=False,
            average_overlapped_corr=average,
        )  # fmt: skip
    )
    theirs = torch.from_numpy(metrics.call_args.args[4])[0] * torch.tensor([720 / 256, 480 / 256])
    model = DiffTrack(
        stored, preset=Preset((0,), (19.0,), 3**-0.5, 13), resolution=RASTER, border="zeros", visibility="all",
        interleaved=interleaved, average=average,
    )  # fmt: skip
    latents = torch.arange(frames, dtype=torch.float32).view(1, -1, 1, 1, 1)
    ours = model.track(latents, queries[..., [0, 2, 1]]).tracks[0]
    assert_close(ours, theirs)


def _script(monkeypatch):
    """evaluate_tapvid.py as a module; stand-ins take the place of what its lines do not use."""
    for name in ("diffusers", "diffusers.schedulers", "torchvision", "torchvision.transforms", "utils", "utils.tapvid"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    for name in ("track_vis", "evaluation"):
        monkeypatch.setitem(sys.modules, f"utils.{name}", MagicMock())
    monkeypatch.setitem(sys.modules, "utils.matching", parts("utils/matching.py", ["corr_to_matches"]))
    module = types.ModuleType("evaluate_tapvid")
    exec(compile((ROOT / "evaluate_tapvid.py").read_text(), "evaluate_tapvid.py", "exec"), module.__dict__)
    return module


@torch.no_grad()
@pytest.mark.parametrize("renormalise", [False, True])
def test_guidance(renormalise):
    """The perturbed sample; frames of 24 cells, as the published number of cells is written into the code."""
    torch.manual_seed(0)
    name = "PAGJointAttnProcessor2_0_CogVideoX" if renormalise else "PAGCFGJointAttnProcessor2_0_CogVideoX"
    heads, dim, text, frames, cells = 3, 16, 5, 13, 24
    attn = attention(heads, dim)
    theirs = processor(
        PROCESSORS,
        name,
        more=["efficient_scaled_dot_product_attention"],
        change=lambda text: text.replace("1350", "24"),
    )
    samples = 2 if renormalise else 3
    video, words = torch.randn(samples, frames * cells, heads * dim), torch.randn(samples, text, heads * dim)
    shown, given = theirs(attn, video, words)
    joined = torch.cat([words, video], 1)[-1:]
    ours = frame_local_attention(*projected(attn, joined), text=text, frames=frames, renormalise=renormalise)
    ours = attn.to_out[0](ours.flatten(2))
    torch.testing.assert_close(ours, torch.cat([given, shown], 1)[-1:], atol=2e-6, rtol=1e-5)
