"""The compiled step: transformers' tokens, a row's own bits, and what is refused."""

import functools
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

import medusa_apar
from medusa_apar import DraftTree
from medusa_apar.drafting.drafter import Reads
from medusa_apar.forest.forest import Forest, Segment
from medusa_apar.heads import HydraHeads
from medusa_apar.kv.pool import KVPool
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.runtimes.agreement import check_agrees
from medusa_apar.runtimes.cpu import known, library, packed_model
from medusa_apar.runtimes.cpu.runtime import CpuRuntime, unsupported_reason
from medusa_apar.runtimes.cpu.weights import PackedMatrix
from medusa_apar.runtimes.torch_runtime import TorchRuntime
from medusa_apar.threads.paragraph_tree import ParagraphTree
from tests.support.models import CHILD, COMPILED, CONTROL, FORK, VOCAB, model_of, tiny_model
from tests.support.oracles import assert_threads_are_plain
from tests.support.path_logits import path_logits
from tests.support.prompts import prompts

KINDS = ("float32", "bfloat16", "int8")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@functools.cache
def written(name, rows):
    """A model, prompts, and what transformers writes behind them, whatever the number of threads."""
    model, inputs = model_of(name, seed=rows), prompts(rows, 9, seed=rows, ragged=True)
    return model, inputs, model.generate(**inputs, do_sample=False, max_new_tokens=24)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("rows", [1, 3])
def test_equals_transformers(name, rows, two_threads):
    equals_transformers(name, rows)


@pytest.mark.parametrize("name", ["llama", "mistral", "olmo2", "gemma3"])
def test_equals_transformers_with_any_number_of_threads(name, threads):
    equals_transformers(name, 3)


def equals_transformers(name, rows):
    model, inputs, expected = written(name, rows)
    for heads in (None, HydraHeads.random(model, 3, seed=rows, aux_layers=(1,))):
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


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"temperature": 1.7, "top_k": 20}, {"do_sample": False}])
def test_compiled_code_chooses_what_python_chooses(sampling, heads, monkeypatch):
    """In whole answers that fork, of rows padded by more and less; with heads as without."""
    model = model_of(seed=3, fork=1.5, eos=0.5)
    drafts = HydraHeads.random(model, 3) if heads else None
    apar = medusa_apar.attach(model, drafts, CONTROL, runtime="cpu", budget=24)
    call = {"do_sample": True, "seed": 5, "repetition_penalty": 1.2, "max_new_tokens": 40} | sampling
    if not call["do_sample"]:
        del call["seed"]
    inputs, asked, chooser = prompts(3, 9, ragged=True), [], apar.runtime.chooser
    monkeypatch.setattr(CpuRuntime, "chooser", property(lambda _: asked.append(1) or chooser))
    ours = apar.generate(**inputs, return_dict_in_generate=True, **call)
    assert asked and ours.stats.forks > 1 and (not heads or ours.stats.drafted["heads"] > 0)
    monkeypatch.setattr(CpuRuntime, "chooser", None)
    assert torch.equal(apar.generate(**inputs, **call), ours.sequences)


