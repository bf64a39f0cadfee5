"""``graphopt::rounded_attention``: attention on operands that are rounded to half precision.

``softmax(scale q k^T + mask) v`` where q, k and v, and on the way scores and weights too, may be
rounded to 16 bits; sums are float32. (Vaswani et al. 2017, equation 1; rounding as in mixed
precision, Micikevicius et al. 2018, section 3.3.)

It is torch's operator on cast operands, which has fused kernels on GPUs. On a CPU that multiplies
bfloat16, that kernel is no faster than in float32; there `graphopt::half_attention` takes a few
heads, or rows of them, at a time: two batched products by oneDNN with a softmax between them, in
memory that stays in the cache and is used again. On two cores of a Zen 4, for 1 to 8 sequences of
128 to 1,024 tokens in 9 or 12 heads of 32 or 64, it takes 0.55 to 0.68 of the time of torch's
kernel in float32 where operands are rounded already, and 0.72 to 0.92 where it rounds them.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MOST = 1 << 21
"""Scores that are held at once: 4 MB."""
FEW = 32
"""Rows of a group of heads below which float32 is faster: a token behind others."""
_KEPT = 1 << 22
"""Numbers of a buffer that is kept for the next call, at the most."""
_LEAST_ROWS = 16

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "rounded_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
    "float? scale, bool enable_gqa, str activations) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "half_attention(Tensor query, Tensor key, Tensor value, Tensor? added, Tensor? hidden, "
    "bool is_causal, float scale, ScalarType dtype, bool side_by_side) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _rounded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    activations: str,
) -> Tensor:
    """Shapes and broadcasting as torch has them; the result has the query's dtype.

    Raises:
        TypeError: the query is not floating.
        ValueError: ``activations`` is unknown.
    """
    if not query.is_floating_point():
        raise TypeError(f"the query is {query.dtype}; it is float32, float64 or half precision")
    operands = (query, key, value)
    if activations == "none":
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if activations not in DTYPES:
        raise ValueError(f"activations {activations!r} are not none, {' or '.join(DTYPES)}")
    dtype = DTYPES[activations]
    if _fits(operands, attn_mask) and is_fast(dtype):
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        turned = query.stride(1) <= query.stride(2)
        return half_attention(
            *operands, *_added(attn_mask, dtype), is_causal, factor, dtype, turned
        )  # type: ignore[no-any-return]
    q, k, v = (_rounded(tensor, dtype) for tensor in operands)
    if attn_mask is not None and attn_mask.is_floating_point():  # halves hold less: -1e9 hides
        attn_mask = attn_mask.to(torch.promote_types(q.dtype, torch.float32))
    made = F.scaled_dot_product_attention(
        q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return made.to(query.dtype)


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``; float64 keeps its width, so that nothing else is rounded."""
    narrow = tensor.to(dtype)
    return narrow.to(tensor.dtype) if tensor.dtype == torch.float64 else narrow


def _fits(operands: tuple[Tensor, ...], mask: Tensor | None) -> bool:
    """Whether `half_attention` has them: four axes, on the CPU, and nobody asks for gradients."""
    plain = all(
        t.dim() == 4 and t.device.type == "cpu" and t.dtype != torch.float64 for t in operands
    )
    given = operands if mask is None else (*operands, mask)
    asked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    alike = operands[0].shape[-1] == operands[2].shape[-1]
    return plain and alike and not asked


