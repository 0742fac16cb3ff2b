"""Drafts on the command line: what is printed of them, and what cannot be is one line before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 96, "eos_token_id": 2,
}  # fmt: skip


def refusal(result, out: Path | None = None) -> str:
    """The one line of a command that was refused, and left nothing."""
    assert (result.code, result.out) == (2, ""), (result.out, result.err)
    lines = [line for line in result.err.splitlines() if line.startswith("twinserve: ")]
    assert len(lines) == 1 and "Traceback" not in result.err, result.err
    assert out is None or not out.exists()
    return lines[0].removeprefix("twinserve: ")


def test_a_simulations_summary_says_what_came_of_its_drafts(twinserve, trace, latency, tmp_path):
    config = json.dumps(NGRAM | {"synthetic_acceptance_rate": 0.7})
    how = ("sim", trace, "--latency", latency, "--speculative-config", config)
    found = json.loads(twinserve(*how, "--json").out)["speculation"]
    said = " ".join(twinserve(*how, "--out", tmp_path / "run").out.split())
    by_position = ", ".join(f"{share:.1%}" for share in found["acceptance_by_position"])
    assert (
        f"{found['drafts']} rows with drafts gave {found['tokens_per_step']:.2f} tokens each; of "
        f"{found['draft_tokens']} drafted tokens {found['accepted_tokens']} were accepted "
        f"({found['acceptance_rate']:.1%}), {found['wasted_tokens']} wasted; by position {by_position}"
    ) in said
    assert "rows with drafts" not in twinserve("sim", trace, "--latency", latency).out


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"num_speculative_tokens": 0}, "speculative_config.num_speculative_tokens is 0, expected: Input should be"),
        (
            {"num_speculative_tokens": 300},
            "speculative_config.num_speculative_tokens is 300, expected: ",
        ),
        ({"num_speculative_tokens": 100}, "num_speculative_tokens is 100, expected at most max_model_len (90) - 2"),
        ({"synthetic_acceptance_rate": float("nan")}, "speculative_config.synthetic_acceptance_rate is nan, expected:"),
        ({"synthetic_acceptance_rate": 1.1}, "speculative_config.synthetic_acceptance_rate is 1.1, expected:"),
        ({"synthetic_acceptance_rate": -0.1}, "speculative_config.synthetic_acceptance_rate is -0.1, expected:"),
        ({"synthetic_acceptance_rate": None}, "speculative_config, expected one of synthetic_acceptance_rate and acce"),
        ({"num_speculative_tokens_per_batch_size": [[1, 2]]}, "a row of the table is [1, 2], expected first and last"),
        ({"num_speculative_tokens_per_batch_size": [[3, 4, 1]]}, "a row of the table is (3, 4, 1), expected first 1,"),
        ({"num_speculative_tokens_per_batch_size": [1]}, "num_speculative_tokens_per_batch_size.0 is 1, expected:"),
        ({"num_speculative_tokens_per_batch_size": [["a", 2, 1]]}, "per_batch_size.0.0 is 'a', expected:"),
    ],
)
def test_numbers_that_cannot_be_are_refused_in_a_line(twinserve, trace, latency, tmp_path, values, problem):
    config = json.dumps(NGRAM | {"synthetic_acceptance_rate": 0.5} | values)
    how = ("--max-model-len", 90, "--speculative-config", config, "--out", tmp_path / "run")
    assert problem in refusal(twinserve("sim", trace, "--latency", latency, *how), tmp_path / "run")


@pytest.mark.parametrize(
    ("law", "problem"),
    [
        ({"by_position": [0.5, float("nan")]}, "expected JSON: NaN is not a number"),
        ({"by_position": [1.1]}, "by_position has 1.1, expected probabilities from 0 to 1"),
        ({"by_position": [-0.1]}, "by_position has -0.1, expected probabilities from 0 to 1"),
        ({"by_position": [0.5], "found_share": -1}, "found_share has -1, expected probabilities from 0 to 1"),
        ({"by_position": [0.5], "concentration": float("nan")}, "expected JSON: NaN is not a number"),
        ({"by_position": [0.5], "concentration": 0}, "concentration is 0, expected a number > 0, or None"),
        (None, "No such file"),
    ],
)
def test_a_law_of_acceptance_that_cannot_be_is_refused_in_a_line_with_its_file(
    twinserve, trace, latency, tmp_path, law, problem
):
    file, run = tmp_path / "law.json", tmp_path / "run"
    if law is not None:
        file.write_text(json.dumps(law))
    config = json.dumps(NGRAM | {"acceptance": str(file)})
    line = refusal(twinserve("sim", trace, "--latency", latency, "--speculative-config", config, "--out", run), run)
    assert line.startswith(f"{file}: ") and problem in line


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("-1", "choose to answer an integer from 0 to 4, it is -1"),
        ("{}[0]", "choose to answer (KeyError: 0)"),
    ],
)
def test_a_rule_of_ones_own_that_raises_or_answers_what_cannot_be_is_one_line(
    twinserve, trace, latency, tmp_path, asked, problem
):
    file, run = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(f"class Mine:\n    most = 4\n    def choose(self, batch):\n        return {asked}\n")
    config = json.dumps(NGRAM | {"synthetic_acceptance_rate": 0.5, "draft_length": f"{file}:Mine"})
    line = refusal(twinserve("sim", trace, "--latency", latency, "--speculative-config", config, "--out", run), run)
    assert line == f"{file}: draft_length is 'Mine', expected {problem}"


# --- the engine: nothing has weights, so what is refused is refused before any are looked for ---


def folder(path: Path, tokens: list[str] | None = None, **changed) -> Path:
    """A folder with a config and no weights, perhaps with a tokenizer of these tokens."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SHAPE | changed))
    if tokens is not None:
        from tokenizers import Tokenizer, models

        Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, tokens[0])).save(
            str(path / "tokenizer.json")
        )
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return path


