"""A model held against transformers: what is right agrees, what is planted wrong is reported, exit status and all."""

from __future__ import annotations

import gc
import json
import math
import sys

import pytest
import torch
from engine_judge import Judge, judge_of, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from twinserve.cli import main
from twinserve.engine import verify as module
from twinserve.engine.models import load_model, source
from twinserve.engine.verify import LOG_PROB_LIMIT, PROMPTS, TEXT, verify
from twinserve.settings.errors import InputError

# Three windows, with room for the prompts.
BEGINNING = TEXT.read_text()[:1100]
TEXT_BYTES = list(BEGINNING.encode())


@pytest.fixture(autouse=True)
def short_text(monkeypatch, tmp_path_factory):
    """The text that is scored is the beginning of the one that ships."""
    path = tmp_path_factory.mktemp("text") / TEXT.name
    path.write_text(BEGINNING)
    monkeypatch.setattr(module, "TEXT", path)


@pytest.fixture(autouse=True)
def nothing_old():
    """Between its two models `verify` looks for garbage, which is to be in what the test itself has made."""
    gc.freeze()


@pytest.fixture
def folder(tmp_path):
    """A folder of the tiny Llama as transformers saves it."""
    judge_of("llama").model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def plant(monkeypatch):
    """Lets the engine, but not transformers, load weights that a function has changed in place."""

    def replace_loader(change):
        def load_wrong(*args, **kwargs):
            decoder = load_model(*args, **kwargs)
            with torch.no_grad():
                change(decoder)
            return decoder

        monkeypatch.setattr(source, "load_model", load_wrong)

    return replace_loader


