"""Help that teaches: nothing is cut at 80 columns, every option has a text, every command a call that works."""

from __future__ import annotations

import re
import shlex

import pytest

from twinserve.commands.app import COMMANDS, GROUPS, parser

NAMES = sorted({*COMMANDS, *GROUPS})


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def command_of(words: list[str]):
    """A command of the command line, and what is left of the words."""
    command = parser()
    while words and hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_every_option_in_full(twinserve, name, option):
    result = twinserve(*name.split(), option)
    assert (result.code, result.err) == (0, "")
    assert f"Usage: twinserve {name} " in result.out and "…" not in result.out
    text, _, _ = result.out.partition("\n  Example:")  # a call is shown whole, to be copied
    assert max(map(len, text.splitlines())) <= 80
    for parameter in command_of(name.split())[0].params:
        for text in (*parameter.opts, *parameter.secondary_opts):
            assert not text.startswith("--") or re.search(rf"{text}\b", result.out), text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_text(name):
    for parameter in command_of(name.split())[0].params:
        assert len(getattr(parameter, "help", None) or "") > 5, f"{name}: {parameter.name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_is_shown_whole_and_can_be_called(twinserve, name):
    example = COMMANDS[name][1]
    assert f"\n  Example:\n    {example}\n" in twinserve(*name.split(), "-h").out
    program, *words = shlex.split(example)
    command, arguments = command_of(words)
    assert program == "twinserve" and words[: len(name.split())] == name.split()
    assert command.make_context("twinserve", arguments).params


def test_the_list_of_commands_has_whole_sentences(twinserve):
    shown = twinserve("-h").out
    assert "..." not in shown.split("Commands:")[1]
    assert all(f"\n  {name} " in shown for name in NAMES if " " not in name)


@pytest.mark.parametrize("words", [[], ["trace"], ["config"]])
def test_without_a_word_behind_it_a_group_shows_its_help_and_has_done_nothing(twinserve, words):
    shown = twinserve(*words)
    assert (shown.code, shown.out, shown.err) == (2, "", twinserve(*words, "-h").out)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_misused_command_says_where_its_help_is(twinserve, name):
    assert twinserve(*name.split(), "--no-such-option").err.endswith(f" (see twinserve {name} -h)\n")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["simulate"], "Did you mean 'sim'?"),
        (["cap"], "Did you mean 'capacity'?"),
        (["reprot"], "Did you mean 'report', 'export'?"),
        (["trace", "statistics"], "Did you mean 'stat'?"),
        (["sim", "x", "--max-num-seq", "3"], "--max-num-seqs"),
    ],
)
def test_a_word_that_is_nearly_one_of_ours_is_guessed(twinserve, words, meant):
    result = twinserve(*words)
    assert result.code == 2 and meant in result.err and result.err.count("\n") == 1


def test_a_misspelt_field_of_a_file_is_guessed(twinserve, trace, latency, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text("max_num_seq = 3\n")
    result = twinserve("sim", trace, "--latency", latency, "--config", path)
    expected = f"{path}: max_num_seq is 3, there is no such field, did you mean max_num_seqs or max_num_active_seqs?"
    assert (result.code, result.err) == (2, f"twinserve: {expected}\n")


def test_a_shell_can_complete_commands():
    assert {"install_completion", "show_completion"} <= {parameter.name for parameter in command_of([])[0].params}
