"""Samples of elementwise operators without the ``pointwise`` tag, reductions and products."""

from __future__ import annotations

import torch
from axis_check import Sample, b, c, f, i, often, pos, rare, s

x, y, row = f(3, 4), f(3, 4), f(1, 4)

_BINARY = (
    "rsub.Tensor divide.Tensor multiply.Tensor subtract.Tensor greater.Tensor less.Tensor"
    " greater_equal.Tensor less_equal.Tensor not_equal.Tensor arctan2 isclose polar complex"
    " float_power.Tensor_Tensor floor_divide"
)
_SCALAR = (
    "floor_divide.Scalar true_divide.Scalar divide.Scalar multiply.Scalar subtract.Scalar"
    " greater.Scalar less.Scalar greater_equal.Scalar less_equal.Scalar not_equal.Scalar"
    " float_power.Tensor_Scalar"
)
_UNARY = (
    "absolute negative fix arccos arccosh arcsin arcsinh arctan arctanh hardswish log_sigmoid"
    " log_sigmoid_forward real isreal special_expit special_erf special_erfc special_exp2"
    " special_expm1 special_log1p"
)
_SAME = "alias clone detach lift_fresh lift_fresh_copy lift contiguous _neg_view resolve_neg"
_ALL_DIMS = (
    "sum nansum mean nanmean prod amax amin max min argmax argmin var std"
    " median nanmedian var_mean std_mean norm.Scalar aminmax linalg_vector_norm"
)
_ONE_DIM = (
    "prod.dim_int max.dim min.dim median.dim nanmedian.dim mode logsumexp amax"
    " argmin mean.dim sum.dim_IntList"
)
_SOFTMAX = "softmax.int log_softmax.int _safe_softmax special_softmax special_log_softmax"
_FFT = "fft_fft fft_ifft fft_irfft fft_hfft"
_FFTN = "fft_fft2 fft_ifft2 fft_irfft2 fft_fftn fft_ifftn fft_irfftn"

