"""The installed package against plain transformers, in a minute: the same tokens, with threads and without.

With `CXX` naming no compiler, torch runs and answers alike. Else the compiled step has to run on Linux.
"""

import os
import shutil
import sys

import torch

import medusa_apar

QUESTION = [{"role": "user", "content": "Give me three tips for better sleep."}]


def main() -> None:
    apar = medusa_apar.load("smollm2-135m", dtype="float32")
    print(f"medusa-apar {medusa_apar.__version__} from {medusa_apar.__file__}\n{apar}")
    compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    if sys.platform == "linux" or not compiler:
        assert ("torch on cpu" in str(apar)) is not compiler, f"this machine has {'a' if compiler else 'no'} compiler"
    inputs = apar.tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    start = inputs["input_ids"].shape[1]
    ours = apar.generate(**inputs, max_new_tokens=48, do_sample=False, fork=False)[0, start:]
    # Control tokens are banned where nothing forks.
    banned = [[apar.control_token_ids.fork_id], [apar.control_token_ids.child_id]]
    plain = apar.model.generate(**inputs, max_new_tokens=48, do_sample=False, bad_words_ids=banned)[0, start:]
    assert torch.equal(ours, plain), f"not the tokens of plain transformers: {ours.tolist()} against {plain.tolist()}"
    output = apar.generate(**inputs, max_new_tokens=160, do_sample=False, return_dict_in_generate=True)
    assert output.stats.forks and output.stats.tokens_per_step > 1, output.stats
    print(f"the same {len(ours)} tokens as transformers; {output.stats}")


if __name__ == "__main__":
    main()