@pytest.fixture
def model_verify(monkeypatch, capsys):
    """Runs `twinserve model verify`: its exit status and what it printed on stdout."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["twinserve", "model", "verify", *map(str, arguments), "--max-tokens", "8"])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code or 0, capsys.readouterr().out

    return run


def query_of_one_layer_perturbed(decoder):
    weight = decoder.layers[1].attention.qkv.weight
    weight[:128] += 0.1 * torch.randn(128, 64, generator=torch.Generator().manual_seed(0))


def key_heads_swapped(decoder):
    weight = decoder.layers[2].attention.qkv.weight
    weight[128:192] = weight[128:192].roll(32, dims=0).clone()


def tiny_with_key_heads_swapped():
    """The tiny Llama of transformers with the same thing wrong as `key_heads_swapped` does."""
    model = tiny(LlamaForCausalLM, LlamaConfig)
    weight = model.model.layers[2].self_attn.k_proj.weight
    weight.copy_(weight.roll(32, dims=0).clone())
    return model


def rotation_a_little_faster(decoder):
    object.__setattr__(decoder.config, "rope_theta", 9000.0)


def norm_forgotten(decoder):
    decoder.layers[3].mlp_norm.weight.fill_(1.0)


@pytest.mark.parametrize("name", ["llama", "mistral-linear", "qwen3-llama3"])
def test_what_transformers_saved_agrees_in_chunks_and_with_prefix_hits(name, tmp_path):
    judge_of(name).model.save_pretrained(tmp_path)
    report = verify(tmp_path, max_tokens=16)
    assert report.agrees and report.first_difference is None
    assert (report.equal, report.sequences, report.tokens) == (len(PROMPTS), len(PROMPTS), 16 * len(PROMPTS))
    assert report.chunked_prompts and report.cached_tokens
    assert 0 < report.log_prob_difference < LOG_PROB_LIMIT / 10
    assert report.perplexity == pytest.approx(report.reference_perplexity, rel=1e-5)


def test_perplexity_is_that_of_the_loss_of_transformers(folder):
    report = verify(folder, prompts=[[5]], max_tokens=1)
    total = 0.0
    for start in range(0, len(TEXT_BYTES), 512):
        window = torch.tensor([TEXT_BYTES[start : start + 512]])
        total += judge_of("llama").model(window, labels=window).loss.item() * (window.shape[1] - 1)
    assert report.text_tokens == len(TEXT_BYTES) - math.ceil(len(TEXT_BYTES) / 512)
    assert report.reference_perplexity == pytest.approx(math.exp(total / report.text_tokens), rel=1e-4)


@pytest.mark.parametrize(
    "change", [query_of_one_layer_perturbed, key_heads_swapped, rotation_a_little_faster, norm_forgotten]
)
def test_a_wrong_weight_is_reported(change, folder, plant):
    plant(change)
    report = verify(folder, max_tokens=16)
    assert report.agrees is False
    assert report.equal < report.sequences and report.log_prob_difference > LOG_PROB_LIMIT
    assert report.perplexity != pytest.approx(report.reference_perplexity, rel=1e-3)


def test_the_first_difference_is_where_transformers_would_have_gone_on_otherwise(folder, plant):
    plant(key_heads_swapped)
    prompts = [TEXT_BYTES[start : start + length] for start, length in PROMPTS]
    first = verify(folder, prompts=prompts, max_tokens=20).first_difference
    judge = judge_of("llama")
    wrong = Judge(tiny_with_key_heads_swapped())
    for index in range(first.prompt + 1):
        ours, theirs = (side.generate(prompts[index], 20) for side in (wrong, judge))
        differing = [place for place in range(20) if ours[place] != theirs[place]]
        assert (index == first.prompt) == bool(differing)
    assert (first.position, first.ours, first.theirs) == (differing[0], ours[differing[0]], theirs[differing[0]])
    best, _ = judge.best_two(prompts[first.prompt] + ours[: first.position])
    assert best[0] == first.theirs and first.margin > 1e-4


def test_a_weight_too_little_wrong_to_change_a_token_is_seen_in_the_log_probabilities(folder, plant):
    plant(lambda decoder: decoder.layers[2].attention.qkv.weight[:32].mul_(1.01))
    report = verify(folder, max_tokens=2)
    assert report.equal == report.sequences and report.first_difference is None
    assert report.log_prob_difference > LOG_PROB_LIMIT
    assert report.agrees is False


def test_near_ties_are_counted_and_agree(tmp_path, plant):
    model = judge_of("llama").model
    weights = model.state_dict()
    rows = weights["lm_head.weight"].clone()
    rows[256:] = rows[:256]
    model.save_pretrained(tmp_path, state_dict=weights | {"lm_head.weight": rows})
    # Of two tokens that transformers finds equally probable, the engine takes the other.
    plant(lambda decoder: decoder.lm_head.weight[256:].mul_(1 + 1e-6))
    report = verify(tmp_path, max_tokens=4)
    assert report.near_ties > report.tokens / 2
    assert report.equal == report.sequences and report.first_difference is None and report.agrees


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        ("bfloat16", "none"),
        ("float16", "none"),
        ("bfloat16", "int8"),
        ("float32", "int8"),
        ("bfloat16", "fp8"),
        ("float32", "fp8"),
    ],
)
def test_in_16_bits_it_is_as_near_to_float32_as_transformers(folder, dtype, quantization):
    report = verify(folder, dtype=dtype, quantization=quantization, max_tokens=4)
    assert report.agrees, report
    assert report.beside == ("float16" if dtype == "float16" else "bfloat16")
    assert (report.dtype, report.quantization, report.execution) == (dtype, quantization, "eager")
    assert 0 < report.mean_difference < report.log_prob_difference
    assert 0 < report.transformers_mean < report.transformers_difference
    # Of what float8 rounds, noise of the last bit may decide.
    near = 0.15 if quantization == "fp8" else 0.05
    assert report.perplexity == pytest.approx(report.reference_perplexity, rel=near)


@pytest.mark.parametrize("change", [query_of_one_layer_perturbed, key_heads_swapped, norm_forgotten])
def test_a_wrong_weight_is_further_from_float32_than_transformers(change, folder, plant):
    plant(change)
    report = verify(folder, dtype="bfloat16", max_tokens=4)
    assert report.agrees is False


def test_weights_in_int8_are_held_against_the_same_weights(folder):
    report = verify(folder, quantization="int8", max_tokens=4)
    assert report.log_prob_difference < 0.1  # what 16 bits of activations leave out
    assert report.reference_perplexity != pytest.approx(verify(folder, max_tokens=1).reference_perplexity, rel=1e-6)


def test_numbers_that_are_none_do_not_agree(folder, plant):
    plant(lambda decoder: decoder.layers[1].mlp_norm.weight.fill_(torch.nan))
    with pytest.raises(InputError, match="the model's logits for it are no finite numbers"):
        verify(folder, max_tokens=2)


def test_a_short_context_shortens_prompts_and_windows(tmp_path):
    model = tiny(MistralForCausalLM, MistralConfig, max_position_embeddings=48, sliding_window=48)
    model.save_pretrained(tmp_path)
    report = verify(tmp_path, max_tokens=40)
    assert report.agrees and report.tokens == 40 * len(PROMPTS)
    assert report.text_tokens == len(TEXT_BYTES) - math.ceil(len(TEXT_BYTES) / 48)


def test_texts_are_read_by_the_tokenizer_of_the_folder(folder):
    words = dict.fromkeys(["?", *BEGINNING.split()])
    vocabulary = {word: index for index, word in enumerate(list(words)[:500])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    report = verify(folder, prompts=["The old library stood", [5, 6, 7]], max_tokens=4)
    assert report.agrees and (report.sequences, report.tokens) == (2, 8)
    num_tokens = len(AutoTokenizer.from_pretrained(folder).encode(BEGINNING))
    assert report.text_tokens == num_tokens - math.ceil(num_tokens / 512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["Hello"]}, r"prompts\[0\] is 'Hello', expected token ids, as the model has no tokenizer"),
        ({"prompts": [[5], []]}, r"prompts\[1\] is \[\], expected at least one token"),
        ({"prompts": []}, r"prompts is \[\], expected at least one prompt"),
        ({"prompts": [[512]]}, r"a token of prompts\[0\] is 512, expected an id from 0 to 511"),
        ({"prompts": [[5] * 2000]}, r"prompts\[0\] is \[5, 5"),
        ({"max_tokens": 0}, r"max_tokens is 0, expected 1 or more"),
        ({"max_tokens": 1024}, r"max_tokens is 1024, .* less than the model's longest context \(1024\)"),
        ({"dtype": "float64"}, "dtype is 'float64', expected: Input should be 'auto', 'float32', 'bfloat16' or"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is 'fp8', expected auto with sdpa"),
        ({"execution": "graphs"}, "device is 'cpu', expected cuda: graphs run on NVIDIA GPUs"),
        ({"device": "abacus"}, "device is 'abacus', expected"),
    ],
)
def test_what_cannot_be_verified_is_refused(folder, arguments, message):
    with pytest.raises(InputError, match=message):
        verify(folder, **arguments)


def test_what_transformers_does_not_load_is_refused(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mystery"}))
    with pytest.raises(InputError, match="transformers cannot load it: .*mystery"):
        verify(folder, max_tokens=1)


def test_the_command_prints_a_table_and_exits_with_0_where_all_agrees(model_verify, folder):
    code, out = model_verify(folder)
    assert code == 0
    for words in (
        "greedy sequences equal",
        "8 of 8, 64 tokens",
        "first difference",
        "none",
        "perplexity of",
        "agrees:",
    ):
        assert words in out
    assert str(folder) in out.replace("\n", "")


def test_the_command_exits_with_1_and_names_the_first_difference_of_a_wrong_weight(model_verify, folder, plant):
    plant(key_heads_swapped)
    code, out = model_verify(folder)
    assert code == 1
    assert "transformers has" in out and "differs by more than rounding explains" in out


def test_the_command_prints_json_alone(model_verify, folder, plant):
    code, out = model_verify(folder, "--json")
    report = json.loads(out)
    assert (code, report["agrees"], report["equal"], report["first_difference"]) == (0, True, 8, None)
    plant(query_of_one_layer_perturbed)
    code, out = model_verify(folder, "--json")
    report = json.loads(out)
    assert (code, report["agrees"]) == (1, False)
    assert set(report["first_difference"]) == {"prompt", "position", "ours", "theirs", "margin"}


def test_the_command_judges_bfloat16_by_transformers_in_bfloat16(model_verify, folder, plant):
    code, out = model_verify(folder, "--dtype", "bfloat16")
    assert code == 0 and "agrees: as near to float32 as transformers is" in out
    assert "transformers in bfloat16" in out.replace("\n", " ")
    plant(key_heads_swapped)
    code, out = model_verify(folder, "--dtype", "bfloat16")
    assert code == 1 and "further from float32 than transformers is" in out