SAMPLES: list[Sample] = [
    *(s(name, x, row) for name in _BINARY.split()),
    *(s(name, x, 2.0) for name in _SCALAR.split()),
    *(s(name, x) for name in (_UNARY + " " + _SAME).split()),
    s("divide.Tensor_mode", x, row, rounding_mode="floor"),
    s("divide.Scalar_mode", x, 0.7, rounding_mode="trunc"), s("float_power.Scalar", 2.0, x),
    s("where.ScalarOther", b(3, 1), x, 0.0), s("where.ScalarSelf", b(3, 4), 1.0, row),
    s("where.Scalar", b(3, 4), 1.0, 2.0), s("masked_fill.Tensor", x, b(3, 1), f()),
    s("__and__.Tensor", b(3, 4), b(4)), s("__and__.Scalar", i(9, 3), 3),
    s("__or__.Tensor", b(3, 1), b(4)), s("__or__.Scalar", i(9, 3), 3),
    s("imag", c(3, 4)), s("conj", c(3)), s("_conj", c(3)), s("resolve_conj", c(3)),
    s("fake_quantize_per_tensor_affine", x, 0.1, 0, -128, 127),
    s("_to_copy", x, dtype=torch.float64), s("to.dtype", x, torch.float64),
    s("to.device", x, "cpu", torch.float64), s("to.dtype_layout", x, dtype=torch.int32),
    s("to.other", x, i(3, 2)), s("to.prim_dtype", x, torch.float64),
    s("type_as", x, i(9, 3)), s("copy", x, f(4)), s("fill.Scalar", x, 1.0),
    s("fill.Tensor", x, f()), s("zero", x), s("prelu", f(2, 3, 4), f(3)), s("prelu", x, f(1)),
    s("_prelu_kernel", x, f(1, 4)),
    s("dropout", x, 0.5, True), s("dropout", x, 0.5, False), s("feature_dropout", x, 0.5, True),
    s("alpha_dropout", x, 0.5, True), s("native_dropout", x, 0.5, True),
    s("bernoulli", pos(3, 4)),
    s("bernoulli.p", x, 0.5), s("bernoulli.Tensor", x, pos(3, 4)), s("rrelu", x),
    s("normal.Tensor_float", x), s("normal.Tensor_Tensor", x, pos(4)),
    s("normal.float_Tensor", 0.0, pos(3)), s("normal_functional", x), s("uniform", x),
    s("exponential", x),
    # reductions
    *(s(name, x) for name in _ALL_DIMS.split() if "logsumexp" not in name),
    *(s(name, f(2, 3, 4), 1) if name != "sum.dim_IntList" else s(name, x, [1], True)
      for name in _ONE_DIM.split() if name not in ("mean.dim", "logsumexp")),
    s("mean.dim", f(2, 3, 4), [0, -1]), s("logsumexp", x, [1]), s("sum.dim_IntList", x, []),
    s("any", rare(2, 3)), s("all", often(2, 3)), s("any.dim", rare(2, 3, 4), 1),
    s("all.dim", b(2, 3, 4), 1), s("any.dims", rare(2, 3, 4), [0, 2]),
    s("all.dims", b(2, 3, 4), [1], True), s("count_nonzero", i(2, 3, 4)),
    s("count_nonzero.dim_IntList", i(2, 3, 4), [1]), s("frobenius_norm.dim", x, [1]),
    s("norm.ScalarOpt_dim", x, 2, [1], True),
    s("norm.ScalarOpt_dtype", x, 2, dtype=torch.float64),
    s("norm.ScalarOpt_dim_dtype", x, 2, [0], False, dtype=torch.float64),
    s("linalg_vector_norm", x, 2, [1]), s("var.dim", x, [1]), s("std.dim", x, [1]),
    s("var.correction", x, [0], correction=0), s("std.correction", x, [1], correction=0),
    s("var_mean.dim", x, [1]), s("std_mean.dim", x, [1]), s("var_mean.correction", x, [0]),
    s("std_mean.correction", x, [0], keepdim=True), s("kthvalue", x, 2, 1),
    s("quantile.scalar", x, 0.4, 1), s("nanquantile.scalar", x, 0.4, 0),
    s("argmax", f(2, 3, 4), 1, True), s("aminmax", x, dim=1),
    *(s(name, f(2, 3, 4), 1) for name in _SOFTMAX.split()), s("_softmax", x, 1, False),
    s("_log_softmax", x, 0, False),
    *(s(name, f(2, 3, 4), 1) for name in ["cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"]),
    s("cosine_similarity", x, row, 1), s("pairwise_distance", x, y), s("renorm", x, 2.0, 0, 1.0),
    *(s(name, f(2, 3, 4), 1) for name in ["sort", "argsort"]), s("msort", x),
    s("sort.stable", x, stable=True, dim=0), s("argsort.stable", x, stable=True, dim=1),
    s("topk", f(2, 5, 3), 2, 1), s("multinomial", pos(3, 5), 4, True),
    *(s(name, c(3, 4), None, 1) for name in _FFT.split()),
    *(s(name, c(2, 3, 4)) for name in _FFTN.split()),
    s("fft_rfft", x), s("fft_ihfft", x), s("fft_rfft2", f(2, 3, 4)), s("fft_rfftn", x, None, [1]),
    s("diff", x, 1, 1),
    s("diff", x, 1, 1, f(3, 1), f(3, 2)), s("glu", f(3, 6), 1), s("glu", f(4, 3), 0),
    s("nonzero", i(2, 3, 4)), s("nonzero_numpy", i(2, 3, 4)), s("masked_select", x, b(3, 4)),
    s("nonzero_static", i(2, 3, 4), size=5), s("_unique", i(9, 6)), s("_unique2", i(9, 6)),
    s("unique_dim", i(3, 4, 2), 0), s("unique_consecutive", i(3, 6)), s("histc", x, 4, -2, 2),
    s("bincount", i(5, 7)), s("trace", f(3, 3)), s("dist", x, y), s("pdist", x),
    s("equal", rare(3), rare(3)), s("allclose", rare(3), rare(3)), s("item", f()),
    s("_local_scalar_dense", f(1)), s("is_nonzero", i(2)),
]  # fmt: skip
