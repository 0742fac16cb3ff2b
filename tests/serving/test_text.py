"""Text that comes piece by piece is the text that decoding everything gives."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_servers import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from twinserve.serving.simulated import StandInTokenizer, stand_in
from twinserve.serving.text import AnswerText, Detokenizer

WORDS = ["▁", "▁the", "▁cat", "s", "at", "▁on", "é", "▁世", "界", ".", "▁."]


@functools.cache
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama-2's: a space is a sign of its own before a word, whose first is not decoded; a byte for what else is."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


def metaspace_ids(text: str) -> list[int]:
    """Whole words where there are some, else bytes."""
    tokenizer, found = metaspace_tokenizer(), []
    while text:
        word = max((word for word in WORDS if text.startswith(word)), key=len, default=None)
        if word is not None:
            found.append(tokenizer.convert_tokens_to_ids(word))
            text = text[len(word) :]
        else:
            found += [3 + byte for byte in text[0].encode()]
            text = text[1:]
    return found


TEXTS = st.lists(
    st.sampled_from(["▁the", "▁cat", "s", "at", "▁on", "é", "▁世", "界", "🙂", "▁🙃", "ß", ".", "▁."]), min_size=1
).map("".join)


def pieces_of(tokenizer, prompt, answer, sizes) -> list[str]:
    text, found, left = Detokenizer(tokenizer, prompt), [], list(answer)
    while left:
        size = sizes[len(found) % len(sizes)]
        found.append(text.push(left[:size]))
        left = left[size:]
    return [*found, text.end()]


SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@given(TEXTS, TEXTS, SIZES)
def test_pieces_of_a_tokenizer_with_a_sign_for_spaces_are_the_whole(prompt, answer, sizes):
    tokenizer, known, said = metaspace_tokenizer(), metaspace_ids(prompt), metaspace_ids(answer)
    whole, before = tokenizer.decode([*known, *said]), tokenizer.decode(known)
    assert before + "".join(pieces_of(tokenizer, known, said, sizes)) == whole


@given(st.text(min_size=1), st.text(min_size=1), SIZES)
def test_pieces_of_a_tokenizer_of_bytes_are_the_whole_and_no_half_character_leaves(prompt, answer, sizes):
    tokenizer = byte_tokenizer()
    known, said = tokenizer.encode(prompt), tokenizer.encode(answer)
    pieces = pieces_of(tokenizer, known, said, sizes)
    assert "".join(pieces) == answer
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in answer


@given(st.binary(min_size=1))
def test_bytes_that_are_no_text_end_as_decoding_gives_them(broken):
    tokenizer = byte_tokenizer()
    letters = tokenizer.backend_tokenizer
    known = tokenizer.encode("before")
    by_byte = {bytes([byte]): token for byte, token in zip(range(256), _byte_ids(letters), strict=True)}
    said = [by_byte[bytes([byte])] for byte in broken]
    whole = tokenizer.decode([*known, *said])
    assert "before" + "".join(pieces_of(tokenizer, known, said, [1])) == whole


def _byte_ids(tokenizer: Tokenizer) -> list[int]:
    """The token of each byte, by GPT-2's table of letters for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    return [tokenizer.token_to_id(letter) for letter in letters]


def test_the_first_space_of_an_answer_is_kept():
    tokenizer, prompt = metaspace_tokenizer(), metaspace_ids("▁the")
    assert tokenizer.decode(metaspace_ids("▁cat")) == "cat"
    assert Detokenizer(tokenizer, prompt).push(metaspace_ids("▁cat")) == " cat"


def test_special_tokens_are_left_out_unless_they_are_asked_for():
    tokenizer = byte_tokenizer()
    prompt, said = tokenizer.encode("a"), [2, *tokenizer.encode("b")]
    assert Detokenizer(tokenizer, prompt).push(said) == "b"
    assert Detokenizer(tokenizer, prompt, skip_special_tokens=False).push(said) == "</s>b"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), SIZES)
def test_a_stop_string_ends_the_text_wherever_tokens_end(answer, stops, sizes):
    tokenizer = byte_tokenizer()
    text, given_out, left = AnswerText(tokenizer, [5], stops=stops), "", tokenizer.encode(answer)
    while left and text.stop is None:
        given_out += text.push(left[: sizes[0]])
        left = left[sizes[0] :]
    given_out += text.end()
    ends = [answer.find(stop) + len(stop) for stop in stops if stop in answer]
    if not ends:
        assert (given_out, text.stop) == (answer, None)
    else:
        assert text.num_tokens == min(ends)
        assert given_out + text.stop == answer[: min(ends)] and text.stop in stops


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_known():
    tokenizer = byte_tokenizer()
    text = AnswerText(tokenizer, [5], stops=["END"])
    given_out = [text.push([token_id]) for token_id in tokenizer.encode("an ENemy")]
    assert "".join(given_out) == "an ENe" and text.end() == "my"


@pytest.mark.parametrize("number", range(9))
def test_stand_in_answers_are_encoded_to_the_tokens_they_were_made_of(number):
    tokenizer = StandInTokenizer()
    said = stand_in(number, range(50))
    assert tokenizer.encode(tokenizer.decode(said)) == said
    asked = [{"role": "user", "content": "hello"}]
    prompt = tokenizer.apply_chat_template(asked)
    answered = [*asked, {"role": "assistant", "content": tokenizer.decode(said)}]
    assert tokenizer.apply_chat_template(answered)[: len(prompt) + 50] == [*prompt, *said]


@given(st.text())
def test_the_stand_in_tokenizer_gives_every_text_back(text):
    tokenizer = StandInTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode(errors="replace").decode()
