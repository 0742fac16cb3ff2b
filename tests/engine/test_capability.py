"""What a CUDA device cannot do is refused by its name before anything is loaded; as far as a CPU can tell, on fakes."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from engine_judge import GREEDY, judge_of

from twinserve.engine import device_queue
from twinserve.engine.capability import Capability
from twinserve.engine.checks import RunnerConfig
from twinserve.engine.device_queue import usable_device
from twinserve.engine.kernels.cuts import shared_bytes
from twinserve.engine.layers import choice
from twinserve.engine.llm import LLM
from twinserve.engine.models import adopt_model
from twinserve.engine.models.source import ModelSource
from twinserve.engine.options import EngineOptions
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError

CARDS = {
    "Tesla T4": (7, 5, 64 << 10),
    "NVIDIA A100": (8, 0, 163 << 10),
    "NVIDIA A40": (8, 6, 99 << 10),
    "NVIDIA L4": (8, 9, 99 << 10),
    "NVIDIA H100": (9, 0, 227 << 10),
}


@pytest.fixture
def card(monkeypatch):
    """Lets two cards of a kind seem to be there, and Triton."""

    def put(name: str) -> None:
        major, minor, shared = CARDS[name]
        properties = SimpleNamespace(name=name, major=major, minor=minor, shared_memory_per_block_optin=shared)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(choice, "find_spec", lambda name: object())

    return put


@pytest.fixture
def folder(tmp_path):
    """A folder of the tiny Llama, its checkpoint in bfloat16, without weights."""
    judge_of("llama").model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"float32"', '"bfloat16"'))
    (tmp_path / "model.safetensors").unlink()
    return tmp_path


def checked(folder, **options) -> RunnerConfig:
    """What a folder's model would be served with."""
    given = EngineOptions(model="tiny", **options)
    return RunnerConfig.checked(ModelSource.of(folder, given), given, Settings())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "Tesla T4",
            {"dtype": "bfloat16"},
            "dtype is 'bfloat16', expected float16 or float32: Tesla T4 has compute capability 7.5, and bfloat16 "
            "begins with 8.0",
        ),
        ("Tesla T4", {}, "dtype is 'bfloat16', expected float16 or float32: Tesla T4"),
        (
            "NVIDIA A100",
            {"kv_cache_dtype": "fp8"},
            "kv_cache_dtype is 'fp8', expected auto: NVIDIA A100 has compute capability 8.0, and float8 begins with",
        ),
        (
            "NVIDIA A100",
            {"quantization": "fp8"},
            "quantization is 'fp8', expected weights of 16 bits, or int8: NVIDIA A100 has compute capability 8.0, and ",
        ),
        ("NVIDIA L4", {"quantization": "fp8", "dtype": "float16"}, "dtype is 'float16', expected bfloat16 with float8"),
        ("NVIDIA A40", {"kv_cache_dtype": "fp8", "attention": "triton"}, "kv_cache_dtype is 'fp8', expected auto: NV"),
    ],
)
def test_numbers_that_a_card_does_not_know_are_refused_by_its_name_before_weights_are_read(
    card, folder, name, options, message
):
    card(name)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(InputError) as refusal:
            LLM(folder, device=device, **options)
        assert str(refusal.value).startswith(message)


def test_a_float8_checkpoint_and_layers_that_are_not_aligned_are_refused_before_weights_are_read(card, folder):
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(fields))
    card("NVIDIA A100")
    with pytest.raises(InputError, match="quantization is 'fp8', expected weights of 16 bits, or int8: NVIDIA A100"):
        LLM(folder, device="cuda")
    card("NVIDIA H100")
    assert checked(folder, device="cuda").attention.graphs
    path.write_text(json.dumps(fields | {"intermediate_size": 120}))
    with pytest.raises(InputError, match="CUDA takes multiples of 16, the intermediate layer is 120"):
        LLM(folder, device="cuda")
    assert checked(folder, device="cpu").model.intermediate_size == 120


