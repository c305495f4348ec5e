"""`merge`: the merged folder is the adapter on its base, for every reader."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from medusa_apar.commands import cli
from medusa_apar.heads import MedusaHeads
from medusa_apar.loading import load
from medusa_apar.models.merge import merge, plain_folder
from medusa_apar.models.sources import locate
from medusa_apar.threads.control_tokens import ControlTokens
from tests.support.folders import lora_of, own_code
from tests.support.tokenizers import WORDS, save_tokenizer


def make_base(folder, tied, dtype=torch.float32, vocabulary=32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.generation_config.repetition_penalty = 1.25
    model.save_pretrained(folder)
    save_tokenizer(folder, WORDS[:vocabulary])
    return folder


def make_adapter(base, folder, indices, ids, grown=False):
    """A random LoRA with trained rows; returns its own logits of PROMPT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if grown:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        trainable_token_indices=indices,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "trainable_tokens" in name:
                parameter.normal_()
    tuned.save_pretrained(folder, save_embedding_layers=False)
    if grown:
        words = [*WORDS[: ids[0]], "[Fork]", "[Child]"]
        save_tokenizer(folder, words)
    tokenizer = AutoTokenizer.from_pretrained(folder if grown else base)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    apar = {"fork_token_id": ids[0], "child_token_id": ids[1], "max_depth": 1, "base": f"../{base.name}"}
    (folder / "apar_config.json").write_text(json.dumps(apar))
    with torch.no_grad():
        return tuned(prompt(ids)).logits


def prompt(ids):
    return torch.tensor([[1, *ids, 9, 17]])


def logits(model, ids):
    with torch.no_grad():
        return model(prompt(ids)).logits


@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_model_is_the_adapter(tmp_path, tied):
    base = make_base(tmp_path / "base", tied)
    ids = (3, 4)
    indices = list(ids) if tied else {"embed_tokens": list(ids), "lm_head": list(ids)}
    expected = make_adapter(base, tmp_path / "adapter", indices, ids)
    heads = MedusaHeads.random(AutoModelForCausalLM.from_pretrained(base), 2)
    heads.save_pretrained(tmp_path / "adapter")

    out = merge(tmp_path / "adapter", tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(plain, ids), expected)
    torch.testing.assert_close(logits(load(tmp_path / "adapter").model, ids), expected)
    assert plain.generation_config.repetition_penalty == 1.25

    rows_in, rows_out = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    before = AutoModelForCausalLM.from_pretrained(base)
    for row in ids:
        assert not torch.equal(rows_in[row], before.get_input_embeddings().weight[row])
        assert not torch.equal(rows_out[row], before.get_output_embeddings().weight[row])
    assert torch.equal(rows_in[5:], before.get_input_embeddings().weight[5:])
    assert torch.equal(rows_in, rows_out) == tied == plain.config.tie_word_embeddings

    apar = load(out)
    assert torch.equal(logits(apar.model, ids), logits(plain, ids))
    assert apar.control_token_ids == ControlTokens(*ids, max_depth=1)
    assert apar.heads.num_heads == 2
    assert apar.tokenizer.chat_template == "{{ messages[0].content }}"
    assert not list(out.glob("adapter*"))
    # The heads' config points at the model around them.
    assert torch.equal(logits(load(out / "medusa").model, ids), logits(plain, ids))


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_grew_by_two(tmp_path, tied):
    size = len(WORDS) - 2
    base = make_base(tmp_path / "base", tied, vocabulary=size)
    ids = (size, size + 1)
    indices = list(ids) if tied else {"embed_tokens": list(ids), "lm_head": list(ids)}
    expected = make_adapter(base, tmp_path / "adapter", indices, ids, grown=True)
    out = merge(tmp_path / "adapter", tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    assert plain.config.vocab_size == size + 2 == len(AutoTokenizer.from_pretrained(out))
    torch.testing.assert_close(logits(plain, ids), expected)
    torch.testing.assert_close(logits(load(out).model, ids), expected)
    torch.testing.assert_close(logits(load(tmp_path / "adapter").model, ids), expected)


def test_dtype(tmp_path):
    base = make_base(tmp_path / "base", True, torch.bfloat16)
    make_adapter(base, tmp_path / "adapter", [3, 4], (3, 4))
    for dtype, stored in ((None, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float32)):
        out = merge(tmp_path / "adapter", tmp_path / f"merged-{dtype}", dtype)
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert model.dtype == stored
        # Added in float32 and rounded once.
        exact = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto") if dtype else None
        if exact is None:
            merge(tmp_path / "adapter", tmp_path / "merged", torch.float32)
        else:
            for one, other in zip(model.parameters(), exact.parameters(), strict=True):
                assert torch.equal(one, other.to(stored))


def test_a_merged_model_is_kept_as_long_as_it_is_made_from_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    base, adapter = make_base(tmp_path / "base", True), tmp_path / "adapter"
    expected = make_adapter(base, adapter, [3, 4], (3, 4))
    MedusaHeads.random(AutoModelForCausalLM.from_pretrained(base), 2).save_pretrained(adapter)

    def kept(dtype=None):
        return plain_folder(locate(adapter), dtype)

    first = kept()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(first).eval(), (3, 4)), expected)
    assert ControlTokens.from_pretrained(first) == ControlTokens(3, 4, max_depth=1)
    assert not (first / "medusa").exists() and not list(first.glob("adapter*"))
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert kept() == first and (first / "model.safetensors").stat().st_mtime_ns == written
    folders = [first, kept(torch.bfloat16)]
    assert AutoModelForCausalLM.from_pretrained(folders[-1], dtype="auto").dtype == torch.bfloat16
    make_adapter(base, adapter, [3, 5], (3, 5))
    folders.append(kept())
    make_base(base, True)  # the same numbers, but who knows
    folders.append(kept())
    assert len(set(folders)) == 4 and plain_folder(locate(first)) is None is plain_folder(locate(base))


