"""The bundled tokenizer is GPT-2's, needs no network, and notices an altered vocabulary."""

import pytest

from support import tokenizer as tokenizer_module
from support.errors import UserError
from support.tokenizer import VOCABULARY, get_tokenizer


@pytest.mark.parametrize(
    ("text", "tokens"), [("Hello world", [15496, 995]), (" good", [922]), (" bad", [2089]), ("", [])]
)
def test_known_token_ids(text, tokens):
    assert get_tokenizer().encode_ordinary(text) == tokens, "is the pattern or the vocabulary another one?"


def test_sizes_and_end_of_text():
    tokenizer = get_tokenizer()
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)
    assert tokenizer.decode([50256]) == "<|endoftext|>"


def test_literal_end_of_text_is_plain_characters():
    text = "one <|endoftext|> two"
    tokens = get_tokenizer().encode_ordinary(text)
    assert 50256 not in tokens
    assert get_tokenizer().decode(tokens) == text


def test_any_text_survives_the_round_trip():
    text = "Tabs\t, breaks\r\n\n, 1234567 numbers, naïve Ω 漢字 🙂, can't  stop   "
    assert get_tokenizer().decode(get_tokenizer().encode_ordinary(text)) == text


def test_unknown_encoding_is_a_user_error_that_names_the_bundled_one():
    with pytest.raises(UserError, match="tokenizer_encoding 'gpt3'.*'gpt2'"):
        get_tokenizer("gpt3")


@pytest.mark.parametrize("damage", ["one digit", "missing"])
def test_altered_or_missing_vocabulary_is_a_user_error(damage, tmp_path, monkeypatch):
    copy = tmp_path / "gpt2.tiktoken"
    if damage == "one digit":
        copy.write_bytes(VOCABULARY.read_bytes().replace(b" 50255", b" 50254"))
    monkeypatch.setattr(tokenizer_module, "VOCABULARY", copy)
    with pytest.raises(UserError, match=r"gpt2\.tiktoken.*git checkout"):
        get_tokenizer.__wrapped__("gpt2")  # past the cache
