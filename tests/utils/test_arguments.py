import re
from dataclasses import dataclass

import pytest

from utils.arguments import GROUPS, check_at_least, flag, flag_table, from_record, make_parser, parse, spellings_of, to_record
from utils.errors import UserError, nearest, run_script, unknown


@dataclass(frozen=True)
class Arguments:
    """Flags of every kind."""

    epochs: int = flag(10, "number of epochs", group="training")
    lr0: float = flag(0.1, "first learning rate", "--lr", metavar="RATE", group="training")
    data: str = flag("digits", "data set", metavar="NAME|PATH", group="data")
    imgsz: int | None = flag(None, "side of the input", "--img", "--img-size", group="network")
    channels: int | None = flag(None, "input channels", choices=(1, 3), group="network")
    augment: str = flag("", "preset", choices={"none": 0, "light": 1}, group="data")
    amp: bool = flag(True, "mixed precision", group="run")
    exist_ok: bool = flag(False, "write into the folder", group="run")
    resume: str = flag("", "run to resume", const="newest", group="run")
    prune_layers: tuple[str, ...] = flag((), "layers", many=True, group="pruning")
    include: tuple[str, ...] = flag(("onnx",), "formats", many=True, choices=("onnx", "openvino"), group="output")
    rates: tuple[float, ...] = flag((0.5,), "rates", many=True, group="pruning")


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
        ("--channels 3", "channels", 3),
        ("--augment light", "augment", "light"),
        ("--augment=", "augment", ""),
        ("--include openvino onnx", "include", ("openvino", "onnx")),
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
        ("--epoch 3", "unknown flag --epoch. Did you mean '--epochs'? Flags of training: --epochs, --lr0. See --help"),
        ("--no-amq", "unknown flag --no-amq. Did you mean '--no-amp'? Flags of run: --amp, --exist-ok, --resume. See --help"),
        ("--exist-okay", "unknown flag --exist-okay. Did you mean '--exist-ok'? Flags of run: --amp, --exist-ok, --resume. See --help"),
        ("--qqqqqq", "unknown flag --qqqqqq. See --help"),
        ("--imgs 3", "unknown flag --imgs. Did you mean '--imgsz'? Flags of network: --imgsz, --channels. See --help"),  # no abbreviations
        ("--epoch=3000", "unknown flag --epoch. Did you mean '--epochs'? Flags of training: --epochs, --lr0. See --help"),
        ("stray", "'stray' follows no flag. See --help"),
        ("--epochs three", "--epochs is 'three'; it must be a whole number"),
        ("--epochs 1.5", "--epochs is '1.5'; it must be a whole number"),
        ("--epochs", "--epochs expects one argument"),
        ("--lr0 fast", "--lr0 is 'fast'; it must be a number"),
        ("--rates 0.1 x", "--rates is 'x'; it must be a number"),
        ("--prune-layers", "--prune-layers expects at least one argument"),
        ("--exist-ok=1", "--exist-ok takes no value, but was given '1'"),
        ("--augment lihgt", "--augment is 'lihgt'. Did you mean 'light'? Valid: none, light"),
        ("--channels 2", "--channels is '2'. Valid: 1, 3"),
        ("--include onnx openwino", "--include is 'openwino'. Did you mean 'openvino'? Valid: onnx, openvino"),
    ],
)
def test_wrong_lines_are_user_errors_that_name_the_flag(line, words):
    with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
        parse(Arguments, "test", line.split())


def test_help_begins_with_the_example_and_goes_by_groups(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = make_parser(Arguments, "Do it: python it.py --epochs 3\n\nIn detail.\n").format_help()
    assert text.startswith("example: python it.py --epochs 3\n\nDo it.\n\nIn detail.\n")
    groups = [line.removesuffix(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["options", *(group for group in GROUPS if group in groups)]
    assert set(groups[1:]) == {"data", "network", "training", "pruning", "output", "run"}
    for words in (
        "--epochs N   number of epochs (default: 10)",
        "--lr0, --lr RATE   first learning rate (default: 0.1)",
        "--data NAME|PATH   data set (default: digits)",
        "--imgsz, --img, --img-size N side of the input\n",
        "--channels {1,3}   input channels\n",
        "--augment {none,light}   preset\n",
        "--amp, --no-amp   mixed precision (default: on)",
        "--exist-ok   write into the folder\n",
        "--resume [TEXT]   run to resume\n",
        "--prune-layers TEXT ...   layers\n",
        "--include {onnx,openvino} ... formats (default: onnx)",
    ):
        assert " ".join(words.split()) in " ".join(text.split())


def test_help_without_an_example_has_the_usual_usage():
    assert make_parser(Arguments, "What it does.").format_help().startswith("usage: ")


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
    """Flags of a second script."""

    epochs: int = flag(2, "a | b", group="training")
    half: bool = flag(False, "half precision", group="run")


def test_table_of_flags_has_a_section_a_script_and_a_table_a_group():
    first, second = flag_table({"a.py": Arguments, "b.py": Others}).split("## b.py\n")
    assert first.startswith("## a.py\n\n### data\n\n| flag | value | default | meaning |\n| --- | --- | --- | --- |\n")
    for row in (
        "| `--epochs` | `N` | 10 | number of epochs |",
        "| `--data` | `NAME\\|PATH` | digits | data set |",
        "| `--imgsz`, `--img`, `--img-size` | `N` | - | side of the input |",
        "| `--amp`, `--no-amp` |  | on | mixed precision |",
        "| `--include` | `{onnx,openvino} ...` | onnx | formats |",
    ):
        assert row in first.splitlines()
    assert [line for line in second.splitlines() if line.startswith("###")] == ["### training", "### run"]
    assert "| `--epochs` | `N` | 2 | a \\| b |" in second.splitlines()
    assert second.endswith("| `--half` |  | off | half precision |")


def test_numbers_below_their_least_value_are_user_errors():
    check_at_least(Arguments(epochs=1), epochs=1)
    with pytest.raises(UserError, match=r"^epochs is 0; it must be at least 1$"):
        check_at_least(Arguments(epochs=0), epochs=1)


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
