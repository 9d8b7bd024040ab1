"""Attention of every query to all keys on CPUs. Private: the models of this package use it."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonkern.functional._arguments import autocast, check_types, softmax_scale
from tritonkern.ops import _backends
from tritonkern.ops.full_attention import op


def full_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Softmax attention of every query to all keys: what a vision transformer on a CPU spends most of its time in.

    Unless a backend is named this is `torch.nn.functional.scaled_dot_product_attention`, but for 1,024 tokens and more
    on AMD CPUs with AVX2 and not AVX-512, where a kernel of this package is faster (measured on Zen 3); compiled and
    exported graphs and transforms of `torch.func` keep PyTorch's. There is no second derivative.

    Args:
        query: ``[B, L, H, D]`` (batch, queries, heads, head dimension), any strides; float64, float32, bfloat16 or
            float16. The package's kernel computes with 16-bit numbers in float32. Under autocast all three are cast to
            its dtype.
        key, value: ``[B, S, H, D]`` in query's dtype. All sizes but B from 1 up.
        scale: factor on the scores, from -2**20 to 2**20; ``D ** -0.5`` if None.
        backend: ``"cpp"``, or ``"reference"``, which stores all weights; None chooses as said above.

    Returns:
        ``[B, L, H, D]`` in query's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent, and a backend is named.
        ValueError: shapes or devices that do not fit together, or a backend that cannot run this call.

    Attention: Vaswani et al., 2017; in blocks with a running maximum: Milakov and Gimelshein, 2018, Dao et al., 2022.
    """
    check_types(backend, query=query, key=key, value=value)
    query, key, value = autocast(query, key, value)
    scale = softmax_scale(scale, query)
    if backend is None:
        if not _own_kernel(query, key):
            op.check_inputs(query, key, value, scale)
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)
        backend = "cpp"
    return op.full_attention_fwd(query, key, value, scale, backend)[0]


def _own_kernel(query: Tensor, key: Tensor) -> bool:
    """Whether the package's kernel is the faster one for this call."""
    # A graph must run on other machines and at other lengths as well; the operator has no rules for torch.func.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if query.device.type != "cpu" or torch.autograd.forward_ad._current_level >= 0:
        return False
    # Shorter sequences gain nothing; each thread copies the keys and values of a head.
    if not query.dim() == key.dim() == 4:
        return False
    return min(query.shape[1], key.shape[1]) >= 1024 and key.shape[1] <= 1 << 16 and _pytorch_is_slower()


@functools.cache
def _pytorch_is_slower() -> bool:
    """Whether this is a CPU on which the package's kernel was measured to be faster, and the kernel was built."""
    if _backends.unavailable(op.NAME, "cpp", torch.device("cpu")) is not None:
        return False
    from tritonkern import _cpp

    return _cpp.is_amd() and _cpp.isa() == "avx2"
