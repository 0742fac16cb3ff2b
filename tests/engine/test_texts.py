"""Texts, tokenizers and templates: what is wrong with one is one line that names it."""

from __future__ import annotations

import inspect
import itertools
import signal
import sys

import pytest
import transformers

from twinserve.engine.hub.chat import chat_prompt
from twinserve.engine.models.source import load_tokenizer
from twinserve.engine.prompts import encode_prompt, well_formed
from twinserve.settings.errors import InputError


class Tokenizer:
    """A token a UTF-8 byte."""

    chat_template = "a template"
    name_or_path = "a folder"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def apply_chat_template(self, messages, **_):
        raise ValueError("line one\nline two")


def test_half_of_a_pair_is_the_replacement_character_and_the_other_prompts_are_kept():
    assert well_formed("nice \ud83d day \U0001f600") == "nice \ufffd day \U0001f600"
    assert encode_prompt("a\udce9", Tokenizer(), 256, 0) == list("a\ufffd".encode())


def test_a_tokenizers_id_beyond_the_vocabulary_is_refused_as_a_given_one_is():
    for prompt in ("aé", [97, 195]):
        with pytest.raises(InputError, match=r"a token of prompts\[3\] is 195, expected an id from 0 to 127"):
            encode_prompt(prompt, Tokenizer(), 128, 3)


def test_a_template_that_fails_is_one_line():
    with pytest.raises(InputError, match="a folder: chat_template, expected a template .*: line one line two"):
        chat_prompt(Tokenizer(), "hello")


def test_a_template_that_does_not_end_is_one_line(monkeypatch):
    monkeypatch.setattr("twinserve.engine.chat_template.MAX_TEMPLATE_S", 0.05)
    monkeypatch.setattr(Tokenizer, "apply_chat_template", lambda *_, **__: [0 for _ in itertools.count() if _ < 0])
    with pytest.raises(
        InputError, match="a folder: chat_template, expected .*: it has not ended after 0.05 s of a processor"
    ):
        chat_prompt(Tokenizer(), "hello")
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_what_transformers_takes_beside_a_templates_variables_does_not_come_from_clients():
    pytest.importorskip("fastapi")
    from twinserve.serving.protocol import Chat

    takes = inspect.signature(transformers.PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
    theirs = {"self", "kwargs", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    assert "chat_template" in takes
    for name in takes - theirs:
        with pytest.raises(ValueError, match=f"which {name} is none of"):
            Chat(messages=[{"role": "user"}], chat_template_kwargs={name: None})


@pytest.mark.parametrize("content", [b"{", b"[]", b"\x00\xff", b'{"model": {"type": "none"}}'])
def test_a_broken_tokenizer_is_one_line_that_names_its_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(
        f"{tmp_path / 'tokenizer.json'}: expected a tokenizer that transformers can load"
    )
    assert "\n" not in str(error.value)


def test_a_sentencepiece_model_without_that_package_says_what_it_needs(tmp_path, monkeypatch):
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *_: None if name == "sentencepiece" else find_spec(name)
    )
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(InputError, match=r"tokenizer.model: needs the package sentencepiece"):
        load_tokenizer(tmp_path)
