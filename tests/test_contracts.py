"""What every function promises whatever it computes: strides, empty tensors, threads, PyTorch's tools.

Layouts are tried on the operators themselves, so that incoming gradients and saved tensors have them as well.
`test_triton_interpreter.py` runs a part of this file in Triton's interpreter.
"""

import itertools

import pytest
import torch
from functions import FUNCTIONS, cast, on, outputs, prepare, results, same
from oracle import fast_backends, native_backends, run_python
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint


def every(backends=fast_backends, names=FUNCTIONS):
    return pytest.mark.parametrize(("name", "where"), on(backends, names))


INTERPRETED = ("triton", "cpu")


def sizes_of(name, where):
    """The usual ones, or few numbers in Triton's interpreter, which is slow."""
    return FUNCTIONS[name].tiny if where == INTERPRETED else {}


class Recorder(TorchDispatchMode):
    """Notes the operators of this package that are called, and their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tritonkern":
            self.calls.append((function, list(tree_map_only(torch.Tensor, torch.Tensor.detach, args))))
        return function(*args, **(kwargs or {}))


def operator_calls(name, where, wanted=None, layout=None, **arguments):
    """The operators that a call runs forward and backward, with their arguments."""
    call, tensors = prepare(name, where, **arguments)
    with Recorder() as recorder:
        results(call, [x if layout is None else layout(x) for x in tensors], wanted)
    return recorder.calls


def changed(arguments, change, at=None):
    """The arguments with all tensors, or with the one (or the list of them) at a place, in another form."""
    return [tree_map_only(torch.Tensor, change, x) if at in (None, i) else x for i, x in enumerate(arguments)]


def tensor_places(arguments):
    return [i for i, x in enumerate(arguments) if any(isinstance(y, torch.Tensor) for y in tree_leaves(x))]


def poison(x, *shape):
    """Memory like `x` that no kernel may read."""
    value = float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    return x.new_full(shape, value)


def inside_larger(x):
    memory = poison(x, *x.shape[:-1], x.shape[-1] + 8)
    memory[..., 3:-5] = x
    return memory[..., 3:-5]


def backwards(x):
    return x.permute(*range(x.dim())[::-1])


LAYOUTS = {
    "reversed": lambda x: backwards(backwards(x).contiguous()),
    "frames_first": lambda x: x.movedim(1, 0).contiguous().movedim(0, 1) if x.dim() > 1 else x,
    "channels_apart": lambda x: torch.stack([x, poison(x, *x.shape)], -1)[..., 0],
    "every_second": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "inside_larger": inside_larger,
    "odd_offset": lambda x: torch.cat([poison(x, 1), x.flatten()])[1:].view_as(x),
    "expanded": lambda x: x[:1].expand_as(x),
    "expanded_frames": lambda x: x[:, :1].expand_as(x) if x.dim() > 1 else x,
}


def laid_out(layout):
    return lambda x: LAYOUTS[layout](x) if x.dim() and x.numel() else x


def assert_same(found, expected, exact):
    """To the bit in C++, whose kernels add in the same order for every layout, unless PyTorch computes a part."""
    for x, y in zip(outputs(found), outputs(expected), strict=True):
        assert torch.equal(x, y) if exact else torch.testing.assert_close(x, y) is None


@every()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(name, where, layout, dtype):
    change, exact = laid_out(layout), where[0] == "cpp" and not name.startswith(("temporal_adapter", "full_attention"))
    for operator, arguments in operator_calls(name, where, dtype=dtype, **sizes_of(name, where)):
        for at in [None, *(tensor_places(arguments) if where != INTERPRETED else [])]:
            expected = operator(*changed(arguments, lambda x: change(x).contiguous(), at))
            assert_same(operator(*changed(arguments, change, at)), expected, exact)


def respaced(x, stride):
    """`x` with another stride on its axes of size 1, which PyTorch leaves to chance, and poison on both sides."""
    memory = poison(x, x.numel() + 64)
    middle = memory[32 : 32 + x.numel()].view(x.shape).copy_(x)
    return memory.as_strided(x.shape, [stride if n == 1 else s for n, s in zip(x.shape, middle.stride())], 32)  # noqa: B905


@every()
@pytest.mark.parametrize("stride", [0, 1, 7, 2**40])
def test_strides_of_axes_of_size_1_mean_nothing(name, where, stride):
    for sizes in FUNCTIONS[name].ones:
        for operator, arguments in operator_calls(name, where, **sizes):
            strange = operator(*changed(arguments, lambda x: respaced(x, stride)))
            for x, y in zip(outputs(strange), outputs(operator(*arguments)), strict=True):
                assert torch.equal(x, y), sizes


@every()
def test_empty(name, where):
    for size in FUNCTIONS[name].empty:
        call, tensors = prepare(name, where, **{size: 0})
        found = results(call, tensors)
        for grad, x in zip(found[-len(tensors) :], tensors, strict=True):
            assert grad is None or grad.shape == x.shape and not grad.any(), size
        assert all(x is None or x.isfinite().all() for x in found), size


@every()
def test_partial_requires_grad(name, where):
    call, tensors = prepare(name, where, **sizes_of(name, where))
    complete, combinations = results(call, tensors), itertools.product((False, True), repeat=len(tensors))
    step = 11 if where == INTERPRETED else 3 if len(tensors) > 5 else 1
    for wanted in itertools.islice(combinations, 1, None, step):
        assert same(results(call, tensors, wanted), complete), wanted


@every()
def test_bits_depend_neither_on_threads_nor_on_the_time(name, where):
    before = torch.get_num_threads()
    for sizes in FUNCTIONS[name].many:
        call, tensors = prepare(name, where, **sizes)
        try:
            runs = []
            for threads in (1, 2, 3, 8, 2):
                torch.set_num_threads(threads)
                runs.append(results(call, tensors))
        finally:
            torch.set_num_threads(before)
        for run in runs[1:]:
            assert same(run, runs[0]), sizes


@every(native_backends)
def test_gradcheck(name, where):
    call, tensors = prepare(name, where, torch.float64, **FUNCTIONS[name].tiny)
    forward = lambda *x: tuple(outputs(call(*x)))  # noqa: E731
    assert torch.autograd.gradcheck(forward, [x.requires_grad_(x.is_floating_point()) for x in tensors], nondet_tol=0)


def test_set_num_threads_is_obeyed():
    pytest.importorskip("tritonkern._cpp", exc_type=ImportError)
    printed = run_python(
        """
        import os, sys, time, torch
        sys.path.insert(0, "tests")
        from functions import FUNCTIONS, prepare
        def started():
            return len(os.listdir("/proc/self/task")) - before
        calls = {name: prepare(name, ("cpp", "cpu"), **FUNCTIONS[name].many[0]) for name in FUNCTIONS}
        before = len(os.listdir("/proc/self/task"))
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for name, (call, tensors) in calls.items():
                call(*tensors)
                end = time.monotonic() + 5
                while started() >= threads and time.monotonic() < end:
                    time.sleep(0.01)  # a thread that OpenMP has no more use for takes a moment to end
                print(threads, started(), name)
        """,
        OMP_NUM_THREADS="1",
    )
    for threads, more, name in map(str.split, printed.splitlines()):
        assert more in {"1": ["0"], "3": ["1", "2"]}[threads], (threads, more, name)  # little work takes two threads


@every()
def test_one_operator_each_way(name, where):
    operators = [operator.name() for operator, _ in operator_calls(name, where)]
    assert len(operators) == 2 and operators[1] == operators[0].removesuffix("fwd") + "bwd"


@every()
@pytest.mark.parametrize("layout", ["reversed", "expanded", "empty"])
def test_opcheck(name, where, layout):
    sizes = {FUNCTIONS[name].empty[-1]: 0} if layout == "empty" else {}
    change = laid_out(layout) if layout in LAYOUTS else None
    for operator, arguments in operator_calls(name, where, layout=change, **sizes):
        if operator.name().endswith("_fwd"):
            arguments = changed(arguments, lambda x: x.requires_grad_(x.is_floating_point()))
        torch.library.opcheck(operator, tuple(arguments))


@every()
@pytest.mark.parametrize("first", [True, False], ids=["of_the_first", "of_the_others"])
def test_opcheck_of_some_gradients(name, where, first):
    wanted = [(at == 0) == first for at in range(len(prepare(name, where)[1]))]
    for operator, arguments in operator_calls(name, where, wanted)[1:] if any(wanted) else []:
        torch.library.opcheck(operator, tuple(arguments))


@every()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_fakes_are_like_real_results(name, where, dtype):
    """Both are contiguous."""
    for sizes in ({}, *({size: 0} for size in FUNCTIONS[name].empty)):
        for operator, arguments in operator_calls(name, where, layout=laid_out("reversed"), dtype=dtype, **sizes):
            with FakeTensorMode() as mode:
                fakes = outputs(operator(*changed(arguments, mode.from_tensor)))
            for real, fake in zip(outputs(operator(*arguments)), fakes, strict=True):
                assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
                assert real.is_contiguous()


# Nothing else says how large these must be, or in which dtype.
FREE = {
    "temporal_mixer_fwd": "x",
    "gated_linear_recurrence_fwd": "x",
    "soft_argmax_2d_fwd": "cost_volume",
    "adapter_in_fwd": "tokens",
}
ANY_DTYPE = ("norm_weight", "conv1_weight", "conv1_bias", "conv2_weight", "conv2_bias")


@every()
def test_direct_calls_of_the_operators_are_checked(name, where):
    """Kernels use the addresses of tensors, so that callers of `torch.ops` must not get past the checks either."""
    for operator, arguments in operator_calls(name, where):
        short = operator.name().partition("::")[2]
        for at, x in enumerate(arguments):
            argument, wrong = operator._schema.arguments[at].name, []
            if isinstance(x, list) and x:
                wrong = [x[1:]]
                if isinstance(x[0], torch.Tensor):
                    wrong += [[y, *x[1:]] for y in (x[0][0], x[0][:1], x[0].double(), x[0].new_empty(0))]
            elif isinstance(x, torch.Tensor) and x.numel() and FREE.get(short) != argument:
                wrong = [x[0], x[:1]] if x.dim() else [x[None]]
                if not (name.startswith("temporal_mixer") and argument in ANY_DTYPE):
                    wrong.append(x.to(torch.float32 if x.dtype == torch.float64 else torch.float64))
            for bad in wrong:
                with pytest.raises((TypeError, ValueError)):
                    print(operator(*arguments[:at], bad, *arguments[at + 1 :]), short, argument)


@every()
def test_compiled_as_one_graph(name, where):
    call, tensors = prepare(name, where)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert same(results(compiled, tensors), results(call, tensors))


@pytest.mark.slow
@every(fast_backends, ["temporal_window_attention", "correlation_soft_argmax", "track_attention-splat"])
def test_compiled_by_inductor(name, where):
    call, tensors = prepare(name, where)
    function = lambda *x: outputs(call(*x))[0] + x[0].sum()  # noqa: E731
    for x, y in zip(results(torch.compile(function, fullgraph=True), tensors), results(function, tensors), strict=True):
        assert x is None or torch.testing.assert_close(x, y) is None


def clip(name, number):
    """Sizes of the clip with this number."""
    return {size: 3 + 4 * number + at for at, size in enumerate(FUNCTIONS[name].clip)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_once_for_all_clips(name):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(prepare(name, ("reference", "cpu"))[0], fullgraph=True, backend=counter)
    for number in range(4):
        compiled(*prepare(name, ("reference", "cpu"), **clip(name, number))[1])
    assert counter.frame_count <= 2  # the static sizes first, then all others


class Module(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *tensors):
        return tuple(outputs(self.call(*tensors)))


@every()
def test_exported_program_takes_any_clip(name, where, tmp_path):
    torch.manual_seed(0)
    call, tensors = prepare(name, where, **clip(name, 0))
    axes = [{} for _ in tensors]
    for size, value in clip(name, 0).items():
        dim = torch.export.Dim(size)
        for of_tensor, x, other in zip(axes, tensors, prepare(name, where, **{**clip(name, 0), size: value + 1})[1]):  # noqa: B905
            of_tensor.update({at: dim for at in range(x.dim()) if x.shape[at] != other.shape[at]})
    program = torch.export.export(Module(call), tuple(tensors), dynamic_shapes=(tuple(axes),))
    torch.export.save(program, tmp_path / "call.pt2")
    loaded = torch.export.load(tmp_path / "call.pt2").module()
    _, tensors = prepare(name, where, **clip(name, 2))
    assert all(map(torch.equal, loaded(*tensors), outputs(call(*tensors))))


@every()
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(name, where, use_reentrant):
    call, tensors = prepare(name, where)

    def grads(wrap):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in tensors]
        sum(x.square().sum() for x in outputs(wrap(*leaves))).backward()  # reentrant checkpoints refuse autograd.grad
        return [x.grad for x in leaves]

    saved = grads(lambda *x: checkpoint(call, *x, use_reentrant=use_reentrant))
    assert same(saved, grads(call))


ROUNDED = [name for name in FUNCTIONS if "attention" in name or name.startswith(("local", "query"))]
KEPT = [name for name in FUNCTIONS if "soft_argmax" in name]


@every(fast_backends, ROUNDED + KEPT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name, where, dtype):
    """Tensors are cast to its dtype, but positions; costs and their soft-argmax keep theirs."""
    call, tensors = prepare(name, where)
    with torch.autocast(where[1], dtype=dtype):
        found = results(call, tensors)
    if name in ROUNDED:
        names = [key for key, x in FUNCTIONS[name].make().items() if isinstance(x, torch.Tensor)]
        tensors = [cast(key, x, dtype) for key, x in zip(names, tensors, strict=True)]
    expected, count = results(call, tensors), len(tensors)
    assert [x.dtype for x in found[:-count]] == [x.dtype for x in expected[:-count]]
    assert all(x is None or x.dtype == torch.float32 for x in found[-count:])
    assert same([x if x is None else x.to(y) for x, y in zip(found, expected, strict=True)], expected)
