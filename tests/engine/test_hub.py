"""What a model's name stands for: a folder, or a model of a hub (here a stand-in of it); all else is told in a line."""

from __future__ import annotations

import json
import time

import pytest
from engine_judge import GREEDY, judge_of
from hub_stand_in import HubStandIn, closed_port

from twinserve.engine.hub import chat_prompt, resolve_model
from twinserve.engine.llm import LLM
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError

THREE_POSSIBILITIES = "expected smollm2-135m, a folder with config.json and safetensors, or a hub id like owner/name"


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A tiny random Llama as transformers saves it, beside what a hub's model also holds."""
    folder = tmp_path_factory.mktemp("tiny")
    judge_of("llama").model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "x/model.safetensors", "x/model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_folder):
    """A hub with one model, an empty cache, and a working folder with nothing in it."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with HubStandIn() as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.endpoint)
        stand_in.models["someone/tiny"] = tiny_folder
        yield stand_in


def refusal(name) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(InputError) as caught:
        resolve_model(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_is_itself(tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(tmp_path) == tmp_path


def test_a_folder_goes_before_a_model_of_the_hub(hub, tmp_path):
    (tmp_path / "here" / "someone" / "tiny").mkdir(parents=True)
    assert str(resolve_model("someone/tiny")) == "someone/tiny"
    assert not hub.asked


def test_a_model_of_the_hub_is_brought_and_served(hub):
    lines = []
    folder = resolve_model("someone/tiny", progress=lines.append)
    assert lines == [f"someone/tiny: asking {hub.endpoint}"]
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    assert hub.brought() == wanted == {path.name for path in folder.iterdir()}
    llm = LLM(folder, settings=Settings.load({"num_gpu_blocks": 8}))
    (completion,) = llm.generate([[5, 9, 300]], GREEDY)
    llm.close()
    judge_of("llama").check([5, 9, 300], completion.token_ids)


def test_what_was_brought_is_found_without_the_hub(hub, monkeypatch):
    folder = resolve_model("someone/tiny")
    hub.asked.clear()
    assert resolve_model("someone/tiny") == folder and not hub.brought()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    assert resolve_model("someone/tiny") == folder


def test_a_hub_out_of_reach_is_told_at_once(hub, monkeypatch):
    endpoint = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    begun = time.monotonic()
    message = refusal("someone/tiny")
    assert time.monotonic() - begun < 20
    assert message.startswith(f"model is 'someone/tiny', no folder here, and {endpoint} did not give it (")
    assert "Connection refused" in message
    assert message.endswith(f"): {THREE_POSSIBILITIES}")


def test_a_hub_out_of_order_is_told(hub):
    hub.broken = True
    assert f"no folder here, and {hub.endpoint} did not give it (status 500): expected" in refusal("someone/tiny")


def test_a_model_that_the_hub_has_not_is_told(hub):
    assert refusal("someone/else") == (
        f"model is 'someone/else', no folder here, and no model that {hub.endpoint} shows without HF_TOKEN: "
        + THREE_POSSIBILITIES
    )


def test_a_gated_model_is_told(hub):
    hub.gated.add("someone/tiny")
    assert refusal("someone/tiny") == (
        f"model is 'someone/tiny', is gated: accept its terms at {hub.endpoint}/someone/tiny, "
        "then set HF_TOKEN or run `hf auth login`"
    )


@pytest.mark.parametrize(
    ("files", "lacking"),
    [
        (["model.gguf"], "config.json"),
        (["config.json", "pytorch_model.bin"], "model*.safetensors"),
        ([], "config.json"),
    ],
)
def test_a_model_of_another_format_is_told(hub, tmp_path, files, lacking):
    folder = tmp_path / "other"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    hub.models["someone/other"] = folder
    expected = f"expected a model with config.json and safetensors, but {hub.endpoint} has no {lacking} in it"
    assert refusal("someone/other") == f"model is 'someone/other', {expected}"


@pytest.mark.parametrize("name", ["", "gpt2", "a/b/c", "/no/such/folder", "./model", "owner/", "o wner/name", "x\0y"])
def test_what_is_none_of_the_three_is_told_without_asking(hub, name):
    assert refusal(name) == f"model is {name!r}, {THREE_POSSIBILITIES}"
    assert not hub.asked


def test_a_file_is_told_without_asking(hub, tmp_path):
    (tmp_path / "here" / "models").mkdir()
    (tmp_path / "here" / "models" / "tiny.gguf").write_bytes(b"")
    assert refusal("models/tiny.gguf").endswith(THREE_POSSIBILITIES)
    assert not hub.asked


class Characters:
    """A tokenizer of characters, with or without a chat template."""

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def encode(self, text):
        return [ord(character) for character in text]

    def apply_chat_template(self, messages, *, add_generation_prompt, return_dict):
        assert add_generation_prompt and not return_dict
        return self.encode(f"{self.chat_template}{json.dumps(messages)}")


def test_a_chat_model_is_asked_by_its_template():
    prompt = "".join(map(chr, chat_prompt(Characters("chat: "), "Hi")))
    assert prompt == 'chat: [{"role": "user", "content": "Hi"}]'


def test_a_model_without_a_template_goes_on_with_the_text():
    assert chat_prompt(Characters(), "Hi") == [72, 105]


def test_a_text_without_a_tokenizer_is_refused():
    with pytest.raises(InputError, match="prompt is 'Hi', expected token ids, as the model has no tokenizer"):
        chat_prompt(None, "Hi")
