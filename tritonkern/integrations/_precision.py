"""How the local correlations of a patched model are computed: as the model computes them, or rounded on request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

PRECISIONS = ("float32", "tf32", "bf16")


class Copies:
    """What was computed from a tensor, kept until the tensor is freed or written to."""

    def __init__(self) -> None:
        self._made = WeakTensorKeyDictionary()

    def of(self, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        version = None if x.is_inference() else x._version  # PyTorch counts no writes to an inference tensor
        if x not in self._made or self._made[x][0] != version:
            self._made[x] = version, make(x)
        return self._made[x][1]


# The setting belongs to the process: two threads that changed it in turn would restore each other's value.
_SETTING = threading.RLock()


class Precision:
    """`local_correlation` and `local_correlation_linear` with the precision given to `tritonkern.patch`."""

    def __init__(self, name: str) -> None:
        if name not in (*PRECISIONS, "bfloat16"):
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)} (or bfloat16), got {name!r}")
        self.name = "bf16" if name == "bfloat16" else name
        self._copies = Copies()

    def __call__(
        self,
        correlate: Callable[..., Tensor],
        features: Tensor,
        support: Tensor,
        coords: Tensor,
        *layer: Tensor | None,
        **options: object,
    ) -> Tensor:
        """`correlate` of these arguments; `layer` is the weight and bias of `local_correlation_linear`."""
        if self.name == "tf32":
            with tf32():
                return correlate(features, support, coords, *layer, **options)
        if self.name == "bf16":
            layer = tuple(x if x is None else x.bfloat16() for x in layer)
            result = correlate(self.rounded(features), support.bfloat16(), coords, *layer, **options)
            return result.to(support.dtype)
        return correlate(features, support, coords, *layer, **options)

    def rounded(self, features: Tensor) -> Tensor:
        """`features` as the correlation reads them. Every iteration of a tracker reads the same ones: they are rounded
        once, and kept for as long as they live."""
        if self.name != "bf16" or features.dtype == torch.bfloat16:
            return features
        if features.requires_grad:
            return features.bfloat16()
        return self._copies.of(features, Tensor.bfloat16)


@contextmanager
def tf32() -> Iterator[None]:
    """Inside, float32 matrix products may be rounded to TF32 on NVIDIA GPUs, ours and PyTorch's."""
    matmul = torch.backends.cuda.matmul
    # From PyTorch 2.9 on; there the older setting can no longer be read once the newer one has been changed.
    name, allowed = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    with _SETTING:
        before = getattr(matmul, name)
        if before != allowed:
            setattr(matmul, name, allowed)
        try:
            yield
        finally:
            if before != allowed:
                setattr(matmul, name, before)
