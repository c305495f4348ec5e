"""The step of a Llama-like model in compiled code, for CPUs.

`step.cpp` and what it includes: the code. `library.py`: compiles it once and mirrors its structs. `weights.py`: a
model's weights in its layout. `weight_fingerprint.py`: whether weights still are what was copied. `known.py`: which
models the code computes. `drafting.py`: Hydra heads in compiled code. `runtime.py`: a forward pass over a forest.
"""
