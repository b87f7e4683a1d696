"""What the memory takes of a tier's traffic alone, on a CUDA device: S28 of `scan_gpu`, bf16, nothing computed.

    python benchmarks/traffic_gpu.py

Every program reads x, delta and z of its rows a block of tokens ahead and writes y, and delta, A_bar and h where the
tier has them, as `fused` does. Under a CUDA graph, median.
"""

import torch
import triton
import triton.language as tl
from triton.testing import do_bench_cudagraph

BATCH, TOKEN, CHANNEL, STATE = 4, 4096, 5120, 16
TIERS = {"y": (0, 0, 0, 8), "delta": (1, 0, 0, 12), "delta, A_bar": (1, 1, 0, 44), "delta, A_bar, h": (1, 1, 1, 76)}
"""Whether delta, A_bar and h are written; bytes a token and channel, read and written."""
PROGRAMS = (
    (16, 8, 1),
    (16, 16, 1),
    (32, 8, 1),
    (32, 8, 2),
    (64, 8, 2),
    (64, 8, 4),
    (128, 8, 4),
    (128, 8, 8),
    (8, 16, 1),
)
"""Rows and tokens of a block, warps."""


@triton.jit
def tier(x, d, z, y, q, p, h, T, C, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
         A: tl.constexpr, H: tl.constexpr):  # fmt: skip
    r = tl.program_id(0) * R + tl.arange(0, R)
    b = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    o = r[:, None] + k[None, :] * C
    x += b * T * C
    d += b * T * C
    z += b * T * C
    y += b * T * C
    q += b * T * C
    p += b * T * C * N
    h += b * T * C * N
    a = tl.load(x + o)
    e = tl.load(d + o)
    g = tl.load(z + o)
    for t in range(0, T, K):
        m = (t + K + k)[None, :] < T
        x += K * C
        d += K * C
        z += K * C
        na = tl.load(x + o, mask=m, other=0.0)
        ne = tl.load(d + o, mask=m, other=0.0)
        ng = tl.load(z + o, mask=m, other=0.0)
        s = a + e + g
        v = tl.sum(s.to(tl.float32), axis=1)
        for u in tl.static_range(K):
            w = (v[:, None] + n[None, :] + u).to(tl.bfloat16)
            if A:
                tl.store(p + r[:, None] * N + n[None, :], w)
            if H:
                tl.store(h + r[:, None] * N + n[None, :], w)
            p += C * N
            h += C * N
        tl.store(y + o, s)
        if D:
            tl.store(q + o, s.to(tl.float32))
        y += K * C
        q += K * C
        a, e, g = na, ne, ng


def main():
    size = BATCH * TOKEN * CHANNEL
    x, d, z, y = (torch.randn(size, device="cuda").bfloat16() for _ in range(4))
    q = torch.empty(size, device="cuda")
    p, h = (torch.empty(size * STATE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    print("| tier | rows | tokens | warps | ms | TB/s |\n|---|---|---|---|---|---|")
    for name, (D, A, H, n_byte) in TIERS.items():
        for rows, tokens, warps in PROGRAMS:
            grid = CHANNEL // rows, BATCH
            sizes = TOKEN, CHANNEL, rows, STATE, tokens, D, A, H
            call = lambda: tier[grid](x, d, z, y, q, p, h, *sizes, num_warps=warps)  # noqa: B023, E731
            call()
            ms = do_bench_cudagraph(call, rep=30, return_mode="median")
            print(f"| {name} | {rows} | {tokens} | {warps} | {ms:.3f} | {n_byte * size / ms / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
