"""Peak memory of Chrono-S on a clip: `python benchmarks/clip_memory.py FRAMES`, of the tritonkern that is imported.

Another version is measured by PYTHONPATH=its/checkout. Two blocks stand for twelve, as the peak does not depend on
depth, and the core of DINOv2's attention, whose memory is its result alone, is left out to save minutes.
"""

import sys
import time

import torch
import torch.nn.functional as F
from measure import peak_memory

from tritonkern.models import dinov2
from tritonkern.models.chrono import Chrono
from tritonkern.models.dinov2 import DINOv2Config


@torch.no_grad()
def main(frames: int) -> None:
    # Older versions call PyTorch's.
    F.scaled_dot_product_attention = lambda query, key, value, **options: value.clone()
    dinov2.full_attention = lambda query, key, value: value.clone()
    model = Chrono(DINOv2Config(384, 2, 6)).eval()
    video = torch.rand(1, frames, 256, 256, 3) * 2 - 1
    queries = torch.rand(1, 64, 3) * torch.tensor([frames - 1.0, 256, 256])
    model(video[:, :1], queries * 0)
    start = time.perf_counter()
    peak = peak_memory(lambda: model(video, queries).tracks, "cpu")
    assert peak is not None, "the system does not tell a process its peak memory"
    print(f"{frames} frames: {peak / 1e9:.2f} GB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        sys.exit(__doc__)
    main(int(sys.argv[1]))
