"""Machine code of every Triton kernel for sm_90, as nvdisasm prints it: 16-bit numbers move in vectors inside loops.

`TRITONKERN_AOT=all pytest -s tests/test_triton_sass.py` prints a table of the kernels: instructions, registers, and
seconds to compile without a cache (benchmarks/README.md).
"""

import re
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from aot import Driver, cubin_tool, pool, resources  # noqa: E402, F401

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"))
TARGET = "sm_90"
OWN_PROCESSES = True  # `compiled_kernels` and `aot.compile_only` both replace how a kernel runs
# Every row of these starts on 16 bytes and holds whole vectors.
SHAPES = {
    "window": (2, 37, 5, 4, 64),
    "match": (37, 3, 16, 16, 64),
    "match_cosine": (5, 2, 16, 16, 64),
    "soft_argmax": (3, 2, 16, 64),
    "sample": (2, 40, 16, 8, 2, 64),
    "splat": (2, 40, 16, 8, 2, 64),
    "local": (2, 9, 12, 10, 48, 128),
    "mixer": (1, 7, 9, 512),
    "recurrence": (1, 5, 16, 2, 64),
    "adapter_first": (3, 8, 384, 128, 4),
    "adapter_last": (3, 8, 384, 128, 4),
}
ONE_CHANNEL_A_THREAD = "a thread has one channel, of which it keeps thirty weights; a warp moves 64 bytes at once"
# 16-bit accesses inside loops that may be there, with the reason.
ALLOWED = {
    "soft_argmax_2d_fwd_kernel": "a disc begins anywhere in a row",
    "temporal_mixer_fwd_kernel": ONE_CHANNEL_A_THREAD,
    "temporal_mixer_bwd_kernel_convolutions": ONE_CHANNEL_A_THREAD,
}


class Code:
    """Instructions of a kernel, and the first and last one of each of its loops."""

    def __init__(self, text):
        self.instructions, labels, branches = [], {}, []
        for line in text.splitlines():
            if label := re.match(r"\s*(\.L_\w+):", line):
                labels[label[1]] = len(self.instructions)
            elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
                if found[1].startswith("BRA") and (target := re.search(r"\.L_\w+", found[2])):
                    branches.append((len(self.instructions), target[0]))
                self.instructions.append(found[1])
        self.loops = [(labels[to], at) for at, to in branches if to in labels and labels[to] <= at]

    def narrow(self):
        """Moves of 16 bits to or from memory inside loops."""
        moves = [at for at, op in enumerate(self.instructions) if re.match(r"(LDG|STG|LDGSTS)\b.*\.[US]?16\b", op)]
        return [self.instructions[at] for at in moves if any(first <= at <= last for first, last in self.loops)]


def compiled_kernels():
    """Resources of every kernel that the operations launch in bfloat16, forward and backward."""
    import calls
    import triton
    from test_gpu import more_calls, run_both_ways
    from triton.runtime.jit import JITFunction

    from tritonkern.ops import _backends
    from tritonkern.ops.query_key_matching import op as query_key
    from tritonkern.ops.temporal_adapter import op as adapter_op
    from tritonkern.ops.temporal_adapter import triton_kernels as adapter

    triton.runtime.driver.set_active(Driver(TARGET))
    run, found = JITFunction.run, {}

    def compile_only(self, *arguments, **options):
        start = time.perf_counter()
        kernel = run(self, *arguments, **{**options, "warmup": True})
        if kernel.hash not in found:
            kernel.seconds = time.perf_counter() - start
            found[kernel.hash] = kernel

    JITFunction.run = compile_only
    _backends._PREDICATES["triton"] = lambda device: None
    adapter.hidden_dtype = adapter_op.hidden_dtype = lambda device, dtype: dtype  # as on a GPU
    query_key.check_range = lambda *arguments: None
    torch.use_deterministic_algorithms(False)
    for name, shape in SHAPES.items():
        calls.with_gradients(*getattr(calls, name)(shape, torch.bfloat16, "triton", True))
    for _, tensors, call in more_calls(torch.bfloat16, "cpu"):
        run_both_ways(tensors, call)
    return [resources(kernel, TARGET) for kernel in found.values()]


@pytest.mark.slow
def test_no_kernel_moves_16_bits_at_a_time_in_a_loop(pool):  # noqa: F811
    found = pool.submit(compiled_kernels).result()
    names = {used.kernel for used in found}
    assert len(names) >= 45 and names >= ALLOWED.keys()
    faults, seen = [], set()
    print(f"\n{'kernel':60}{'instructions':>13}{'in loops':>9}{'registers':>10}{'seconds':>8}")
    for used in sorted(found, key=lambda used: used.kernel):
        code = Code(cubin_tool("nvdisasm", "-c", used.cubin))
        in_loops = len({at for first, last in code.loops for at in range(first, last + 1)})
        print(f"{used.kernel:60}{len(code.instructions):13}{in_loops:9}{used.registers:10}{used.seconds:8.1f}")
        narrow = code.narrow()
        if narrow and used.kernel not in ALLOWED:
            faults.append(f"{used.kernel}: {narrow}")
        seen |= {used.kernel} if narrow else set()
    assert not faults, "\n".join(faults)
    assert seen == ALLOWED.keys(), f"no longer needed: {ALLOWED.keys() - seen}"


CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P0 LDG.E.U16 R4, [R2.64] ;
        /*0020*/                   LDG.E.128 R8, [R2.64] ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   STG.E.U16 [R2.64], R4 ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);
"""


def test_narrow_moves_in_loops_are_found():
    code = Code(CODE)
    assert len(code.instructions) == 6 and code.loops == [(1, 3), (5, 5)] and code.narrow() == ["LDG.E.U16"]
