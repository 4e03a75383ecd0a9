"""The flags of the five scripts: in groups, explained, with their choices; and what a wrong line is answered with."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

import export
import predict
import prune
import train
import val
from compression.analysis.sensitivity import KINDS
from tests.conftest import ROOT
from utils.arguments import GROUPS, flag_table, make_parser, parse
from utils.errors import UserError

SCRIPTS = {
    "train.py": (train, train.TrainArguments),
    "prune.py": (prune, prune.PruneArguments),
    "export.py": (export, export.ExportArguments),
    "val.py": (val, val.ValArguments),
    "predict.py": (predict, predict.PredictArguments),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_group_and_a_help_text(script):
    fields = dataclasses.fields(SCRIPTS[script][1])
    assert {field.metadata["group"] for field in fields} <= set(GROUPS)
    assert all(len(field.metadata["help"]) > 5 for field in fields)
    assert all(field.metadata["help"][-1] not in ".;" for field in fields)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_an_example_that_the_script_takes(script):
    module, arguments = SCRIPTS[script]
    text = make_parser(arguments, module.__doc__).format_help()
    example = text.splitlines()[0]
    assert example.startswith(f"example: python {script} --")
    parse(arguments, module.__doc__, example.split()[3:])
    for field in dataclasses.fields(arguments):
        assert f"  --{field.name.replace('_', '-')}" in text


def test_help_shows_the_choices_of_closed_sets():
    text = make_parser(train.TrainArguments, train.__doc__).format_help()
    for words in (
        "--optimizer {SGD,Adam,AdamW,Muon,RMSProp}",
        "--augment {none,light,default,strong}",
        "--auto-augment {none,trivial,rand}",
        "--balance {none,sampler,weights}",
        "--cache [{ram,disk}]",
        "--channels {1,3}",
        "--act-stats {train,val,test}",
        "--summary {sparsity,compute,model,modules}",
        f"--sense {{{','.join(KINDS)}}}",  # written in the help, as its table lies further down
        "--qe-mode, --qem {sym,sym_restr,asym_s,asym_u}",
        "--qe-clip-acts, --qeca {none,avg,n_std,gauss,laplace}",
    ):
        assert f"  {words}" in text
    assert "--allocation {uniform,sensitivity}" in make_parser(prune.PruneArguments, "").format_help()
    assert "--include {onnx,openvino,torchscript,safetensors} ..." in make_parser(export.ExportArguments, "").format_help()
    assert "--split {train,val,test}" in make_parser(val.ValArguments, "").format_help()


@pytest.mark.parametrize(
    ("script", "line", "message"),
    [
        ("train.py", "--optimizer adm", "--optimizer is 'adm'. Did you mean 'Adam'? Valid: SGD, Adam, AdamW, Muon, RMSProp"),
        ("train.py", "--augment lihgt", "--augment is 'lihgt'. Did you mean 'light'? Valid: none, light, default, strong"),
        (
            "train.py",
            "--kd-teecher x",
            "unknown flag --kd-teecher. Did you mean '--kd-teacher'? Flags of distillation: --distill, --kd-",
        ),
        ("train.py", "--val_fraction much", "--val-fraction is 'much'; it must be a number"),
        ("train.py", "yolov5n-cls", "'yolov5n-cls' follows no flag"),
        ("prune.py", "--criterion ranks", "--criterion is 'ranks'. Did you mean 'rank'? Valid: rank, effective_rank"),
        (
            "export.py",
            "--include onnx openwino",
            "--include is 'openwino'. Did you mean 'openvino'? Valid: onnx, openvino, torchscript, safetensors",
        ),
        ("val.py", "--split valid", "--split is 'valid'. Did you mean 'val'? Valid: train, val, test"),
    ],
)
def test_wrong_lines_name_the_flag_the_value_and_what_is_valid(script, line, message):
    module, arguments = SCRIPTS[script]
    with pytest.raises(UserError) as caught:
        parse(arguments, module.__doc__, line.split())
    assert str(caught.value).startswith(message)


def test_a_wrong_line_ends_a_script_in_one_line_with_code_2():
    done = subprocess.run([sys.executable, "val.py", "--spilt", "val"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("val.py: error: unknown flag --spilt. Did you mean '--split'? Flags of data: --data, --split, ")
    assert len(done.stderr.splitlines()) == 1


def test_names_of_old_files_still_name_a_grid():
    assert parse(train.TrainArguments, "", ["--qe-mode", "SYMMETRIC"])[0].qe_mode == "SYMMETRIC"


def test_the_table_has_every_flag():
    table = flag_table({script: arguments for script, (_, arguments) in SCRIPTS.items()})
    assert table.count("| `--") == sum(len(dataclasses.fields(arguments)) for _, arguments in SCRIPTS.values())