def test_refusals_and_force(tmp_path, capsys):
    base = make_base(tmp_path / "base", True)
    make_adapter(base, tmp_path / "adapter", [3, 4], (3, 4))
    out = tmp_path / "out"

    def refused(*args):
        capsys.readouterr()  # transformers' bars
        assert cli.main(["merge", *map(str, args)]) == 2
        printed, err = capsys.readouterr()
        assert not printed and err.count("\n") == 1 and err.startswith("medusa-apar: ")
        return err

    assert "nothing to merge" in refused(base, "--out", out)
    assert "does not exist" in refused(tmp_path / "gone", "--out", out)
    for used in ("adapter", "base"):
        err = refused(tmp_path / "adapter", "--out", tmp_path / used, "--force")
        assert "is what the merged model is made from" in err
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("stale")
    assert "is not empty" in refused(tmp_path / "adapter", "--out", out)
    assert "holds no model" in refused(tmp_path / "adapter", "--out", out, "--force")
    assert sorted(path.name for path in out.iterdir()) == ["model-00001-of-00002.safetensors", "notes.txt"]
    (out / "config.json").write_text('{"model_type": "llama"}')
    (out / "adapter_config.json").write_text("{}")
    assert "adapter_config.json would be read with" in refused(tmp_path / "adapter", "--out", out, "--force")
    (out / "adapter_config.json").unlink()
    capsys.readouterr()
    assert cli.main(["merge", str(tmp_path / "adapter"), "--out", str(out), "--force"]) == 0
    assert capsys.readouterr().out.startswith("wrote  model, tokenizer, ")
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "model-00001-of-00002.safetensors").exists()
    assert load(out).control_token_ids == ControlTokens(3, 4, max_depth=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_force_deletes_what_is_the_models_alone(tmp_path):
    base = make_base(tmp_path / "base", True)
    make_adapter(base, tmp_path / "adapter", [3, 4], (3, 4))
    out = merge(tmp_path / "adapter", tmp_path / "out")
    (out / "medusa").mkdir()
    mine = ["results.json", "optimizer.pt", "training_args.bin", "data.safetensors", "mail.jinja", "medusa/notes.txt"]
    stale = ["model-00001-of-00002.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
    stale += ["added_tokens.json", "medusa/medusa_lm_head.pt", "medusa/config.json"]
    for name in mine + stale:
        (out / name).write_text("{}")
    merge(tmp_path / "adapter", out, force=True)
    assert [name for name in mine if not (out / name).exists()] == []
    assert [name for name in stale if (out / name).exists()] == []
    assert load(out).control_token_ids == ControlTokens(3, 4, max_depth=1)
    for name in ("medusa/medusa_lm_head.pt", "medusa/config.json"):
        (out / name).write_text("{}")
    MedusaHeads.random(AutoModelForCausalLM.from_pretrained(base), 2).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", out, force=True)
    assert load(out).heads.num_heads == 2
    assert (out / "medusa" / "notes.txt").exists() and not (out / "medusa" / "medusa_lm_head.pt").exists()


def test_code_of_the_model_runs_where_it_is_trusted(tmp_path, capsys):
    base = make_base(tmp_path / "base", True)
    make_adapter(base, tmp_path / "adapter", [3, 4], (3, 4))
    own_code(base)
    command = ["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert cli.main([*command, "--trust-remote-code"]) == 0


def test_a_python_caller_is_told_of_no_option(tmp_path):
    base = make_base(tmp_path / "base", True)
    make_adapter(base, tmp_path / "adapter", [3, 4], (3, 4))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "stale").mkdir()
    (tmp_path / "stale" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "stale" / "adapter_config.json").write_text("{}")
    apar = load(tmp_path / "adapter")
    for folder, words in (("mine", "holds no model"), ("stale", "would be read with the new model")):
        with pytest.raises(FileExistsError, match=f"{words}.*choose another folder") as error:
            apar.save_pretrained(tmp_path / folder)
        assert "--" not in str(error.value)


def test_a_failed_merge_leaves_nothing(tmp_path):
    base = make_base(tmp_path / "base", True)
    make_adapter(base, tmp_path / "adapter", [3, 4], (3, 4))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot be read"):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# ---- every kind of LoRA

ADAPTERS = {
    "the unembedding": {"target_modules": ["q_proj", "lm_head"]},
    "the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both ends": {"target_modules": ["lm_head", "embed_tokens"]},
    "both ends, kept tied": {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "a whole unembedding": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "a whole norm": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    "everything linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "dora on the unembedding": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    "biases": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}


def biased_base(folder, tied):
    make_base(folder, tied)
    config = LlamaConfig.from_pretrained(folder)
    config.attention_bias, config.initializer_range = True, 0.3
    torch.manual_seed(2)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, about ties
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_computes_the_same_when_merged(tmp_path, kind, tied):
    base = biased_base(tmp_path / "base", tied)
    expected = lora_of(base, tmp_path / "adapter", **ADAPTERS[kind])
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(base), [3, 4]), atol=0.01)
    torch.testing.assert_close(logits(load(tmp_path / "adapter").model, [3, 4]), expected, rtol=1e-4, atol=1e-4)
    out = merge(tmp_path / "adapter", tmp_path / "merged")
    for again in (AutoModelForCausalLM.from_pretrained(out), load(out).model):
        torch.testing.assert_close(logits(again, [3, 4]), expected, rtol=1e-4, atol=1e-4)
    load(out).save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load(tmp_path / "saved").model, [3, 4]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_that_peft_cannot_merge_is_refused(tmp_path):
    base = make_base(tmp_path / "base", True)
    lora_of(base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"], trainable_token_indices=[3, 4])
    with pytest.raises(NotImplementedError, match="changes lm_head in two ways at once, which peft cannot merge"):
        load(tmp_path / "adapter")


def renamed(state):
    return {key.replace("q_proj", "query"): value for key, value in state.items()}


def of_another_rank(state):
    return {key: (value[:2] if "lora_A" in key else value[:, :2]).contiguous() for key, value in state.items()}


MISFITS = {
    "renamed layers": (renamed, r"4 of its tensors are missing from its file, .*q_proj.lora_A"),
    "a missing tensor": (lambda state: dict(list(state.items())[1:]), r"1 of its tensors are missing .*lora_A"),
    "half of each pair": (
        lambda state: {k: v for k, v in state.items() if "lora_A" in k},
        r"2 of its tensors are missing .*lora_B",
    ),
    "nothing": (lambda state: {}, "4 of its tensors are missing"),
    "a tensor too many": (
        lambda state: state | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)},
        r"1 of its tensors have no place in that model, .*layers\.7",
    ),
    "another rank": (of_another_rank, "size mismatch for .*lora_A"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, misfit):
    change, words = MISFITS[misfit]
    base = make_base(tmp_path / "base", True)
    lora_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    for use in (lambda: load(tmp_path / "adapter"), lambda: merge(tmp_path / "adapter", tmp_path / "out")):
        with pytest.raises(ValueError, match=f"adapter does not fit its base model.*{words}") as error:
            use()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_larger_or_smaller_model_is_refused(tmp_path):
    base = make_base(tmp_path / "base", True)
    lora_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    for layers in (1, 3):
        config = LlamaConfig.from_pretrained(base, num_hidden_layers=layers)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match="does not fit its base model"):
            load(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "SORCERY"}, "peft_type is 'SORCERY' in .*adapter_config.json, which the installed peft"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, "is of kind PROMPT_TUNING.*cannot be merged"),
        ({"target_modules": ["wq"]}, "does not fit its base model.*wq"),
        ({"trainable_token_indices": [10**9]}, "it trains the row of id 1000000000, and the model has 32"),
    ],
)
def test_an_adapter_config_that_cannot_be_merged_is_refused(tmp_path, change, words):
    base = make_base(tmp_path / "base", True)
    lora_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "adapter")


def test_warnings_of_peft_reach_the_user(tmp_path):
    base = make_base(tmp_path / "base", True)
    with pytest.warns(UserWarning, match="tied layer"):
        lora_of(base, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.warns(UserWarning, match="tied layer"):
        load(tmp_path / "adapter")


@pytest.mark.real
def test_the_shipped_adapter(tmp_path):
    out = merge("smollm2-135m", tmp_path / "merged")
    apar, plain = load(), load(out)
    ids = apar.tokenizer("Three tips for better sleep", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(plain.model(ids).logits, apar.model(ids).logits, atol=1e-3, rtol=1e-3)
    assert plain.control_token_ids == apar.control_token_ids
    assert plain.heads is not None and plain.tokenizer.chat_template == apar.tokenizer.chat_template
    assert Path(out / "generation_config.json").is_file()
