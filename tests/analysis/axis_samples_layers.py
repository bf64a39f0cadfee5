"""Samples of products, attention, recurrence, norms, convolutions, pooling and losses."""

from __future__ import annotations

import torch
from axis_check import Draw, Sample, b, f, i, i8, pos, s

q, k, v = f(2, 4, 3, 6), f(2, 4, 5, 6), f(2, 4, 5, 7)
LSTM = [f(16, 3), f(16, 4), f(16), f(16)]
GRU = [f(12, 3), f(12, 4), f(12), f(12)]
RNN = [f(4, 3), f(4, 4), f(4), f(4)]
SIGNS = Draw(lambda: torch.randint(0, 2, (3,)) * 2 - 1)
STEPS, LABELS = Draw(lambda: torch.tensor([6, 6])), Draw(lambda: torch.tensor([2, 2]))
AFFINE = [(1, 0), (2, 0)]  # scale and shift do not mix, but what they are applied to does
NORM = (f(4), f(4), f(4), pos(4))

SAMPLES: list[Sample] = [
    s("mm", f(3, 4), f(4, 5)), s("bmm", f(2, 3, 4), f(2, 4, 5)), s("matmul", f(2, 3, 4), f(4, 5)),
    s("matmul", f(4), f(2, 4, 5)), s("matmul", f(2, 1, 3, 4), f(6, 4, 5)),
    s("matmul", f(3, 4), f(4)), s("linalg_matmul", f(3, 4), f(4, 5)), s("mv", f(3, 4), f(4)),
    s("dot", f(4), f(4)), s("vdot", f(4), f(4)), s("_int_mm", i8(17, 8), i8(8, 8)),
    s("addmm", f(5), f(3, 4), f(4, 5)), s("addmm", f(3, 1), f(3, 4), f(4, 5)),
    s("baddbmm", f(1, 5), f(2, 3, 4), f(2, 4, 5)), s("addmv", f(3), f(3, 4), f(4)),
    s("_addmm_activation", f(5), f(3, 4), f(4, 5)), s("addbmm", f(5), f(2, 3, 4), f(2, 4, 5)),
    s("linear", f(2, 3, 4), f(5, 4), f(5)), s("linear", f(4), f(5, 4)),
    s("linear", f(3, 4), f(4)),
    s("bilinear", f(3, 4), f(3, 5), f(6, 4, 5), f(6)), s("outer", f(3), f(4)),
    s("ger", f(3), f(4)),
    s("addr", f(4), f(3), f(4)), s("inner", f(2, 3, 4), f(5, 4)),
    s("tensordot", f(2, 3, 4), f(4, 3, 5), [1, 2], [1, 0]), s("cdist", f(2, 3, 4), f(2, 5, 4)),
    s("_cdist_forward", f(3, 4), f(5, 4), 2.0, None), s("_euclidean_dist", f(3, 4), f(5, 4)),
    s("linalg_cross", f(4, 3), f(4, 3)), s("cross", f(3, 4), f(3, 4), 0),
    s("linalg_vecdot", f(4, 3), f(4, 3)), s("einsum", "bij,bjk->bik", [f(2, 3, 4), f(2, 4, 5)]),
    s("einsum", "...i, ...j -> ...ij", [f(2, 3), f(2, 4)]),
    s("einsum", "ab,bc", [f(2, 3), f(3, 4)]),
    s("einsum", "ii->i", [f(3, 3)]), s("einsum", "bhd->bd", [f(2, 3, 4)]),
    # attention and recurrence
    s("scaled_dot_product_attention", q, k, v),
    s("scaled_dot_product_attention", q, k, v, b(3, 5)),
    s("scaled_dot_product_attention", q, k, v, f(2, 1, 3, 5), scale=0.3),
    s("scaled_dot_product_attention", q, f(2, 4, 3, 6), f(2, 4, 3, 7), None, 0.0, True),
    s("scaled_dot_product_attention", q, f(2, 2, 5, 6), f(2, 2, 5, 7), f(2, 4, 1, 5),
      enable_gqa=True, careful=[(1, 1), (2, 1)]),
    s("scaled_dot_product_attention", q, k, v, None, 0.5),
    s("scaled_dot_product_attention", f(3, 6), f(5, 6), f(5, 7)),
    s("graphopt::rounded_attention", q, k, f(2, 4, 5, 6), b(3, 5), False, 0.3, False, "none"),
    s("_scaled_dot_product_attention_math", q, k, v, f(3, 5)),
    s("_scaled_dot_product_flash_attention_for_cpu", q, k, f(2, 4, 5, 6), attn_mask=f(2, 1, 3, 5)),
    s("lstm.input", f(5, 2, 3), [f(1, 2, 4), f(1, 2, 4)], LSTM, True, 1, 0.0, False, False, False),
    s("gru.input", f(2, 5, 3), f(1, 2, 4), GRU, True, 1, 0.0, False, False, True),
    s("rnn_tanh.input", f(5, 3), f(1, 4), RNN, True, 1, 0.0, False, False, False),
    s("rnn_relu.input", f(5, 2, 3), f(1, 2, 4), RNN, True, 1, 0.0, False, False, False),
    s("lstm_cell", f(2, 3), [f(2, 4), f(2, 4)], *LSTM, careful=[(2, 1)]),
    s("gru_cell", f(2, 3), f(2, 4), *GRU),
    s("rnn_tanh_cell", f(2, 3), f(2, 4), *RNN, careful=[(k, 0) for k in range(2, 6)]),
    s("rnn_relu_cell", f(1, 3), f(1, 4), *RNN, careful=[(k, 0) for k in range(2, 6)]),
    # norms
    s("layer_norm", f(2, 3, 4), [3, 4], f(3, 4), f(3, 4), careful=[*AFFINE, (1, 1), (2, 1)]),
    s("layer_norm", f(2, 3, 4), [4]),
    s("native_layer_norm", f(2, 3, 4), [4], f(4), f(4), 1e-5, careful=AFFINE),
    s("rms_norm", f(2, 3, 4), [4], f(4), careful=AFFINE),
    s("_fused_rms_norm", f(2, 3, 4), [4], f(4), 1e-6, careful=AFFINE),
    s("group_norm", f(2, 6, 3), 3, f(6), f(6), careful=AFFINE),
    s("native_group_norm", f(2, 6, 3), f(6), f(6), 2, 6, 3, 3, 1e-5, careful=AFFINE),
    s("batch_norm", f(3, 4, 5), *NORM, False, 0.1, 1e-5, False),
    s("batch_norm", f(3, 4), None, None, None, None, True, 0.1, 1e-5, False),
    s("native_batch_norm", f(3, 4, 5), *NORM, False, 0.1, 1e-5),
    s("_native_batch_norm_legit.no_stats", f(3, 4, 5), f(4), f(4), True, 0.1, 1e-5),
    s("_native_batch_norm_legit_functional", f(3, 4, 5), *NORM, True, 0.1, 1e-5),
    s("_native_batch_norm_legit_no_training", f(3, 4, 5), *NORM, 0.1, 1e-5),
    s("_batch_norm_with_update_functional", f(3, 4, 5), *NORM, 0.1, 1e-5),
    s("_batch_norm_no_update", f(3, 4, 5), *NORM, 0.1, 1e-5),
    s("instance_norm", f(3, 4, 5), f(4), f(4), None, None, True, 0.1, 1e-5, False),
    s("_weight_norm", f(3, 4), f(3, 1)), s("_weight_norm_interface", f(3, 4), f(1, 4), 1),
    # convolutions
    s("conv1d", f(2, 4, 9), f(6, 4, 3), f(6), [2], [1]), s("conv1d", f(4, 9), f(6, 4, 3)),
    s("conv1d", f(2, 4, 9), f(6, 4, 3), f(6), [3]),
    s("conv1d", f(2, 4, 5), f(6, 2, 1), None, groups=2),
    s("conv1d.padding", f(2, 4, 5), f(6, 4, 3), None, [1], "same"),
    s("conv2d", f(2, 4, 4, 6), f(8, 2, 2, 3), f(8), [2, 3], [0, 0], [1, 1], 2),
    s("conv2d", f(2, 4, 4, 5), f(4, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 4),
    s("conv2d.padding", f(2, 3, 4, 5), f(4, 3, 1, 1), f(4), [1, 1], "valid"),
    s("conv3d", f(1, 2, 3, 3, 4), f(3, 2, 2, 2, 1)),
    s("conv3d.padding", f(1, 2, 3, 3, 4), f(3, 2, 1, 1, 1), None, [1, 1, 1], "valid"),
    s("conv_transpose1d", f(2, 4, 5), f(4, 3, 2), f(6), [2], [0], [0], 2),
    s("conv_transpose1d", f(2, 4, 5), f(4, 3, 3), f(3), [2], [1], [1]),
    s("conv_transpose2d.input", f(2, 3, 4, 3), f(3, 5, 2, 2), f(5), [2, 2]),
    s("conv_transpose3d.input", f(1, 2, 2, 3, 3), f(2, 3, 1, 2, 2)),
    s("convolution", f(2, 4, 9), f(6, 4, 3), f(6), [1], [1], [1], False, [0], 1),
    s("_convolution", f(2, 4, 5), f(4, 3, 2), None, [2], [0], [1], True, [0], 2,
      False, False, False, False),
    # pooling, resampling, windows
    s("max_pool1d", f(2, 3, 6), [2]), s("max_pool2d", f(2, 3, 6, 5), [3, 3], [2, 2], [1, 1]),
    s("max_pool2d", f(3, 6, 6), [2, 3]), s("max_pool3d", f(1, 2, 4, 4, 4), [2, 2, 2]),
    s("avg_pool1d", f(2, 3, 7), [2]), s("avg_pool2d", f(2, 3, 6, 4), [2, 2]),
    s("avg_pool3d", f(1, 2, 4, 4, 4), [2, 2, 2], [1, 1, 1]),
    s("max_pool1d_with_indices", f(2, 3, 6), [2]),
    s("max_pool2d_with_indices", f(2, 3, 4, 6), [2, 2]),
    s("max_pool3d_with_indices", f(1, 2, 4, 4, 4), [2, 2, 2]),
    s("adaptive_avg_pool1d", f(2, 3, 6), [3]), s("adaptive_avg_pool2d", f(2, 3, 5, 4), [2, 4]),
    s("adaptive_avg_pool3d", f(1, 2, 4, 4, 4), [1, 1, 1]),
    s("adaptive_max_pool1d", f(2, 3, 6), [2]),
    s("adaptive_max_pool2d", f(2, 3, 5, 4), [2, 2]),
    s("adaptive_max_pool3d", f(1, 2, 4, 4, 4), [2, 2, 2]),
    s("_adaptive_avg_pool2d", f(2, 3, 5, 4), [2, 2]),
    s("_adaptive_avg_pool3d", f(1, 2, 4, 4, 4), [1, 2, 2]),
    *(s(f"{name}1d", f(2, 3, 4), [6], *rest) for name, *rest in
      [("upsample_nearest",), ("_upsample_nearest_exact",), ("upsample_linear", False)]),
    *(s(f"{name}2d{aa}", f(2, 3, 4, 5), [6, 6], *rest) for name, aa, *rest in
      [("upsample_nearest", ""), ("_upsample_nearest_exact", ""), ("upsample_bilinear", "", False),
       ("upsample_bicubic", "", True), ("_upsample_bilinear", "_aa", False),
       ("_upsample_bicubic", "_aa", False)]),
    *(s(f"{name}3d", f(1, 2, 3, 4, 5), [4, 6, 6], *rest) for name, *rest in
      [("upsample_nearest",), ("_upsample_nearest_exact",), ("upsample_trilinear", False)]),
    *(s(f"{name}1d.vec", f(2, 3, 4), [6], *rest, None) for name, *rest in
      [("upsample_nearest",), ("_upsample_nearest_exact",), ("upsample_linear", False)]),
    *(s(f"{name}2d{aa}.vec", f(2, 3, 4, 5), [6, 6], *rest, None) for name, aa, *rest in
      [("upsample_nearest", ""), ("_upsample_nearest_exact", ""), ("upsample_bilinear", "", False),
       ("upsample_bicubic", "", True), ("_upsample_bilinear", "_aa", False),
       ("_upsample_bicubic", "_aa", False)]),
    *(s(f"{name}3d.vec", f(1, 2, 3, 4, 5), [4, 6, 6], *rest, None) for name, *rest in
      [("upsample_nearest",), ("_upsample_nearest_exact",), ("upsample_trilinear", False)]),
    s("unfold", f(3, 6), 1, 2, 1), s("unfold", f(6, 3), 0, 2, 2),
    s("im2col", f(2, 3, 4, 5), [2, 2], [1, 1], [0, 0], [1, 1]),
    s("col2im", f(2, 12, 12), [4, 5], [2, 2], [1, 1], [0, 0], [1, 1]),
    s("grid_sampler", f(2, 3, 4, 5), pos(2, 3, 6, 2), 0, 0, False),
    s("grid_sampler_2d", f(2, 3, 4, 5), pos(2, 3, 6, 2), 0, 0, False),
    s("grid_sampler_3d", f(1, 2, 3, 4, 5), pos(1, 2, 3, 6, 3), 0, 0, False),
    s("affine_grid_generator", f(2, 2, 3), [2, 3, 4, 5], False),
    # losses
    *(s(name, f(3, 4), f(3, 4), reduction) for name in
      ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss")
      for reduction in (0, 1)),
    s("kl_div", f(3, 4), pos(3, 4), 0), s("kl_div", f(3, 4), pos(3, 4)),
    s("binary_cross_entropy", pos(3, 4), pos(3, 4), f(4), 0), s("mse_loss", f(3, 4), f(1, 4), 0),
    s("binary_cross_entropy_with_logits", f(3, 4), pos(3, 4), None, pos(4), 0),
    s("hinge_embedding_loss", f(3, 4), f(3, 4), 1.0, 0),
    s("poisson_nll_loss", f(3), pos(3), True, False, 1e-8, 0),
    s("margin_ranking_loss", f(3), f(3), f(3), 0.0, 0),
    *(s("cross_entropy_loss", f(4, 5), i(5, 4), f(5), reduction) for reduction in (0, 1, 2)),
    s("cross_entropy_loss", f(4, 5, 3), i(5, 4, 3), None, 0, -100, 0.1),
    s("cross_entropy_loss", f(4, 5), pos(4, 5), None, 0),
    s("cross_entropy_loss", f(5), i(5), None, 0),
    s("nll_loss", f(4, 5), i(5, 4), pos(5), 0), s("nll_loss_nd", f(4, 5, 3), i(5, 4, 3), None, 0),
    s("nll_loss2d", f(4, 5, 3, 2), i(5, 4, 3, 2), None, 0),
    s("nll_loss_forward", f(4, 5), i(5, 4), pos(5), 1, -100),
    s("nll_loss_forward", f(4, 5), i(5, 4), None, 0, -100),
    s("nll_loss2d_forward", f(4, 5, 3, 2), i(5, 4, 3, 2), pos(5), 2, -100),
    s("multi_margin_loss", f(3, 4), i(4, 3), 1, 1, pos(4), 0),
    s("multilabel_margin_loss", f(3, 4), i(4, 3, 4), 0),
    s("cosine_embedding_loss", f(3, 4), f(3, 4), SIGNS, 0.0, 0),
    s("triplet_margin_loss", f(3, 4), f(3, 4), f(3, 4), reduction=0),
    s("ctc_loss.IntList", f(6, 2, 4), i(3, 2, 2), [6, 6], [2, 2], 3, 0),
    s("ctc_loss.Tensor", f(6, 2, 4), i(3, 2, 2), STEPS, LABELS, 3, 0),
]  # fmt: skip
