"""Training trackers from scratch on videos that are generated with exact tracks."""

from tritonkern.training.loop import TrainingPlan, train
from tritonkern.training.synthetic import Clip, generate_clip, photo_clips

__all__ = ["Clip", "TrainingPlan", "generate_clip", "photo_clips", "train"]
