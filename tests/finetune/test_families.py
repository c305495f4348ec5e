"""A packed row's losses are those of the model's own forward over each path, whatever its family."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, GPTNeoXConfig, GraniteConfig, PhiConfig

from medusa_apar.finetune.adapter import attach_lora, check_forward, control_rows, label_losses
from medusa_apar.finetune.packing import Tokens, join, pack_threads
from tests.support.models import CHILD, CONFIGS, EOS, FORK, IDS, LLAMA_LIKE, VOCAB
from tests.support.tokenizers import tiny_tokenizer

TOKENS = Tokens(FORK, CHILD, EOS)
SCALED = {
    "granite": lambda: GraniteConfig(**LLAMA_LIKE, **IDS, logits_scaling=8.0, embedding_multiplier=6.0),
    "cohere": lambda: CohereConfig(**LLAMA_LIKE, **IDS, logit_scale=0.0625),
    "gpt_neox tied": lambda: GPTNeoXConfig(
        **{k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}, **IDS, tie_word_embeddings=True
    ),
    "phi": lambda: PhiConfig(**LLAMA_LIKE, **IDS),  # an unembedding with a bias
}
FAMILIES = CONFIGS | SCALED


def model_of(family: str):
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config._attn_implementation = "eager"  # transformers' sdpa leaves out soft caps
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            model.get_output_embeddings().bias.normal_()
    return model


def threads(seed: int):
    """A trunk of 24, a child under a fork at 9, a grandchild: longer than any window of CONFIGS."""
    ids = torch.randint(5, VOCAB, (3, 24), generator=torch.Generator().manual_seed(seed)).tolist()
    ids[0][9] = ids[1][6] = FORK
    ids[1][0] = ids[2][0] = CHILD
    return [(ids[0], -1, 0), (ids[1][:14], 0, 9), (ids[2][:12], 1, 6)]


def paths(threads):
    """Per thread its whole path, and where in it the thread's own tokens begin."""
    found: list[tuple[list[int], int]] = []
    for ids, parent, fork in threads:
        if parent < 0:
            found.append((ids, 0))
        else:
            above, start = found[parent]
            above = above[: start + fork + 1]
            found.append((above + ids, len(above)))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_plain_forward_of_each_path(family):
    tuned = attach_lora(model_of(family), tiny_tokenizer(), TOKENS, rank=4)
    check_forward(tuned)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    trees = [threads(0), threads(1)]
    ours = label_losses(tuned, join([pack_threads(tree, 4) for tree in trees]), TOKENS)
    head = tuned.get_base_model().get_output_embeddings()
    bias = getattr(getattr(head, "token_adapter", head).base_layer, "bias", None)
    expected, of_rows = [], torch.zeros(())
    for tree in trees:
        for index, (path, start) in enumerate(paths(tree)):
            logits = tuned(input_ids=torch.tensor([path])).logits[0]
            if bias is not None:
                logits = logits + bias  # which peft's own forward leaves out
            first = max(start, 3 if index == 0 else 0)
            labels = torch.tensor(path[first + 1 :])
            losses = nn.functional.cross_entropy(logits[first:-1], labels, reduction="none")
            expected.append(losses)
            of_rows = of_rows + losses.sum()
    torch.testing.assert_close(ours.values, torch.cat(expected), atol=1e-4, rtol=1e-4)
    gradients = torch.autograd.grad(ours.values.sum(), control_rows(tuned))
    torch.testing.assert_close(gradients, torch.autograd.grad(of_rows, control_rows(tuned)), atol=1e-3, rtol=1e-3)


def test_a_family_that_makes_its_logits_otherwise_is_refused():
    model = model_of("llama")
    tuned = attach_lora(model, tiny_tokenizer(), TOKENS, rank=4)
    forward = type(model).forward

    class Doubling(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = 2 * output.logits
            return output

    model.__class__ = Doubling
    with pytest.raises(NotImplementedError, match="makes its logits in a way that training does not know"):
        check_forward(tuned)
