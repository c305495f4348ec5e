"""Threads that draft with EAGLE-3 write the model's own tokens, and what is drafted saw the whole path."""

import copy
import json
import math
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import medusa_apar
from medusa_apar.drafting.speculator import Speculator
from medusa_apar.heads import Eagle3Heads, load_heads
from medusa_apar.heads.eagle3 import drafter as drafter_module
from medusa_apar.runtimes.capture import Captured
from tests.support.eagle3_files import LAYOUTS, checkpoint
from tests.support.engine_runs import request
from tests.support.models import CONTROL, VOCAB, forking_model, tiny_model
from tests.support.oracles import assert_threads_are_plain
from tests.support.prompts import prompts


def drafter_of(model, name="its authors'", seed=0):
    layout = LAYOUTS[name]
    boundaries = tuple(2 - place % 2 for place in range(layout.states))  # the tiny models have two layers
    layout = replace(layout, ids=boundaries, where_ids="top", target=layout.target and model.config.hidden_size)
    return Eagle3Heads.from_state(*checkpoint(layout, seed, model.config.hidden_size, VOCAB), model)


@torch.no_grad()
def cold(heads, path, tree):
    """What the drafter proposes behind a path of tokens, the root included, from nothing but these tokens."""
    ids = torch.tensor(path)
    with torch.no_grad(), Captured(heads.base, (), heads.boundaries) as captured:
        heads.base(input_ids=ids[None])
    features = heads.network.fuse(captured.boundary_states())
    ids_of, features_of, parents = (
        list(path),
        [torch.zeros_like(features[0]), *features[:-1]],
        [*range(-1, len(path) - 1)],
    )
    found, chances = [], []

    def run():
        positions = []
        for parent in parents:
            positions.append(positions[parent] + 1 if parent >= 0 else 0)
        visible = torch.eye(len(parents), dtype=torch.bool)
        for row, parent in enumerate(parents):
            if parent >= 0:
                visible[row] |= visible[parent]
        visible[1:, 0] = False

        def attend(index, q, k, v):
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(0, 1)

        embedded = heads.embed(torch.tensor(ids_of))
        drafted = heads.network(embedded, torch.stack(features_of), torch.tensor(positions), attend)
        return heads.top(heads.unembed(drafted.states), tree.top_k), drafted.features

    rows = {-1: len(path) - 1}
    for node, choice in enumerate(tree.choices):
        (best, log_probs), behind = run()
        row = rows[int(tree.parents[node])]
        found.append(int(best[row, choice[-1]]))
        chances.append(float(log_probs[row, choice[-1]]))
        rows[node] = len(ids_of)
        ids_of.append(found[-1])
        features_of.append(behind[row])
        parents.append(row)
    return found, chances


@contextmanager
def watched():
    """Of every draft: the path, root included, what was drafted with which chances, the tree, and the chance of a path
    below which nothing need be looked for."""
    seen, draft = [], Speculator._draft

    def watching(self, advances, hidden, load, *args):
        least = self._min_probability(load)
        drafting = draft(self, advances, hidden, load, *args)
        for advance in advances if drafting is not None else ():
            if advance.drafted is not None:
                ids, log_probs = advance.drafted
                lineage = [*advance.thread.ancestors(), (advance.thread, None)]
                path = [token for thread, stop in lineage for token in thread.tokens[:stop]]
                seen.append((path, ids.tolist(), log_probs.tolist(), drafting.tree, least))
        return drafting

    with patch.object(Speculator, "_draft", watching):
        yield seen


def finish(engine, its):
    engine.add(its)
    while engine.unfinished:
        engine.step()
    return its