@functools.cache
def runtime_of(kind, name):
    return CpuRuntime(model_of(name, seed=5), kind)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_rows_bits_depend_on_its_path_alone(threads, data):
    runtime = runtime_of(data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(["mistral", "olmo2", "gemma2"])))
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
            with runtime.session():
                forest = Forest([[Segment(trunk, cached)]], ledger, torch.device("cpu"))
                runtime.forward(forest, ledger.pool)
        tree = DraftTree.likeliest(8).first(size) if size else DraftTree([])
        requests.append([Segment(trunk, len(prompt), draft_tree=tree, draft_tokens=drafts)])
        expected.append(path_logits(runtime, prompt)[-1])
        for node in range(size):
            lineage = [drafts[i] for i in np.flatnonzero(tree.ancestors[node])]
            expected.append(path_logits(runtime, prompt + lineage)[-1])
    with runtime.session():
        logits, _ = runtime.forward(Forest(requests, ledger, torch.device("cpu")), ledger.pool)
    assert torch.equal(logits, torch.stack(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_long_paths_have_the_same_bits_in_one_pass_and_token_by_token(kind, threads):
    """Beyond a tile of places, a block of rows, and the slots that a pool begins with; scratch is not relied upon."""
    runtime = CpuRuntime(model_of("llama", seed=6), kind)
    ids = [5 + (7 * n * n + n) % (VOCAB - 5) for n in range(300)]
    ledger, trunk = SlotLedger(KVPool()), ParagraphTree(ids).trunk
    with runtime.session():
        forest = Forest([[Segment(trunk, len(ids))]], ledger, torch.device("cpu"))
        forest.verified_rows = torch.arange(len(ids))
        whole = runtime.forward(forest, ledger.pool)[0].clone()
        for buffer in runtime._scratch[ledger.pool].buffers(1, 1):
            buffer.fill_(float("nan"))
        again, pool = SlotLedger(KVPool()), None
        for stop in (1, 70, 71, 200, 300):
            forest = Forest([[Segment(trunk, stop)]], again, torch.device("cpu"))
            logits, _ = runtime.forward(forest, again.pool)
            assert torch.equal(logits[0], whole[stop - 1])
            pool = again.pool
            for buffer in runtime._scratch[pool].buffers(1, 1):
                buffer.fill_(float("nan"))
    assert torch.isfinite(whole).all()


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
    assert apar.runtime.facts.kind == kind
    out = apar.generate(**prompts(2, 9), do_sample=False, max_new_tokens=40, return_dict_in_generate=True)
    written = [thread for tree in out.paragraph_tree for thread in tree.threads if thread.token_ids]
    assert len(written) > 3
    for thread in written:
        ids = thread.path_ids + thread.token_ids
        logits = path_logits(apar.runtime, ids[:-1])[len(thread.path_ids) - 1 :]
        logits[:, CHILD] = -torch.inf
        for row, before in zip(logits, ids[len(thread.path_ids) - 1 :], strict=False):
            if before in (FORK, CHILD) or thread.depth >= apar.max_depth:
                row[FORK] = -torch.inf
        assert logits.argmax(-1).tolist() == thread.token_ids


def test_hidden_states_and_aux_layers_are_those_of_the_torch_runtime():
    model = model_of(seed=2)
    forests = []
    for runtime in (CpuRuntime(model, "float32"), TorchRuntime(model, "sdpa")):
        ledger, trunk = SlotLedger(KVPool()), ParagraphTree([5, 9, 13, 20]).trunk
        tree = DraftTree([(0,), (0, 0), (1,)])
        with runtime.session():
            segment = Segment(trunk, 4, draft_tree=tree, draft_tokens=[7, 8, 9])
            forest = Forest([[segment]], ledger, model.device)
            forests.append(runtime.forward(forest, ledger.pool, Reads((0, 2))))
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

    callers = [threading.Thread(target=answer, args=(n,)) for n in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(ours, alone) for ours, alone in zip(found, expected, strict=True))


def test_a_call_that_is_about_to_begin_survives_refresh():
    """Another Python thread may ask for it at any time."""
    model = model_of(seed=1)
    runtime = CpuRuntime(model, "float32")
    expected = path_logits(runtime, [5, 6, 7, 8])
    with runtime.session():
        runtime.refresh()
        ledger = SlotLedger(runtime.pool(None))
        segment = Segment(ParagraphTree([5, 6, 7, 8]).trunk, 4)
        found, _ = runtime.forward(Forest([[segment]], ledger, torch.device("cpu")), ledger.pool)
    assert torch.equal(found[0], expected[-1])


def test_packing_one_model_does_not_stop_calls_of_another(monkeypatch):
    first, second = (medusa_apar.attach(model_of(seed=seed), runtime="cpu") for seed in (1, 2))
    began, goes_on = threading.Event(), threading.Event()
    pack = packed_model.PackedModel.__init__

    def slowly(self, model, kind):
        if model is first.model:
            began.set()
            assert goes_on.wait(60)
        pack(self, model, kind)

    monkeypatch.setattr(packed_model.PackedModel, "__init__", slowly)
    first.refresh()
    call = threading.Thread(target=lambda: first.generate(**prompts(1, 5), max_new_tokens=4))
    call.start()
    try:
        assert began.wait(60)
        other = threading.Thread(target=lambda: second.generate(**prompts(1, 5), max_new_tokens=4), daemon=True)
        other.start()
        other.join(20)
        assert not other.is_alive()
    finally:
        goes_on.set()
        call.join()


@pytest.mark.parametrize("by", ["hook.generate", "custom_generate"])
def test_a_call_looks_through_the_model_once(by, monkeypatch):
    model = model_of(seed=1)
    hook = medusa_apar.attach(model, HydraHeads.random(model, 3), runtime="cpu")
    generate = hook.generate if by == "hook.generate" else functools.partial(model.generate, custom_generate=hook)
    call = prompts(1, 9) | {"do_sample": False, "max_new_tokens": 8}
    generate(**call)  # has measured what a step costs
    looks, unknown_part = [], known.unknown_part
    monkeypatch.setattr(known, "unknown_part", lambda model: looks.append(model) or unknown_part(model))
    generate(**call)
    assert looks == [model]


def test_scores_logits_and_samples_are_those_of_the_torch_runtime():
    model = model_of(seed=4)
    heads = HydraHeads.random(model, 3)
    options = {"max_new_tokens": 16, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for more in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_k": 9, "seed": 5}):
        ours, theirs = (
            medusa_apar.attach(model, heads, runtime=runtime).generate(**prompts(2, 9), **options, **more)
            for runtime in ("cpu", "torch")
        )
        assert torch.equal(ours.sequences, theirs.sequences)
        for name in ("scores", "logits"):
            for one, other in zip(ours[name], theirs[name], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_model_that_has_changed_under_it_is_refused():
    model = model_of(seed=1)
    apar = medusa_apar.attach(model, runtime="cpu")
    model.train()
    with pytest.raises(ValueError, match="CPU runtime, which cannot run this model: the model is in training mode"):
        apar.generate(**prompts(1, 5), max_new_tokens=4)
    model.eval()
    assert apar.generate(**prompts(1, 5), max_new_tokens=4).shape == (1, 9)


def test_what_it_cannot_run_is_refused_or_left_to_torch(monkeypatch, caplog):
    model = tiny_model("gpt2")
    assert isinstance(medusa_apar.attach(model).runtime, TorchRuntime)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is none of the models that it knows"):
        medusa_apar.attach(model, quantize="int8")
    with pytest.raises(ValueError, match="runtime='gpu' is not one of"):
        medusa_apar.attach(model, runtime="gpu")
    with pytest.raises(ValueError, match="quantize='int3' is not one of"):
        medusa_apar.attach(model, quantize="int3")
    with pytest.raises(ValueError, match="runtime='torch' was asked for"):
        medusa_apar.attach(model, runtime="torch", quantize="int8")
    llama = model_of()
    handle = llama.model.layers[0].register_forward_hook(lambda *_: None)
    assert "hooks" in unsupported_reason(llama)
    handle.remove()
    assert unsupported_reason(llama) is None
    library.outcome.cache_clear()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    try:
        assert isinstance(medusa_apar.attach(llama).runtime, TorchRuntime)
        # What its user can install is said aloud.
        assert [record.getMessage() for record in caplog.records if record.name.endswith("runtimes.pick")] == [
            "LlamaForCausalLM runs in torch, since the CPU runtime cannot run it: there is no C++ compiler (g++ or "
            "clang++; or name one in CXX)."
        ]
        with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
            medusa_apar.attach(llama, quantize="int8")
    finally:
        library.outcome.cache_clear()


def test_a_compiler_that_fails_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    library.outcome.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"c\+\+ cannot compile .*step.cpp: no such option"):
            medusa_apar.attach(model_of(), quantize="int8")
        assert not list((tmp_path / "cache" / "cpu").glob("*/step.so"))
    finally:
        library.outcome.cache_clear()


def test_without_wide_instructions_int8_has_the_same_sums(tmp_path, monkeypatch):
    """The plain C++ behind the intrinsics; what it adds in float32 may round otherwise, without fused products."""
    monkeypatch.setattr(library, "FLAGS", ("-O1", *library.FLAGS[1:]))  # sums are looked at, and no times
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path))
    plain = library._open(library._compiled(library.compilers()[0], "-march=x86-64"))
    x, weight = torch.randn(7, 200), torch.randn(35, 200)
    expected = PackedMatrix(weight, "int8")(x)
    monkeypatch.setattr(library, "library", lambda: plain)
    torch.testing.assert_close(PackedMatrix(weight, "int8")(x), expected, rtol=1e-5, atol=1e-5)
    runtime = CpuRuntime(model_of(seed=7), "int8")
    check_agrees(runtime.model, runtime, 0.1)


def test_a_cache_that_was_cleaned_or_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    compiler = tmp_path / "c++"  # one that makes an empty file at once
    compiler.write_text('#!/bin/sh\nfor name; do :; done\n[ "$name" = --version ] || touch "$name"\n')
    compiler.chmod(0o755)
    made = library._compiled([str(compiler)])
    made.unlink()
    assert library._compiled([str(compiler)]) == made and made.is_file()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "file" / "cache"))
    library.outcome.cache_clear()
    try:
        assert isinstance(medusa_apar.attach(model_of()).runtime, TorchRuntime)
    finally:
        library.outcome.cache_clear()