def test_heads_too_large_for_a_cards_shared_memory_are_refused_or_served_without_graphs(card, tmp_path, folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"head_dim": 32', '"head_dim": 256'))
    card("NVIDIA L4")
    for asked in ({"attention": "triton"}, {"execution": "graphs"}):
        with pytest.raises(InputError) as refusal:
            LLM(folder, device="cuda", **asked)
        assert str(refusal.value) == (
            "head_dim is 256, expected smaller heads for triton: its attention needs 143,872 bytes of shared memory, "
            "and NVIDIA L4 has 101,376"
        )
    chosen = checked(folder, device="cuda").attention
    assert (chosen.name, chosen.graphs) == ("sdpa", False)
    assert "no graphs: head_dim is 256, expected smaller heads for triton" in chosen.reason
    card("NVIDIA H100")
    assert checked(folder, device="cuda").attention.graphs


@pytest.mark.parametrize("name", ["NVIDIA A100", "NVIDIA A40", "NVIDIA L4", "NVIDIA H100"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_heads_of_64_and_128_fit_every_card(name, dtype):
    major, minor, shared = CARDS[name]
    for head_dim in (64, 80, 128):
        for group in (1, 4, 7, 8):
            needed = shared_bytes(group, head_dim, dtype, (major, minor))
            Capability(name, (major, minor), shared).check_shared_memory(needed, head_dim)


@pytest.mark.parametrize(
    ("device", "asked", "dtype"),
    [
        ("cuda", "auto", torch.bfloat16),
        ("cuda:1", "auto", torch.bfloat16),
        ("cpu", "auto", torch.float32),
        ("cuda", "float16", torch.float16),
        ("cpu", "float16", torch.float16),
        ("cpu", "bfloat16", torch.bfloat16),
    ],
)
def test_the_checkpoints_dtype_is_the_default_on_cuda(folder, device, asked, dtype):
    assert ModelSource.of(folder, EngineOptions(device=device, dtype=asked)).dtype == dtype
    model = adopt_model(judge_of("llama").model, dtype=torch.bfloat16)
    assert ModelSource.of(model, EngineOptions(device=device)).dtype == torch.bfloat16
    shape = ModelSource.of("qwen3-0.6b", EngineOptions(device=device, dtype=asked, load_format="dummy"))
    assert shape.dtype == dtype


def test_a_checkpoint_in_a_dtype_that_cannot_be_served_says_what_can(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"bfloat16"', '"float64"'))
    with pytest.raises(InputError, match="dtype is 'auto', expected float32, bfloat16, float16, as the checkpoint has"):
        ModelSource.of(folder, EngineOptions(device="cuda"))
    assert ModelSource.of(folder, EngineOptions(device="cuda", dtype="float16")).dtype == torch.float16
    path.write_text(path.read_text().replace('"float64"', "64"))
    with pytest.raises(InputError, match="dtype is 64, expected the name of a dtype"):
        ModelSource.of(folder, EngineOptions())


def test_a_decoder_is_served_in_no_other_dtype_than_its_own():
    decoder = adopt_model(judge_of("llama").model, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="dtype is 'float32', expected bfloat16, as the Decoder is"):
        LLM(decoder, dtype="float32")


def test_float16_is_served_on_a_cpu():
    judge = judge_of("llama")
    llm = LLM(judge.model, dtype="float16", settings=Settings(num_gpu_blocks=32))
    assert llm.facts()["dtype"] == llm.facts()["kv_cache_dtype"] == "float16"
    prompt = list(range(5, 90))
    (completion,) = llm.generate([prompt], GREEDY)
    llm.close()
    logits = judge.model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() < 0.3


def test_a_device_has_its_number_and_is_current_where_its_steps_are_launched(card, monkeypatch):
    card("NVIDIA H100")
    assert usable_device("cuda") == torch.device("cuda:0")
    assert usable_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match="device is 'cuda:2', but torch finds 2 CUDA devices"):
        usable_device("cuda:2")
    current = []

    @contextmanager
    def entered(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", entered)
    seen = []
    with device_queue.on_device(usable_device("cuda:1")):
        seen += current
    with device_queue.on_device(torch.device("cpu")):
        assert not current
    assert seen == [torch.device("cuda:1")]
