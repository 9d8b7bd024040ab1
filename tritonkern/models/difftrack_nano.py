"""difftrack-nano: a CogVideoX of pixels small enough to train on a CPU, tracked with as DiffTrack does."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tritonkern.models.checkpoints import load_strict, read_state_dict
from tritonkern.models.cogvideox import CogVideoX
from tritonkern.models.difftrack import DiffTrack, Preset

FRAMES = 8
"""Frames of the clips that it is trained on, and of a pass."""
PIXELS = (64, 64)
CONTRAST = 2.0
"""Factor on pixels in [-1, 1], whose standard deviation is then near that of the noise."""


class DiffTrackNano(DiffTrack):
    """`DiffTrack` with a transformer that learned nothing but to denoise generated clips.

    It takes patches of 4 x 4 pixels of frames of 64 x 64, 16 x 16 cells; there is no VAE and no text.

    Args:
        layer: whose queries and keys are matched.
        timestep: the noise level that the transformer is told, from 0 to 1000; no noise is added.
        radius: of the soft-argmax, in cells.
    """

    def __init__(self, layer: int = 2, timestep: float = 20.0, radius: float | None = 1.5):
        transformer = CogVideoX(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=3,
            out_channels=3,
            time_embed_dim=128,
            text_embed_dim=8,
            num_layers=4,
            sample_width=PIXELS[1],
            sample_height=PIXELS[0],
            sample_frames=4 * (FRAMES - 1) + 1,
            patch_size=4,
            max_text_seq_length=1,
            spatial_interpolation_scale=1.0,
        )
        super().__init__(transformer, preset=Preset((layer,), (timestep,), None, FRAMES), pixels=PIXELS, radius=radius)

    def features(self, video: Tensor) -> Tensor:
        """Frames `[B, T, 64, 64, 3]` in [-2, 2] of `[B, T, H, W, 3]` in [-1, 1]."""
        return CONTRAST * super().features(video)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> DiffTrackNano:
        """The model with the weights that `tritonkern train --model difftrack-nano` wrote to `path`, in float32.

        Raises `FileNotFoundError` if there is no such file, `ValueError` if it does not hold this model's weights.
        """
        model = cls()
        load_strict(model.transformer, read_state_dict(path), str(path))
        return model.eval()