def test_the_compiler_may_have_arguments(monkeypatch):
    monkeypatch.setenv("CXX", "env g++")
    assert library.compilers()[0][1:] == ["g++"]


def test_broken_activations_stay_broken():
    packed = PackedMatrix(torch.randn(20, 64), "int8")
    x = torch.randn(4, 64)
    x[1, 3], x[2, 40] = float("nan"), float("inf")
    out = packed(x)
    assert out[1].isnan().all() and out[2].isnan().all() and torch.isfinite(out[[0, 3]]).all()


def test_an_impostor_is_left_to_torch():
    """Built like Llama, with another inside."""
    model = model_of(seed=2)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3
    scalings = {layer.self_attn.scaling for layer in model.model.layers}
    model.model.layers[1].self_attn.scaling = 0.01  # the runtime reads the first layer's
    assert isinstance(medusa_apar.attach(model).runtime, TorchRuntime) and len(scalings) == 1
    with pytest.raises(ValueError, match="its layers differ in how they scale"):
        medusa_apar.attach(model, runtime="cpu")


def test_a_token_beyond_the_vocabulary_is_an_error_and_not_a_read_of_anything():
    runtime = CpuRuntime(model_of(), "float32")
    for token in (VOCAB, -1):
        ledger, trunk = SlotLedger(KVPool()), ParagraphTree([5, token, 7]).trunk
        with runtime.session(), pytest.raises(IndexError, match=f"not one of the model's {VOCAB}"):
            runtime.forward(Forest([[Segment(trunk, 3)]], ledger, torch.device("cpu")), ledger.pool)


def test_rotary_tables_stop_where_frequencies_would_change():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 300}
    model = model_of(seed=1)
    config = model.config.to_dict() | {"rope_parameters": rope, "max_position_embeddings": 300}
    dynamic = type(model)(LlamaConfig(**config)).eval()
    dynamic.load_state_dict(model.state_dict())
    apar = medusa_apar.attach(dynamic, runtime="cpu")
    inputs = prompts(1, 270)
    before = dynamic.model.rotary_emb.inv_freq.clone()
    ours = apar.generate(**inputs, do_sample=False, max_new_tokens=20)
    assert torch.equal(dynamic.model.rotary_emb.inv_freq, before)
    assert torch.equal(ours, dynamic.generate(**inputs, do_sample=False, max_new_tokens=20))
