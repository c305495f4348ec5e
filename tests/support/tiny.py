"""Tiny random models of many families, and drafters and references the exactness tests share."""

from __future__ import annotations

import json
import string
from collections.abc import Hashable
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    LogitsProcessorList,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from medusa_apar import ControlTokens, DraftTree
from medusa_apar.drafting.drafter import Drafter
from medusa_apar.threads.control_tokens import DEFAULT_MAX_DEPTH, ControlTokensLogitsProcessor
from medusa_apar.triton_kernels.reference import sample

VOCAB, EOS, FORK, CHILD = 61, 2, 3, 4
CONTROL = ControlTokens(FORK, CHILD)

_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_IDS = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}

# Heads of 32 dimensions: the CPU runtime can run it.
WIDE = _LLAMA_LIKE | {"hidden_size": 96, "intermediate_size": 112, "num_attention_heads": 6, "head_dim": 32}

CONFIGS = {
    "llama": lambda: LlamaConfig(**_LLAMA_LIKE, **_IDS),
    "wide_llama": lambda: LlamaConfig(**WIDE, **_IDS),
    # Windows shorter than the text: masked by path position, or the test fails.
    "mistral": lambda: MistralConfig(**_LLAMA_LIKE, **_IDS, sliding_window=7),
    "qwen2": lambda: Qwen2Config(**_LLAMA_LIKE, **_IDS),
    "qwen3": lambda: Qwen3Config(**_LLAMA_LIKE, **_IDS, head_dim=8),
    "gemma2": lambda: Gemma2Config(**_LLAMA_LIKE, **_IDS, head_dim=8, sliding_window=6),
    "gemma3": lambda: Gemma3TextConfig(
        **_LLAMA_LIKE, **_IDS, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: Phi3Config(**_LLAMA_LIKE, **_IDS),
    "gpt_neox": lambda: GPTNeoXConfig(
        **{key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}, **_IDS
    ),
    "olmo2": lambda: Olmo2Config(**_LLAMA_LIKE, **_IDS),
    # Attention sinks, mixture of experts.
    "gpt_oss": lambda: GptOssConfig(
        **_LLAMA_LIKE, **_IDS, head_dim=8, sliding_window=6, num_local_experts=4, num_experts_per_tok=2
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, **_IDS),
}


def tiny_model(family: str = "llama", seed: int = 0, scale: float = 3.0, **bias: float) -> PreTrainedModel:
    """Random weights, scaled up so that the text varies and ties do not occur. `bias` nudges "fork" and "eos"."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    if bias:
        head = torch.nn.Linear(model.config.hidden_size, VOCAB, bias=True)
        head.weight.data = model.get_output_embeddings().weight.data.clone()
        head.bias.data.zero_()
        head.bias.data[FORK], head.bias.data[EOS] = bias.get("fork", 0.0), bias.get("eos", 0.0)
        model.set_output_embeddings(head)
    return model


def forking_model(seed: int, family: str = "llama") -> PreTrainedModel:
    """Forks often, deep, and ends some of its threads."""
    return tiny_model(family, seed, scale=6.0, fork=0.9, eos=0.4)


def forking_folder(folder: Path, family: str = "llama") -> Path:
    """A saved model that forks, its tokenizer and its control ids: what `load` takes."""
    model = forking_model(3, family)
    biased = model.get_output_embeddings()
    plain = torch.nn.Linear(biased.in_features, VOCAB, bias=False)  # a Llama folder has no bias to keep
    plain.weight.data = biased.weight.data.clone()
    plain.weight.data[FORK] *= 3
    model.set_output_embeddings(plain)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "apar_config.json").write_text(json.dumps({"fork_token_id": FORK, "child_token_id": CHILD}))
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, one character per id: what the tiny models write is text."""
    characters = [*string.ascii_letters, "Ġ", ".", ",", "0"]
    vocabulary = {
        token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<fork>", "<child>", *characters])
    }
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    assert len(vocabulary) == VOCAB
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")


def prompts(rows: int, length: int, seed: int = 0, ragged: bool = False) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, left-padded by 0, 2, 4, ... tokens if ragged."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(input_ids)
    if ragged:
        for row in range(rows):
            mask[row, : 2 * row] = 0
            input_ids[row, : 2 * row] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def plain_continuation(model, path_ids: list[int], length: int, prompt_length: int, **kwargs) -> list[int]:
    """What transformers' own greedy decoding writes behind a path under the fork rule."""
    rule = ControlTokensLogitsProcessor(CONTROL, prompt_length, kwargs.pop("fork", True), DEFAULT_MAX_DEPTH)
    path = torch.tensor([path_ids])
    out = model.generate(
        input_ids=path,
        attention_mask=torch.ones_like(path),
        max_new_tokens=length,
        do_sample=False,
        logits_processor=LogitsProcessorList([rule]),
        **kwargs,
    )
    return out[0, len(path_ids) :].tolist()


_continued: WeakKeyDictionary[PreTrainedModel, dict[tuple, list[int]]] = WeakKeyDictionary()


def known_continuation(model, path_ids: list[int], length: int, prompt_length: int) -> list[int]:
    """`plain_continuation`, decoded once for the same weights and path: many runs of a model have the same threads.

    Not for models whose weights are changed through `.data`, which torch does not count as a change.
    """
    weights = tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())
    known = _continued.setdefault(model, {})
    key = weights, model.generation_config.to_json_string(), prompt_length, *path_ids
    if len(known.get(key, ())) < length:
        known[key] = plain_continuation(model, path_ids, length, prompt_length)
    return known[key][:length]


