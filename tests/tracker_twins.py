"""The structural twins of the public trackers, each with its input, for tests of what all patches have in common."""

import contextlib
from functools import partial
from unittest import mock

import alltracker_like
import chrono_like
import cotracker_like
import locotrack_like
import tapir_like
import torch
from torch import nn

from tritonkern.integrations import cotracker, locotrack, tapir
from tritonkern.integrations.chrono import without_xformers


class TAPIRTwin:
    """A tracker with its input; the names of the twins' parts differ as those of the repositories do."""

    module, operation = tapir, "local_correlation"
    layers = ("torch_pips_mixer.blocks.0.mlp1_up", "torch_pips_mixer.linear", "torch_cost_volume_track_mods.hid1")
    """Of different kinds, some of which the patched methods read."""
    linear = ("mlp2_up", "linear_1", "hid4")
    """Names of linear layers, as peft takes them."""

    def __init__(self, dtype=torch.float32):
        self.model = tapir_like.Tracker().eval().to(dtype)
        for name in ("hid1", "hid3", "hid4"):  # ReLUs that let something through
            nn.init.constant_(self.model.torch_cost_volume_track_mods[name].bias, 0.5)
        self.arguments = frames_last_channels(dtype)

    def tracks(self):
        return self.model(*self.arguments)["tracks"]

    def outputs(self):
        """Every result that a part of the model contributes to, in one tensor."""
        results = self.model(*self.arguments)
        return torch.cat([results["tracks"], results["occlusion"][..., None], results["expected_dist"][..., None]], -1)


class LocoTrackTwin(TAPIRTwin):
    module = locotrack
    layers = ("cmdtop.0.conv.1.0", "cmdtop.1.conv.0.1", "cost_conv", "torch_pips_mixer.output_proj", "resnet_torch.1.0")
    linear = ("output_proj", "query_proj", "occ_linear")

    def __init__(self, dtype=torch.float32):
        self.model = locotrack_like.Tracker().eval().to(dtype)
        self.arguments = frames_last_channels(dtype)


class ChronoTwin(TAPIRTwin):
    layers = ("adapter.0.conv1", "adapter.1.conv_pool", "adapter.0.norm2", "adapter.1.attn_temp.qkv", "occ_linear")
    linear = ("attn_temp.qkv", "attn_temp.proj", "occ_linear", "attn.qkv")

    def __init__(self):
        with without_xformers():
            self.model = chrono_like.Tracker(dim=64, depth=3).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        self.arguments = frames_last_channels(torch.float32)

    def outputs(self):
        with without_xformers():
            return super().outputs()


class CoTrackerTwin(TAPIRTwin):
    module, operation = cotracker, "local_correlation_linear"
    layers = ("corr_mlp.fc1", "updateformer.time.to_q", "updateformer.gather.to_kv", "fnet.conv")
    linear = ("fc1", "to_kv", "to_out")

    def __init__(self, dtype=torch.float32, kind=cotracker_like.Offline):
        self.model = kind().eval().to(dtype)
        video = torch.rand(1, 6, 3, 64, 96, dtype=dtype) * 255
        self.arguments = video, torch.cat([torch.arange(7.0)[:, None] % 6, torch.rand(7, 2) * 60], 1)[None].to(dtype)

    def tracks(self):
        return self.model(*self.arguments)[0]

    def outputs(self):
        tracks, *logits = self.model(*self.arguments)[:3]
        return torch.cat([tracks, *(x[..., None] for x in logits)], -1)


@contextlib.contextmanager
def on_a_cpu():
    """Runs AllTracker's own code, which takes its frames to a GPU."""
    with mock.patch.object(torch.Tensor, "cuda", lambda self: self):
        yield


class AllTrackerTwin(TAPIRTwin):
    layers = ("fnet.0", "update_block.motion_encoder.convc1", "update_block.refine.0.attn.to_q", "upsample_weight.2")
    linear = ("to_q", "to_kv", "to_out")

    def __init__(self):
        self.model, self.arguments = alltracker_like.Net().eval(), (torch.rand(1, 6, 3, 64, 96) * 255,)

    def outputs(self):
        with on_a_cpu():
            return torch.cat(self.model(*self.arguments)[:2], 2).movedim(2, -1)


def frames_last_channels(dtype, frames=5, queries=9):
    video = torch.rand(1, frames, 64, 64, 3, dtype=dtype) * 2 - 1
    times = torch.arange(queries)[:, None] % frames
    return video, torch.cat([times, torch.rand(queries, 2) * 64], 1)[None].to(dtype)


TWINS = {
    "alltracker": AllTrackerTwin,
    "chrono": ChronoTwin,
    "tapir": TAPIRTwin,
    "locotrack": LocoTrackTwin,
    "cotracker": CoTrackerTwin,
    "cotracker-online": partial(CoTrackerTwin, kind=cotracker_like.Online),
}
