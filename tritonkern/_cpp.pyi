"""The compiled CPU kernels, bound in csrc/*/bindings.cpp. tests/test_cpp_build.py compares this file with them."""

from collections.abc import Sequence

from torch import Tensor

_Tensor = tuple[int, Sequence[int]]

def isa() -> str: ...
def isas() -> list[str]: ...
def temporal_window_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: int,
    right: int,
    scale: float,
    num_threads: int,
    out: Tensor,
    lse: Tensor,
) -> None: ...
def temporal_window_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: int,
    right: int,
    scale: float,
    num_threads: int,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None: ...
def correlation_soft_argmax_forward(
    dtype: int,
    shape: Sequence[int],
    temperature: float,
    radius: float,
    cosine: bool,
    eps: float,
    num_threads: int,
    query: _Tensor,
    features: _Tensor,
    results: Sequence[int],
    /,
) -> None: ...
def correlation_soft_argmax_backward(
    dtype: int,
    shape: Sequence[int],
    temperature: float,
    radius: float,
    cosine: bool,
    eps: float,
    num_threads: int,
    query: _Tensor,
    features: _Tensor,
    results: Sequence[int],
    grads: Sequence[int],
    grad_query: int,
    grad_features: int,
    /,
) -> None: ...
def soft_argmax_forward(
    dtype: int,
    shape: Sequence[int],
    temperature: float,
    radius: float,
    num_threads: int,
    cost: _Tensor,
    results: Sequence[int],
    /,
) -> None: ...
def soft_argmax_backward(
    dtype: int,
    shape: Sequence[int],
    temperature: float,
    radius: float,
    num_threads: int,
    cost: _Tensor,
    results: Sequence[int],
    grad_points: int,
    grad_cost: int,
    /,
) -> None: ...

_Image = tuple[int, Sequence[int], int, int]
_Source = tuple[_Image, int, _Image | None, int, int]

def group_norm_statistics(
    shape: Sequence[int], num_threads: int, channels: int, eps: float, image: _Image, mean: int, rstd: int, /
) -> None: ...
def group_norm_sums(
    shape: Sequence[int],
    num_threads: int,
    channels: int,
    image: _Image,
    grad: _Image,
    mean: int,
    sums: int,
    moments: int,
    /,
) -> None: ...
def group_norm_gradient(
    shape: Sequence[int],
    num_threads: int,
    channels: int,
    image: _Image,
    grad: _Image,
    slope: int,
    scale: int,
    shift: int,
    grad_image: _Image,
    /,
) -> None: ...
def conv3x3(
    shape: Sequence[int],
    num_threads: int,
    in_channels: int,
    out_channels: int,
    tile: int,
    source: _Source,
    weight: int,
    weight_stride: Sequence[int],
    bias: int,
    relu: bool,
    residual: _Image | None,
    mask: _Image | None,
    out: _Image,
    /,
) -> None: ...
def conv3x3_weight_gradient(
    shape: Sequence[int],
    num_threads: int,
    in_channels: int,
    out_channels: int,
    tile: int,
    source: _Source,
    grad_out: _Source,
    grad_weight: int,
    grad_bias: int,
    /,
) -> None: ...
def track_attention_forward(
    dtype: int,
    shape: Sequence[int],
    options: tuple[float, float, bool, bool, int],
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    tracks: int,
    visible: int,
    out: int,
    lse: int,
    /,
) -> None: ...
def track_attention_backward(
    dtype: int,
    shape: Sequence[int],
    options: tuple[float, float, bool, bool, int],
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    tracks: int,
    visible: int,
    grad_out: _Tensor,
    grads: Sequence[int],
    grad_tracks: int,
    grad_precision: int,
    /,
) -> None: ...
def local_correlation_forward(
    shape: Sequence[int], options: tuple[int, int, bool, bool, bool, int], tensors: Sequence[_Tensor], /
) -> None: ...
def local_correlation_backward(
    shape: Sequence[int],
    options: tuple[int, int, bool, bool, bool, int],
    tensors: Sequence[_Tensor],
    grads: Sequence[_Tensor],
    /,
) -> None: ...
def is_amd() -> bool: ...
def full_attention_forward(
    dtype: int,
    shape: Sequence[int],
    scale: float,
    num_threads: int,
    query: tuple[int, Sequence[int]],
    key: tuple[int, Sequence[int]],
    value: tuple[int, Sequence[int]],
    out: int,
    lse: int,
    /,
) -> None: ...
def temporal_mixer_tasks(shape: Sequence[int], /) -> int: ...
def temporal_mixer_forward(
    dtype: int,
    shape: Sequence[int],
    causal: bool,
    eps: float,
    num_threads: int,
    x: tuple[int, Sequence[int]],
    parameters: Sequence[int],
    states: Sequence[int],
    results: Sequence[int],
    /,
) -> None: ...
def temporal_mixer_backward(
    dtype: int,
    shape: Sequence[int],
    causal: bool,
    eps: float,
    num_threads: int,
    x: tuple[int, Sequence[int]],
    grad_out: tuple[int, Sequence[int]],
    parameters: Sequence[int],
    results: Sequence[int],
    chunk: int,
    /,
) -> None: ...
