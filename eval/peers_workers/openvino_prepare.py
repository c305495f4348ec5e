"""A transformers folder as OpenVINO's files with int8 weights: `openvino_prepare.py FOLDER SCRATCH OUT BANNED_IDS`."""

import json
import shutil
import sys

import numpy
import openvino
from openvino import opset13
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

folder, scratch, out, banned = *sys.argv[1:4], json.loads(sys.argv[4])
OVModelForCausalLM.from_pretrained(
    folder, export=True, compile=False, quantization_config=OVWeightQuantizationConfig(bits=8)
).save_pretrained(f"{scratch}/plain")

# GenAI's generate can suppress no tokens, so the graph does: a constant is added to the logits.
core = openvino.Core()
model = core.read_model(f"{scratch}/plain/openvino_model.xml")
result = model.output("logits").node
logits = result.input_value(0)
mask = numpy.zeros((1, 1, logits.get_partial_shape()[2].get_length()), numpy.float32)
mask[..., banned] = -1e9
masked = opset13.add(logits, opset13.constant(mask))
masked.output(0).set_names(logits.get_names())
result.input(0).replace_source_output(masked.output(0))
openvino.save_model(model, f"{out}/openvino_model.xml", compress_to_fp16=False)
for name in ("config.json", "generation_config.json"):
    shutil.copy(f"{scratch}/plain/{name}", out)
