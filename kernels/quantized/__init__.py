"""Quantized weights: how they are stored, how they are found, and operators on them.

A `Scheme` names number format, bits and groups; a `QuantizedWeight` holds packed codes, scales and
zero points of a weight ``(N, K)``. `quantize` rounds to nearest, with or without a clipping search;
`hqq` optimises zero points; `gptq` minimises the error of products. Other methods find scales by
`find_scales` and codes by `codes.encode` and build a weight by `QuantizedWeight.from_codes`.

``graphopt::quantized_linear`` and ``graphopt::quantized_embedding`` take the stored tensors and the
fields of the scheme, all plain types, so that a graph with them can be saved. `linear` and
`embedding` call them with a weight; both read the same tensors, so a tied head is stored once.
``graphopt::quantized_experts`` (`experts`) multiplies groups of rows by weights of their own, and
``graphopt::quantized_conv`` (`conv`) convolves.

What emission may rely on:

* The tensors of `QuantizedWeight.tensors` are all that is stored, under the names of the operators'
  arguments. They are the layout ``"plain"``, which every device reads and which files hold. Nothing
  is kept beside them: what runs a call reads them where they lie, a few output channels at a time.
* Another layout is made by ``paths.Path.prepare(weight)``: tensors that take the place of the plain
  ones, which may then be freed, and ``layout=`` names it. Its scheme is the same; ``zeros`` and
  ``tensor_scale`` are None. It is of the machine that made it: prepare after loading, never save.
  Embeddings read plain tensors only, so what a tied head shares stays plain.
* ``choice.choose_layout`` says by measurement which layout is fastest for a number of rows. Within
  a layout the operator chooses the path, by measurement when a kind of call first runs.
* On a GPU the layout is plain. Paths there are Triton kernels (`triton_launch`) and torch's own
  products; each is tried against the definition before it is used (`trials`), and a warning names
  what is left out. A CUDA graph captures what was chosen before: run the model once with the same
  sizes first. A first call compiles and chooses tiles, which can take a minute.
* Paths hold to `definition` within the rounding of the input's dtype; ``"int4pack"`` also rounds
  scales to bfloat16. Integer products are exact on all of them (`integers`).
* Static activations (`static`) are quantized by a scale and a zero point that are numbers of the
  call, ``input_scale`` and ``input_zero``; `activation_ranges` finds them.
* The result has the dtype of the input, under autocast that of autocast. Gradients are those of the
  product with the dequantized weight; the stored tensors have none, and asking for one is an error.
"""

from __future__ import annotations

from graphopt.kernels.quantized.autograd import embedding, linear
from graphopt.kernels.quantized.choice import choose_layout, chosen, using
from graphopt.kernels.quantized.conv import conv
from graphopt.kernels.quantized.experts import experts
from graphopt.kernels.quantized.gptq import gptq
from graphopt.kernels.quantized.hqq import hqq
from graphopt.kernels.quantized.integers import is_exact
from graphopt.kernels.quantized.paths import PATHS, Path
from graphopt.kernels.quantized.rounding import find_scales, quantize
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.static import Static
from graphopt.kernels.quantized.weight import QuantizedWeight

__all__ = [
    "PATHS",
    "Path",
    "QuantizedWeight",
    "Scheme",
    "Static",
    "choose_layout",
    "chosen",
    "conv",
    "embedding",
    "experts",
    "find_scales",
    "gptq",
    "hqq",
    "is_exact",
    "linear",
    "quantize",
    "using",
]
