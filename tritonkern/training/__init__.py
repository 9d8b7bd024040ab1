"""Training trackers from scratch on videos that are generated with exact tracks."""

from tritonkern.training.adapting import AdaptingPlan, train_ditracker
from tritonkern.training.denoising import DenoisingPlan, train_denoiser
from tritonkern.training.held_out import SETS, photo_clips
from tritonkern.training.loop import TrainingPlan, train
from tritonkern.training.refining import RefiningPlan, train_nano
from tritonkern.training.synthetic import Clip, generate_clip

__all__ = [
    "SETS",
    "AdaptingPlan",
    "Clip",
    "DenoisingPlan",
    "RefiningPlan",
    "TrainingPlan",
    "generate_clip",
    "photo_clips",
    "train",
    "train_denoiser",
    "train_ditracker",
    "train_nano",
]
