"""The installed package against plain transformers, in a minute: the same tokens, with threads and without.

With `CXX` naming no compiler, the torch runtime has to say so and to answer alike.
"""

import os
import shutil

import torch

import medusa_apar

QUESTION = [{"role": "user", "content": "Give me three tips for better sleep."}]


def main() -> None:
    apar = medusa_apar.load("smollm2-135m", dtype="float32")
    print(f"medusa-apar {medusa_apar.__version__} from {medusa_apar.__file__}\n{apar}")
    if "CXX" in os.environ and shutil.which(os.environ["CXX"]) is None:
        assert "torch on cpu" in str(apar), "something runs that cannot have been compiled"
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
