"""`convert`: every layout into every other and back, bit for bit."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from medusa_apar.commands import cli
from medusa_apar.heads import MedusaHeads
from medusa_apar.heads.checkpoints import normalise, read
from medusa_apar.heads.convert import LAYOUTS, convert
from medusa_apar.models.head_files import FILES
from tests.support.head_layouts import (
    HIDDEN,
    MAP,
    VOCABULARY,
    all_tensors,
    blocks_and_rows,
    make_base,
    unembedding,
    with_whole_rows,
    write,
)


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


def test_the_same_logits_in_every_layout(tmp_path, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    heads = MedusaHeads.random(model, 2, 2)
    heads.save_pretrained(tmp_path / "v2", dtype=torch.float32)
    x = torch.randn(3, HIDDEN)
    for layout in ("v1", "vllm", "medusa2"):
        convert(tmp_path / "v2", layout, tmp_path / layout, base=str(base))
        again = MedusaHeads.from_pretrained(tmp_path / layout, model)
        torch.testing.assert_close(again.logits(x), heads.logits(x))


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
