"""Error of a product of float32 matrices made of three TF32 products (`input_precision="tf32x3"`), emulated in NumPy.

    python benchmarks/gpu/tf32x3.py

Tensor cores add the products of 8 channels to the accumulator and cut the sum off; how many bits are left is not
documented, so 24 and 25 are tried. The error is compared with that of fused multiply-adds one after the other, which is
what a thread does in float32.
"""

import numpy as np

CHANNELS, TRIALS = (32, 64, 128, 256), 20000


def rounded(x):
    """To TF32: to nearest, ties away from zero."""
    bits = x.view(np.uint32).astype(np.uint64) + 0x1000
    return (bits & 0xFFFFE000).astype(np.uint32).view(np.float32)


def cut_off(x, bits):
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(np.ldexp(mantissa, bits)), exponent - bits)


def three_products(a, b, bits):
    high_a, high_b = rounded(a), rounded(b)
    low_a, low_b = rounded(a - high_a), rounded(b - high_b)
    total = np.zeros(len(a))
    for tile in range(0, a.shape[1], 32):  # as Triton: the small products of a tile of channels come first
        for left, right in ((low_a, high_b), (high_a, low_b), (high_a, high_b)):
            for first in range(tile, tile + 32, 8):
                group = slice(first, first + 8)
                total = cut_off(total + (left[:, group].astype(np.float64) * right[:, group]).sum(1), bits)
    return total


def fused(a, b):
    total = np.zeros(len(a), np.float32)
    for k in range(a.shape[1]):
        total = (total + a[:, k].astype(np.float64) * b[:, k]).astype(np.float32)
    return total


def main():
    generator = np.random.default_rng(0)
    for channels in CHANNELS:
        a, b = generator.standard_normal((2, TRIALS, channels)).astype(np.float32)
        exact = (a.astype(np.float64) * b).sum(1)
        plain = fused(a, b)
        for bits in (24, 25):
            found = three_products(a, b, bits)
            errors = [x - exact for x in (found, plain)]
            ratios = [f(errors[0]) / f(errors[1]) for f in (lambda x: np.abs(x).max(), np.std)]
            print(f"{channels:4} channels, {bits} bits: largest error x {ratios[0]:.2f}, deviation x {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
