"""A pytest plugin that finds what Python code and tests get wrong about devices, without a GPU: `-p pretend_cuda`.

Tensors on "cuda" are CPU memory in a subclass that says it is on cuda:0. Mixing it with a CPU tensor raises as on a
GPU, and so do `.numpy()` and indexing a CPU tensor with it. Operators of this package run their C++ kernels in place of
Triton's. What PyTorch does in C++ below the dispatcher still sees the CPU, so that not every mix is found.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
_NO_NUMPY = (
    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
)


class PretendCuda(torch.Tensor):
    """`memory`, a CPU tensor, as a tensor on a GPU."""

    @staticmethod
    def __new__(cls, memory):
        x = torch.Tensor._make_wrapper_subclass(
            cls, memory.shape, strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype,
            layout=memory.layout, device="cpu", requires_grad=False,
        )  # fmt: skip
        x.memory = memory
        return x

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **_):
        return f"PretendCuda({self.memory!r})"

    def __deepcopy__(self, memo):
        memo[id(self)] = copy = wrap(self.memory.detach().clone()).requires_grad_(self.requires_grad)
        return copy

    def get_device(self):
        return 0

    def data_ptr(self):
        return self.memory.data_ptr()

    def tolist(self):
        return self.memory.tolist()

    def numpy(self, *_, **__):
        raise TypeError(_NO_NUMPY)

    __array__ = numpy

    def cpu(self, *_, **__):
        return ToCpu.apply(self)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.memory.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return wrap(grad.clone())


class ToCuda(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return wrap(x.detach().clone())

    @staticmethod
    def backward(ctx, grad):
        return grad.memory.clone()


def wrap(x):
    return PretendCuda(x) if isinstance(x, torch.Tensor) and not isinstance(x, PretendCuda) else x


def unwrap(tree):
    return tree_map(lambda x: x.memory if isinstance(x, PretendCuda) else x, tree)


# Take tensors of both devices on a GPU, too.
_MIXED = {"copy_", "_to_copy", "index", "_index_put_impl_", "index_put", "index_put_", "set_", "_assert_async"}
_MIXED |= {"lift_fresh"}


def dispatch(function, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    namespace, _, name = function._schema.name.partition("::")
    on_cpu = [x for x in tensors if not isinstance(x, PretendCuda) and x.dim() > 0]
    on_cuda = [x for x in tensors if isinstance(x, PretendCuda)]
    if on_cpu and on_cuda and name not in _MIXED:
        raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu (in {name})")
    if name == "index" and not isinstance(args[0], PretendCuda) and on_cuda:
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    options = {
        key: torch.device("cpu") if key == "device" and value else unwrap(value) for key, value in kwargs.items()
    }
    arguments = unwrap(args)
    if namespace == "tritonkern":
        arguments, options = tree_map(
            lambda x: "cpp" if isinstance(x, str) and x == "triton" else x, (arguments, options)
        )
    result = function(*arguments, **options)
    if name == "copy_" and not isinstance(args[0], PretendCuda):
        return args[0]
    changed = function._schema.is_mutable and function._schema.arguments[0].alias_info
    if changed and changed.is_write and isinstance(args[0], PretendCuda) and isinstance(result, torch.Tensor):
        if args[0].shape != args[0].memory.shape or args[0].stride() != args[0].memory.stride():
            raise NotImplementedError(f"{name} changes the shape of its argument")
        return args[0]
    return tree_map(wrap, result)


def _functions(owner, names):
    return {getattr(owner, name) for name in names.split()}


_FACTORIES = _functions(torch, "empty zeros ones full rand randn randint arange linspace eye tensor as_tensor randperm")
_FACTORIES |= _functions(torch, "empty_strided scalar_tensor logspace tril_indices triu_indices from_numpy")
_LIKE = _functions(torch, "empty_like zeros_like ones_like rand_like randn_like full_like")
_NEW = _functions(torch.Tensor, "new_empty new_zeros new_ones new_full new_tensor new_empty_strided")


def _is_cuda(device):
    return device is not None and (isinstance(device, int) or torch.device(device).type == "cuda")


class Mode(TorchFunctionMode):
    """Makes tensors where `device` asks for them, and moves them between devices."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in _FACTORIES and _is_cuda(kwargs.get("device")):
            needs_grad = kwargs.pop("requires_grad", False)
            return wrap(function(*args, **{**kwargs, "device": "cpu"})).requires_grad_(needs_grad)
        if function is torch.as_tensor and kwargs.get("device") is None and isinstance(args[0], PretendCuda):
            return args[0]
        if function in _LIKE and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            result = function(*unwrap(args), **kwargs)
            return wrap(result) if _is_cuda(device) else result
        if function in _NEW:
            device = kwargs.pop("device", args[0].device)
            result = function(unwrap(args[0]).detach(), *unwrap(args[1:]), **kwargs)
            return wrap(result) if _is_cuda(device) else result
        if function is torch.Tensor.to:
            return self._to(function, *args, **kwargs)
        if function is torch.Tensor.cuda:
            return args[0] if isinstance(args[0], PretendCuda) else ToCuda.apply(args[0])
        if function is torch.Tensor.cpu:
            return ToCpu.apply(args[0]) if isinstance(args[0], PretendCuda) else args[0]
        if function in (torch.Tensor.data_ptr, torch.Tensor.tolist):
            return function(unwrap(args[0]))
        if function in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(args[0], PretendCuda):
            raise TypeError(_NO_NUMPY)
        return function(*args, **kwargs)

    def _to(self, function, x, *rest, device=None, **kwargs):
        rest = list(rest)
        if rest and isinstance(rest[0], (str, torch.device, int)) and not isinstance(rest[0], bool):
            device = rest.pop(0)
        elif rest and isinstance(rest[0], torch.Tensor):
            device, rest[0] = rest[0].device, rest[0].dtype
        rest = [x for x in rest if isinstance(x, torch.dtype)]  # neither None nor non_blocking
        if device is not None and torch.device(device).type == "meta":
            return function(unwrap(x), "meta", *rest, **kwargs)
        if _is_cuda(device) and not isinstance(x, PretendCuda):
            x = ToCuda.apply(x)
        elif device is not None and torch.device(device).type == "cpu" and isinstance(x, PretendCuda):
            x = ToCpu.apply(x)
        return function(x, *rest, **kwargs) if rest or kwargs else x


def pytest_configure(config):
    for name, value in {
        "is_available": True, "get_device_capability": (9, 0), "get_device_name": "a GPU", "synchronize": None,
        "reset_peak_memory_stats": None, "max_memory_allocated": 0, "memory_allocated": 0, "current_device": 0,
        "device_count": 1,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *_, value=value: value)
    sys.path.insert(0, str(Path(__file__).parent))
    from tritonkern.ops import _backends

    of_triton = _backends._PREDICATES["triton"]
    _backends._PREDICATES["triton"] = lambda device: None if device.type == "cuda" else of_triton(device)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    with Mode():
        yield
