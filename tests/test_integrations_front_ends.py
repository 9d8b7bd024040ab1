"""Front ends of trackers: `tritonkern.patch` finds the model in their objects, and ours runs in their place.

The classes are built like those of sinapsis-cotracker 0.1.7, napari-cotrack 0.1.7 and napari-deeplabcut 0.4.0 where a
patch or a backbone touches them; none of their text is here. napari-deeplabcut itself is used where it is installed.
"""

import importlib.util
import runpy
import sys
import types
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cotracker_like import Offline, Online, Predictor

import tritonkern

EXAMPLE = Path(__file__).parents[1] / "examples" / "napari_deeplabcut_backbone.py"
QUERIES = torch.tensor([[[0, 20.0, 30.0], [2, 50.0, 40.0]]])


class Sinapsis:
    """sinapsis-cotracker: a template with attributes of its own and the predictor in `cotracker`."""

    def __init__(self, tracker):
        self.attributes = SimpleNamespace(device="cpu", grid_size=5, model_variant="scaled")
        self.checkpoint_path = "scaled_offline.pth"
        self.cotracker = Predictor(tracker)
        self.is_first_step, self.tracks, self.buffer = True, None, deque(maxlen=8)

    @property
    def predictor(self):
        return self.cotracker


class DeepLabCut:
    """napari-deeplabcut: a tracking model that holds its job and the predictor in `model`."""

    def __init__(self, tracker):
        self.cfg = SimpleNamespace(video=np.zeros((6, 64, 96, 3), np.uint8), keypoints=QUERIES[0].numpy())
        self.device = "cpu"
        self.model = Predictor(tracker)

    @property
    def predictor(self):
        return self.model


class NapariCotrack(Predictor):
    """napari-cotrack: the bare predictor, made without a checkpoint, to which weights are loaded."""

    @property
    def predictor(self):
        return self


@torch.no_grad()
@pytest.mark.parametrize(
    ("front_end", "tracker"),
    [(Sinapsis, Offline), (Sinapsis, Online), (DeepLabCut, Offline), (NapariCotrack, Offline)],
)
def test_patch_finds_the_model(front_end, tracker):
    made, video = front_end(tracker().eval()), torch.rand(1, 8, 3, 64, 96) * 255

    def track():
        if tracker is Online:
            made.predictor(video, queries=QUERIES, is_first_step=True)
        return made.predictor(video, queries=QUERIES)[0]

    expected = track()
    with tritonkern.patch(made) as handle:
        assert any(name.endswith("get_correlation_feat") for name in handle.replaced)
        torch.testing.assert_close(track(), expected, atol=1e-3, rtol=0)
    assert torch.equal(track(), expected)


@dataclass
class Job:
    """As much of the plugin's TrackingWorkerData as a tracking model reads."""

    video: np.ndarray
    keypoints: np.ndarray  # frame, y, x, as in napari's layers
    keypoint_range: tuple[int, int]
    backward_tracking: bool = False


def stand_in():
    """The plugin's registry, and its class for CoTracker3, which calls a predictor."""
    module = types.ModuleType("napari_deeplabcut.tracking.core.models")
    module.AVAILABLE_TRACKERS = {}

    def register_backbone(name):
        return lambda cls: module.AVAILABLE_TRACKERS.setdefault(name, {"class": cls})["class"]

    class TrackingModel(ABC):
        def __init__(self, cfg):
            self.cfg, self.device = cfg, self.auto_set_device()
            self.model = self.load_model(self.device)

        @abstractmethod
        def load_model(self, device): ...

    class Cotracker3(TrackingModel):
        def prepare_inputs(self, cfg):
            return SimpleNamespace(video=cfg.video, keypoints=cfg.keypoints[:, [0, 2, 1]])

        def run(self, inputs, progress_callback, stop_callback):
            video = torch.from_numpy(inputs.video).to(self.device).float().permute(0, 3, 1, 2)[None]
            queries = torch.from_numpy(inputs.keypoints).to(self.device).float()[None]
            with torch.inference_mode():
                tracks, visibility = self.model(video, queries=queries)
            return SimpleNamespace(keypoints=tracks[0].numpy(), keypoint_features={"visibility": visibility[0].numpy()})

    module.register_backbone, module.Cotracker3 = register_backbone, Cotracker3
    return module


@pytest.fixture
def plugin(monkeypatch):
    """The module of the plugin's tracking models: the real one where it is installed."""
    name = "napari_deeplabcut.tracking.core.models"
    if importlib.util.find_spec("napari_deeplabcut") is not None:
        return importlib.import_module(name)
    made = stand_in()
    for parent in ("napari_deeplabcut", "napari_deeplabcut.tracking", "napari_deeplabcut.tracking.core"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, made)
    return made


def test_our_tracker_is_a_backbone_of_napari_deeplabcut(plugin, monkeypatch):
    """A bright square moves four pixels to the right per frame."""
    runpy.run_path(str(EXAMPLE))
    backbone = plugin.AVAILABLE_TRACKERS["tritonkern nano"]["class"]
    video = np.random.default_rng(0).integers(0, 90, (1, 128, 160, 3), dtype=np.uint8).repeat(5, 0)
    for t in range(5):
        video[t, 48:80, 40 + 4 * t : 72 + 4 * t] = video[0, 10:42, 10:42] + 150
    keypoints = np.array([[0, 64.0, 56.0]])
    if hasattr(plugin, "TrackingWorkerData"):
        pandas = pytest.importorskip("pandas")
        features = pandas.DataFrame({"label": ["nose"]})
        job = plugin.TrackingWorkerData("tritonkern nano", video, keypoints, features, (0, 5), False)
    else:
        job = Job(video, keypoints, (0, 5))
    model = backbone(job)
    inputs = model.prepare_inputs(job)
    found = model.run(inputs, lambda *_: None, lambda: False)
    assert found.keypoints.shape == (5, 1, 2) and found.keypoint_features["visibility"].shape == (5, 1)
    np.testing.assert_allclose(found.keypoints[:, 0], [[56 + 4 * t, 64] for t in range(5)], atol=3)
    if hasattr(plugin, "TrackingWorkerData"):
        assert model.validate_outputs(inputs, model.prepare_outputs(found, worker_inputs=job)) == (True, "")