def assert_threads_are_plain(model, paragraph_trees) -> int:
    """Promise 1, thread by thread; returns how many threads were compared."""
    compared = 0
    for tree in paragraph_trees:
        for thread in tree.threads:
            if thread.token_ids:
                expected = known_continuation(model, thread.path_ids, len(thread.token_ids), tree.trunk.num_forced)
                assert thread.token_ids == expected, thread
                compared += 1
    return compared


def assert_chosen_tokens_are_the_models(model, trees, seed=None, process=lambda ids, scores: scores) -> int:
    """Promises 1 and 2: behind its path, insertions included, every token a thread chose is what the model chooses."""
    compared = 0
    for tree in trees:
        for thread in tree.threads:
            path, first = thread.path_ids + thread.token_ids, len(thread.path_ids)
            with torch.no_grad():
                logits = model(torch.tensor([path])).logits[0].float()
            for place in range(first, len(path)):
                index = place - first + thread.num_forced
                if index in thread.inserted:
                    continue
                scores = process(torch.tensor([path[:place]]), logits[place - 1][None])[0]
                if seed is None:
                    chosen = int(scores.argmax())
                else:
                    chosen = sample(scores, seed, thread.key, thread.start + index)
                assert chosen == path[place], (thread, index)
                compared += 1
    return compared


class WeightlessHeads:
    """Draft heads that are their own drafter (`medusa_apar.drafting.drafter`); `propose` is what they differ in."""

    taps = ()
    num_heads, input_size = 3, _LLAMA_LIKE["hidden_size"]
    acceptance: list[list[float]] | None = [[0.8, 0.1, 0.05]] * 3

    @property
    def shape_key(self) -> Hashable:
        return type(self).__name__, self.num_heads

    @property
    def key(self) -> Hashable:
        return id(self)

    def check_matches(self, model: PreTrainedModel) -> None: ...

    def refresh(self) -> None: ...

    def drafter(self, packing: str | None = None, kernels: bool = False) -> Drafter:
        return self

    def propose(
        self, hidden_states: torch.Tensor, root_ids: torch.Tensor, tree: DraftTree, min_probability: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class RecallHeads(WeightlessHeads):
    """Heads that remembers a finished run: nearest hidden state -> the tokens that followed it there.

    Guesses so well that runs of several tokens, `[Fork]` among them, are accepted at once; every `wrong_every`-th
    guess is spoilt.
    """

    def __init__(self, model: PreTrainedModel, paragraph_trees, num_heads: int = 3, wrong_every: int = 5):
        self.num_heads, self.wrong_every, self._calls = num_heads, wrong_every, 0
        self.input_size = model.config.get_text_config().hidden_size
        self.acceptance = [[0.8, 0.1, 0.05, 0.03]] * num_heads
        keys, futures = [], []
        for thread in (thread for tree in paragraph_trees for thread in tree.threads):
            ids = thread.path_ids + thread.token_ids
            with torch.no_grad():
                hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
            for position in range(len(thread.path_ids) - 1, len(ids) - 1):
                future = ids[position + 2 : position + 2 + num_heads]
                keys.append(hidden[position])
                futures.append(future + [0] * (num_heads - len(future)))
        self._keys, self._futures = torch.stack(keys), torch.tensor(futures)

    def propose(
        self, hidden_states: torch.Tensor, root_ids: torch.Tensor, tree: DraftTree, min_probability: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nearest = torch.cdist(hidden_states, self._keys).argmin(dim=1)
        first = self._futures[nearest][..., None]
        self._calls += 1
        if self._calls % self.wrong_every == 0:
            first = (first + 1) % VOCAB
        table = (first + torch.arange(tree.top_k)) % VOCAB
        token_ids = table[:, tree.depths, tree.ranks]
        return token_ids, torch.zeros(token_ids.shape)
