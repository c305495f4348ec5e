"""Texts that come token by token are those that are decoded at once, and end before stop strings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa_apar.events.texts import TextStream, TokenTexts
from tests.support.byte_chat import SPECIAL, byte_tokenizer
from tests.support.stop_strings import cut

LETTERS = "abé你😀 \n"
BYTES = byte_tokenizer()
# Bytes of characters, in any order, whole ones among them; and special tokens.
BYTE_IDS = st.lists(
    st.one_of(
        st.sampled_from(LETTERS).map(lambda letter: BYTES(letter, add_special_tokens=False)["input_ids"]),
        st.integers(0, len(SPECIAL) + 255).map(lambda id: [id]),
        st.sampled_from([[id] for id in BYTES(LETTERS, add_special_tokens=False)["input_ids"]]),
    ),
    max_size=20,
).map(lambda parts: [id for part in parts for id in part])
STOPS = st.lists(st.text(alphabet="ab é你\ufffd", min_size=1, max_size=4), min_size=1, max_size=3)


def pieces_tokenizer():
    """As SentencePiece has it: a space stands at the beginning of words, and bytes stand in for unknown characters."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for piece in ("▁", "a", "b", "ab", "▁a", "▁ab", "é"):
        vocabulary[piece] = len(vocabulary)
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab")]
    inner = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


