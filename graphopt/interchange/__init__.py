"""Quantized checkpoints of other tools, read and written: codes and scales stay what they are.

A *layout* says by which tensors a file holds one linear layer: `compressed_tensors`, `gptq`, and
the blocks of `gguf`. Each reads a `QuantizedWeight` of its tensors and, but for GGUF, writes them.
`folder` finds the quantized layers of a Hugging Face folder and puts `modules.QuantizedLinear` in
their places; `export` writes such a folder from an optimized model.
"""