@cache
def is_fast(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU has instructions for products in half precision."""
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    wide = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and (wide or not x86)


class _Piece(NamedTuple):
    """Some rows of the queries of some groups of heads, or several examples whole; one group reads
    one head of keys and values."""

    examples: slice
    groups: slice
    rows: slice


def _pieces(batch: int, groups: int, each: int, rows: int, columns: int) -> Iterator[_Piece]:
    """All of them, of at most `MOST` scores unless `_LEAST_ROWS` rows have more."""
    of_row = max(each * columns, 1)
    high = max(1, min(rows, max(_LEAST_ROWS, MOST // of_row)))
    wide = max(1, min(groups, MOST // (of_row * high)))
    whole = (high, wide) == (rows, groups)
    deep = max(1, MOST // (of_row * high * wide)) if whole else 1
    for examples in _slices(batch, deep):
        for part in _slices(groups, wide):
            for some in _slices(rows, high):
                yield _Piece(examples, part, some)


def _slices(extent: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, extent)) for start in range(0, extent, step)]


def _half_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Tensor | None,
    hidden: Tensor | None,
    is_causal: bool,
    scale: float,
    dtype: torch.dtype,
    side_by_side: bool,
) -> Tensor:
    """``(B, H, L, D)``, ``(B, h, S, D)`` twice, and a mask as `_added` has it: ``(B, H, L, D)`` in
    the query's dtype, ``side_by_side`` with the heads of a token next to each other in memory."""
    made = _result(query, side_by_side)
    each = query.shape[1] // key.shape[1]
    if query.dtype == torch.float32 and each * query.shape[2] < FEW:
        made.copy_(F.scaled_dot_product_attention(
            query, key.to(query.dtype), value.to(query.dtype),
            None if added is None else added.to(query.dtype),
            is_causal=is_causal, scale=scale, enable_gqa=each > 1,
        ))  # fmt: skip
    else:
        _attend(made, query, key, value, added, is_causal, scale, dtype)
    is_any = hidden is not None and bool(hidden.any())
    return made.masked_fill_(hidden, 0) if is_any else made


def _attend(
    made: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Tensor | None,
    is_causal: bool,
    scale: float,
    dtype: torch.dtype,
) -> None:
    """Write the result, piece by piece."""
    batch, _, rows, width = query.shape
    groups, columns = key.shape[1:3]
    each = query.shape[1] // groups
    held: tuple[Any, ...] = ()
    for piece in _pieces(batch, groups, each, rows, columns):
        if held[:2] != piece[:2]:
            read = (tensor[piece.examples, piece.groups] for tensor in (key, value))
            pair = zip(("keys", "values"), read, strict=True)
            held = (*piece[:2], *(_narrow(n, t, 1, dtype).flatten(0, 1) for n, t in pair))
        seen = min(columns, piece.rows.stop) if is_causal else columns
        keys, values = held[2][:, :seen], held[3][:, :seen]
        heads_read = slice(piece.groups.start * each, piece.groups.stop * each)
        place = piece.examples, heads_read, piece.rows
        asked, out = query[place], made[place]
        stacked = _narrow("query", asked, scale, dtype).view(len(keys), -1, width)
        part = None if added is None else _part(added, place)[..., :seen]
        scores = _scores(stacked, keys, part, asked.shape)
        if is_causal:
            _hide_later(scores.view(*asked.shape[:3], seen), piece.rows)
        torch.ops.aten._softmax.out(scores, -1, False, out=scores)
        _mix(scores, values, out)


def _result(query: Tensor, side_by_side: bool) -> Tensor:
    batch, heads, rows, width = query.shape
    if not side_by_side:
        return query.new_empty(query.shape)
    return query.new_empty(batch, rows, heads, width).transpose(1, 2)


def _scores(stacked: Tensor, keys: Tensor, mask: Tensor | None, asked: torch.Size) -> Tensor:
    """``(e h, n L, S)`` of ``(e h, n L, D)`` and ``(e h, S, D)``; a mask ``(e, H, L, S)`` is added
    by the product where it need not be repeated for that."""
    out = _space("scores", (len(keys), stacked.shape[1], keys.shape[1]), stacked.dtype)
    turned = keys.transpose(1, 2)
    if mask is not None and mask.shape[1:3] == (1, 1):
        each = mask.expand(asked[0], len(keys) // asked[0], 1, -1).reshape(len(keys), 1, -1)
        return torch.baddbmm(each, stacked, turned, out=out)
    if mask is not None and mask.shape[:2] == (1, 1) and asked[:2] == (1, len(keys)):
        return torch.baddbmm(mask[0], stacked, turned, out=out)
    torch.bmm(stacked, turned, out=out)
    if mask is not None:
        out.view(*asked[:3], -1).add_(mask)
    return out


def _mix(weights: Tensor, values: Tensor, out: Tensor) -> None:
    """The product, into ``(e, H, L, D)`` of any layout and dtype."""
    if out.is_contiguous() and out.dtype == weights.dtype:
        torch.bmm(weights, values, out=out.view(*weights.shape[:2], -1))
        return
    space = _space("mixed", out.shape, weights.dtype)
    torch.bmm(weights, values, out=space.view(*weights.shape[:2], -1))
    out.copy_(space)


def _added(mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """What is added to scores, finite numbers of four axes, and the rows that see nothing, which
    get zeros, ``(..., 1)``; one row where it is the same for all."""
    if mask is None:
        return None, None
    least, lowest = _shared(mask), torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        return torch.where(least, zero, lowest), ~least.any(-1, keepdim=True)
    hidden = (least == -torch.inf).all(-1, keepdim=True)
    return least.to(dtype).clamp_min(lowest), hidden


def _shared(mask: Tensor) -> Tensor:
    while mask.dim() < 4:
        mask = mask[None]
    return mask[:, :, :1] if mask.stride(2) == 0 else mask


def _part(tensor: Tensor, place: tuple[slice, ...]) -> Tensor:
    """What a piece reads of a tensor that may have one of an axis for all."""
    sizes = zip(place, tensor.shape, strict=False)
    return tensor[tuple(part if size > 1 else slice(None) for part, size in sizes)]


def _hide_later(scores: Tensor, rows: slice) -> None:
    """Columns behind the row, of scores ``(..., rows, seen)`` that start at column 0."""
    last = scores[..., rows.start :]
    later = torch.ones(last.shape[-2:], dtype=torch.bool).triu(1)
    last.masked_fill_(later, torch.finfo(scores.dtype).min)


def _narrow(name: str, tensor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The tensor times a factor, contiguous: itself, or a copy in memory that is used again."""
    if scale == 1 and tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    space = _space(name, tensor.shape, dtype)
    return space.copy_(tensor) if scale == 1 else torch.mul(tensor, scale, out=space)


_spaces = threading.local()


def _space(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for one piece, the same for the next: new pages would take longer than products."""
    count = torch.Size(shape).numel()
    if count > _KEPT:
        return torch.empty(shape, dtype=dtype)
    held: dict[Any, Tensor] = _spaces.__dict__
    found = held.get((name, dtype))  # type: ignore[call-overload]
    if found is None or len(found) < count:
        with torch.inference_mode(mode=False):  # calls in other modes use it too
            found = held[name, dtype] = torch.empty(count, dtype=dtype)  # type: ignore[index]
    return found[:count].view(shape)


_library.impl("rounded_attention", _rounded_attention, "CompositeImplicitAutograd")
_library.impl("half_attention", _half_attention, "CPU")
torch.library.register_fake(
    "graphopt::half_attention", lambda query, *others: _result(query, others[-1]), lib=_library
)

rounded_attention: Any = torch.ops.graphopt.rounded_attention.default
half_attention: Any = torch.ops.graphopt.half_attention.default


def cast_before(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    activations: str,
) -> Tensor:
    """The operator where products in half precision are fast, for Inductor: it rounds, scales and
    lays out where operands are made, and prepares a mask once for all layers that have it."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = DTYPES[activations]
    narrow = tuple(t.to(dtype).contiguous() for t in (query * factor, key, value))
    if not _fits(narrow, mask):
        made = rounded_attention(*narrow, mask, is_causal, 1.0, enable_gqa, activations)
        return made.to(query.dtype)  # type: ignore[no-any-return]
    made = half_attention(*narrow, *_added(mask, dtype), is_causal, 1.0, dtype, False)
    return made.to(query.dtype)  # type: ignore[no-any-return]
