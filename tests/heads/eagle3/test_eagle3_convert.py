"""`medusa-apar convert` of EAGLE-3 drafters: whatever is read is written for other engines, bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_apar.heads import load_heads
from medusa_apar.heads.convert import convert
from medusa_apar.heads.eagle3.files import parse
from medusa_apar.heads.eagle3.heads import read
from tests.support.eagle3_files import LAYOUTS, VOCAB, checkpoint
from tests.support.models import tiny_model

STATES = {"states": 2, "more": {"boundaries": [1, 2]}}  # of a base of two layers


def written(folder, layout, **sizes):
    state, config = checkpoint(layout, **sizes)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors_of(file):
    """By place, so that two files can be compared."""
    found = {f"{index} {name}": tensor for index, layer in enumerate(file.layers) for name, tensor in layer.items()}
    names = ("norm", "fc", "fc_bias", "input_norm", "embedding", "unembedding", "token_map")
    found |= {name: getattr(file, name) for name in names if getattr(file, name) is not None}
    return found | {f"state norm {index}": norm for index, norm in enumerate(file.state_norms)}


def assert_same(one, other):
    """The same drafter; biases of zero that the other has besides change nothing."""
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() <= theirs.keys()
    for name, tensor in theirs.items():
        if name in mine:
            assert tensor.dtype == mine[name].dtype and torch.equal(tensor, mine[name]), name
        else:
            assert name.endswith("_proj.bias") and not tensor.any(), name
    for name in ("boundaries", "norm_before_residual", "norm_output", "num_states", "draft_vocab_size"):
        assert getattr(one, name) == getattr(other, name), name
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters")
    for name in (*names, "target_hidden_size"):
        assert getattr(one.config, name) == getattr(other.config, name), name


@pytest.mark.parametrize("first", ["eagle3", "speculators"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back_every_layout_is_the_same_drafter(tmp_path, name, first):
    source = written(tmp_path / "source", LAYOUTS[name])
    given = parse(*read(source))
    second = "eagle3" if first == "speculators" else "speculators"
    convert(source, first, tmp_path / first, base="their/base")
    convert(tmp_path / first, second, tmp_path / second, base="their/base")
    for folder in (first, second):
        assert_same(given, parse(*read(tmp_path / folder)))


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_vllm_finds_what_it_asks_for(tmp_path, name, layout):
    """Tensors and config entries stand where its loaders look for them (`llama_eagle3.py`, `speculators/algos.py`)."""
    given = LAYOUTS[name]
    convert(written(tmp_path / "source", given), layout, tmp_path / "out", base="their/base")
    state = load_file(tmp_path / "out" / "model.safetensors")
    top = json.loads((tmp_path / "out" / "config.json").read_text())
    inner = top["transformer_layer_config"] if layout == "speculators" else top
    single = given.layers == 1 and layout == "eagle3"
    assert ("midlayer.hidden_norm.weight" if single else "layers.0.hidden_norm.weight") in state
    assert inner["num_hidden_layers"] == given.layers and inner["num_aux_hidden_states"] == given.states
    assert len(state["fc.weight"][0]) == given.states * top.get("target_hidden_size", inner["hidden_size"])
    file = parse(*read(tmp_path / "out"))
    for place in (inner["eagle_config"], top):
        assert place.get("eagle_aux_hidden_state_layer_ids") == (file.boundaries and list(file.boundaries))
    biases = {key.split(".")[-2] for key in state if key.endswith("_proj.bias")}
    llama = inner["model_type"] == "llama"
    assert llama == ("q" not in given.norms) and inner["attention_bias"] == given.bias == bool(biases)
    if llama and biases:
        assert biases == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert top["draft_vocab_size"] == len(state["d2t"] if "d2t" in state else range(VOCAB))
    assert top["norm_before_fc"] == ("input_norm.weight" in state) and top["fc_norm"] == ("fc_norm.0.weight" in state)
    assert inner["rope_theta"] == inner["rope_parameters"]["rope_theta"]


def test_states_are_written_in_ascending_order(tmp_path):
    layout = replace(LAYOUTS["a norm for each state"], more={"fc_norm": True, "boundaries": [5, 1, 3]})
    source = written(tmp_path / "source", layout)
    convert(source, "eagle3", tmp_path / "out")
    mine, theirs = (parse(*read(folder)) for folder in (source, tmp_path / "out"))
    assert theirs.boundaries == (1, 3, 5)
    blocks, others = (file.fc.unflatten(1, (3, -1)).unbind(1) for file in (mine, theirs))
    for place, other in enumerate((1, 2, 0)):
        assert torch.equal(others[place], blocks[other])
        assert torch.equal(theirs.state_norms[place], mine.state_norms[other])
    twice = written(tmp_path / "twice", replace(layout, more={"fc_norm": True, "boundaries": [2, 2, 3]}))
    with pytest.raises(ValueError, match="fuses a state twice"):
        convert(twice, "eagle3", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_earlier_drafter_in_the_folder_is_not_read_with_the_new_one(tmp_path):
    source = written(tmp_path / "source", LAYOUTS["its authors'"])
    (tmp_path / "out").mkdir()
    for name in ("model-00001-of-00002.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        (tmp_path / "out" / name).write_bytes(b"old")
    convert(source, "eagle3", tmp_path / "out", force=True)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json"}
    with pytest.raises(FileNotFoundError, match="no file, folder or Hub id"):
        convert("./nothing", "eagle3", tmp_path / "none")


def test_a_draft_vocabulary_without_an_unembedding_gets_the_rows_of_the_base(tmp_path):
    model = tiny_model("llama", seed=3)
    model.save_pretrained(tmp_path / "base")
    sizes = {"hidden": model.config.hidden_size, "vocab": model.config.vocab_size}
    source = written(tmp_path / "source", replace(LAYOUTS["its authors'"], unembedding=False, **STATES), **sizes)
    with pytest.raises(ValueError, match="name the base model with --base: rows of its unembedding"):
        convert(source, "eagle3", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    _, _, notes = convert(source, "eagle3", tmp_path / "out", base=str(tmp_path / "base"))
    assert "lm_head.weight is written along" in " ".join(notes)
    file = parse(*read(tmp_path / "out"))
    assert torch.equal(file.unembedding, model.get_output_embeddings().weight[file.token_map])
    mine, theirs = (load_heads(folder, model) for folder in (source, tmp_path / "out"))
    x = torch.randn(3, model.config.hidden_size)
    assert torch.equal(mine.unembed(x), theirs.unembed(x))


def test_another_models_rows_are_refused(tmp_path):
    tiny_model("llama", seed=3).save_pretrained(tmp_path / "base")
    source = written(tmp_path / "source", replace(LAYOUTS["its authors'"], unembedding=False), hidden=40)
    with pytest.raises(ValueError, match="it drafts for another model"):
        convert(source, "eagle3", tmp_path / "out", base=str(tmp_path / "base"))


def test_a_speculator_names_its_base(tmp_path):
    source = written(tmp_path / "source", LAYOUTS["its authors'"])
    with pytest.raises(ValueError, match="name the base model with --base: speculators' config has to"):
        convert(source, "speculators", tmp_path / "out")
    convert(source, "speculators", tmp_path / "out", base="their/base")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "their/base"
    convert(tmp_path / "out", "speculators", tmp_path / "again")  # which knows its base
    with pytest.raises(FileExistsError, match="already holds model.safetensors and config.json"):
        convert(source, "eagle3", tmp_path / "out")
    convert(source, "eagle3", tmp_path / "out", force=True)


def test_medusa_heads_and_drafters_do_not_become_each_other(tmp_path):
    source = written(tmp_path / "source", LAYOUTS["its authors'"])
    with pytest.raises(ValueError, match="holds an EAGLE-3 drafter: convert it --to eagle3 or --to speculators"):
        convert(source, "v2", tmp_path / "out")
    (tmp_path / "medusa").mkdir()
    save_file({"0.0.linear.weight": torch.zeros(4, 4)}, tmp_path / "medusa" / "medusa_lm_head.safetensors")
    with pytest.raises(ValueError, match="not an EAGLE-3 drafter"):
        convert(tmp_path / "medusa" / "medusa_lm_head.safetensors", "eagle3", tmp_path / "out")
    with pytest.raises(ValueError, match="written as safetensors alone"):
        convert(source, "eagle3", tmp_path / "out", file_format="pt")


def test_what_vllm_cannot_hold_is_said(tmp_path):
    state, config = checkpoint(LAYOUTS["its authors'"])
    state["fc.bias"] = torch.zeros(len(state["fc.weight"]))
    (tmp_path / "source").mkdir()
    save_file(state, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    _, _, notes = convert(tmp_path / "source", "eagle3", tmp_path / "out")
    assert notes == ["vLLM does not load this drafter: it has no place for fc.bias."]
