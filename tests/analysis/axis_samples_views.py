"""Samples of views, cuts and joins."""

from __future__ import annotations

import torch
from axis_check import Sample, b, c, f, s

x, y = f(3, 4, 5), f(3, 4, 5)

SAMPLES: list[Sample] = [
    # dims rearranged
    s("unsqueeze", f(3, 4), 1), s("squeeze.dim", f(3, 1, 4), 1), s("squeeze.dim", f(3, 4), 1),
    s("squeeze.dims", f(3, 1, 4, 1), [1, 3]), s("squeeze", f(3, 1, 4)),
    s("view", f(4, 6, 5), [24, 5]), s("view", f(4, 6), [2, 2, 6]), s("view", f(4, 6), [8, 3]),
    s("view", f(4, 6), [2, 4, 3]), s("reshape", f(6, 4), [2, 3, -1]),
    s("_unsafe_view", f(3, 4), [12]), s("_reshape_alias", f(3, 4), [12], [1]),
    s("flatten.using_ints", f(3, 4, 5), 1, 2), s("unflatten.int", f(3, 6), 1, [2, 3]),
    s("view_as", f(3, 4), f(12)), s("reshape_as", f(3, 4), f(2, 6)), s("ravel", f(3, 4)),
    s("permute", x, [2, 0, 1]), s("transpose.int", x, 0, -1), s("t", f(3, 4)), s("t", f(3)),
    s("numpy_T", x), s("mT", x), s("mH", x), s("adjoint", x), s("matrix_H", f(3, 4)),
    s("movedim.int", x, 0, 2), s("movedim.intlist", x, [0, 1], [2, 0]),
    s("moveaxis.int", x, -1, 0), s("moveaxis.intlist", x, [1], [0]),
    s("swapaxes", x, 0, 2), s("swapdims", x, 1, 2),
    s("expand", f(3, 1, 4), [2, -1, 5, -1]), s("expand", f(3, 1), [3, 4]),
    s("expand_as", f(3, 1), f(2, 3, 4)), s("broadcast_to", f(4), [3, 4]),
    s("repeat", f(3, 4), [2, 1, 3]), s("tile", f(3, 4), [2]),
    s("repeat_interleave.self_int", f(3, 4), 2, 1), s("repeat_interleave.self_int", f(3, 4), 2),
    s("pixel_shuffle", f(2, 12, 3, 4), 2), s("pixel_unshuffle", f(2, 3, 4, 6), 2),
    s("channel_shuffle", f(2, 6, 3), 2),
    s("view_as_real", c(3, 4)), s("view_as_complex", f(3, 4, 2)),
    s("view.dtype", f(3, 4), torch.int32), s("view.dtype", f(3, 4), torch.int8, careful=[(0, 1)]),
    # positions chosen by number
    s("select.int", x, 1, 2), s("select.int", x, -1, -2), s("unbind.int", f(3, 4), 1),
    s("slice.Tensor", x, 1, 1, 3), s("slice.Tensor", x, 1, -3), s("slice.Tensor", x, 2, 0, 5, 2),
    s("slice.Tensor", x, 1, 0, 2**63 - 1), s("slice.Tensor", x, 1, -9, 2),
    s("narrow", x, 2, 1, 3),
    s("split.Tensor", f(3, 5), 2, 1), s("split.sizes", f(3, 5), [1, 4], 1),
    s("split_with_sizes", f(3, 5), [2, 3], -1), s("chunk", f(3, 5), 2, 1),
    s("unsafe_chunk", f(3, 5), 2, 0), s("unsafe_split.Tensor", f(3, 5), 2, 1),
    s("unsafe_split_with_sizes", f(3, 5), [4, 1], 1),
    s("tensor_split.sections", f(3, 5), 2, 1), s("tensor_split.indices", f(3, 5), [1, 3], 1),
    s("flip", x, [0, 2]), s("fliplr", f(3, 4)), s("flipud", f(3, 4)),
    s("roll", f(3, 4), [1], [1]), s("roll", f(3, 4), [1]),
    s("constant_pad_nd", f(3, 4), [1, 2]), s("constant_pad_nd", f(3, 4), [0, 0, -1, 1], 7.0),
    s("pad", f(3, 4), [1, 0], "constant", 0.0), s("pad", f(2, 3, 4), [2, 1], "reflect"),
    s("pad", f(2, 3, 4), [0, 1], "replicate"), s("pad", f(2, 3, 4), [1, 1], "circular"),
    s("reflection_pad1d", f(2, 3, 4), [1, 2]), s("reflection_pad2d", f(2, 3, 4), [1, 1, 1, 0]),
    s("reflection_pad3d", f(2, 2, 3, 4), [1, 1, 0, 0, 1, 0]),
    s("replication_pad1d", f(2, 3, 4), [0, 2]), s("replication_pad2d", f(2, 3, 4), [1, 0, 0, 1]),
    s("replication_pad3d", f(2, 2, 3, 4), [0, 1, 0, 0, 1, 1]),
    s("tril", x), s("triu", f(4, 4), 1), s("diagonal", f(2, 4, 5), 1, 1, 2),
    s("diagonal", f(4, 4), -1),
    # tensors put together
    s("cat", [f(3, 2), f(3, 4)], 1), s("cat", [f(2, 4), f(3, 4), f(2, 4)]),
    s("cat", [f(0), f(3, 4)], 1), s("concat", [f(3, 2), f(3, 4)], 1),
    s("concatenate", [f(3, 2), f(3, 4)], -1), s("hstack", [f(2), f(3)]),
    s("hstack", [f(3, 2), f(3, 4)]), s("vstack", [f(4), f(2, 4)]), s("dstack", [f(4), f(4)]),
    s("dstack", [f(3, 4), f(3, 4)]), s("stack", [x, y], 1), s("stack", [f(3), f(3)], -1),
    # shaped alike, sizes, nothing of values
    s("zeros_like", x), s("ones_like", x), s("full_like", x, 2.0), s("rand_like", x),
    s("empty_like", x, garbage=True), s("randn_like", x), s("randint_like", x, 9),
    s("randint_like.low_dtype", x, 3, 9), s("new_zeros", x, [3]), s("new_ones", x, [3]),
    s("new_full", x, [3], 2.0), s("new_empty", b(3), [0]), s("sym_size.int", x, 1),
    s("zeros", [3, 4]), s("ones", [3]), s("full", [3], 2.0), s("empty.memory_format", [0]),
    s("arange", 4), s("arange.start", 1, 4), s("arange.start_step", 0, 6, 2),
    s("linspace", 0.0, 1.0, 4), s("eye", 3), s("eye.m", 3, 4), s("rand", [3]), s("randn", [3]),
    s("randint", 5, [3]), s("randint.low", 1, 5, [3]), s("randperm", 4), s("scalar_tensor", 2.0),
    s("tril_indices", 3, 3), s("triu_indices", 3, 4), s("sym_numel", x),
    s("sym_stride.int", x, 0), s("sym_storage_offset", x),
]  # fmt: skip
