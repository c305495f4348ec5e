"""A GGUF file requantised to Q8_0 by llama.cpp itself: `llama_prepare.py FILE OUT`."""

import sys

import llama_cpp

params = llama_cpp.llama_model_quantize_default_params()
params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
params.allow_requantize = True
if status := llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params):
    sys.exit(f"llama_model_quantize returned {status}")
