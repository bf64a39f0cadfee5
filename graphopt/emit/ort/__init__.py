"""Regions of a program in ONNX Runtime, the rest in torch: the target ``"onnxruntime"``.

`nodes` says which nodes may be tried, `regions` puts them into as few convex regions as there can
be, and `models` translates each. What ONNX Runtime takes is found by giving it to ONNX Runtime: a
region that it refuses is taken apart by `probing`, kind of operator by kind of operator. `sessions`
opens what was translated over the memory of torch's own weights, `call` runs it on torch tensors,
and `lowering` keeps what is faster here and puts the whole in place where it verifies.
"""
