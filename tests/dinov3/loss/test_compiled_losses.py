"""Compiled kernels of the losses over all prototypes: same numbers, and a bound on memory traffic."""

import pytest
import torch

from dinov3.cells.patch_cross_entropy import chunk_and_gradients, prototype_cross_entropy
from dinov3.cells.sinkhorn import column_sums, row_scales, sinkhorn_knopp

pytestmark = [
    pytest.mark.slow,  # each compilation takes seconds
    pytest.mark.filterwarnings(
        "ignore:.*torch.jit.script_method:DeprecationWarning"
    ),  # torch's own
]

GIB = 2**30
# ViT-S/8 with 64 images: masked patches, prototypes, width of the bottleneck, rows of a chunk.
M, K, D, CHUNK = 15_052, 65_536, 256, 1024


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [9, 10])
def test_compiled_sinkhorn_gives_the_same_assignment(rows):
    logits = normal(1, rows, 13)
    for temperature in (0.07, 0.2):
        plain, compiled = (
            sinkhorn_knopp(logits, temperature, compiled=flag).probabilities()
            for flag in (False, True)
        )
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_cross_entropy_gives_the_same_loss_and_gradients(dtype):
    assignment = sinkhorn_knopp(normal(2, 11, 17), 0.1, compiled=True)
    found = []
    for compiled in (False, True):
        x = normal(3, 11, 8).to(dtype).requires_grad_()
        w = normal(4, 17, 8).requires_grad_()
        loss = prototype_cross_entropy(
            x,
            w,
            assignment,
            torch.rand(11, generator=torch.Generator().manual_seed(5)),
            student_temp=0.1,
            chunk_bytes=4 * 4 * 17,
            compiled=compiled,
        )
        loss.backward()
        found.append((loss.detach(), x.grad, w.grad))
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
    )
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain, **tolerance)


def traffic(function, *shapes_and_types, wrap=lambda *args: args):
    """Bytes that the kernels of the compiler read and write, by its own count, without running them."""
    import torch._logging
    from torch._inductor import config, metrics
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    torch._logging.set_logs(inductor_metrics=True)  # it counts for its log only
    try:
        metrics.reset()
        with FakeTensorMode(), config.patch(force_disable_caches=True):
            tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes_and_types]

            def outputs(*args):
                found = function(*wrap(*args))
                return found if isinstance(found, tuple) else (found,)

            graph = make_fx(outputs, decomposition_table=select_decomp_table())(*tensors)
            compile_fx_inner(graph, tensors)
        return metrics.num_bytes_accessed
    finally:
        torch._logging.set_logs()


def test_losses_move_at_most_thirty_gibibytes():
    """The count is of the kernels for a CPU, which reads a row of 128 kB more than once from its cache."""
    half, full = torch.bfloat16, torch.float32
    logits, row, prototype = ((M, K), half), ((M, 1), full), ((K,), full)
    one = ((), full)
    columns = traffic(column_sums, logits, row, one, row)
    rows = traffic(row_scales, logits, row, one, prototype)
    largest = 2 * M * K  # the pass for the largest logit of each row
    sinkhorn = largest + 3 * (columns + rows)  # of three iterations
    chunk = traffic(
        chunk_and_gradients,
        ((CHUNK, D), half),
        ((K, D), half),
        ((K, D), full),
        ((CHUNK, K), half),
        ((CHUNK, 1), full),
        one,
        prototype,
        ((CHUNK, 1), full),
        ((CHUNK,), full),
        wrap=lambda x, w, g, *rest: (x, w, g, rest[:5], rest[5], 0.1),
    )
    entropy = chunk * M / CHUNK
    assert sinkhorn > 8 * GIB, (
        "the logits are read in each visit: a smaller count has counted nothing"
    )
    assert entropy > 6 * GIB
    assert sinkhorn + entropy < 30 * GIB, (sinkhorn / GIB, entropy / GIB)
    print(f"Sinkhorn {sinkhorn / GIB:.1f} GiB, cross-entropy {entropy / GIB:.1f} GiB")
