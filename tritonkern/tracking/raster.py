"""Frames at the resolution of a model."""

import numpy as np
import torch
import torch.nn.functional as F


def resized(frame: np.ndarray, resolution: tuple[int, int]) -> np.ndarray:
    """Bilinear with antialiasing, on the raster convention: position x becomes x * W_model / W, without a shift."""
    # PyTorch warns about arrays that are read-only or have negative strides; these are copied.
    image = torch.from_numpy(np.require(frame, requirements=["C", "W"])).permute(2, 0, 1)[None]
    result = F.interpolate(image, size=resolution, mode="bilinear", antialias=True, align_corners=False)
    return result[0].permute(1, 2, 0).numpy()
