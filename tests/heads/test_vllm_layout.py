"""Heads in vLLM's layout: written for the model that it serves, read from there, and back again."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import medusa_apar
from medusa_apar.commands import cli
from medusa_apar.heads import MedusaHeads, vllm_layout
from medusa_apar.heads.checkpoints import normalise, read
from medusa_apar.heads.convert import convert
from medusa_apar.models.head_files import FILES
from tests.support.head_layouts import (
    HIDDEN,
    MAP,
    VOCABULARY,
    blocks_and_rows,
    in_vllm_names,
    make_base,
    refused,
    unembedding,
    with_whole_rows,
    write,
)


def test_vllm_shared_rows_become_v1_and_return(tmp_path, base):
    write("vllm", tmp_path / "a", blocks_and_rows(3, 1, False), base)
    convert(tmp_path / "a", "v1", tmp_path / "v1")
    state = load_file(tmp_path / "v1" / FILES[0])
    assert all(torch.equal(state[f"{head}.1.weight"], unembedding(base)) for head in range(3))
    convert(tmp_path / "v1", "v2", tmp_path / "v2")
    assert set(load_file(tmp_path / "v2" / FILES[0])) == set(blocks_and_rows(3, 1, False))


@pytest.mark.parametrize("own", [False, True])
def test_a_truncated_vocabulary_is_whole_for_vllm(tmp_path, base, capsys, own):
    state = blocks_and_rows(2, 1, own, rows=len(MAP)) | {"token_map": torch.tensor(MAP)}
    write("v1" if own else "v2", tmp_path / "a", state, base)
    (tmp_path / "a" / "config.json").write_text("{}")  # whose heads they are, the command has to be told
    command = ["convert", str(tmp_path / "a"), "--to", "vllm", "--out", str(tmp_path / "b")]
    assert "--base" in refused(capsys, *command[1:])
    assert cli.main([*command, "--base", str(base)]) == 0
    assert "token_map is left out, as vLLM cannot load it" in capsys.readouterr().err
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "truncated_vocab_size": VOCABULARY,
        "num_heads": 2,
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "original_lm_head": not own,
        "base_model_name_or_path": "",
    }
    expected = in_vllm_names(with_whole_rows(state, base)) | ({} if own else {"lm_head.weight": unembedding(base)})
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)


def test_a_drafter_for_the_model_that_vllm_serves(tmp_path, base):
    """Which may have gained tokens since the heads were made; another model's heads are refused."""
    write("v1", tmp_path / "v1", blocks_and_rows(3, 1, True, torch.float16), base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    model.save_pretrained(tmp_path / "grown")
    assert vllm_layout.export(tmp_path / "v1", tmp_path / "grown", tmp_path / "out", torch.bfloat16) == 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == config["truncated_vocab_size"] == VOCABULARY + 5 and not config["original_lm_head"]
    old, new = blocks_and_rows(3, 1, True, torch.float16)["2.1.weight"], unembedding(tmp_path / "grown")
    rows = load_file(tmp_path / "out" / "model.safetensors")["lm_heads.2.weight"]
    assert torch.equal(rows, torch.cat([old, new[VOCABULARY:].half()]).bfloat16())
    assert vllm_layout.export(tmp_path / "out", tmp_path / "grown", tmp_path / "out") == 3  # in place of what was there
    for width, tokens, words in (
        (2 * HIDDEN, VOCABULARY, f"these heads have hidden size {HIDDEN}, and the base has {2 * HIDDEN}"),
        (HIDDEN, VOCABULARY - 1, f"these heads draft from {VOCABULARY} tokens, and the base has {VOCABULARY - 1}"),
    ):
        make_base(tmp_path / "other", hidden=width, vocabulary=tokens)
        with pytest.raises(ValueError, match=words):
            vllm_layout.export(tmp_path / "v1", tmp_path / "other", tmp_path / "new")
    with pytest.raises(FileExistsError, match="holds a model"):
        vllm_layout.export(tmp_path / "v1", base, base)
    assert not (tmp_path / "new").exists()


def test_vllms_other_name_for_the_shared_unembedding(tmp_path, base):
    state = in_vllm_names(blocks_and_rows(2, 1, False)) | {"lm_heads.0.weight": unembedding(base)}
    save_file(state, tmp_path / "model.safetensors")
    convert(tmp_path, "v2", tmp_path / "v2", base=str(base))
    assert set(load_file(tmp_path / "v2" / FILES[0])) == set(blocks_and_rows(2, 1, False))


def test_heads_in_vllms_layout_are_what_is_read_from_their_folder(tmp_path, base, capsys):
    write("v1", tmp_path / "new", blocks_and_rows(3, 1, True), base)
    write("v1", tmp_path / "out", blocks_and_rows(2, 1, True), base)
    (tmp_path / "out" / "config.json").unlink()
    to = ("--to", "vllm", "--out", tmp_path / "out")
    assert "already holds medusa_lm_head.safetensors" in refused(capsys, tmp_path / "new", *to)
    convert(tmp_path / "new", "vllm", tmp_path / "out", force=True)
    assert normalise(read(tmp_path / "out")[0]).num_heads == 3
    write("apar", tmp_path / "out", blocks_and_rows(2, 1, True), base)
    assert "would be read instead" in refused(capsys, tmp_path / "new", *to, "--force")


@pytest.mark.real
def test_heads_of_the_real_model_through_vllm_and_back(tmp_path):
    apar = medusa_apar.load("smollm2-135m", heads=None)
    MedusaHeads.random(apar.model, num_heads=2).save_pretrained(tmp_path / "made")
    convert(tmp_path / "made", "vllm", tmp_path / "vllm", base="smollm2-135m")
    convert(tmp_path / "vllm", "v2", tmp_path / "v2")
    made, again = load_file(tmp_path / "made" / FILES[0]), load_file(tmp_path / "v2" / FILES[0])
    assert made.keys() == again.keys() and all(torch.equal(made[key], again[key]) for key in made)
