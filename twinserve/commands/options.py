"""What commands share: their help, options made from pydantic models, so that a setting has one name, one default and
one description, and arguments that several commands take."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from typer.core import TyperCommand, TyperGroup

from twinserve.settings.limits import plain

TraceFile = Annotated[
    Path, typer.Argument(help="A trace in any of the formats of docs/traces.md, gzip or not; or a folder of WEKA's.")
]
Traces = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the public traces, for a vLLM step log whose prompts are those of one.",
        envvar="TWINSERVE_TRACES",
    ),
]
Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings; the engine's in [engine]. Options override it.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace what has the name already, once all that takes its place is written.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")]


VLLM_ARGS_HELP = "A command line of vllm serve, such as '--max-num-seqs 512'; settings that are options override it."


def settings_of_vllm(text: str | None) -> dict[str, Any]:
    """The settings that a command line of `vllm serve` sets; the flags that are not modelled are said.

    Raises:
        InputError: it cannot be read.
    """
    from twinserve.commands.progress import say
    from twinserve.worlds.vllm_like import read_vllm_args

    settings, unmodelled = ({}, []) if text is None else read_vllm_args(text)
    if unmodelled:
        say(f"not modelled of the command line of vLLM: {', '.join(unmodelled)}")
    return settings


_WHOLE = 1000
"""Letters; no command's first sentence has more."""


class Command(TyperCommand):
    """A command whose help names every option in full, however narrow the terminal, panel by panel."""

    def get_short_help_str(self, limit: int = 0) -> str:
        return super().get_short_help_str(_WHOLE)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """What becomes a number is looked at as it is written, which nobody sees any more once it is one."""
        if ctx.resilient_parsing:  # as a shell does, which completes a line that is not whole: nothing is wrong yet
            return super().parse_args(ctx, args)
        texts = self.make_parser(ctx).parse_args(list(args))[0]
        values = self.make_context(ctx.info_name, list(args), ctx.parent, resilient_parsing=True).params
        parameters: list[Any] = self.get_params(ctx)
        for parameter in parameters:
            text, value = texts.get(parameter.name), values.get(parameter.name)
            if isinstance(text, str) and type(value) in (int, float):
                try:
                    plain(text)
                except ValueError as error:
                    raise typer.BadParameter(str(error), ctx=ctx, param=parameter) from error
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                panel = getattr(parameter, "rich_help_panel", None) or ("Arguments" if is_argument else "Options")
                names, text = record
                if len(names) + 2 > formatter.width:  # an option and what switches it off, a line each
                    names = names.replace(" / ", " /\n  ")
                sections.setdefault(panel, []).append((names, text))
        for panel, records in sections.items():
            with formatter.section(panel):
                formatter.write_dl(records)


class Group(TyperGroup):
    """Commands, of which one that is misspelt, or called by a longer or shorter name, is guessed."""

    def get_short_help_str(self, limit: int = 0) -> str:
        return super().get_short_help_str(_WHOLE)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Without a word, help; and the status of bad input, as nothing was done."""
        if not args and not ctx.resilient_parsing:
            print(ctx.get_help(), file=sys.stderr)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        alike = [name for name in self.commands if word and (name.startswith(word) or word.startswith(name))]
        if word not in self.commands and alike:
            ctx.fail(f"No such command {word!r}. Did you mean {' or '.join(map(repr, alike))}?")
        return super().resolve_command(ctx, args)


class KeepsDashes(Command):
    """A command one of whose arguments may be `--`, which parsers take for the end of the options and drop."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        at = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [*args[:at], *args[at : at + 1], *args[at:]])


NO_OPTION = {"is_option": False}
"""What a field says that no option sets, as something else decides it."""


def options_of(model: type[BaseModel], panel: str, *, but: Collection[str] = ()) -> Callable[[Callable], Callable]:
    """Give a command one option a field of `model`; those given reach the command as the dict `panel`.

    An option that is not given is absent from the dict, so that a configuration file can set it. Pydantic itself
    checks the values; the command line only parses them. A field that says NO_OPTION has none.

    Args:
        panel: the keyword argument of the command that takes the dict, and, in words, the heading in the help.
        but: fields that are no options.
    """
    fields = {
        name: info
        for name, info in model.model_fields.items()
        if name not in but and info.json_schema_extra != NO_OPTION
    }

    def decorate(command: Callable) -> Callable:
        own = inspect.signature(command, eval_str=True)

        added = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, info, panel)
            )
            for name, info in fields.items()
        ]

        @functools.wraps(command)
        def wrapper(**values: Any) -> Any:
            given = {name: values.pop(name) for name in fields}
            return command(**values, **{panel: {name: value for name, value in given.items() if value is not None}})

        kept = [parameter for parameter in own.parameters.values() if parameter.name != panel]
        wrapper.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *added)}
        return wrapper

    return decorate


def _annotation(name: str, info: Any, panel: str) -> Any:
    kind, flag = info.annotation, name.replace("_", "-")
    if get_origin(kind) is list:
        kind = list[str]
    elif get_origin(kind) not in (None, Literal):
        kind = next(arm for arm in get_args(kind) if arm is not type(None))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        kind = str  # as JSON
    default = "none" if info.default in (None, []) else str(info.default)
    option = typer.Option(
        f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",
        help=f"{info.description[0].upper()}{info.description[1:]} (default: {default})",
        rich_help_panel=panel.replace("_", " ").capitalize(),
        show_default=False,
    )
    return Annotated[Union[kind, None], option]  # noqa: UP007 - built at run time
