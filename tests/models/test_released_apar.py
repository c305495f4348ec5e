"""The APAR checkpoints that their authors released (Vicuna, THUDM/apar-7b) load as they are: a tiny one of their make.

32000 sentencepiece-like tokens and `[SplitMask]`, `[SplitSop]` added behind them, a Llama of 32002 rows, and `medusa/`
with a pickle of heads whose two residual blocks are one, beside a config that lies.
"""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, PreTrainedTokenizerFast

from medusa_apar.heads.convert import convert
from medusa_apar.loading import load
from medusa_apar.threads.control_tokens import ControlTokens
from medusa_apar.verify.control_processor import ControlTokensLogitsProcessor

FORK, CHILD, EOS, HIDDEN, PIECES, HEADS = 32000, 32001, 2, 16, 32000, 5
WORDS = 40  # the ids 259 to 298, of which the model writes


def save_tokenizer(folder):
    """Llama's: bytes, pieces with a leading bar, <s> in front of a prompt."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [f"\u2581w{index}" for index in range(PIECES - len(pieces))]
    inner = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_tokens(["[SplitMask]", "[SplitSop]"])
    assert fast.convert_tokens_to_ids(["[SplitMask]", "[SplitSop]"]) == [FORK, CHILD]
    fast.save_pretrained(folder)


def save_model(folder):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=PIECES + 2,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
        head = model.lm_head.weight
        keep = head[[EOS, FORK, CHILD, *range(259, 259 + WORDS)]].clone()
        head.zero_()  # the others are never the likeliest
        head[[EOS, FORK, CHILD, *range(259, 259 + WORDS)]] = keep
        head[FORK] *= 2.5
    model.half().save_pretrained(folder)


def save_heads(folder):
    """As medusa-llm 0.1 does: `[ResBlock] * 2` repeats one object, and its config is the class's default."""
    folder.mkdir()
    heads = torch.nn.ModuleList()
    for _ in range(HEADS):
        block = torch.nn.Module()
        block.linear = torch.nn.Linear(HIDDEN, HIDDEN)
        heads.append(torch.nn.Sequential(*[block] * 2, torch.nn.Linear(HIDDEN, PIECES + 2, bias=False)))
    torch.save(heads.half().state_dict(), folder / "medusa_lm_head.pt")
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "/mnt/authors/apar-7b"}
    (folder / "config.json").write_text(json.dumps(config))
    return heads


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released") / "apar-7b"
    save_model(folder)
    save_tokenizer(folder)
    return folder, save_heads(folder / "medusa")


@pytest.fixture(scope="module")
def apar(released):
    with pytest.warns(UserWarning, match="medusa_num_heads is 2 in the config but 5 in the file"):
        return load(released[0])


def test_every_part_arrives(apar, released):
    assert apar.control_token_ids == ControlTokens(FORK, CHILD)
    assert apar.model.get_input_embeddings().num_embeddings == PIECES + 2 == len(apar.tokenizer)
    assert apar.tokenizer("w3 w5")["input_ids"] == [1, 262, 264]
    assert (apar.heads.num_heads, apar.heads.num_layers) == (HEADS, 2)
    for head, (block, again, unembedding) in enumerate(released[1]):
        assert block is again
        for layer in range(2):
            assert torch.equal(apar.heads.blocks[layer].weight[head], block.linear.weight.float())
        assert torch.equal(apar.heads.unembedding[head], unembedding.weight.float())


def test_it_forks_and_drafts_and_writes_what_transformers_writes(apar):
    inputs = apar.tokenizer("w1 w2 w9 w3", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 60, "do_sample": False}
    found = apar.generate(**inputs, **options, return_dict_in_generate=True)
    tree = found.paragraph_tree[0]
    threads = [thread for thread in tree.threads if thread.token_ids]
    assert len(threads) > 1
    for thread in threads:
        rule = ControlTokensLogitsProcessor(apar.control_token_ids, length)
        path = torch.tensor([thread.path_ids])
        expected = apar.model.generate(
            path,
            attention_mask=torch.ones_like(path),
            max_new_tokens=len(thread.token_ids),
            do_sample=False,
            logits_processor=LogitsProcessorList([rule]),
        )
        assert thread.token_ids == expected[0, path.shape[1] :].tolist()
    text = apar.tokenizer.decode(found.sequences[0, length:], skip_special_tokens=True)
    assert "w" in text and "Split" not in text
    plain = apar.generate(**inputs, **options, fork=False)
    banned = apar.model.generate(**inputs, **options, suppress_tokens=[FORK, CHILD])
    assert torch.equal(plain, banned)


def test_convert_reads_and_rewrites_the_heads(released, tmp_path):
    read, written, notes = convert(released[0], "v1", tmp_path / "v1", file_format="pt")
    assert (read.layout, read.heads, read.layers) == ("apar", HEADS, 2) == ("apar", written.heads, written.layers)
    assert len(notes) == 2 and "medusa_num_heads is 2" in notes[0]
    original = torch.load(released[0] / "medusa" / "medusa_lm_head.pt", weights_only=True)
    again = torch.load(tmp_path / "v1" / "medusa_lm_head.pt", weights_only=True)
    assert original.keys() == again.keys()
    assert all(torch.equal(original[key], again[key]) for key in original)