def asking(model: Path, trace, config: dict) -> tuple:
    """The words of a command that runs a model with these drafts."""
    return ("run", trace, "--model", model, "--speculative-config", json.dumps(config))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"vocab_size": 65}, "speculative_config.model is '{}', expected a vocabulary of 64 tokens, it has 65"),
        ({"max_position_embeddings": 95}, "speculative_config.model is '{}', expected a context of 96, it has 95"),
        ({"tokens": ["a", "c"]}, "speculative_config.model is '{}', expected a model with the same tokens"),
        ({"hidden_size": "x"}, "{}/config.json: hidden_size is 'x', expected"),
        ({}, "{}: no weights: expected model.safetensors or model.safetensors.index.json"),
    ],
)
def test_a_model_that_cannot_draft_is_refused_before_weights_are_looked_for(
    twinserve, trace, tmp_path, monkeypatch, changed, problem
):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)  # a value is cut where it is long, as the name of a temporary folder may be
    tokens = ["a", "b"] if "tokens" in changed else None
    model, draft, out = folder(Path("model"), tokens), folder(Path("draft"), **changed), Path("out")
    config = {"method": "draft_model", "num_speculative_tokens": 4, "model": str(draft)}
    line = refusal(twinserve(*asking(model, trace, config), "--out", out), out)
    assert problem.format(draft) in line, line


def test_a_draft_that_is_not_there_is_named_by_its_own_option(twinserve, trace, tmp_path):
    pytest.importorskip("torch")
    model = folder(tmp_path / "model")
    for name, problem in (
        ("no-such-model", "speculative_config.model is 'no-such-model', expected "),
        (None, "speculative_config.model is missing, expected a model that drafts"),
    ):
        config = {"method": "draft_model", "num_speculative_tokens": 4} | ({} if name is None else {"model": name})
        assert refusal(twinserve(*asking(model, trace, config))).startswith(problem)


def test_more_drafts_than_the_models_context_holds_and_a_method_the_engine_lacks_are_refused(
    twinserve, trace, tmp_path
):
    pytest.importorskip("torch")
    model = folder(tmp_path / "model")
    for config, problem in (
        (
            {"method": "ngram", "num_speculative_tokens": 95},
            "num_speculative_tokens is 95, expected at most ",
        ),
        (
            {"method": "eagle3", "num_speculative_tokens": 3},
            "speculative_config.method is 'eagle3', expected ngram",
        ),
    ):
        assert problem in refusal(twinserve(*asking(model, trace, config)))


def test_a_rule_of_ones_own_is_tried_before_a_model_is_looked_for(twinserve, trace, tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "mine.py"
    file.write_text("class Mine:\n    most = 9\n    def choose(self, batch):\n        return 1\n")
    words = asking(tmp_path / "none", trace, NGRAM | {"draft_length": f"{file}:Mine"})
    assert refusal(twinserve(*words)) == (
        f"{file}: draft_length is 'Mine', expected most an integer from 1 to 4, it is 9"
    )


def test_a_draft_of_a_shape_alone_has_random_weights_as_the_model_has(twinserve, trace, tmp_path):
    pytest.importorskip("torch")
    model, draft = folder(tmp_path / "model"), folder(tmp_path / "draft", num_hidden_layers=2)
    config = {"method": "draft_model", "num_speculative_tokens": 2, "model": str(draft)}
    done = twinserve(*asking(model, trace, config), "--load-format", "dummy", "--json", "--max-output-tokens", 6)
    assert done.code == 0 and json.loads(done.out)["speculation"]["drafts"] > 0
