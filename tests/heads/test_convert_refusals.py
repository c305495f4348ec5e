"""What `convert` refuses, in one sentence each and with nothing written."""

import json

import torch
from safetensors.torch import save_file

from medusa_apar.commands import cli
from medusa_apar.heads.convert import convert
from medusa_apar.models.head_files import FILES
from tests.support.head_layouts import MAP, blocks_and_rows, make_base, refused, write


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
