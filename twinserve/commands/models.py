"""The commands that use a model as such: answer, bring one, hold one against transformers."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Annotated

import typer

from twinserve.commands.options import Config, Json, options_of
from twinserve.commands.progress import say
from twinserve.engine.options import EngineOptions
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError, RunError
from twinserve.settings.limits import MOST_TOKENS


@options_of(EngineOptions, "engine")
@options_of(Settings, "settings", but=Settings.model_fields.keys() - {"speculative_config", "pipeline_depth"})
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    engine: dict,
    settings: dict,
    max_tokens: Annotated[
        int | None, typer.Option(help="The most tokens to answer with; unless given, up to the model's length.", min=1)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many of the likeliest tokens; 0 or -1: all.", min=-1)] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of so much probability.")] = 1.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt."""
    from dataclasses import asdict

    from twinserve.policies import SamplingParams
    from twinserve.worlds.run import load_llm

    options = EngineOptions.load(engine, config)
    chosen = Settings.load(settings, config, beside=("engine",))
    try:
        params = SamplingParams(temperature, max_tokens, top_k, top_p, options.seed)
    except ValueError as error:
        raise InputError(str(error)) from error
    with closing(load_llm(options, chosen, progress=say)) as llm:
        from twinserve.engine.hub import chat_prompt

        (completion,) = llm.generate([prompt if raw else chat_prompt(llm.tokenizer, prompt)], params)
    if completion.finish_reason == "refused":
        raise InputError(completion.refusal or "", field="prompt", value=prompt)
    if completion.refusal is not None:
        raise RunError(completion.refusal)
    print(json.dumps(asdict(completion)) if as_json else completion.text)


def model_fetch(name: Annotated[str, typer.Argument(help="smollm2-135m.")]) -> None:
    """Bring a model and say where it lies."""
    from twinserve.engine.hub import fetch

    print(fetch(name, progress=say))


def model_describe(
    model: Annotated[
        str,
        typer.Argument(help="A shape that ships, a config.json or its folder; @DEVICE and options as of a roofline."),
    ],
    as_json: Json = False,
) -> None:
    """Say what a model stores, keeps and computes a token, and on a device what fits and what a step takes there."""
    from twinserve.planning.description import described

    rows = described(model)
    if as_json:
        print(json.dumps(rows))
    else:
        from twinserve.commands.tables import description_table

        description_table(model, rows)


@options_of(EngineOptions, "engine", but={"model", "load_format"})
def model_verify(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, smollm2-135m, or a hub id.")],
    engine: dict,
    max_tokens: Annotated[int, typer.Option(help="Generated after each prompt.", min=1, max=MOST_TOKENS)] = 32,
    as_json: Json = False,
) -> None:
    """Hold a model on this engine against transformers; exit status 1 if more than rounding differs."""
    from twinserve.worlds.run import require_engine

    options = EngineOptions.load(engine)
    require_engine(options.device)
    from twinserve.engine.hub import resolve_model
    from twinserve.engine.verify import verify

    folder = resolve_model(model, progress=say)
    given = options.model_dump(exclude={"model"}, exclude_unset=True)
    report = verify(folder, max_tokens=max_tokens, progress=say, **given)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        from twinserve.commands.tables import verify_table

        verify_table(report.as_dict())
    if not report.agrees:
        raise typer.Exit(1)
