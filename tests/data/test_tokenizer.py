from __future__ import annotations

import json

import numpy as np
import pytest

from gpu_microgpt.data import CharTokenizer
from gpu_microgpt.errors import DataError


def test_ids_follow_code_points_and_bos_is_last():
    tokenizer = CharTokenizer("hello wörld\n")
    assert tokenizer.characters == "\n dehlorwö"
    assert (tokenizer.vocab_size, tokenizer.bos) == (11, 10)
    ids = tokenizer.encode("lo\nö")
    assert ids.dtype == np.int32
    assert ids.tolist() == [5, 6, 0, 9]
    assert tokenizer.encode("").shape == (0,)


@pytest.mark.parametrize("text", ["", "abc", "\x00a\U0001f600", "a\ud800z"])
def test_decode_undoes_encode(text):
    tokenizer = CharTokenizer(text + "xyz")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_decodes_to_nothing():
    assert CharTokenizer("ab").decode([2, 0, 1, 2, 0]) == "aba"


@pytest.mark.parametrize("ids", [[3], [-1], [0, 1, 99]])
def test_decode_refuses_other_ids(ids):
    with pytest.raises(ValueError, match=r"ids in \[0, 3\)"):
        CharTokenizer("ab").decode(ids)


def test_unknown_characters_are_named():
    with pytest.raises(DataError) as caught:
        CharTokenizer("abc").encode("aéb\nz\x00", "prompt")
    message = str(caught.value)
    assert message.startswith("prompt: ")
    for part in ("U+00E9", "U+000A", "U+0000", "'z' (U+007A)", "'abc'"):
        assert part in message
    assert "U+0061" not in message
    assert "\n" not in message


def test_many_unknown_characters_are_counted():
    with pytest.raises(DataError, match=r"U\+0031.* and 4 more; wanted only 'abc'"):
        CharTokenizer("abc").encode("123456789")


def test_a_character_above_all_known_ones_is_unknown():
    with pytest.raises(DataError, match=r"U\+1F600"):
        CharTokenizer("ab").encode("\U0001f600")


def test_undecodable_bytes_of_a_command_line_are_unknown_characters():
    with pytest.raises(DataError, match=r"U\+DCFF"):
        CharTokenizer("ab").encode("a\udcff")


def test_the_largest_vocabulary():
    code_points = [c for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    largest = "".join(map(chr, code_points[: (1 << 16) - 1]))
    tokenizer = CharTokenizer(largest)
    assert tokenizer.vocab_size == 65_536
    assert tokenizer.encode(largest).astype(np.uint16).tolist() == list(range(65_535))
    too_many = "".join(map(chr, code_points[: 1 << 16]))
    with pytest.raises(DataError, match=r"got 65,536 distinct.*at most 65,536 ids"):
        CharTokenizer(too_many)


def test_json_round_trip():
    tokenizer = CharTokenizer('zyx\n"é')
    again = CharTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.characters == tokenizer.characters


def test_an_empty_vocabulary_knows_nothing():
    with pytest.raises(DataError, match=r"U\+0000"):
        CharTokenizer("").encode("\x00")


@pytest.mark.parametrize("values", [{}, {"kind": "bpe", "characters": "a"}, {"kind": "characters"}])
def test_from_dict_refuses_another_kind(values):
    with pytest.raises(DataError, match="wanted kind 'characters'"):
        CharTokenizer.from_dict(values)
