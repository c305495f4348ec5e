"""JSON that others wrote: read as json reads it, and nothing of it fills the memory or is told in another way than a
sentence."""

import gzip
import json
import random
import tracemalloc

import pytest

from medusa_apar import json_files
from medusa_apar.json_files import json_object, numbered_lines, numbered_records, parse


def array(seed):
    rng = random.Random(seed)

    def value(depth):
        kinds = [rng.randrange(-(10**9), 10**9), rng.random(), None, True, "", 'a"]},[{ é \u2028 😀', "\\\n\t"]
        if depth and rng.random() < 0.6:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        if depth and rng.random() < 0.6:
            return {f"k{n}é": value(depth - 1) for n in range(rng.randrange(4))}
        return rng.choice(kinds)

    return [value(3) for _ in range(rng.randrange(12))]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_an_array_is_read_as_json_reads_it(tmp_path, monkeypatch, seed, chunk):
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    path = tmp_path / "a.json"
    options = {"indent": 2} if seed % 2 else {}
    path.write_text(" \n" + json.dumps(array(seed), ensure_ascii=seed % 3 == 0, **options) + " \n", encoding="utf-8")
    assert [record for _, record in numbered_records(path)] == array(seed)


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_an_array_cut_or_damaged_anywhere_is_a_sentence(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    path, rng = tmp_path / "a.json", random.Random(0)
    text = json.dumps(array(5)).encode()
    assert len(text) > 100
    for cut in range(1, len(text), 5):
        path.write_bytes(text[:cut])
        with pytest.raises(ValueError, match="a.json cannot be read"):
            list(numbered_records(path))
    for _ in range(100):
        damaged = bytearray(text)
        damaged[rng.randrange(1, len(text), 5)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            whole = json.loads(damaged.decode("utf-8", "surrogateescape"))
        except ValueError:
            with pytest.raises(ValueError, match="a.json cannot be read"):
                list(numbered_records(path))
        else:
            assert [record for _, record in numbered_records(path)] == whole


def bomb(path, start, filler, megabytes):
    """Much of one character: gzip's members may follow one another, so that it takes no time to make."""
    path.write_bytes(gzip.compress(start) + megabytes * gzip.compress(filler * (1 << 20)))
    return path


@pytest.mark.parametrize(
    ("start", "filler", "sentence"),
    [
        (b'{"a": 1}\n{"messages": "', b"a", r"c\.jsonl\.gz:2 is longer than 64 MiB: write one record a line"),
        (b"", b"a", r"c\.jsonl\.gz:1 is longer than 64 MiB"),
        (b'["', b"a", r"record 1 is broken JSON .*, or it is longer than 64 MiB"),
    ],
    ids=["second line", "first line", "record"],
)
def test_a_line_that_unpacks_to_a_gigabyte_is_not_read_whole(tmp_path, start, filler, sentence):
    path = bomb(tmp_path / "c.jsonl.gz", start, filler, 1024)
    assert path.stat().st_size < 3 << 20
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=sentence):
            list(numbered_records(path))
        assert tracemalloc.get_traced_memory()[1] < 6 * json_files.MAX_RECORD
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"is not valid JSON \(broken JSON"),
        (b"[1]", "holds no JSON object, but list"),
        (b"null", "holds no JSON object, but NoneType"),
        (b"\xff\xfe{\0}\0", r"is not valid JSON \(broken text"),
        (b'{"a":' * 100_000, r"is not valid JSON \(broken JSON, it nests too deeply"),
        (b'{"a": ' + b"1" * 9999 + b"}", "a number has thousands of digits"),
        (b" " * ((1 << 26) + 1), "is longer than 64 MiB"),
    ],
    ids=["empty", "list", "null", "utf16", "deep", "digits", "long"],
)
def test_a_file_that_is_no_object_is_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "o.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"o\.json .*{sentence}|o\.json {sentence}"):
        json_object(path)


def test_lines_keep_their_numbers_and_all_that_is_in_them(tmp_path):
    rows = [{"a": "\u2028 and \x85"}, {"b": 1}]
    path = tmp_path / "l.jsonl"
    text = "\ufeff\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text, encoding="utf-8")
    assert [(number, parse(line)) for number, line in numbered_lines(path)] == [(2, rows[0]), (4, rows[1])]
