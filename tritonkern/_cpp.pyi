"""The compiled CPU kernels, bound in csrc/*/bindings.cpp. tests/test_cpp_build.py compares this file with them."""

from torch import Tensor

def isa() -> str: ...
def isas() -> list[str]: ...
def view(x: Tensor) -> tuple[str, tuple[int, ...], tuple[int, ...]]: ...
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
    query: Tensor,
    features: Tensor,
    temperature: float,
    limit: int,
    cosine: bool,
    eps: float,
    num_threads: int,
    points: Tensor,
    mean: Tensor,
    maximum: Tensor,
    minimum: Tensor,
    best: Tensor,
    worst: Tensor,
    weight: Tensor,
    query_inverse_norm: Tensor,
    features_inverse_norm: Tensor,
) -> None: ...
def correlation_soft_argmax_backward(
    grad_points: Tensor | None,
    grad_mean: Tensor | None,
    grad_maximum: Tensor | None,
    grad_minimum: Tensor | None,
    query: Tensor,
    features: Tensor,
    points: Tensor,
    maximum: Tensor,
    best: Tensor,
    worst: Tensor,
    weight: Tensor,
    query_inverse_norm: Tensor,
    features_inverse_norm: Tensor,
    temperature: float,
    limit: int,
    cosine: bool,
    eps: float,
    num_threads: int,
    grad_query: Tensor,
    grad_features: Tensor,
) -> None: ...
def soft_argmax_2d_forward(
    cost: Tensor,
    temperature: float,
    limit: int,
    num_threads: int,
    points: Tensor,
    maximum: Tensor,
    best: Tensor,
    weight: Tensor,
) -> None: ...
def soft_argmax_2d_backward(
    grad_points: Tensor,
    cost: Tensor,
    points: Tensor,
    maximum: Tensor,
    best: Tensor,
    weight: Tensor,
    temperature: float,
    limit: int,
    num_threads: int,
    grad_cost: Tensor,
) -> None: ...
def temporal_adapter_statistics(image: Tensor, eps: float, num_threads: int, mean: Tensor, rstd: Tensor) -> None: ...
def temporal_adapter_sums(
    image: Tensor, grad: Tensor, mean: Tensor, num_threads: int, sums: Tensor, moments: Tensor
) -> None: ...
def temporal_adapter_norm_gradient(
    image: Tensor, grad: Tensor, slope: Tensor, scale: Tensor, shift: Tensor, num_threads: int, grad_image: Tensor
) -> None: ...
def temporal_adapter_conv3x3(
    source: Tensor,
    load: str,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    residual: Tensor | None,
    out_mask: Tensor | None,
    tile: int,
    num_threads: int,
    out: Tensor,
) -> None: ...
def temporal_adapter_conv3x3_weight_gradient(
    source: Tensor,
    load: str,
    scale: Tensor | None,
    shift: Tensor | None,
    grad_out: Tensor,
    mask: Tensor | None,
    tile: int,
    num_threads: int,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None: ...
def track_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    visible: Tensor | None,
    inverse_variance: float,
    scale: float,
    splat: bool,
    culling: bool,
    num_threads: int,
    out: Tensor,
) -> None: ...
def track_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    visible: Tensor | None,
    inverse_variance: float,
    scale: float,
    splat: bool,
    culling: bool,
    num_threads: int,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_tracks: Tensor | None,
    grad_inverse_variance: Tensor | None,
) -> None: ...
def local_correlation_forward(
    features: Tensor,
    support: Tensor,
    position: Tensor,
    radius: int,
    zeros: bool,
    y_first: bool,
    num_threads: int,
    out: Tensor,
) -> None: ...
def local_correlation_backward(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    radius: int,
    zeros: bool,
    y_first: bool,
    num_threads: int,
    grad_features: Tensor | None,
    grad_support: Tensor | None,
    grad_position: Tensor | None,
) -> None: ...
def local_correlation_multiply(left: Tensor, right: Tensor, add: bool, num_threads: int, out: Tensor) -> None: ...
def is_amd() -> bool: ...
def full_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, num_threads: int, out: Tensor, lse: Tensor
) -> None: ...
def temporal_mixer_forward(
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    causal: bool,
    eps: float,
    normed_state: Tensor | None,
    hidden_state: Tensor | None,
    num_threads: int,
    out: Tensor,
    new_normed_state: Tensor | None,
    new_hidden_state: Tensor | None,
) -> None: ...
def temporal_mixer_backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    causal: bool,
    eps: float,
    num_threads: int,
    grad_x: Tensor | None,
    sums: Tensor | None,
) -> None: ...
