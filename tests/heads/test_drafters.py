"""What drafts with heads beside a runtime. The heads keep nothing of it but copies of weights, for any runtime."""

import copy
from dataclasses import replace

import pytest
import torch

import medusa_apar
from medusa_apar import DraftTree
from medusa_apar.heads import HydraHeads, MedusaHeads
from medusa_apar.runtimes.runtime import RuntimeFacts
from tests.support.mapped_heads import MAP, mapped
from tests.support.models import VOCAB, tiny_model
from tests.support.prompts import prompts

TREE = DraftTree([(0,), (0, 0), (1,), (0, 1), (0, 0, 0)])
CALL = prompts(2, 9, seed=4) | {"do_sample": False, "max_new_tokens": 24, "return_dict_in_generate": True}


HEADS = {
    "hydra": lambda model: HydraHeads.random(model, 3, seed=1),
    "hydra, a draft vocabulary": lambda model: mapped(HydraHeads.random(model, 3, seed=1)),
    "medusa": lambda model: MedusaHeads.random(model, 3, seed=1),
    "medusa, a draft vocabulary": lambda model: mapped(MedusaHeads.random(model, 3, seed=1)),
    "medusa, own unembeddings": lambda model: MedusaHeads.random(model, 3, seed=1, layout="v1"),
}
RUNTIMES = {"torch": {"runtime": "torch"}, "cpu": {"runtime": "cpu"}, "int8": {"quantize": "int8"}}


def drafts(hook):
    hidden = torch.randn(3, hook.heads.input_size, generator=torch.Generator().manual_seed(0))
    return hook.runtime.drafter(hook.heads).propose(hidden, torch.tensor([5, 6, 7]), TREE)


def counts(out):
    return out.stats.steps, out.stats.drafted, out.stats.accepted, out.stats.accepted_lengths


def same(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", HEADS)
def test_runtimes_that_share_heads_draft_as_if_each_had_its_own(kind):
    model = tiny_model("wide_llama", seed=2)
    heads = HEADS[kind](model)
    alone = {}
    for name, options in RUNTIMES.items():
        other = copy.deepcopy(model)
        hook = medusa_apar.attach(other, copy.deepcopy(heads, {id(model): other}), **options)
        alone[name] = drafts(hook), counts(hook.generate(**CALL))
    shared = {name: medusa_apar.attach(model, heads, **options) for name, options in RUNTIMES.items()}
    for name in (*shared, *shared, *reversed(shared)):
        expected, steps = alone[name]
        assert same(drafts(shared[name]), expected), name
        assert counts(shared[name].generate(**CALL)) == steps, name
    if heads.token_map is not None or kind == "hydra":  # else no weight of theirs is rounded
        assert not same(alone["torch"][0], alone["int8"][0])


@pytest.mark.parametrize("other", ["cpu", "int8"])
def test_a_call_of_one_runtime_may_begin_within_anothers(other):
    model = tiny_model("wide_llama", seed=2)
    heads = mapped(HydraHeads.random(model, 3, seed=1))
    outer, inner = (medusa_apar.attach(model, heads, **RUNTIMES[name]) for name in ("torch", other))
    expected, within = counts(outer.generate(**CALL)), counts(inner.generate(**CALL))
    found = []

    def consumer(event):
        if len(found) < 5:
            found.append(None)
            found[-1] = counts(inner.generate(**CALL))

    assert counts(outer.generate(**CALL, events=consumer)) == expected
    assert found == [within] * 5


@pytest.mark.parametrize("kind", HEADS)
def test_attaching_sets_nothing_on_the_heads(kind):
    model = tiny_model("wide_llama", seed=2)
    heads = HEADS[kind](model)
    before = {name: value for name, value in vars(heads).items() if name != "_copies"}
    for options in RUNTIMES.values():
        medusa_apar.attach(model, heads, **options).generate(**CALL)
    after = {name: value for name, value in vars(heads).items() if name != "_copies"}
    assert before.keys() == after.keys() and all(after[name] is value for name, value in before.items())


@pytest.mark.parametrize("kind", HEADS)
def test_a_key_tells_apart_what_a_captured_step_reads(kind):
    heads = HEADS[kind](tiny_model("wide_llama", seed=2))
    key = heads.drafter().key
    assert heads.drafter().key == key and hash(heads.drafter().key) == hash(key)
    keys = {key, *(heads.drafter(packing).key for packing in ("float32", "int8"))}
    assert len(keys) == 3
    weight = heads.bias if isinstance(heads, HydraHeads) else heads.blocks[0].bias
    weight.data = weight.data.clone()
    keys.add(heads.drafter().key)
    assert len(keys) == 4
    unembedding = heads.base.lm_head.weight
    unembedding.data = unembedding.data.clone()
    keys.add(heads.drafter().key)
    assert len(keys) == 5


@pytest.mark.parametrize("packing", [None, "float32"])
@pytest.mark.parametrize("kind", HEADS)
def test_a_drafter_may_look_at_the_whole_tree_whatever_is_unlikely(kind, packing):
    """Only compiled Hydra heads do not: see tests/runtimes/cpu/test_drafting.py."""
    heads = HEADS[kind](tiny_model("wide_llama", seed=2))
    drafter = heads.drafter(packing)
    hidden, roots = torch.randn(3, heads.input_size), torch.tensor([5, 6, 7])
    ids, log_probs = drafter.propose(hidden, roots, TREE)
    some_ids, some = drafter.propose(hidden, roots, TREE, 0.3)
    looked_at = some > -torch.inf
    assert torch.equal(some_ids[looked_at], ids[looked_at]) and torch.equal(some[looked_at], log_probs[looked_at])
    assert looked_at.all() == (packing is None or isinstance(heads, MedusaHeads))


def test_quantising_the_unembedding_leaves_the_rows_that_were_copied():
    model = tiny_model("wide_llama", seed=2)
    heads = mapped(MedusaHeads.random(model, 3, seed=1))
    hidden, roots = torch.randn(3, heads.input_size), torch.tensor([5, 6, 7])
    before = heads.drafter().propose(hidden, roots, TREE)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    assert same(heads.drafter().propose(hidden, roots, TREE), before)
    heads.refresh()
    with pytest.raises(ValueError, match="cannot take rows of a quantised unembedding"):
        heads.drafter()


@pytest.mark.parametrize("how", [{}, {"packing": "float32"}, {"kernels": True}])
def test_heads_with_unembeddings_of_their_own_do_not_ask_for_the_bases(how):
    model = tiny_model("wide_llama", seed=2)
    heads = MedusaHeads(3, 1, model.config.hidden_size, VOCAB, own_unembedding=True, token_map=MAP).attach(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    assert heads.drafter(**how).rows is None


@pytest.mark.parametrize(
    ("name", "facts"),
    {
        "torch": RuntimeFacts("float32", "sdpa", graphs=False, max_nodes=None, fused_verify=False),
        "cpu": RuntimeFacts("float32", "cpu", graphs=False, max_nodes=None, fused_verify=False),
        "int8": RuntimeFacts("int8", "cpu", graphs=False, max_nodes=None, fused_verify=False),
    }.items(),
)
def test_a_runtimes_facts(name, facts):
    found = medusa_apar.attach(tiny_model("wide_llama", seed=2), **RUNTIMES[name]).runtime.facts
    assert replace(found, build="") == facts and bool(found.build) == (facts.backend == "cpu")
