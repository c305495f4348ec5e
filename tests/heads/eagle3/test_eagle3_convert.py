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
from tests.support.eagle3_files import LAYOUTS, checkpoint
from tests.support.models import tiny_model

STATES = {"ids": (2, 2, 2), "where_ids": "top"}  # of a base of two layers


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
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    for name in ("boundaries", "norm_before_residual", "norm_output", "num_states", "draft_vocab_size"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters"):
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
    state = load_file(tmp_path / "eagle3" / "model.safetensors")
    assert {"hidden_norm.weight", "midlayer.hidden_norm.weight"} & {key.removeprefix("layers.0.") for key in state}


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
