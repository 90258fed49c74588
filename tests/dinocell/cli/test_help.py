"""Every command teaches itself: a help text, an example that is a right call, options as statements."""

from __future__ import annotations

import re
import shlex

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from dinocell.cli.app import app

# What an option does, in the first word of its help text.
VERBS = """
Accept Adapt Allow Assume Change Collect Compare Compress Compute Copy Count Cut Divide Download Draw Expect
Fetch Find Give Ignore Include Keep List Look Maximise Merge Move Open Plan Print Process Read Refuse Remove
Record Replace Request Resize Run Scale Score Search Show Sign Skip Start Stop Store Submit Take Test Train Use Wait Write
""".split()  # noqa: SIM905


def commands(group=None, path=()):
    """(path, command) of every command that does something; groups are passed through."""
    group = group or get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join([*path, name]), command


COMMANDS = dict(commands())


def example_of(command) -> str:
    (example,) = re.findall(r"^ *Example: `(?:srun )?dinocell (.+)`$", command.help, flags=re.M)
    return example


@pytest.mark.parametrize("path", COMMANDS)
def test_the_help_of_a_command_shows_every_name_and_text_whole(path):
    done = CliRunner().invoke(app, [*path.split(), "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= 80
    shown = squeezed(done.output)
    for parameter in COMMANDS[path].params:
        assert squeezed(parameter.help) in shown, parameter.name
        if parameter.param_type_name == "option":
            assert all(name in done.output for name in parameter.opts + parameter.secondary_opts)
    assert squeezed(example_of(COMMANDS[path])) in shown


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def test_every_example_is_a_right_call_of_its_command():
    for path, command in COMMANDS.items():
        words = shlex.split(example_of(command))
        depth = len(path.split())
        assert words[:depth] == path.split()
        command.make_context(path, words[depth:])


def test_the_help_of_every_option_says_what_it_does():
    wrong = []
    for path, command in COMMANDS.items():
        for parameter in command.params:
            text = re.sub(r" *\[default: [^]]+\]$", "", parameter.help or "")
            statement = len(text.split()) >= 3 and text.endswith(".") and "  " not in text
            if parameter.param_type_name == "option":
                statement = statement and text.split()[0] in VERBS
            if not statement or not text[0].isupper():
                wrong.append(f"{path} {parameter.name}: {text}")
    assert wrong == []


def test_groups_list_their_commands():
    for group in ([], ["weights"], ["data"], ["jump"], ["upstream"], ["shards"]):
        done = CliRunner().invoke(app, [*group, "--help"])
        assert done.exit_code == 0
        assert "..." not in done.output.split("\n", 1)[1]
        for path in COMMANDS:
            if path.split()[:-1] == group:
                assert path.split()[-1] in done.output
