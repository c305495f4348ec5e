"""The compiled step: transformers' tokens, a row's own bits, and what is refused."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config

import medusa_apar
from medusa_apar import DraftTree
from medusa_apar.cpu import library
from medusa_apar.cpu.runtime import CpuRuntime, refusal
from medusa_apar.forest import Forest, Stem
from medusa_apar.heads import HydraHeads
from medusa_apar.kv_pool import KVPool
from medusa_apar.paragraph_tree import ParagraphTree
from medusa_apar.slot_ledger import SlotLedger
from medusa_apar.torch_runtime import TorchRuntime
from tests.tiny import CHILD, CONTROL, EOS, FORK, VOCAB, assert_threads_are_plain, prompts, tiny_model

KINDS = ("float32", "bfloat16", "int8")
SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 112, "num_hidden_layers": 3, "head_dim": 32},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0},
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama, 5 queries a head": lambda: LlamaConfig(
        **{**SIZES, "num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 160}
    ),
    "llama, no groups": lambda: LlamaConfig(**{**SIZES, "num_key_value_heads": 6, "head_dim": 64}),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=7),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2, windows": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
}


def model_of(name="llama", seed=0, **bias):
    from tests import tiny

    tiny.CONFIGS["cpu"] = CONFIGS[name]
    try:
        model = tiny_model("cpu", seed, scale=6.0, **bias)
    finally:
        del tiny.CONFIGS["cpu"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and float(parameter.abs().max()) == 0:  # biases that a fresh model has at zero
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_equals_transformers(name, rows):
    model = model_of(name, seed=rows)
    inputs = prompts(rows, 9, seed=rows, ragged=True)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    for heads in (None, HydraHeads.random(model, 3, seed=rows, taps=(1,))):
        apar = medusa_apar.attach(model, heads, runtime="cpu")
        assert isinstance(apar.runtime, CpuRuntime)
        actual = model.generate(**inputs, do_sample=False, max_new_tokens=24, custom_generate=apar)
        assert torch.equal(actual, expected)


def test_threads_are_plain():
    model = model_of(seed=3, fork=1.5, eos=0.5)
    apar = medusa_apar.attach(model, HydraHeads.random(model, 3), CONTROL, runtime="cpu", budget=24)
    out = model.generate(
        **prompts(2, 9), do_sample=False, max_new_tokens=48, custom_generate=apar, return_dict_in_generate=True
    )
    assert assert_threads_are_plain(model, out.paragraph_tree) > 4


def path_logits(runtime, ids):
    """[len(ids), vocab], a token a step: nothing beside it, nothing drafted."""
    ledger, trunk = SlotLedger(KVPool()), ParagraphTree(ids).trunk
    logits = []
    with runtime.running():
        for stop in range(1, len(ids) + 1):
            forest = Forest([[Stem(trunk, stop)]], ledger, torch.device("cpu"))
            logits.append(runtime.forward(forest, ledger.pool)[0].clone())
    return torch.cat(logits)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_rows_bits_depend_on_its_path_alone(data):
    kind = data.draw(st.sampled_from(KINDS))
    runtime = RUNTIMES[kind]
    ids = st.integers(5, VOCAB - 1)
    requests, expected = [], []
    ledger = SlotLedger(KVPool())
    ledger.pool.allocate(np.arange(data.draw(st.integers(0, 9))))  # slots are not where they would be alone
    for _ in range(data.draw(st.integers(1, 3))):
        prompt = data.draw(st.lists(ids, min_size=2, max_size=20))
        size = data.draw(st.integers(0, 6))
        drafts = data.draw(st.lists(ids, min_size=size, max_size=size))
        trunk = ParagraphTree(prompt).trunk
        cached = data.draw(st.integers(0, len(prompt) - 1))
        if cached:
            with runtime.running():
                forest = Forest([[Stem(trunk, cached)]], ledger, torch.device("cpu"))
                runtime.forward(forest, ledger.pool)
        tree = DraftTree.likeliest(8).first(size) if size else DraftTree([])
        requests.append([Stem(trunk, len(prompt), draft_tree=tree, draft_tokens=drafts)])
        expected.append(path_logits(runtime, prompt)[-1])
        for node in range(size):
            lineage = [drafts[i] for i in np.flatnonzero(tree.ancestors[node])]
            expected.append(path_logits(runtime, prompt + lineage)[-1])
    with runtime.running():
        logits, _ = runtime.forward(Forest(requests, ledger, torch.device("cpu")), ledger.pool)
    assert torch.equal(logits, torch.stack(expected))


RUNTIMES = {kind: CpuRuntime(model_of("mistral", seed=5), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_heads_have_the_bits_of_one_token_after_another(kind):
    """No tie can fall the other way: in every precision each thread is what its path alone gives."""
    model = model_of(seed=3, fork=1.5, eos=0.5)
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    heads = HydraHeads.random(model, 3)
    apar = medusa_apar.attach(
        model, heads, CONTROL, runtime="cpu", quantize="int8" if kind == "int8" else None, budget=20, max_threads=5
    )
    assert apar.runtime.kind == kind
    out = apar.generate(**prompts(2, 9), do_sample=False, max_new_tokens=40, return_dict_in_generate=True)
    threads = [thread for tree in out.paragraph_tree for thread in tree.threads if thread.token_ids]
    assert len(threads) > 3
    for thread in threads:
        ids = thread.path_ids + thread.token_ids
        logits = path_logits(apar.runtime, ids[:-1])[len(thread.path_ids) - 1 :]
        logits[:, CHILD] = -torch.inf
        for row, before in zip(logits, ids[len(thread.path_ids) - 1 :], strict=False):
            if before in (FORK, CHILD) or thread.depth >= apar.max_depth:
                row[FORK] = -torch.inf
        assert logits.argmax(-1).tolist() == thread.token_ids


def test_int8_is_transformers_on_the_rounded_weights():
    model = model_of("qwen2", seed=8)
    inputs = prompts(2, 9, seed=1)
    apar = medusa_apar.attach(model, quantize="int8")
    ours = apar.generate(**inputs, do_sample=False, max_new_tokens=24)
    from medusa_apar.cpu.weights import PackedMatrix

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(PackedMatrix(module.weight, "int8").dense())
    assert torch.equal(ours, model.generate(**inputs, do_sample=False, max_new_tokens=24))


def test_hidden_states_and_taps_are_those_of_the_torch_runtime():
    model = model_of(seed=2)
    forests = []
    for runtime in (CpuRuntime(model, "float32"), TorchRuntime(model, "sdpa")):
        ledger, trunk = SlotLedger(KVPool()), ParagraphTree([5, 9, 13, 20]).trunk
        tree = DraftTree([(0,), (0, 0), (1,)])
        with runtime.running():
            stem = Stem(trunk, 4, draft_tree=tree, draft_tokens=[7, 8, 9])
            forest = Forest([[stem]], ledger, model.device)
            forests.append(runtime.forward(forest, ledger.pool, (0, 2)))
    for ours, theirs in zip(*forests, strict=True):
        torch.testing.assert_close(ours[:, : theirs.shape[1]], theirs, rtol=1e-3, atol=1e-3)


def test_changed_weights_are_read():
    model = model_of(seed=1)
    apar = medusa_apar.attach(model, runtime="cpu")
    inputs = prompts(1, 9)
    apar.generate(**inputs, do_sample=False, max_new_tokens=8)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.neg_()
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert torch.equal(apar.generate(**inputs, do_sample=False, max_new_tokens=12), expected)


def test_calls_may_overlap():
    model = model_of(seed=1)
    apar = medusa_apar.attach(model, runtime="cpu")
    asked = [prompts(1, 5 + n, seed=n) for n in range(4)]
    expected = [apar.generate(**inputs, do_sample=False, max_new_tokens=30) for inputs in asked]
    found = [None] * 4

    def answer(n):
        found[n] = apar.generate(**asked[n], do_sample=False, max_new_tokens=30)

    threads = [threading.Thread(target=answer, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(ours, alone) for ours, alone in zip(found, expected, strict=True))


def test_what_it_cannot_run_is_refused_or_left_to_torch(monkeypatch):
    model = tiny_model("gpt2")
    assert isinstance(medusa_apar.attach(model).runtime, TorchRuntime)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not built like Llama"):
        medusa_apar.attach(model, quantize="int8")
    with pytest.raises(ValueError, match="runtime='gpu' is not one of"):
        medusa_apar.attach(model, runtime="gpu")
    with pytest.raises(ValueError, match="quantize='int3' is not one of"):
        medusa_apar.attach(model, quantize="int3")
    with pytest.raises(ValueError, match="runtime='torch' was asked for"):
        medusa_apar.attach(model, runtime="torch", quantize="int8")
    llama = model_of()
    handle = llama.model.layers[0].register_forward_hook(lambda *_: None)
    assert "hooks" in refusal(llama)
    handle.remove()
    assert refusal(llama) is None
    library.library.cache_clear()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    try:
        assert isinstance(medusa_apar.attach(llama).runtime, TorchRuntime)
        with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
            medusa_apar.attach(llama, quantize="int8")
    finally:
        library.library.cache_clear()


def test_a_compiler_that_fails_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    library.library.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"c\+\+ cannot compile .*step.cpp: no such option"):
            medusa_apar.attach(model_of(), quantize="int8")
        assert not list((tmp_path / "cache" / "cpu").glob("*/step.so"))
    finally:
        library.library.cache_clear()