def gaps_tokenizer(split=None, normalizer=None, added=()):
    """Byte-level, with "b" twice as one token, and without two of the bytes, which it drops."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"a", "ä"})
    inner = Tokenizer(models.BPE({name: index for index, name in enumerate([*alphabet, "bb", "bbbb"])}, MERGES))
    bytes_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = bytes_level if split is None else pre_tokenizers.Sequence([split, bytes_level])
    inner.decoder = decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.add_special_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


MERGES = [("b", "b"), ("bb", "bb")]
PIECES = pieces_tokenizer()
GAPS = gaps_tokenizer()
UNKNOWN = [
    PIECES,
    gaps_tokenizer(pre_tokenizers.WhitespaceSplit()),
    gaps_tokenizer(pre_tokenizers.Split(" ", "removed")),
    gaps_tokenizer(normalizer=normalizers.NFC()),
    gaps_tokenizer(added=[AddedToken("<s>", rstrip=True)]),
]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def streamed(tokenizer, ids, stops=(), free=0):
    """What each token shows, then what is left; how much there was to read before each token; whether it stopped."""
    stream = TextStream(TokenTexts.of(tokenizer), stops, free)
    shown, lengths = [], []
    for id in ids:
        lengths.append(stream.length)
        shown.append(stream.push(id))
    return [*shown, stream.end()], lengths, stream.stopped


@settings(max_examples=100, deadline=None)
@given(BYTE_IDS)
def test_bytes_become_the_text_that_all_of_them_decode_to(ids):
    shown, lengths, stopped = streamed(BYTES, ids)
    assert "".join(shown) == decoded(BYTES, ids) and not stopped
    # No character is shown in parts: whatever follows, what was shown stays a beginning of the text.
    for count, length in enumerate(lengths):
        seen = "".join(shown[:count])
        assert length == len(seen) and decoded(BYTES, ids).startswith(seen)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab é你😀", max_size=12))
def test_pieces_become_the_text_that_all_of_them_decode_to(text):
    ids = PIECES(text, add_special_tokens=False)["input_ids"]
    shown, _, _ = streamed(PIECES, [*ids, PIECES.eos_token_id])
    assert "".join(shown) == decoded(PIECES, ids) == text.removeprefix(" ")
    assert all(part == "" or "\ufffd" not in part for part in shown)


def test_a_word_keeps_the_space_before_it_and_half_a_character_is_told_at_the_end():
    word = PIECES.convert_tokens_to_ids("▁ab")
    half = [PIECES.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "你".encode()[:2]]
    assert streamed(PIECES, [word, word, *half])[0] == ["ab", " ab", "", "", decoded(PIECES, half)]
    half = BYTES("你", add_special_tokens=False)["input_ids"][:2]
    assert streamed(BYTES, half)[0] == ["", "", "\ufffd"]


@settings(max_examples=100, deadline=None)
@given(BYTE_IDS, STOPS)
def test_a_text_ends_before_its_first_stop_string(ids, stops):
    text, found = cut(decoded(BYTES, ids), stops)
    shown, _, stopped = streamed(BYTES, ids, stops)
    assert ("".join(shown), stopped) == (text, found)
    # Once it has stopped there is nothing more; and nothing that was shown is ever taken back.
    for count in range(len(ids) + 1):
        assert text.startswith("".join(shown[:count]))


@settings(max_examples=100, deadline=None)
@given(BYTE_IDS, STOPS, st.integers(0, 12))
def test_no_stop_string_ends_among_the_first_tokens(ids, stops, free):
    shown, _, stopped = streamed(BYTES, ids, stops, free)
    stream = TextStream(TokenTexts.of(BYTES))
    for id in ids[:free]:
        stream.push(id)
    start = stream.length if len(ids) > free else len(decoded(BYTES, ids))
    assert ("".join(shown), stopped) == cut(decoded(BYTES, ids), stops, start)


def test_what_may_become_a_stop_string_is_held_back_and_then_shown():
    ids = BYTES("abab b", add_special_tokens=False)["input_ids"]
    assert streamed(BYTES, ids, ["abac"])[0] == ["", "", "", "ab", "ab ", "b", ""]
    assert streamed(BYTES, ids, ["b b"])[0] == ["a", "", "ba", "", "", "", ""]
    assert streamed(BYTES, ids, ["b b"])[2]


@pytest.mark.parametrize("stop", ["a" * 3000, "ab" * 1500])
def test_looking_for_a_stop_string_takes_a_step_a_character(stop):
    """A long string that nearly comes again and again is held, and no more is looked at than once."""
    ids = BYTES("a", add_special_tokens=False)["input_ids"] * 4000
    shown, _, stopped = streamed(BYTES, ids, [stop, stop + "c"])
    assert stopped == (stop == "a" * 3000)
    assert "".join(shown) == ("" if stopped else "a" * 4000)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(SPECIAL) + 255))
def test_bytes_of_a_token(id):
    own = TokenTexts.of(BYTES).bytes_of(id)
    expected = SPECIAL[id].encode() if id < len(SPECIAL) else None
    assert own == expected if expected else len(own) == 1
    if expected is None and own[0] < 128:
        assert decoded(BYTES, [id]) == own.decode()


RUNS = {
    "special tokens": [1],
    "bytes that are no character": [2 + 0xFF],
    "a character that never ends": [2 + 0xE4, 2 + 0xBD],
    "characters amid such": [2 + 0xFF, *(2 + byte for byte in "你".encode())],
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_token_costs_the_same_however_long_nothing_can_be_read(run):
    longest = 0

    class Texts(TokenTexts):
        def decode(self, ids):
            nonlocal longest
            longest = max(longest, len(ids))
            return super().decode(ids)

    stream, ids = TextStream(Texts(PIECES)), run * 100
    a = PIECES.convert_tokens_to_ids("▁a")
    shown = "".join(map(stream.push, [a, *ids, a])) + stream.end()
    assert longest < 30
    assert shown.startswith("a") and shown.endswith(" a")
    if run != RUNS["characters amid such"]:  # where the tokenizer takes whole characters for broken ones
        assert shown == decoded(PIECES, [a, *ids, a])


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=LETTERS + "<|im_end|>\t") | st.sampled_from(["<|im_end|>" * 9, "\ud7ff\U0010ffff"]))
def test_a_text_has_the_least_tokens_or_more(text):
    """A tokenizer with long tokens, one that lacks some bytes, and those of which it is not known."""
    count = len(BYTES(text, add_special_tokens=False)["input_ids"])
    assert len(text.encode()) / 13 <= TokenTexts.of(BYTES).least_tokens(text) <= count
    least = TokenTexts.of(GAPS).least_tokens(text)
    assert len(text.encode().translate(None, b"a\xe4")) / 4 <= least <= len(GAPS(text)["input_ids"])
    assert not any(TokenTexts.of(other).least_tokens(text) for other in UNKNOWN)


def test_bytes_of_pieces():
    texts = TokenTexts.of(PIECES)
    named = {piece: texts.bytes_of(PIECES.convert_tokens_to_ids(piece)) for piece in ("▁ab", "<0xE4>", "é", "</s>")}
    assert named == {"▁ab": b" ab", "<0xE4>": b"\xe4", "é": "é".encode(), "</s>": b"</s>"}
    assert texts.bytes_of(5000) == TokenTexts.of(BYTES).bytes_of(5000) == b""
