"""Crops of two sizes in one attention call, with a kernel that a CPU has."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from dinov3.cells.packed_attention import find_kernel, use_packed_attention
from dinov3.layers.attention import SelfAttention


def by_sequence(q, k, v, begins, lengths):
    """What the kernels of a GPU compute, one sequence after the other."""
    assert begins.dtype == torch.int32
    assert begins.diff().tolist() == list(lengths)
    bounds = begins.tolist()
    found = []
    for start, stop in pairwise(bounds):
        heads = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        found.append(functional.scaled_dot_product_attention(*heads).transpose(0, 1))
    return torch.cat(found)


def test_one_call_equals_a_call_for_each_size():
    torch.manual_seed(0)
    layer = SelfAttention(16, num_heads=2, qkv_bias=True)
    calls = []

    def kernel(*args):
        calls.append(args)
        return by_sequence(*args)

    def turned(patches):
        angle = torch.rand(patches, 8)
        return angle.sin(), angle.cos()

    crops = [torch.randn(3, 9, 16), torch.randn(2, 5, 16)]
    ropes = [turned(8), turned(4)]
    plain = layer.forward_list(crops, rope_list=ropes)
    use_packed_attention(torch.nn.Sequential(layer), kernel)
    packed = layer.forward_list(crops, rope_list=ropes)
    assert len(calls) == 1
    for ours, expected in zip(packed, plain, strict=True):
        torch.testing.assert_close(ours, expected)


def test_without_a_gpu_it_is_refused():
    with pytest.raises(ValueError, match="must be '' without a GPU, got varlen: leave it out"):
        find_kernel("varlen", torch.device("cpu"), torch.bfloat16)


def test_in_float32_it_is_refused():
    with pytest.raises(ValueError, match="must be '' in float32, got varlen"):
        find_kernel("varlen", torch.device("cuda"), torch.float32)
