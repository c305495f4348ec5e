"""The step of a Llama-like model in compiled code, for CPUs.

`matrix.h`, `attention.h`, `step.cpp`: the code. `library.py`: compiles it once and mirrors its structs. `weights.py`: a
model's weights in its layout. `runtime.py`: a forward pass over a forest.
"""
