"""A transformers script as you have it, with one argument more: the answer is written in several threads.

    python examples/drop_in.py

The model is any chat model of transformers, untuned: it forks by rule, at the titled items of the lists that it writes.
A model that was tuned to fork brings its marks along: `medusa_apar.load("smollm2-135m")` gives model and hook in one.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import medusa_apar

NAME = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"

tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForCausalLM.from_pretrained(NAME)
hook = medusa_apar.attach(model, tokenizer=tokenizer, fork="lists")

chat = [{"role": "user", "content": "Give me a list of five tips for better sleep."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(
    **inputs, max_new_tokens=160, do_sample=False, return_dict_in_generate=True, custom_generate=hook
)

print(tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"\n{output.stats.forks} forks, {output.stats.tokens_per_step:.1f} tokens a step")
