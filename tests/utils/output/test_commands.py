"""Commands that are printed for the next step can be pasted into a shell."""

import shlex
import subprocess

import pytest

from utils.output.commands import command, quoted


def test_a_command_has_its_flags():
    assert command("val", weights="runs/a b.pt", batch_size="3") == "python val.py --weights 'runs/a b.pt' --batch-size 3"


@pytest.mark.parametrize("name", ["plain", "a b", "$(touch x)", "it's", "`x`", "-x; rm", "", "ü"])
def test_words_come_back_as_they_were(name):
    assert shlex.split(quoted(name)) == [name]


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred'\\", "tab\tü", "latin\udce9"])
def test_control_characters_are_written_out_and_read_back_by_a_shell(name):
    line = quoted(name)
    assert line.isprintable()
    found = subprocess.run(["bash", "-c", f"printf %s {line}"], capture_output=True, check=True).stdout
    assert found == name.encode("utf-8", "surrogateescape")
