"""`convert`: every layout into every other and back, bit for bit, or a sentence that says why not."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import medusa_apar
from medusa_apar.commands import cli
from medusa_apar.heads import MedusaHeads, vllm_layout
from medusa_apar.heads.checkpoints import normalise, read
from medusa_apar.heads.convert import LAYOUTS, convert
from medusa_apar.models.head_files import FILES

HIDDEN, VOCABULARY = 16, 37
MAP = [4, 30, 2, 11]


def make_base(folder, dtype=torch.float32, tied=False, hidden=HIDDEN, vocabulary=VOCABULARY, **save_options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, **save_options)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        False: make_base(root / "untied", max_shard_size="5KB"),
        True: make_base(root / "tied", torch.bfloat16, tied=True),
    }


@pytest.fixture
def base(bases):
    return bases[False]


def blocks_and_rows(num_heads, num_layers, own, dtype=torch.float32, rows=VOCABULARY, tied=False):
    """A file's content by the V1 or V2 naming."""
    generator = torch.Generator().manual_seed(num_heads * 10 + num_layers)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    state = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            for kind, shape in (("weight", (HIDDEN, HIDDEN)), ("bias", (HIDDEN,))):
                first = state.get(f"{head}.0.linear.{kind}")
                state[f"{head}.{layer}.linear.{kind}"] = first if tied and layer else randn(*shape)
        if own:
            state[f"{head}.{num_layers}.weight"] = randn(rows, HIDDEN)
    return state


def in_vllm_names(state):
    named = {}
    for key, value in state.items():
        parts = key.split(".")
        if len(parts) == 4:
            named[f"blocks.{parts[0]}.layers.{parts[1]}.{parts[3]}"] = value
        elif len(parts) == 3:
            named[f"lm_heads.{parts[0]}.weight"] = value
        else:
            named[key] = value
    return named


def unembedding(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype="auto").get_output_embeddings().weight.detach()


def with_whole_rows(state, base):
    """What vLLM's layout makes of heads with a token_map: rows that a head lacks are the base's."""
    whole = dict(state)
    token_map = whole.pop("token_map").long()
    for key, rows in state.items():
        if len(key.split(".")) == 3 and len(rows) == len(token_map):
            whole[key] = unembedding(base).to(rows.dtype).clone()
            whole[key][token_map] = rows
    return whole


