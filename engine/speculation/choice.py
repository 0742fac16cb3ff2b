"""Which proposer a configuration asks for, and whether it can be had; refused before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from twinserve.engine.checks import RunnerConfig, check_device
from twinserve.engine.hub.resolve import resolve_model
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.models.source import ModelSource
from twinserve.engine.options import EngineOptions
from twinserve.engine.speculation.proposers import DraftModel, NgramProposer, Proposer
from twinserve.engine.speculation.runner import SpeculativeRunner
from twinserve.settings.errors import InputError


def draft_of(
    draft: str | Path | nn.Module | None, config: RunnerConfig, source: ModelSource, options: EngineOptions
) -> ModelSource | None:
    """The model that drafts, before its weights are loaded; None if none does.

    Args:
        draft: as LLM takes it; None is that of the configuration.
        source: the model that it drafts for.

    Raises:
        InputError: it cannot draft for this model, or these steps cannot be drafted for.
    """
    speculative = config.settings.speculative_config
    if speculative is None:
        if draft is not None:
            raise InputError("expected None without speculative_config", field="draft", value=draft)
        return None
    if speculative.method == "eagle3":
        problem = "expected ngram, ngram_gpu or draft_model in the engine"
        raise InputError(problem, field="speculative_config.method", value="eagle3")
    if options.kv_cache_dtype == "fp8":
        raise InputError("expected auto with speculative_config", field="kv_cache_dtype", value="fp8")
    if speculative.method != "draft_model":
        return None
    if draft is None and speculative.model is None:
        raise InputError("is missing, expected a model that drafts", field="speculative_config.model")
    field, named = "speculative_config.model", str(speculative.model)
    if draft is None:
        draft = named if options.load_format == "dummy" else resolve_model(named, field=field)
    found = ModelSource.of(draft, options)
    if found.config.vocab_size != source.config.vocab_size:
        problem = f"expected a vocabulary of {source.config.vocab_size} tokens, it has {found.config.vocab_size}"
        raise InputError(problem, field=field, value=named)
    tokenizers = found.tokenizer, source.tokenizer
    if None not in tokenizers and len({tuple(sorted(one.get_vocab().items())) for one in tokenizers}) > 1:
        raise InputError("expected a model with the same tokens", field=field, value=named)
    if found.config.max_position_embeddings < config.max_model_len:
        problem = f"expected a context of {config.max_model_len}, it has {found.config.max_position_embeddings}"
        raise InputError(problem, field=field, value=named)
    if isinstance(draft, Decoder) and draft.device.type != config.device.type:
        raise InputError(f"expected a model on {config.device}, it is on {draft.device}", field=field, value=named)
    if config.device.type == "cuda":
        check_device(found, found.config, config.device, found.dtype)
    return found


def proposer_maker(
    config: RunnerConfig, drafting: Decoder | None
) -> Callable[[SpeculativeRunner], Proposer | DraftModel]:
    """Makes the proposer of a runner, whose pool it shares the numbers of."""
    speculative = config.settings.speculative_config
    assert speculative is not None

    def make(runner: SpeculativeRunner) -> Proposer | DraftModel:
        if drafting is None:
            return NgramProposer(speculative.prompt_lookup_min, speculative.prompt_lookup_max, config.max_model_len)
        return DraftModel(drafting, runner.forward_of(drafting), config.max_model_len)

    return make
