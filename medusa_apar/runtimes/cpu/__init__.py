"""The step of a model in compiled code, for CPUs.

runtime.py     a forward pass over a forest
packed_model.py  a model as compiled code reads it
layers.py      what a decoder layer is, and where each family keeps its parts
known.py       which models are computed: those that are what transformers defines
weights.py     a model's weights in the layout of the compiled code
weight_fingerprint.py  whether weights still are what was copied
mapped_weights.py  weights in a mapped file: that nobody wrote to them, without reading them
pack_files.py  packed weights on disk, mapped by the next start
drafting.py    drafting with Hydra heads
eagle3.py      drafting with an EAGLE-3 drafter
choosing.py    which tokens rows choose, in one call
library.py     compiles the code once, and mirrors its structs
step.cpp       the step
layer_pass.h   one layer of it
matrix.h       products of few rows with a matrix
int8.h         such products of int8
amx.h          the same in tiles, for many rows
bf16.h         such products of bfloat16
vectors.h      vectors of floats and of int32
product.h      whole layers, shared by the threads
attention.h    attention of rows over their paths
step_cache.h   keys and values as int16 steps
float_cache.h  keys and values as floats
int16.h        products of int16
panel16.h      such products with a tile that several rows share
descent.h      down a draft tree, level by level
hydra.h        Hydra heads over one
eagle3.h       an EAGLE-3 drafter over one
choose.h       which token a row chooses
scores.h       what processors make of its logits
noise.h        the noise of its choice
top.h          the largest of many logits
pack.h         weights into panels of int8
weight_fingerprint.h  sums over the bits of weights
team.h         threads that share a step
crowd.h        how many they are while others hold the cores
"""