def write(layout, folder, state, base, pickled=False, bias=True):
    """A folder in one of the layouts, by nothing of the code under test."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"base_model_name_or_path": str(base), "medusa_num_heads": 2, "vocab_size": VOCABULARY}
    if layout == "vllm":
        own = any(len(key.split(".")) == 3 for key in state)
        token_map = state.get("token_map")
        state = in_vllm_names(state)
        if not own:
            rows = unembedding(base)
            state["lm_head.weight"] = rows.clone() if token_map is None else rows[token_map.long()]
        if not bias:
            state = {key: value for key, value in state.items() if not key.endswith(".bias")}
        config |= {"model_type": "medusa", "original_lm_head": not own, "medusa_fc_bias": bias}
        name = "model.safetensors"
    elif layout == "medusa2":
        files = [*base.glob("*.safetensors")]
        weights = {key: value for file in files for key, value in load_file(file).items()}
        state = weights | {f"medusa_head.{key}": value for key, value in state.items()}
        config |= json.loads((base / "config.json").read_text())
        name = "model.safetensors"
    else:
        folder = folder / "medusa" if layout == "apar" else folder
        folder.mkdir(exist_ok=True)
        name = "medusa_lm_head.pt" if pickled or layout == "apar" else "medusa_lm_head.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".pt"):
        torch.save(state, folder / name)
    else:
        save_file({key: value.clone() for key, value in state.items()}, folder / name, metadata={"format": "pt"})


def all_tensors(folder):
    """Every tensor under `folder` as (dtype, shape, bytes)."""
    state = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors":
            state |= load_file(file)
        elif file.suffix == ".pt":
            state |= torch.load(file, weights_only=True)
    return {
        key: (value.dtype, tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
        for key, value in state.items()
    }


@st.composite
def cases(draw):
    source, target = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))
    own = {"v1": True, "apar": True, "v2": False}.get(source, draw(st.booleans()))
    layers = draw(st.integers(0 if own else 1, 3))
    tied = source == "apar" or draw(st.booleans())
    mapped = source not in ("medusa2", "apar") and draw(st.booleans())
    return {
        "source": source,
        "target": target,
        "own": own,
        "layers": layers,
        "heads": draw(st.integers(1, 3)),
        "tied": tied or layers < 2,
        "token_map": torch.tensor(MAP, dtype=draw(st.sampled_from([torch.int32, torch.int64]))) if mapped else None,
        "rows": draw(st.sampled_from([VOCABULARY, len(MAP)])) if mapped else VOCABULARY,
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "bias": source != "vllm" or layers == 0 or draw(st.booleans()),
        "tied_base": draw(st.booleans()),
        "pickled": draw(st.booleans()),
    }


@given(case=cases())
@settings(max_examples=120, deadline=None)
def test_there_and_back_again(bases, case):
    base, source, target = bases[case["tied_base"]], case["source"], case["target"]
    state = blocks_and_rows(case["heads"], case["layers"], case["own"], case["dtype"], case["rows"], case["tied"])
    if case["token_map"] is not None:
        state["token_map"] = case["token_map"]
    expressible = not (
        (target == "v2" and case["own"])
        or (target in ("medusa2", "apar") and case["token_map"] is not None)
        or (target == "apar" and not case["tied"])
    )
    with tempfile.TemporaryDirectory() as scratch:
        a, b, again, expected = (Path(scratch) / name for name in ("a", "b", "again", "expected"))
        write(source, a, state, base, case["pickled"], case["bias"])
        if not expressible:
            with pytest.raises(ValueError):
                convert(a, target, b)
            assert not b.exists()
            return
        before = all_tensors(a)
        read_from, written, _ = convert(a, target, b)
        assert (read_from.heads, read_from.layers) == (written.heads, written.layers) == (case["heads"], case["layers"])
        assert written.bytes > 0
        convert(b, source, again, file_format="pt" if case["pickled"] and source in ("v1", "v2") else None)
        assert all_tensors(a) == before
        if case["token_map"] is not None and "vllm" in (source, target):
            write(source, expected, with_whole_rows(state, base), base, case["pickled"], case["bias"])
            before = all_tensors(expected)
        assert all_tensors(again) == before


def test_vllm_shared_rows_become_v1_and_return(tmp_path, base):
    write("vllm", tmp_path / "a", blocks_and_rows(3, 1, False), base)
    convert(tmp_path / "a", "v1", tmp_path / "v1")
    state = load_file(tmp_path / "v1" / FILES[0])
    assert all(torch.equal(state[f"{head}.1.weight"], unembedding(base)) for head in range(3))
    convert(tmp_path / "v1", "v2", tmp_path / "v2")
    assert set(load_file(tmp_path / "v2" / FILES[0])) == set(blocks_and_rows(3, 1, False))


def test_the_same_logits_in_every_layout(tmp_path, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    heads = MedusaHeads.random(model, 2, 2)
    heads.save_pretrained(tmp_path / "v2", dtype=torch.float32)
    x = torch.randn(3, HIDDEN)
    for layout in ("v1", "vllm", "medusa2"):
        convert(tmp_path / "v2", layout, tmp_path / layout, base=str(base))
        again = MedusaHeads.from_pretrained(tmp_path / layout, model)
        torch.testing.assert_close(again.logits(x), heads.logits(x))


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


def test_a_medusa_2_model_is_still_the_model(tmp_path, base):
    write("v2", tmp_path / "v2", blocks_and_rows(2, 1, False), base)
    _, written, _ = convert(tmp_path / "v2", "medusa2", tmp_path / "full")
    assert written.heads == 2
    ids = torch.tensor([[1, 5, 9]])
    expected = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "full")(ids).logits, expected)
    assert (tmp_path / "full" / "tokenizer.json").exists()
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["medusa_num_heads"] == 2 and config["version"] == "2" and config["model_type"] == "llama"
    # The heads of one that has heads already are replaced, not added to.
    write("v1", tmp_path / "v1", blocks_and_rows(1, 1, True), base)
    convert(tmp_path / "v1", "medusa2", tmp_path / "other", base=str(tmp_path / "full"))
    assert {key for key in all_tensors(tmp_path / "other") if "medusa" in key} == {
        f"medusa_head.{key}" for key in blocks_and_rows(1, 1, True)
    }


def test_apar_shares_what_is_tied(tmp_path, base):
    state = blocks_and_rows(2, 2, True, tied=True)
    write("v1", tmp_path / "v1", state, base)  # in safetensors: two copies of each block
    convert(tmp_path / "v1", "apar", tmp_path / "model")
    written = torch.load(tmp_path / "model" / "medusa" / "medusa_lm_head.pt", weights_only=True)
    assert set(written) == set(state)
    convert(tmp_path / "v1", "apar", tmp_path / "safe", file_format="safetensors")
    assert "0.1.linear.weight" not in load_file(tmp_path / "safe" / "medusa" / FILES[0])
    for folder in ("model", "safe"):
        back, _, _ = convert(tmp_path / folder, "v1", tmp_path / f"{folder}-v1")
        assert back.layout == "apar" and back.layers == 2
        assert all_tensors(tmp_path / f"{folder}-v1") == all_tensors(tmp_path / "v1")


def test_a_pickle_is_no_larger_than_its_tensors(tmp_path, base):
    huge = torch.zeros(1000, HIDDEN, HIDDEN)
    state = {"0.0.linear.weight": huge[3], "0.0.linear.bias": torch.zeros(HIDDEN)}
    (tmp_path / "v2").mkdir()
    torch.save(state, tmp_path / "v2" / "medusa_lm_head.pt")
    convert(tmp_path / "v2", "v2", tmp_path / "out", file_format="pt")
    assert (tmp_path / "out" / "medusa_lm_head.pt").stat().st_size < 10_000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtype(tmp_path, base, layout):
    write("v1", tmp_path / "a", blocks_and_rows(2, 1, True), base)
    if layout == "v2":
        write("v2", tmp_path / "a", blocks_and_rows(2, 1, False), base)
    _, written, _ = convert(tmp_path / "a", layout, tmp_path / "b", dtype=torch.bfloat16)
    assert written.dtype == "bfloat16"
    assert {dtype for dtype, _, _ in all_tensors(tmp_path / "b").values()} == {torch.bfloat16}


def test_acceptance_survives(tmp_path, base):
    write("v2", tmp_path / "a", blocks_and_rows(2, 1, False), base)
    config = tmp_path / "a" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"acceptance": [[0.5], [0.25]]}))
    here = tmp_path / "a"
    for layout in ("vllm", "medusa2", "v1", "v2"):
        convert(here, layout, tmp_path / layout)
        here = tmp_path / layout
        assert json.loads((here / "config.json").read_text())["acceptance"] == [[0.5], [0.25]]


def test_the_base_is_found_relative_to_the_heads(tmp_path):
    make_base(tmp_path / "model")
    write("v2", tmp_path / "model" / "heads", blocks_and_rows(1, 1, False), Path(".."))
    convert(tmp_path / "model" / "heads", "v1", tmp_path / "v1")
    rows = load_file(tmp_path / "v1" / FILES[0])["0.1.weight"]
    assert torch.equal(rows, unembedding(tmp_path / "model"))


def test_vllms_other_name_for_the_shared_unembedding(tmp_path, base):
    state = in_vllm_names(blocks_and_rows(2, 1, False)) | {"lm_heads.0.weight": unembedding(base)}
    save_file(state, tmp_path / "model.safetensors")
    convert(tmp_path, "v2", tmp_path / "v2", base=str(base))
    assert set(load_file(tmp_path / "v2" / FILES[0])) == set(blocks_and_rows(2, 1, False))


def test_tensors_of_different_dtypes_are_read_without_loss():
    state = blocks_and_rows(2, 1, False) | {
        f"{head}.1.weight": torch.zeros(VOCABULARY, HIDDEN, dtype=torch.float16) for head in range(2)
    }
    heads = normalise(state)
    assert heads.unembedding.dtype == torch.float16
    assert torch.equal(heads.weight[0, 1], state["1.0.linear.weight"])


def test_a_sharded_pickle_of_a_whole_model(tmp_path, base):
    state = blocks_and_rows(2, 1, True)
    torch.save({"model.norm.weight": torch.zeros(3)}, tmp_path / "a.bin")
    torch.save({f"medusa_head.{key}": value for key, value in state.items()}, tmp_path / "b.bin")
    shards = {"model.norm.weight": "a.bin"} | {f"medusa_head.{key}": "b.bin" for key in state}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    assert set(read(tmp_path)[0]) == {f"medusa_head.{key}" for key in state}


# ---- what is refused, with nothing written


def refused(capsys, *args):
    """The one sentence of a refused command."""
    assert cli.main(["convert", *map(str, args)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("medusa-apar: ")
    return err


def test_refusals(tmp_path, base, capsys):
    write("v1", tmp_path / "v1", blocks_and_rows(2, 2, True), base)
    write("v2", tmp_path / "v2", blocks_and_rows(2, 1, False) | {"token_map": torch.tensor(MAP)}, base)
    write("v2", tmp_path / "orphan", blocks_and_rows(2, 1, False), "")
    (tmp_path / "hydra").mkdir()
    (tmp_path / "hydra" / "config.json").write_text('{"kind": "hydra"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "hydra" / FILES[0])
    out = tmp_path / "out"
    for args, words in [
        (("v1", "--to", "v2"), "unembedding of its own, which the v2 layout cannot hold"),
        (("v1", "--to", "v2", "--base", base), "the heads' unembedding is not that of"),
        (("v1", "--to", "apar"), "residual blocks differ"),
        (("v2", "--to", "medusa2"), "draft from 4 of the vocabulary's tokens, and the medusa2 layout has no token_map"),
        (("v2", "--to", "apar"), "no token_map"),
        (("orphan", "--to", "vllm"), "name the base model with --base: vLLM's layout holds rows of its unembedding"),
        (("orphan", "--to", "medusa2"), "a medusa2 model holds its weights"),
        (("hydra", "--to", "v2"), "holds hydra heads, which exist in no other format"),
        (("nothing/at/all", "--to", "v2"), "is no file, folder or Hub id"),
        (("v1", "--to", "vllm", "--format", "pt"), "safetensors alone"),
        (("v1", "--to", "medusa2", "--base", tmp_path / "gone"), "gone does not exist"),
    ]:
        assert words in refused(capsys, tmp_path / args[0], *args[1:], "--out", out), args
        assert not out.exists()
    assert "no Medusa heads in" in refused(capsys, base, "--to", "v2", "--out", out)


def test_damaged_files_are_one_sentence(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for name, content, words in [
        ("medusa_lm_head.pt", b"not a pickle", "no plain file of tensors"),
        ("medusa_lm_head.pt", b"", "it ends early"),
        ("medusa_lm_head.safetensors", b"\x10", "medusa_lm_head.safetensors cannot be read"),
        ("config.json", b"{", "config.json is not valid JSON"),
    ]:
        (tmp_path / "a" / name).write_bytes(content)
        assert words in refused(capsys, tmp_path / "a", "--to", "v1", "--out", tmp_path / "out")
        if name == "medusa_lm_head.safetensors":
            save_file(blocks_and_rows(1, 1, True), tmp_path / "a" / name)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    assert "it holds a list" in refused(capsys, tmp_path / "list.pt", "--to", "v1", "--out", tmp_path / "out")
    broken = blocks_and_rows(1, 1, True) | {"0.0.linear.bias": torch.zeros(3)}
    save_file(broken, tmp_path / "broken.safetensors")
    err = refused(capsys, tmp_path / "broken.safetensors", "--to", "v1", "--out", tmp_path / "out")
    assert "bias of shape [3]" in err
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays_without_force(tmp_path, base, capsys):
    write("v1", tmp_path / "v1", blocks_and_rows(2, 1, True), base)
    out = tmp_path / "out"
    convert(tmp_path / "v1", "v1", out, file_format="safetensors")
    assert "already holds" in refused(capsys, tmp_path / "v1", "--to", "v1", "--format", "pt", "--out", out)
    convert(tmp_path / "v1", "v1", out, file_format="pt", force=True)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "medusa_lm_head.pt"]

    make_base(tmp_path / "model")
    model = sorted((path.name, path.read_bytes()) for path in (tmp_path / "model").iterdir())
    for force in ((), ("--force",)):
        err = refused(capsys, tmp_path / "v1", "--to", "v1", "--out", tmp_path / "model", *force)
        assert "holds a model, whose config.json stays" in err
    same = ("--to", "medusa2", "--base", tmp_path / "model", "--out", tmp_path / "model", "--force")
    assert "what the model is made from" in refused(capsys, tmp_path / "v1", *same)
    convert(tmp_path / "v1", "apar", tmp_path / "model")  # beside a model is where these belong
    assert json.loads((tmp_path / "model" / "medusa" / "config.json").read_text())["base_model_name_or_path"] == ".."
    (tmp_path / "model" / "medusa").rename(tmp_path / "medusa")
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "model").iterdir()) == model

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.md").write_text("mine")
    full = ("--to", "medusa2", "--out", tmp_path / "full")
    assert "is not empty" in refused(capsys, tmp_path / "v1", *full)
    assert "holds no model" in refused(capsys, tmp_path / "v1", *full, "--force")
    (tmp_path / "full" / "config.json").write_text('{"model_type": "medusa"}')  # heads in vLLM's layout are no model
    assert "holds no model" in refused(capsys, tmp_path / "v1", *full, "--force")
    (tmp_path / "full" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "full" / "results.json").write_text("{}")
    assert cli.main(["convert", str(tmp_path / "v1"), *map(str, full), "--force"]) == 0
    assert (tmp_path / "full" / "notes.md").read_text() == "mine"
    assert (tmp_path / "full" / "results.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "medusa", "model", "out", "v1"]


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


def test_the_command_says_what_it_read_and_wrote(tmp_path, base, capsys):
    write("v1", tmp_path / "a", blocks_and_rows(5, 1, True, torch.float16), base)
    assert cli.main(["convert", str(tmp_path / "a"), "--to", "vllm", "--out", str(tmp_path / "b")]) == 0
    out, err = capsys.readouterr()
    size = 5 * 2 * (HIDDEN * HIDDEN + HIDDEN + VOCABULARY * HIDDEN)
    shared = f"5 heads, 1 residual block, draft vocabulary {VOCABULARY}, float16, {size:,} bytes"
    assert out == f"read   v1, {shared}, {tmp_path / 'a'}\nwrote  vllm, {shared}, {tmp_path / 'b'}\n"
    assert err == "medusa-apar: medusa_num_heads is 2 in the config but 5 in the file, which counts.\n"
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["num_heads"] == 5 and config["truncated_vocab_size"] == config["vocab_size"] == VOCABULARY


@pytest.mark.real
def test_heads_of_the_real_model_through_vllm_and_back(tmp_path):
    apar = medusa_apar.load("smollm2-135m", heads=None)
    MedusaHeads.random(apar.model, num_heads=2).save_pretrained(tmp_path / "made")
    convert(tmp_path / "made", "vllm", tmp_path / "vllm", base="smollm2-135m")
    convert(tmp_path / "vllm", "v2", tmp_path / "v2")
    made, again = load_file(tmp_path / "made" / FILES[0]), load_file(tmp_path / "v2" / FILES[0])
    assert made.keys() == again.keys() and all(torch.equal(made[key], again[key]) for key in made)
