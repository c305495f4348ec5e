"""How a step runs: through transformers' own modules, with kernels and CUDA graphs, or in compiled code on a CPU.

runtime.py           what every runtime can do
pick.py              which one runs a model
torch_runtime.py     any model, any device, over an attention backend
attention.py         the attention backends, entered through transformers' interfaces
triton_attention.py  the backend whose attention is a kernel
cuda_graphs.py       small steps as one launch
cpu/                 models of many families in compiled code
model_state.py       whether a model still is what it was
packed_linear.py     linear layers on a CPU from weights laid out for few rows
capture.py           the hidden states that heads read, taken out of a forward pass
draft_layers.py      a drafter's layers behind the base's, over the same paths
agreement.py         whether a runtime computes what the model does
measure.py           what a step costs on this device
devices.py           which devices a model lies on
"""
