import contextlib
import errno
import os
import pickle
import random
import runpy
import stat
import sys

import pytest
import torch

import utils
from tests.conftest import ROOT
from utils.errors import UserError
from utils.files import pickled_tensors
from utils.files.checkpoint import (
    NeedsCode,
    atomic_write,
    check_version,
    describe,
    find_state_dict,
    is_checkpoint,
    read_tensor_file,
    save_checkpoint,
    write_text,
)

CONTENT = {"spec": {"name": "net"}, "state_dict": {"fc.weight": torch.arange(6.0).reshape(2, 3)}, "epoch": 3, "rng": torch.get_rng_state()}


class Marker:
    """A pickle of it makes a file when it is loaded the unsafe way."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_pickle(path, content, form):
    if form == "zip":
        torch.save(content, path)
    elif form == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))


def test_atomic_write_makes_folders_and_replaces_the_old_file(tmp_path):
    path = tmp_path / "a" / "b" / "x.txt"
    write_text(path, "one")
    with path.open(encoding="utf-8") as reader:
        write_text(path, "zwölf")
        assert reader.read() == "one"  # who reads meanwhile has the old file, and never a part of the new one
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("boom"), KeyboardInterrupt()])
def test_error_while_writing_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def write():
        with atomic_write(path) as temporary:
            temporary.write_text("half of the n")
            assert path.read_text() == "old"
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_comes_back_as_it_was_saved(tmp_path):
    save_checkpoint(tmp_path / "w" / "last.pt", CONTENT)
    content = read_tensor_file(tmp_path / "w" / "last.pt")
    assert is_checkpoint(content)
    assert check_version(content, tmp_path) is content
    assert (content["format"], content["version"], content["epoch"], content["spec"]) == ("rankcut", 1, 3, {"name": "net"})
    assert content["state_dict"]["fc.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(content["rng"], CONTENT["rng"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/3: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_full_disk_is_an_oserror_and_the_old_checkpoint_stands(tmp_path, monkeypatch, error):
    path = tmp_path / "last.pt"
    save_checkpoint(path, CONTENT)

    def fail(content, file):
        file.write_bytes(b"PK half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        save_checkpoint(path, {**CONTENT, "epoch": 4})
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [path]
    assert read_tensor_file(path)["epoch"] == 3


@pytest.mark.parametrize("values", [100, 400_000])
@pytest.mark.parametrize("limit", [0, 300, 1_500])
def test_write_that_the_system_stops_is_an_oserror(tmp_path, values, limit):
    resource = pytest.importorskip("resource")
    path = tmp_path / "last.pt"
    save_checkpoint(path, CONTENT)
    before, content = resource.getrlimit(resource.RLIMIT_FSIZE), {"w": torch.rand(values), "x": torch.rand(values)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"last\.pt|large"):
            save_checkpoint(path, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [path]
    assert read_tensor_file(path)["epoch"] == 3


def test_other_errors_of_saving_pass_unchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("a tensor without storage")))
    with pytest.raises(RuntimeError, match="without storage"):
        save_checkpoint(tmp_path / "last.pt", CONTENT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("read", [read_tensor_file, pickled_tensors.read_pickled])
def test_code_in_a_pickle_is_never_run(tmp_path, read, form):
    path, mark = tmp_path / "evil.pt", tmp_path / "was-run"
    write_pickle(path, {"model": Marker(mark), "state_dict": {"w": torch.ones(1)}}, form)
    if read is pickled_tensors.read_pickled and form != "pickle":
        assert isinstance(read(path)["model"], pickled_tensors.Stub)
    else:
        with pytest.raises(UserError, match=r"evil.pt"):
            read(path)
    assert not mark.exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickle_that_needs_code_is_told_from_a_damaged_file(tmp_path, form):
    write_pickle(tmp_path / "net.pt", {"model": Marker(tmp_path / "was-run")}, form)
    with pytest.raises(NeedsCode, match=r"net.pt needs code to load.*state dict"):
        read_tensor_file(tmp_path / "net.pt")


@pytest.mark.parametrize(("form", "values", "step"), [("zip", 4, 7), ("zip", 5000, 331), ("legacy", 4, 1)])
@pytest.mark.filterwarnings("ignore")  # torch warns of what it finds in foreign files
def test_half_written_files_are_refused_at_any_length(tmp_path, form, values, step):
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    write_pickle(whole, {"w": torch.arange(float(values))}, form)
    data = whole.read_bytes()
    assert read_tensor_file(whole)["w"][3] == 3
    for length in range(0, len(data), step):
        part.write_bytes(data[:length])
        for read in (read_tensor_file, pickled_tensors.read_pickled):
            with pytest.raises(UserError, match=r"part.pt"):
                read(part)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_are_refused_or_read_but_raise_nothing_else(tmp_path, form):
    path, draw, refused = tmp_path / "x.pt", random.Random(0), 0
    write_pickle(path, {"w": torch.arange(4.0)}, form)
    whole = path.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            read_tensor_file(path)
            continue
        refused += 1
    assert 50 < refused < 300


def test_pickle_in_a_zip_that_claims_several_disks_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(Marker(tmp_path / "was-run"), path)
    data = bytearray(path.read_bytes())
    locator = data.rindex(b"PK\x06\x07")  # zip64: 4 bytes of signature, 4 of disk, 8 of offset, 4 of the number of disks
    data[locator + 4] = 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x.pt"):
        read_tensor_file(path)


def test_what_is_no_weights_file_is_named(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    for name, words in {"absent.pt": "no weights file .*absent.pt", ".": "is a folder", "text.pt": "text.pt is not a weights file"}.items():
        with pytest.raises(UserError, match=words):
            read_tensor_file(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2; this code reads up to 1: update"),
        ({"version": None}, "version None"),
        ({"version": "1"}, "version 1"),
        ({"spec": None}, "'spec' is missing"),
        ({"state_dict": [1]}, "'state_dict' is missing"),
    ],
)
def test_newer_or_incomplete_checkpoints_are_refused(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        check_version({"format": "rankcut", "version": 1, "spec": {}, "state_dict": {}, **change}, tmp_path / "x.pt")


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model", "ema", "state_dict_ema", "net"])
def test_state_dict_is_found_under_its_usual_keys(tmp_path, key):
    tensors = {"a": torch.ones(2), "b": torch.zeros(1)}
    assert find_state_dict(tensors if key is None else {"epoch": 3, key: tensors}, tmp_path) == tensors


@pytest.mark.parametrize(
    "content", [{}, [], {"weights": {"a": torch.ones(1)}}, {"state_dict": {}}, {"a": torch.ones(1), "epoch": 3}, "text"]
)
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"x\.pt holds no state dict"):
        find_state_dict(content, tmp_path / "x.pt")
    assert not is_checkpoint(content)


# ---- python -m utils.files.checkpoint

STATE = {
    "conv.weight": torch.zeros(8, 3, 3, 3),
    "bn.weight": torch.zeros(8),
    "bn.running_mean": torch.zeros(8),
    "bn.num_batches_tracked": torch.tensor(3),
    "fc.weight": torch.zeros(5, 8, dtype=torch.bfloat16),
}
TENSORS = [
    "tensors",
    "  conv.weight             [8, 3, 3, 3]  float32",
    "  bn.weight               [8]           float32",
    "  bn.running_mean         [8]           float32",
    "  bn.num_batches_tracked  []            int64",
    "  fc.weight               [5, 8]        bfloat16",
    # 8 * 27 + 8 + 5 * 8
    "5 tensors; 264 parameters in 3 of them (the others are statistics of norms and integers)",
]


def test_a_checkpoint_is_described_line_by_line(tmp_path):
    content = {
        "spec": {"name": "net", "num_classes": 5},
        "metrics": {"top1": 0.5},
        "arguments": {"lr0": 0.001, "freeze": []},
        "plan": {
            "kept": {"conv": [0, 2, 5], "longer.conv": [1]},
            "sizes": {"conv": 8, "longer.conv": 4},
            "before": {"kept": {"conv": list(range(8))}, "sizes": {"conv": 16}},
        },
        "state_dict": STATE,
        "training": {"epoch": 3, "step": 7, "optimizer": {}},
    }
    save_checkpoint(tmp_path / "x.pt", content)
    lines = describe(read_tensor_file(tmp_path / "x.pt"), tmp_path / "x.pt").split("\n")
    assert lines == [
        f"{tmp_path}/x.pt: checkpoint, version 1",
        "spec",
        "  name         net",
        "  num_classes  5",
        "metrics",
        "  top1  0.5",
        "arguments",
        "  lr0     0.001",
        "  freeze  []",
        "plan",
        "  conv         3 of 8",
        "  longer.conv  1 of 4",
        "  and before that",
        "  conv  8 of 16",
        "training state",
        "  epoch 3, step 7",
        *TENSORS,
    ]


def test_what_is_not_there_is_said_and_widths_do_without_indices(tmp_path):
    content = {"format": "rankcut", "version": 1, "spec": {}, "metrics": {}, "state_dict": STATE}
    assert describe(content, tmp_path).split("\n")[1:9] == [
        "spec", "  none", "metrics", "  none", "arguments", "  None", "plan", "  none: no channels were cut",
    ]  # fmt: skip
    widths = {"kept": {}, "sizes": {"conv": 8}, "widths": {"conv": 5}}
    assert "plan\n  conv  5 of 8\ntraining state\n  none\n" in describe({**content, "plan": widths}, tmp_path)


def test_a_plain_state_dict_is_described(tmp_path):
    assert describe({"state_dict": STATE}, tmp_path).split("\n") == [f"{tmp_path}: plain state dict", *TENSORS]


@pytest.mark.parametrize(
    "plan", ["cut", [1], {"kept": 3}, {"kept": {"a": 1}, "sizes": 2}, {"kept": {}, "before": [1]}, {"kept": {1: None}, "sizes": {1: {}}}]
)
def test_odd_contents_are_shown_and_raise_nothing(tmp_path, plan):
    content = {"format": "rankcut", "version": 1, "spec": {1: "a\nb\x1b[31m", "long": "x" * 5000}, "metrics": 7, "plan": plan}
    text = describe({**content, "state_dict": {**STATE, "odd\n": "text", 3: None}, "training": [1]}, tmp_path)
    assert "\x1b" not in text
    assert "a?b?[31m" in text
    assert max(len(line) for line in text.split("\n")) < 200
    assert text.endswith("7 tensors; 264 parameters in 3 of them (the others are statistics of norms and integers)")


def test_deeply_nested_plans_are_walked_through(tmp_path):
    plan = {"kept": {"a": [0]}, "sizes": {"a": 2}}
    for _ in range(2000):
        plan = {"kept": {"a": [0]}, "sizes": {"a": 2}, "before": plan}
    content = {"format": "rankcut", "version": 1, "spec": {}, "state_dict": STATE, "plan": plan}
    assert describe(content, tmp_path).count("and before that") == 2000


def test_the_command_describes_files_and_reports_in_one_line(script, tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    save_checkpoint(tmp_path / "b.pt", CONTENT)
    save_checkpoint(tmp_path / "newer.pt", CONTENT)
    torch.save({**torch.load(tmp_path / "newer.pt"), "version": 9}, tmp_path / "newer.pt")
    write_pickle(tmp_path / "evil.pt", {"model": Marker(tmp_path / "was-run")}, "zip")
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    done = script("utils/files/checkpoint.py", "a.pt", "b.pt")
    assert done.code == 0
    assert done.out.startswith("a.pt: plain state dict\ntensors\n")
    assert "\nb.pt: checkpoint, version 1\nspec\n  name  net\n" in done.out
    for arguments, words in (
        ((), "FILE"),
        (("--help",), "python -m utils.files.checkpoint FILE"),
        (("absent.pt",), "no weights file absent.pt"),
        ((".",), ". is a folder"),
        (("text.pt",), "text.pt is not a weights file"),
        (("evil.pt",), "evil.pt needs code to load"),
        (("list.pt",), "list.pt holds no state dict"),
        (("newer.pt",), "version 9"),
    ):
        refused = script("utils/files/checkpoint.py", *arguments)
        assert refused.code == 2
        assert words in refused.err
        assert refused.err.count("\n") == 1
        assert refused.out == ""
    assert not (tmp_path / "was-run").exists()


def test_the_command_runs_as_a_module(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "files", utils.files)  # both come back afterwards
    for name in ("utils.files", "utils.files.checkpoint"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["-m", str(ROOT / "weights/digits.pt")])
    monkeypatch.chdir(tmp_path)
    runpy.run_module("utils.files.checkpoint", run_name="__main__")  # a warning would be an error
    output = capsys.readouterr().out
    assert "  name           resnet20\n" in output
    assert "269,434 parameters" in output
    assert list(tmp_path.iterdir()) == []
