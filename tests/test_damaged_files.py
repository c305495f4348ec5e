"""Whatever is wrong with a file that others wrote: one sentence that names it, or the result that the file stands for.

Every format is cut, emptied, replaced by a folder and by bytes that are no text, and every entry of a JSON file takes
values of other types and is deleted.
"""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from medusa_apar import ControlTokens, load
from medusa_apar.heads import HydraHeads, MedusaHeads, load_heads
from medusa_apar.heads.convert import convert
from medusa_apar.models.merge import merge
from tests.support.folders import PROMPT, word_model
from tests.support.models import CHILD, FORK
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tokenizers import save_tokenizer

OURS = (ValueError, OSError, NotImplementedError)
PLACES = 10  # at which a file is cut
OTHER_TYPES = (None, "x", -1, 3.5, True, [], {}, ["x"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of each format, and what is in it."""
    root = tmp_path_factory.mktemp("whole")
    for name in ("base", "shards", "pickle"):
        word_model().save_pretrained(root / name, max_shard_size="4KB" if name == "shards" else "1GB")
        save_tokenizer(root / name)
    (root / "pickle" / "model.safetensors").unlink()
    torch.save(word_model().state_dict(), root / "pickle" / "pytorch_model.bin")
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    MedusaHeads.random(model, 2, layout="v1").save_pretrained(root / "v1")
    heads = MedusaHeads.random(model, 2)
    heads.acceptance = [[0.5, 0.3], [0.2, 0.1]]
    heads.save_pretrained(root / "v2")
    HydraHeads.random(model, 2, aux_layers=(0,)).save_pretrained(root / "hydra")
    convert(root / "v2", "v2", root / "pt", file_format="pt")
    convert(root / "v2", "vllm", root / "vllm", base=str(root / "base"))
    convert(root / "v2", "medusa2", root / "medusa2", base=str(root / "base"))
    (root / "gguf").mkdir()
    write_tiny_gguf(root / "gguf" / "tiny.gguf")
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        trainable_token_indices=[FORK, CHILD],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(model, config).save_pretrained(root / "adapter")
    apar = {"fork_token_id": FORK, "child_token_id": CHILD, "base": "../base", "max_depth": 2}
    (root / "adapter" / "apar_config.json").write_text(json.dumps(apar))
    return root


def damages(data, is_json):
    """(what was done, content); a content of None is a folder in the file's place."""
    yield from {"empty": b"", "no text": b"\xff\xfe\x00", "a folder": None}.items()
    yield from ((f"cut at {at}", data[:at]) for at in range(1, len(data), max(1, len(data) // PLACES)))
    if is_json:
        entries = json.loads(data)
        yield from {"no object": b"[]", "too deep": b"[" * 100_000}.items()
        for number, key in enumerate(entries):
            others = [value for value in OTHER_TYPES if type(value) is not type(entries[key])]
            said = entries[key] not in (None, False)  # peft writes thirty entries that say nothing
            for value in (others[number % len(others)], others[(number + 3) % len(others)])[: 1 + said]:
                yield f"{key} = {value!r}", json.dumps(entries | {key: value}).encode()
            if said:
                yield f"no {key}", json.dumps({k: v for k, v in entries.items() if k != key}).encode()


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits


def loaded(folder):
    return logits(load(folder).model)


def plain(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder).eval())


def plain_adapter(folder):
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    return logits(PeftModel.from_pretrained(base, str(folder)).eval())


def merged(folder):
    return plain(merge(folder, folder.parent / "merged", force=True))


def tensors(heads):
    return torch.cat([parameter.flatten() for parameter in heads.parameters()])


def of_heads(folder):
    return tensors(load_heads(folder, AutoModelForCausalLM.from_pretrained(folder.parent / "base")))


def converted(folder):
    convert(folder, "v2", folder.parent / "converted", base=str(folder.parent / "base"), force=True)
    return of_heads(folder.parent / "converted")


def control(folder):
    tokens = ControlTokens.from_pretrained(folder)
    return torch.tensor([tokens.fork_id, tokens.child_id])


CASES = [
    *(("base", file, loaded, plain) for file in ("config.json", "model.safetensors", "generation_config.json")),
    *(("base", file, loaded, plain) for file in ("tokenizer.json", "tokenizer_config.json")),
    ("shards", "model.safetensors.index.json", loaded, plain),
    ("shards", "model-00001-of-*.safetensors", loaded, plain),
    ("pickle", "pytorch_model.bin", loaded, plain),
    ("gguf", "tiny.gguf", lambda folder: logits(load(folder / "tiny.gguf").model), None),
    *(("adapter", "adapter_model.safetensors", read, plain_adapter) for read in (loaded, merged)),
    ("adapter", "adapter_config.json", loaded, plain_adapter),
    ("adapter", "apar_config.json", loaded, plain_adapter),
    ("adapter", "apar_config.json", control, None),
    *((kind, "medusa_lm_head.safetensors", of_heads, None) for kind in ("v1", "v2", "hydra")),
    *((kind, "config.json", of_heads, None) for kind in ("v1", "v2", "hydra", "vllm", "medusa2")),
    ("vllm", "model.safetensors", converted, None),
    ("vllm", "config.json", converted, None),
    ("pt", "medusa_lm_head.pt", of_heads, None),
    ("pt", "medusa_lm_head.pt", converted, None),
    ("medusa2", "model.safetensors.index.json", converted, None),
    ("medusa2", "model.safetensors.index.json", loaded, plain),
]


@pytest.mark.parametrize(("kind", "file", "read", "oracle"), CASES)
def test_a_damaged_file_is_one_sentence_or_does_not_matter(whole, kind, file, read, oracle):
    path = next((whole / kind).glob(file))
    data, intact, refused = path.read_bytes(), read(whole / kind), 0
    for damage, content in damages(data, path.suffix == ".json"):
        path.unlink()
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = read(whole / kind)
        except OURS as error:
            refused += 1
            words = str(error)
            assert "\n" not in words and "untrusted" not in words and "weights_only=False" not in words, damage
            # What a config says of a model that can be built is judged when it is attached, under the model's name.
            assert path.name in words or str(path.parent) in words or "ForCausalLM" in words, (damage, words)
        else:
            expected = intact if oracle is None else oracle(whole / kind)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5), damage  # merging rounds
        finally:
            if path.is_dir():
                path.rmdir()
            path.write_bytes(data)
    assert refused >= 4  # cuts among them
