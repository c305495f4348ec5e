"""Every head file layout found in the wild, read back to the same tensors."""

import json
import traceback
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_apar.heads import HydraHeads, MedusaHeads, load_heads
from medusa_apar.heads.checkpoints import MAX_HEADS, MAX_LAYERS, normalise

HIDDEN, VOCABULARY = 16, 37


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def state_dict(num_heads, num_layers, own):
    """A file's content by the V1 or V2 naming."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    state = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            state[f"{head}.{layer}.linear.weight"] = randn(HIDDEN, HIDDEN)
            state[f"{head}.{layer}.linear.bias"] = randn(HIDDEN)
        if own:
            state[f"{head}.{num_layers}.weight"] = randn(VOCABULARY, HIDDEN)
    return state


def assert_holds(heads, state):
    tensors = heads.tensors()
    for head in range(heads.num_heads):
        for layer in range(heads.num_layers):
            assert torch.equal(tensors.weight[layer, head], state[f"{head}.{layer}.linear.weight"])
            assert torch.equal(tensors.bias[layer, head], state[f"{head}.{layer}.linear.bias"])
        if tensors.unembedding is not None:
            assert torch.equal(tensors.unembedding[head], state[f"{head}.{heads.num_layers}.weight"])


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
@pytest.mark.parametrize("prefix", ["", "medusa_head."])
@pytest.mark.parametrize(("num_layers", "own"), [(1, True), (1, False), (2, True), (2, False), (0, True)])
def test_reads_v1_and_v2(tmp_path, model, name, prefix, num_layers, own):
    state = state_dict(12, num_layers, own)  # twelve heads: "10" sorts before "2"
    named = {prefix + key: value for key, value in state.items()}
    (torch.save if name.endswith(".pt") else save_file)(named, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        heads = MedusaHeads.from_pretrained(path, model)
        assert (heads.num_heads, heads.num_layers, heads.unembedding is not None) == (12, num_layers, own)
        assert_holds(heads, state)


def test_reads_the_heads_of_a_sharded_medusa_2_model(tmp_path, model):
    state = state_dict(3, 1, False)
    shards = [{"model.embed_tokens.weight": torch.zeros(3)}, {}, {}]
    for index, (key, value) in enumerate(state.items()):
        shards[1 + index % 2]["medusa_head." + key] = value
    weight_map = {}
    for index, shard in enumerate(shards):
        if index:  # the first shard is never opened
            save_file(shard | {"lm_head.weight": torch.zeros(2)}, tmp_path / f"{index}.safetensors")
        weight_map |= dict.fromkeys(shard, f"{index}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_holds(MedusaHeads.from_pretrained(tmp_path, model), state)


@pytest.mark.parametrize("writer", ["torch", "both", "first", "last"])
def test_reads_tied_residual_blocks(tmp_path, model, writer):
    """medusa-llm 0.1, which trained the APAR heads, repeats one block object; some writers drop the copies."""
    block = torch.nn.Linear(HIDDEN, HIDDEN)
    tied = {"weight": block.weight.data, "bias": block.bias.data}
    state = {"0.2.weight": torch.randn(VOCABULARY, HIDDEN)}
    for layer in {"torch": (0, 1), "both": (0, 1), "first": (0,), "last": (1,)}[writer]:
        state |= {f"0.{layer}.linear.{kind}": value for kind, value in tied.items()}
    if writer == "torch":
        torch.save(state, tmp_path / "medusa_lm_head.pt")
    else:
        save_file({key: value.clone() for key, value in state.items()}, tmp_path / "medusa_lm_head.safetensors")
    heads = MedusaHeads.from_pretrained(tmp_path, model)
    assert heads.num_layers == 2
    assert torch.equal(heads.blocks[0].weight[0], block.weight)
    assert torch.equal(heads.blocks[1].weight[0], block.weight)


@pytest.mark.parametrize("shared", [True, False])
def test_reads_vllm_files(tmp_path, model, shared):
    state = state_dict(2, 2, True)
    token_map = torch.tensor([4, 30, 2, 11])
    named = {"token_map": token_map}
    for head in range(2):
        for layer in range(2):
            named[f"blocks.{head}.layers.{layer}.weight"] = state[f"{head}.{layer}.linear.weight"]
        if not shared:
            named[f"lm_heads.{head}.weight"] = state[f"{head}.2.weight"]
    if shared:
        named["lm_head.weight"] = torch.zeros(VOCABULARY, HIDDEN)
    save_file(named, tmp_path / "model.safetensors")
    heads = MedusaHeads.from_pretrained(tmp_path, model)
    assert torch.equal(heads.token_map, token_map)
    assert (heads.unembedding is None) == shared
    assert not heads.blocks[0].bias.any()  # vLLM's blocks have no bias unless asked
    if not shared:
        assert torch.equal(heads.unembedding[1], state["1.2.weight"][token_map])


def test_a_lying_config_loses_against_the_file(tmp_path, model):
    save_file(state_dict(5, 1, True), tmp_path / "medusa_lm_head.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    with pytest.warns(UserWarning, match="medusa_num_heads is 2 in the config but 5 in the file"):
        assert MedusaHeads.from_pretrained(tmp_path, model).num_heads == 5


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("truncated", [False, True])
def test_round_trip(tmp_path, model, layout, truncated):
    heads = MedusaHeads.random(model, 3, 2, layout=layout)
    if truncated:
        token_map = torch.tensor([7, 0, 36, 21])
        truncated_heads = MedusaHeads(3, 2, HIDDEN, VOCABULARY, layout == "v1", token_map)
        truncated_heads.blocks.load_state_dict(heads.blocks.state_dict())
        heads = truncated_heads.attach(model)
    heads.save_pretrained(tmp_path, dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["version"] == layout[1]
    assert config["medusa_num_heads"] == 3
    assert config["vocab_size"] == VOCABULARY
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = MedusaHeads.from_pretrained(tmp_path, model)
    hidden_states = torch.randn(4, HIDDEN)
    assert torch.equal(heads.logits(hidden_states), again.logits(hidden_states))
    assert again.token_map is None if not truncated else torch.equal(again.token_map, heads.token_map)


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("token_map", [None, torch.tensor([7, 0, 36, 21])])
def test_vllm_export_holds_the_same_heads(tmp_path, model, layout, token_map):
    heads = MedusaHeads(2, 2, HIDDEN, VOCABULARY, layout == "v1", token_map).attach(model)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    heads.export_vllm(tmp_path, dtype=torch.float32)
    state = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    shared = layout == "v2"
    rows = torch.arange(VOCABULARY) if token_map is None else token_map
    assert config["original_lm_head"] == ("lm_head.weight" in state) == shared
    assert config["truncated_vocab_size"] == config["vocab_size"] == VOCABULARY and "token_map" not in state
    assert torch.equal(state["blocks.1.layers.1.weight"], heads.blocks[1].weight[1])
    if shared:  # vLLM has no other way to the base's unembedding
        assert torch.equal(state["lm_head.weight"], model.lm_head.weight)
    again = MedusaHeads.from_pretrained(tmp_path, model)
    hidden_states = torch.randn(3, HIDDEN)
    torch.testing.assert_close(again.logits(hidden_states)[..., rows], heads.logits(hidden_states))


def test_saves_fp16_in_the_names_of_the_wild(tmp_path, model):
    MedusaHeads.random(model, 2, 1, layout="v1").save_pretrained(tmp_path)
    state = load_file(tmp_path / "medusa_lm_head.safetensors")
    assert set(state) == set(state_dict(2, 1, True))
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "medusa_lm_head.safetensors"]


def test_a_pickle_runs_no_code(tmp_path, model):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"0.0.linear.weight": Malicious()}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match="is no plain file of tensors") as error:
        MedusaHeads.from_pretrained(tmp_path, model)
    # Torch says here how to run it all the same; not even the traceback may.
    assert "weights_only" not in "".join(traceback.format_exception(error.value))
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("0.0.linear.weight"), "lacks residual block 0"),
        (lambda state: state.pop("1.1.weight"), "1 of 2 Medusa heads have an unembedding"),
        (lambda state: [state.pop(key) for key in list(state) if key.startswith("0.")], r"\[1\]"),
        (lambda state: state.update({"grounded.weight": torch.zeros(1)}), "grounded.weight"),
        (lambda state: state.update({"0.3.linear.weight": torch.zeros(HIDDEN, HIDDEN)}), "different depth"),
        (lambda state: state.clear(), r"\[\]"),
    ],
)
def test_broken_files_are_refused(change, words):
    state = state_dict(2, 1, True)
    change(state)
    with pytest.raises(ValueError, match=words):
        normalise(state)


@pytest.mark.parametrize(
    ("num_heads", "num_layers"), [(MAX_HEADS, MAX_LAYERS), (MAX_HEADS + 1, 1), (1, MAX_LAYERS + 1)]
)
@pytest.mark.parametrize("kind", [MedusaHeads, HydraHeads])
def test_what_is_written_can_be_read(tmp_path, model, kind, num_heads, num_layers):
    heads = kind.random(model, num_heads, num_layers)
    if num_heads <= MAX_HEADS and num_layers <= MAX_LAYERS:
        heads.save_pretrained(tmp_path / "out")
        assert load_heads(tmp_path / "out", model).num_heads == num_heads
        return
    writers = [heads.save_pretrained, *([heads.export_vllm] if kind is MedusaHeads else [])]
    for write in writers:
        with pytest.raises(ValueError, match=f"{num_heads} draft heads of {num_layers} residual blocks: .* at most 32"):
            write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def expanded():
    return torch.zeros(1).expand(10**6, 10**6)  # some bytes in a file, terabytes once it is copied


@pytest.mark.parametrize(
    ("key", "tensor", "words"),
    [
        ("0.100000000.linear.weight", torch.zeros(HIDDEN, HIDDEN), "at most 32 of 8"),
        ("0.100000000.weight", torch.zeros(VOCABULARY, HIDDEN), "at most 32 of 8"),
        ("100000000.0.linear.weight", torch.zeros(HIDDEN, HIDDEN), "numbered from 0 without gaps"),
        (f"0.{'9' * 5000}.linear.weight", torch.zeros(HIDDEN, HIDDEN), "not a Medusa head file"),
        ("0.0.linear.weight", torch.tensor(1.0), "is torch.float32 of shape|has a weight of shape"),
        ("0.0.linear.weight", torch.zeros(HIDDEN, HIDDEN).to_sparse(), "no dense tensor"),
        ("0.0.linear.weight", torch.zeros(HIDDEN, HIDDEN, dtype=torch.long), "of dtype torch.int64|is torch.int64"),
        ("0.0.linear.weight", expanded(), "no dense tensor"),
        ("0.1.weight", torch.tensor(1.0), "of shape|need all or none"),
        ("token_map", torch.tensor(3), "must be a list of ids"),
        ("token_map", torch.tensor([-1, 3]), "must be a list of ids"),
        ("token_map", torch.tensor([True, False]), "must be a list of ids"),
        (7, torch.zeros(1), "it names one of them 7"),
        ("0.0.linear.weight", 5, "something else"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_a_key_or_tensor_out_of_bounds_is_refused_before_anything_is_allocated(
    tmp_path, model, key, tensor, words, own
):
    torch.save(state_dict(2, 1, own) | {key: tensor}, tmp_path / "medusa_lm_head.pt")
    for read in (load_heads, MedusaHeads.from_pretrained):
        with pytest.raises(ValueError, match=words) as error:
            read(tmp_path, model)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["from_states", "aux_layers", "from_token.0", "bias", "blocks.0.weight"])
@pytest.mark.parametrize("tensor", [torch.tensor(1), torch.eye(2).to_sparse(), torch.zeros(1).expand(9, 9, 10**9)])
def test_a_tensor_of_hydra_heads_out_of_bounds_is_refused(tmp_path, model, key, tensor):
    HydraHeads.random(model, 2, aux_layers=(0,)).save_pretrained(tmp_path)
    state = load_file(tmp_path / "medusa_lm_head.safetensors")
    (tmp_path / "medusa_lm_head.safetensors").unlink()
    torch.save(state | {key: tensor}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match="damaged|no dense tensor"):
        load_heads(tmp_path, model)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/outside.safetensors", "a/../../b.safetensors", "", 5])
def test_an_index_names_no_file_outside_of_its_folder(tmp_path, model, place):
    (tmp_path / "in").mkdir()
    save_file(state_dict(1, 1, False), tmp_path / "outside.safetensors")
    index = {"weight_map": {"medusa_head.0.0.linear.weight": place}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json says that .* which is no file of its folder"):
        load_heads(tmp_path / "in", model)


def test_files_of_an_index_may_be_links_as_in_the_hubs_cache(tmp_path, model):
    (tmp_path / "in").mkdir()
    state = state_dict(1, 1, False)
    save_file({f"medusa_head.{key}": value for key, value in state.items()}, tmp_path / "blob")
    (tmp_path / "in" / "1.safetensors").symlink_to(tmp_path / "blob")
    index = {"weight_map": {f"medusa_head.{key}": "1.safetensors" for key in state}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_holds(load_heads(tmp_path / "in", model), state)


def test_heads_of_another_model_are_refused(tmp_path, model):
    wide = {key: torch.zeros(2 * HIDDEN, 2 * HIDDEN) for key in ("0.0.linear.weight", "1.0.linear.weight")}
    save_file(wide, tmp_path / "medusa_lm_head.safetensors")
    with pytest.raises(ValueError, match="hidden size is 32, the model's 16"):
        MedusaHeads.from_pretrained(tmp_path, model)
    save_file(state_dict(1, 1, True) | {"0.1.weight": torch.zeros(99, HIDDEN)}, tmp_path / "medusa_lm_head.safetensors")
    with pytest.raises(ValueError, match="vocabulary is 99, the model's 37"):
        MedusaHeads.from_pretrained(tmp_path, model)


def test_a_folder_without_heads_says_what_it_looked_for(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="medusa_lm_head.safetensors"):
        MedusaHeads.from_pretrained(tmp_path, model)
