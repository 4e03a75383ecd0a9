import io
from contextlib import redirect_stdout
from dataclasses import dataclass

import pytest

from utils.arguments import flag, flag_table, from_record, make_parser, parse, spellings_of, to_record
from utils.errors import UserError, nearest, run_script, unknown


@dataclass(frozen=True)
class Arguments:
    """Flags of every kind."""

    epochs: int = flag(10, "number of epochs")
    lr0: float = flag(0.1, "first learning rate", "--lr")
    data: str = flag("digits", "data set")
    imgsz: int | None = flag(None, "side of the input", "--img", "--img-size")
    amp: bool = flag(True, "mixed precision")
    exist_ok: bool = flag(False, "write into the folder")
    resume: str = flag("", "run to resume", const="newest")
    prune_layers: tuple[str, ...] = flag((), "layers", many=True)
    rates: tuple[float, ...] = flag((0.5,), "rates", many=True)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--epochs 3", "epochs", 3),
        ("--epochs=3", "epochs", 3),
        ("--lr0 2e-3", "lr0", 0.002),
        ("--lr 1", "lr0", 1.0),
        ("--data a/b", "data", "a/b"),
        ("--img 64", "imgsz", 64),
        ("--img-size 64", "imgsz", 64),
        ("--imgsz 64", "imgsz", 64),
        ("--amp", "amp", True),
        ("--no-amp", "amp", False),
        ("--exist-ok", "exist_ok", True),
        ("--exist_ok", "exist_ok", True),
        ("--resume", "resume", "newest"),
        ("--resume runs/exp", "resume", "runs/exp"),
        ("--prune-layers a b.c", "prune_layers", ("a", "b.c")),
        ("--prune_layers a", "prune_layers", ("a",)),
        ("--rates 0.25 1", "rates", (0.25, 1.0)),
        ("--epochs 3 --epochs 4", "epochs", 4),
    ],
)
def test_flag_gives_one_value_of_its_type(line, name, value):
    arguments, given = parse(Arguments, "test", line.split())
    assert getattr(arguments, name) == value
    assert type(getattr(arguments, name)) is type(value)
    assert given == {name}
    assert arguments == Arguments(**{name: value})


def test_nothing_given_is_all_defaults():
    assert parse(Arguments, "test", []) == (Arguments(), set())


def test_default_that_is_given_counts_as_given():
    assert parse(Arguments, "test", ["--epochs", "10", "--amp"])[1] == {"epochs", "amp"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--epoch 3", ["unknown flag --epoch", "Did you mean '--epochs'", "--help"]),
        ("--no-amq", ["unknown flag --no-amq", "Did you mean '--no-amp'"]),
        ("--exist-okay", ["--exist-okay", "Did you mean '--exist-ok'"]),
        ("--qqqqqq", ["unknown flag --qqqqqq. See"]),
        ("--imgs 3", ["unknown flag --imgs", "Did you mean '--img"]),  # no abbreviations
        ("stray", ["stray"]),
        ("--epochs three", ["--epochs", "three", "int"]),
        ("--epochs 1.5", ["--epochs", "1.5"]),
        ("--epochs", ["--epochs", "one argument"]),
        ("--lr0 fast", ["--lr0", "fast", "float"]),
        ("--rates 0.1 x", ["--rates", "x"]),
        ("--prune-layers", ["--prune-layers", "at least one"]),
        ("--exist-ok=1", ["--exist-ok", "1"]),
    ],
)
def test_wrong_lines_are_user_errors_that_name_the_flag(line, words):
    with pytest.raises(UserError) as caught:
        parse(Arguments, "test", line.split())
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_misspelt_flag_with_its_value_is_named_alone():
    with pytest.raises(UserError, match=r"unknown flag --epoch\b.*Did you mean '--epochs'"):
        parse(Arguments, "test", ["--epoch=30000000000"])


def test_help_tells_defaults():
    text = io.StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit) as caught:
        make_parser(Arguments, "What it does.").parse_args(["--help"])
    assert caught.value.code == 0
    shown = " ".join(text.getvalue().split())
    assert "What it does." in shown
    for words in ("number of epochs (default: 10)", "mixed precision (default: on)", "folder (default: off)", "input (default: -)"):
        assert words in shown


def test_spellings_have_dashes_first():
    assert spellings_of("exist_ok") == ["--exist-ok", "--exist_ok"]
    assert spellings_of("epochs") == ["--epochs"]


def test_record_and_back():
    arguments = Arguments(epochs=3, prune_layers=("a", "b"), imgsz=64)
    record = to_record(arguments)
    assert record["prune_layers"] == ["a", "b"]
    assert record["rates"] == [0.5]
    assert from_record(Arguments, record) == arguments
    assert from_record(Arguments, {"epochs": 4}) == Arguments(epochs=4)
    with pytest.raises(UserError, match="unknown entry 'epoch'; it was written by another version"):
        from_record(Arguments, {"epoch": 4})


@dataclass(frozen=True)
class Others:
    """Flags of a second script, one of them shared."""

    epochs: int = flag(2, "never shown, since the first script's words are")
    half: bool = flag(False, "half precision")


def test_table_of_flags_has_a_row_a_flag_and_a_column_a_script():
    lines = flag_table({"a.py": Arguments, "b.py": Others}).splitlines()
    assert lines[:2] == ["| flag | a.py | b.py | meaning |", "| --- | --- | --- | --- |"]
    assert len(lines) == 2 + 9 + 1
    assert "| `--epochs` | 10 | 2 | number of epochs |" in lines
    assert "| `--imgsz`, `--img`, `--img-size` | - |  | side of the input |" in lines
    assert "| `--amp` / `--no-amp` | on |  | mixed precision |" in lines
    assert "| `--half` |  | off | half precision |" in lines


def test_nearest_choice_and_unknown_name():
    assert nearest("resnet81", ["resnet18", "vgg16"]) == " Did you mean 'resnet18'?"
    assert nearest("zzz", ["resnet18", "vgg16"]) == ""
    assert str(unknown("model", "vgg61", ["resnet18", "vgg16"])) == "unknown model 'vgg61'. Did you mean 'vgg16'? Valid: resnet18, vgg16"
    many = str(unknown("model", "?", [f"m{i}" for i in range(25)]))
    assert many.endswith("m19, ... (25 in all)")


def test_nearest_choice_is_found_in_any_letters():
    assert nearest("PAGERANKS", ["PageRank"]) == " Did you mean 'PageRank'?"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("epochs is -1"), 2, "error: epochs is -1"),
        (OSError(28, "No space left on device", "x.pt"), 2, "error: x.pt: the disk is full"),
        (PermissionError(13, "Permission denied", "a"), 2, "error: a: permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(error, code, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    captured = capsys.readouterr()
    assert caught.value.code == code
    assert words in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError(5, "Input/output error"), ZeroDivisionError()])
def test_defects_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_script(main)
