"""The drafter's network beside transformers' own Llama layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from medusa_apar.heads.eagle3.files import parse
from medusa_apar.heads.eagle3.layer import Eagle3
from tests.support.eagle3_files import HIDDEN, LAYOUTS, Layout, checkpoint


def loaded(module, tensors, prefix):
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    module.load_state_dict(own, strict=True)
    return module


def reference(file, states, embedded, positions, mask):
    """What the authors' code does with transformers' modules: fused states and embeddings -> output and its norm."""
    config = file.config
    config._attn_implementation = "eager"

    def norm(weight, x):
        module = LlamaRMSNorm(weight.numel(), config.rms_norm_eps)
        module.weight = nn.Parameter(weight)
        return module(x)

    if file.input_norm is not None:
        states = norm(file.input_norm, states)
    if file.state_norms:
        size = len(file.state_norms[0])
        states = torch.cat(
            [norm(w, part) for w, part in zip(file.state_norms, states.split(size, -1), strict=True)], -1
        )
    hidden = F.linear(states, file.fc)
    turned = LlamaRotaryEmbedding(config)(hidden[None], positions[None])
    residual = hidden
    for index, tensors in enumerate(file.layers):
        attention = LlamaAttention(config, 0)
        wide = HIDDEN if index else 2 * HIDDEN
        for name in "qkv":
            old, bias = getattr(attention, f"{name}_proj"), f"self_attn.{name}_proj.bias" in tensors
            setattr(attention, f"{name}_proj", nn.Linear(wide, old.out_features, bias=bias))
        loaded(attention, {k: v for k, v in tensors.items() if "_norm" not in k}, "self_attn.")
        if index:
            x = norm(tensors["input_layernorm.weight"], residual)
        else:
            normed = norm(tensors["hidden_norm.weight"], hidden)
            residual = normed if file.norm_before_residual else hidden
            x = torch.cat([norm(tensors["input_layernorm.weight"], embedded), normed], -1)
        residual = residual + attention(x[None], turned, mask[None, None])[0][0]
        feed = loaded(LlamaMLP(config), tensors, "mlp.")
        residual = residual + feed(norm(tensors["post_attention_layernorm.weight"], residual))
    return residual, norm(file.norm, residual)


class Kept:
    """Keys and values of every row so far; a row sees those that the parents name, and itself."""

    def __init__(self):
        self.kept, self.parents = {}, []

    def attend(self, index, q, k, v):
        keys, values = self.kept.get(index, (k[:0], v[:0]))
        keys, values = self.kept[index] = torch.cat([keys, k]), torch.cat([values, v])
        repeats = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(repeats, 1).transpose(0, 1) for x in (keys, values))
        out = F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=self.mask()[-len(q) :])
        return out.transpose(0, 1)

    def mask(self):
        visible = torch.eye(len(self.parents), dtype=torch.bool)
        for row, parent in enumerate(self.parents):
            if parent >= 0:
                visible[row] |= visible[parent]
        return visible


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "Qwen3's norms"])
@torch.inference_mode()
def test_a_row_is_what_transformers_layers_give(name):
    layout = LAYOUTS[name]
    file = parse(*checkpoint(layout))
    drafter, rows = Eagle3(file), 9
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(rows, file.fc.shape[1], generator=generator)
    embedded = torch.randn(rows, HIDDEN, generator=generator)
    positions = torch.arange(3, 3 + rows)
    kept = Kept()
    kept.parents = list(range(-1, rows - 1))
    drafted = drafter(embedded, drafter.fuse(states), positions, kept.attend)
    mask = torch.zeros(rows, rows).masked_fill(~kept.mask(), float("-inf"))
    features, normed = reference(file, states, embedded, positions, mask)
    torch.testing.assert_close(drafted.states, normed)
    torch.testing.assert_close(drafted.features, normed if file.norm_output else features)


@pytest.mark.parametrize("name", LAYOUTS)
@torch.inference_mode()
def test_rows_one_by_one_are_rows_at_once(name):
    """Over a tree: each row sees its own path, in whatever call that ran."""
    file = parse(*checkpoint(LAYOUTS[name]))
    drafter = Eagle3(file)
    generator = torch.Generator().manual_seed(2)
    parents = [-1, 0, 1, 1, 2, 3, 3, 5]
    depths = torch.tensor([0, 1, 2, 2, 3, 3, 3, 4])
    embedded, features = torch.randn(2, len(parents), HIDDEN, generator=generator)
    once, each = Kept(), Kept()
    once.parents = parents
    whole = drafter(embedded, features, depths, once.attend)
    for row, parent in enumerate(parents):
        each.parents.append(parent)
        alone = drafter(embedded[row, None], features[row, None], depths[row, None], each.attend)
        torch.testing.assert_close(alone.states[0], whole.states[row])
        torch.testing.assert_close(alone.features[0], whole.features[row])


@torch.inference_mode()
def test_queries_and_keys_have_norms_of_their_own():
    """Qwen3's: a key of any length is the same key."""
    file = parse(*checkpoint(LAYOUTS["Qwen3's norms"]))
    file.layers[0] = {key: value for key, value in file.layers[0].items() if not key.endswith(".bias")}
    kept, stretched = Kept(), Kept()
    kept.parents = stretched.parents = [-1, 0, 1]
    generator = torch.Generator().manual_seed(3)
    embedded, features = torch.randn(2, 3, HIDDEN, generator=generator)
    Eagle3(file)(embedded, features, torch.arange(3), kept.attend)
    for name in "qk":
        file.layers[0][f"self_attn.{name}_proj.weight"] = 7 * file.layers[0][f"self_attn.{name}_proj.weight"]
    Eagle3(file)(embedded, features, torch.arange(3), stretched.attend)
    torch.testing.assert_close(kept.kept[0][0], stretched.kept[0][0], rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_weights_are_the_files_own_and_stay_as_they_are():
    file = parse(*checkpoint(Layout()))
    drafter = Eagle3(file)
    assert drafter.fc.data_ptr() == file.fc.data_ptr() and not any(p.requires_grad for p in drafter.parameters())
    assert sum(p.numel() for p in drafter.parameters()) == sum(
        t.numel() for t in (*file.layers[0].values(), file.norm, file.fc, file.unembedding)
    )
