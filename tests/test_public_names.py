"""What metier promises to those who import it: these names, and a quick import."""

import inspect
import subprocess
import sys

import pytest

import metier
from metier.app.cli import app

PUBLIC = {
    "audit",
    "demo",
    "export",
    "init",
    "overfit",
    "plan",
    "predict",
    "pretrain",
    "run",
    "serve",
    "specialist",
    "train",
}
COMMANDS = {command.callback.__name__: command.callback for command in app.registered_commands}


def test_public_names_are_these():
    assert set(metier.__all__) == PUBLIC
    assert set(dir(metier)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_name_is_a_documented_function(name):
    function = getattr(metier, name)
    assert inspect.isfunction(function)
    assert inspect.getdoc(function)
    assert function.__name__ == name


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        metier.rum  # noqa: B018


def test_each_command_is_a_function_of_the_same_name():
    assert set(COMMANDS) - {"chat"} == PUBLIC - {"specialist"}, "chat is a loop over `specialist`"


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"chat", "serve"}))
def test_each_command_takes_the_arguments_of_its_function(name):
    command = set(inspect.signature(COMMANDS[name]).parameters) - {"as_json"}
    function = set(inspect.signature(getattr(metier, name)).parameters) - {"progress"}
    assert command == function


def test_importing_metier_imports_nothing_heavy():
    code = "import sys, metier; print(len({'torch', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
