"""The best rate of a float32 product here, by torch and by the kernels' own way: what counted work is held against."""

import torch

from fasthyper import ops
from fasthyper.bench.machine import gemm_rate, timed

SIZE, DEPTH = 2048, 1023


def bench_product(benchmark):
    h, basis = torch.rand(SIZE, DEPTH), torch.rand(SIZE, DEPTH + 1)

    def rates():
        seconds = timed(lambda: ops.generate(h, basis, [(SIZE * SIZE,)]), seconds=2.0)
        return {"ours": 2 * SIZE * SIZE * (DEPTH + 1) / seconds, "torch": gemm_rate(SIZE, DEPTH + 1, SIZE)}

    benchmark.extra_info.update(what="product", flops_per_second=benchmark.pedantic(rates, rounds=1))
