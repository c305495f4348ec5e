"""EAGLE-3 checkpoints in every layout are read into one form, and damaged ones refused in a sentence."""

import re
from dataclasses import replace

import pytest
import torch

from medusa_apar.heads.eagle3.files import ascending_boundaries, default_boundaries, parse
from tests.support.eagle3_files import HEAD_DIM, HIDDEN, KV_HEADS, LAYOUTS, VOCAB, Layout, checkpoint


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read(name):
    layout = LAYOUTS[name]
    state, config = checkpoint(layout)
    file = parse(state, config)
    assert (len(file.layers), file.num_states, file.hidden_size) == (layout.layers, layout.states, HIDDEN)
    assert file.config.num_key_value_heads == KV_HEADS and file.config.head_dim == HEAD_DIM
    assert file.draft_vocab_size == (layout.draft_vocab or VOCAB)
    assert (file.embedding is not None, file.unembedding is not None) == (layout.embedding, layout.unembedding)
    if layout.draft_vocab is not None:
        flags = checkpoint(replace(layout, flags=True))[0]["t2d"]
        assert file.token_map.tolist() == flags.nonzero()[:, 0].tolist()
    assert file.norm_before_residual == (layout.speculators or bool(layout.more.get("norm_before_residual")))
    assert (file.boundaries is None) == (layout.where_ids is None)
    kept = {id(tensor) for tensor in state.values() if tensor.is_floating_point()}
    held = [*(tensor for layer in file.layers for tensor in layer.values()), file.norm, file.fc, file.fc_bias]
    held += [file.input_norm, *file.state_norms, file.embedding, file.unembedding]
    assert kept == {id(tensor) for tensor in held if tensor is not None}  # nothing is lost, nothing copied


@pytest.mark.parametrize(
    ("ids", "convention", "boundaries"),
    [
        ((1, 2, 4), None, (2, 3, 5)),  # of layers, after which the states are taken
        ((2, 3, 5), None, (2, 3, 5)),  # of layers, before which they are
        ((24, 30, 36), None, (24, 30, 36)),  # NVIDIA's for gpt-oss: the last is behind all 36 layers
        ((1, 2, 4), "before", (1, 2, 4)),
        ((2, 3, 5), "after", (3, 4, 6)),
    ],
)
@pytest.mark.parametrize("place", ["top", "eagle_config"])
def test_layer_ids_are_before_or_after(ids, convention, boundaries, place):
    state, config = checkpoint(Layout(ids=ids, where_ids=place))
    assert parse(state, config, convention).boundaries == boundaries


def test_without_ids_low_middle_and_high_states_are_fused():
    state, config = checkpoint(Layout())
    assert parse(state, config).boundaries is None and default_boundaries(32) == (2, 16, 29)


@pytest.mark.parametrize("layers", range(1, 40))
def test_our_own_boundaries_ascend_and_end_behind_the_last_layer(layers):
    found = ascending_boundaries(layers)
    assert list(found) == sorted(set(found)) and found[-1] == layers and found[0] >= 1
    assert len(found) == min(layers, 3)


def test_rope_may_stand_at_either_place():
    old = parse(*checkpoint(Layout(rope={"rope_theta": 5e5})))
    new = parse(*checkpoint(Layout(rope={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})))
    assert old.config.rope_parameters["rope_theta"] == new.config.rope_parameters["rope_theta"] == 5e5
    scaled = parse(*checkpoint(LAYOUTS["scaled rope"]))
    assert scaled.config.rope_parameters["rope_type"] == "llama3" and scaled.config.rope_parameters["factor"] == 8


def _without(name):
    return lambda state, config: state.pop(name)


def _set(name, value):
    return lambda state, config: state.__setitem__(name, value(state[name]) if name in state else value(None))


def _say(name, value):
    return lambda state, config: config.__setitem__(name, value)


def _nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without("norm.weight"), "lacks its final norm"),
        (_without("midlayer.hidden_norm.weight"), "layer 0 of the drafter lacks hidden_norm.weight"),
        (_without("midlayer.self_attn.k_proj.weight"), "first layer lacks self_attn.k_proj.weight"),
        (_without("midlayer.mlp.down_proj.weight"), "lacks mlp.down_proj.weight"),
        (
            _set("midlayer.self_attn.o_proj.weight", lambda t: t[:-1]),
            "o_proj.weight of the drafter's layer 0 has shape",
        ),
        (_set("midlayer.mlp.up_proj.weight", lambda t: t[:, 1:]), "up_proj.weight of the drafter's layer 0 has shape"),
        (_set("fc.weight", lambda t: t[:, :-1]), "reads 71 numbers"),
        (_set("fc.weight", lambda t: t[:-1]), "fc.weight has shape"),
        (_set("lm_head.weight", lambda t: t[:-1]), "lm_head.weight of the drafter has shape"),
        (_set("embed_tokens.weight", lambda t: torch.zeros(7, HIDDEN)), "embed_tokens.weight of the drafter has shape"),
        (_set("input_norm.weight", lambda t: torch.zeros(7)), "input_norm.weight of the drafter has shape"),
        (_set("norm.weight", _nan), "not finite"),
        (_set("d2t", lambda t: t + VOCAB), "names no 12 different ids"),
        (_set("d2t", lambda t: torch.zeros_like(t) - torch.arange(12)), "names no 12 different ids"),
        (_set("d2t", lambda t: t.float()), "'d2t' in the drafter's file is of torch.float32"),
        (_set("midlayer.mlp.up_proj.weight", lambda t: t.long()), "is of torch.int64"),
        (_set("layers.3.mlp.up_proj.weight", lambda t: torch.zeros(2)), "numbered"),
        (_set("midlayer.self_attn.sinks", lambda t: torch.zeros(4)), "holds self_attn.sinks"),
        (_set("blocks.0.layers.0.weight", lambda t: torch.zeros(4)), "holds the key 'blocks.0.layers.0.weight'"),
        (_say("num_attention_heads", None), "num_attention_heads is None"),
        (_say("num_attention_heads", 5), "heads of 8 do not fit"),
        (_say("eagle_aux_hidden_state_layer_ids", [1, 2]), "names 2 states of the base"),
        (_say("eagle_aux_hidden_state_layer_ids", "all"), "must be a list of layers"),
    ],
)
def test_damaged_files_are_refused_in_a_sentence(damage, words):
    state, config = checkpoint(Layout())
    damage(state, config)
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        parse(state, config)
    assert "\n" not in str(refused.value)


def test_other_files_are_no_drafters():
    with pytest.raises(ValueError, match="not an EAGLE-3 drafter"):
        parse({"0.0.linear.weight": torch.zeros(4, 4), "norm.weight": torch.zeros(4)}, {})