def assert_as_cold(heads, seen, some=40):
    """Every node, but that below an unlikely path nothing need have been looked for."""
    assert seen
    for path, ids, log_probs, tree, least in seen[:: max(len(seen) // some, 1)]:
        expected, chances = cold(heads, path, tree)
        reach = {-1: 1.0}
        for node, parent in enumerate(tree.parents.tolist()):
            reach[node] = reach[parent] * math.exp(chances[node])
            if ids[node] == -1:
                assert log_probs[node] == -math.inf and reach[parent] < least * 1.01
            else:
                assert ids[node] == expected[node]
                assert log_probs[node] == pytest.approx(chances[node], abs=1e-3 + 1e-3 * abs(chances[node]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_drafts_and_never_shows(name):
    model = forking_model(5)
    plain = medusa_apar.attach(model, None, CONTROL, speculation="off", runtime="torch")
    heads = drafter_of(model, name)
    apar = medusa_apar.attach(model, heads, CONTROL, runtime="torch", budget=40)
    arguments = prompts(2, 6, seed=2, ragged=True) | {"do_sample": False, "max_new_tokens": 40}
    expected = plain.generate(**arguments, return_dict_in_generate=True)
    out = apar.generate(**arguments, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.stats.drafted["heads"] > 0 and out.stats.final_slots == 0
    assert_threads_are_plain(model, out.paragraph_tree)


SITUATIONS = {
    "plainly": {},
    "one thread at a time": {"max_threads": 1},
    "with few slots": {"pool_slots": 9 + 2 * 40 + 2 * 3},
    "with one tree for all": {"speculation": "even"},
    "with prompts fed in pieces": {"prefill": 4},
    "on the CPU runtime": {"runtime": "cpu"},
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", ["its authors'", "two layers", "speculators'"])
def test_drafts_are_those_of_a_cold_start(name, situation):
    """Behind forks, accepted tokens, chunks of prompts and preemption, a draft saw what plain passes would show it."""
    options = dict(SITUATIONS[situation])
    model = forking_model(5, "wide_llama" if options.get("runtime") == "cpu" else "llama")
    heads = drafter_of(model, name)
    prefill = options.pop("prefill", None)
    apar = medusa_apar.attach(model, heads, CONTROL, **{"runtime": "torch", "budget": 40} | options)
    if prefill is not None:
        apar.options = replace(apar.options, max_prefill_rows=prefill)
    with watched() as seen:
        apar.generate(**prompts(2, 9, seed=2, ragged=True), do_sample=False, max_new_tokens=40)
    assert_as_cold(heads, seen)


@pytest.mark.parametrize(
    "family", ["llama", "llama3", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "gpt_oss", "gpt2"]
)
def test_drafts_of_every_family_are_those_of_a_cold_start_and_never_show(family):
    model = tiny_model(family, fork=9.0)
    heads = drafter_of(model, "with an embedding of its own")
    call = prompts(1, 7, seed=3) | {"do_sample": False, "max_new_tokens": 30, "return_dict_in_generate": True}
    with watched() as seen:
        out = medusa_apar.attach(model, heads, CONTROL, runtime="torch", budget=30).generate(**call)
    assert_as_cold(heads, seen, 10)
    plain = medusa_apar.attach(model, None, CONTROL, runtime="torch", speculation="off").generate(**call)
    assert torch.equal(out.sequences, plain.sequences) and out.stats.forks > 0
    assert_threads_are_plain(model, out.paragraph_tree)


def test_a_prefix_hit_drafts_as_a_cold_start():
    model = forking_model(5)
    heads = drafter_of(model)
    apar = medusa_apar.attach(model, heads, CONTROL, runtime="torch", budget=40)
    text = [7 + place % 50 for place in range(70)]
    with apar.engine(prefix_cache=True) as engine:
        finish(engine, request("first", text, limit=6))
        with watched() as seen:
            second = finish(engine, request("second", [*text[:66], 9, 11, 13], limit=12))
    assert second.stats.cached_tokens > 0
    assert_as_cold(heads, seen)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_folder_of_either_kind_is_loaded_by_its_tensors(tmp_path, pickled):
    model = forking_model(5)
    state, config = checkpoint(replace(LAYOUTS["its authors'"], states=2, ids=(2, 1), where_ids="top"), 0, 32, VOCAB)
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    if pickled:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
    apar = medusa_apar.attach(model, tmp_path, CONTROL, budget=30)
    assert isinstance(apar.heads, Eagle3Heads) and apar.heads.boundaries == (2, 1)
    assert "5 Eagle3 heads" in repr(apar)
    again = load_heads(tmp_path, model)
    again.save_pretrained(tmp_path / "again", torch.float32)
    assert torch.equal(load_heads(tmp_path / "again", model).network.fc, apar.heads.network.fc)


def test_a_model_is_saved_with_its_drafter(tmp_path):
    model = forking_model(5)
    apar = medusa_apar.attach(model, drafter_of(model, "two layers"), CONTROL, budget=30)
    apar.save_pretrained(tmp_path / "all")
    again = load_heads(tmp_path / "all" / "medusa", model)
    for mine, its in zip(apar.heads.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, its)
    assert again.boundaries == apar.heads.boundaries


@pytest.mark.parametrize("options", [{"runtime": "cpu"}, {"quantize": "int8"}, {"dtype": torch.bfloat16}])
def test_the_cpu_runtime_drafts_in_its_own_weights_and_never_shows(options):
    options = dict(options)
    model = forking_model(5, "wide_llama").to(options.pop("dtype", torch.float32))
    heads = drafter_of(model)
    texts = []
    for speculation in ("off", "forest"):
        apar = medusa_apar.attach(
            model, heads, CONTROL, **{"runtime": "cpu", "budget": 40, "speculation": speculation} | options
        )
        out = apar.generate(**prompts(2, 6, seed=2), do_sample=False, max_new_tokens=40, return_dict_in_generate=True)
        texts.append(out.sequences.tolist())
    assert texts[0] == texts[1] and out.stats.drafted["heads"] > 0


def test_drafters_of_other_models_are_refused():
    model = forking_model(5)
    layout = replace(LAYOUTS["its authors'"], states=2, ids=(2, 1), where_ids="top")
    for sizes, changes, words in (
        ((40, VOCAB), {}, "reads states of 40 numbers"),
        ((32, 99), {}, "vocabulary is 99"),
        ((32, VOCAB), {"ids": (2, 9)}, "layers 0 to 1"),
        ((32, VOCAB), {"ids": (2, 0)}, "embeddings as a state"),
        ((40, VOCAB), {"target": 32}, "40 wide and has not an embedding"),
        ((32, VOCAB), {"states": 3, "where_ids": None}, "a base of 2 layers has none that are usual"),
        ((32, VOCAB), {"states": 5, "where_ids": None}, "fuses 5 states"),
    ):
        with pytest.raises(ValueError, match=words):
            Eagle3Heads.from_state(*checkpoint(replace(layout, **changes), 0, *sizes), model)


def test_rotary_frequencies_stay_whole_in_any_dtype():
    model = forking_model(5).to(torch.bfloat16)
    half, whole = drafter_of(model), drafter_of(model.float())
    assert half.dtype == torch.bfloat16
    rotaries = [heads.to(heads.dtype).network.rotary(torch.device("cpu")) for heads in (half, whole)]
    assert torch.equal(*(rotary.inv_freq for rotary in rotaries)) and rotaries[0].inv_freq.dtype == torch.float32


def test_what_is_saved_are_the_weights_as_they_are_and_the_states_that_are_read(tmp_path):
    """Whatever became of the tensors of the file: another dtype, a copy, an update."""
    model = forking_model(5)
    layout = replace(LAYOUTS["speculators'"], states=2, ids=(1, 2), where_ids="top")
    state, config = checkpoint(layout, 0, 32, VOCAB)
    heads = copy.deepcopy(Eagle3Heads.from_state(state, config, model, convention="before").half()).float()
    assert heads.boundaries == (1, 2)
    with torch.no_grad():
        heads.network.fc += 1.0
    heads.attach(model).save_pretrained(tmp_path, torch.float32)
    again = load_heads(tmp_path, model, torch.float32)
    assert again.boundaries == (1, 2)  # though a first id of 1 would be the layer after which
    for (name, mine), its in zip(heads.network.named_parameters(), again.network.parameters(), strict=True):
        assert torch.equal(mine, its), name


def test_tokens_that_are_new_to_the_drafter_do_no_harm():
    model = forking_model(5)
    layout = replace(LAYOUTS["with an embedding of its own"], states=2, ids=(2, 1), where_ids="top", draft_vocab=9)
    heads = Eagle3Heads.from_state(*checkpoint(layout, 0, 32, 20), model)  # the model has 61 tokens
    plain, drafting = (
        medusa_apar.attach(model, heads, CONTROL, runtime="torch", speculation=its, budget=30).generate(
            **prompts(2, 6, seed=2), do_sample=False, max_new_tokens=30
        )
        for its in ("off", "forest")
    )
    assert torch.equal(plain, drafting)


def test_threads_that_draft_in_groups_draft_the_same(monkeypatch):
    model = forking_model(5)
    heads = drafter_of(model)
    monkeypatch.setattr(drafter_module, "MOST_BYTES", 1)  # one at a time
    apar = medusa_apar.attach(model, heads, CONTROL, runtime="torch", budget=40)
    with watched() as seen:
        apar.generate(**prompts(2, 9, seed=2), do_sample=False, max_new_tokens=30)
    assert_as_cold(heads, seen, 20)


def test_an_engine_that_does_not_guess_keeps_nothing_for_it():
    model = forking_model(5)
    apar = medusa_apar.attach(model, drafter_of(model), CONTROL, runtime="torch", speculation="off")
    with apar.engine() as engine:
        engine.add(request("one", [7, 8, 9], limit=4))
        engine.step()
        assert not engine.ledger.pool.storage.features and max(engine.ledger.pool.keys) == 1
