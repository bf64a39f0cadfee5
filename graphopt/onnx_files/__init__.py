"""ONNX files rewritten as they are: an ONNX file in, a verified one out.

`optimize` is the way through: `document` reads a file, `feeds` draws what it is run on, `pipeline`
runs the passes of a `recipe`, each held by `examine` to the original in ONNX Runtime (and to
float64 by `wide`, where it can run that), and the file is written when the whole holds.

Passes: `unused`, `fold`, `repeated`, `merge`, `fuse` and `quantize`, which finds `products`.
`guard` keeps the contract of a model while passes of other libraries run on it.
"""
