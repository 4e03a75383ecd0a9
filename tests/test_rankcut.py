"""The front door: what a notebook does in a few lines."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn.utils import parametrizations

import rankcut
from models.networks.own import unwrapped
from rankcut import UserError
from setup import package

ROOT = Path(__file__).resolve().parent.parent
DIGIT = ROOT / "data" / "images" / "digit_3.png"
CLASSES = tuple("0123456789")
QUICK = {"workers": 0, "images": 64, "round_to": 1, "allocation": "uniform"}


class Own(nn.Module):
    """A network that is registered nowhere."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.body = nn.Conv2d(12, 24, 3, stride=2, padding=1)
        self.head = nn.Linear(24, 10)

    def forward(self, images):
        hidden = torch.relu(self.norm(self.stem(images)))
        return self.head(torch.relu(self.body(hidden)).mean((2, 3)))


@pytest.fixture(scope="module")
def digits():
    return rankcut.load(ROOT / "weights" / "digits.pt")


@pytest.mark.usefixtures("plots")
def test_five_lines_train_cut_tune_measure_and_ship(tmp_path):
    dense = rankcut.load("resnet20", imgsz=16).finetune("digits", epochs=1, optimizer="Adam", lr0=3e-3, workers=0)
    small = dense.prune("digits", macs=0.5, **QUICK).finetune("digits", epochs=1, workers=0)
    assert small.spec.class_names == CLASSES
    assert small.validate("digits", workers=0).top1 == pytest.approx(small.results["top1"])
    shipped = rankcut.load(small.export("torchscript", tmp_path))
    kept = rankcut.load(small.save(tmp_path / "small.pt"))
    del dense, small  # and with them their temporary folders
    for one, other in zip(shipped.predict(DIGIT), kept.predict(DIGIT), strict=True):
        assert one[0] == other[0]
        assert one[1] == pytest.approx(other[1], abs=1e-4)


def test_a_cut_says_what_it_cost_and_knows_its_dense_network(tmp_path):
    path = rankcut.wrap(Own(), CLASSES, imgsz=16, channels=1).save(tmp_path / "dense.pt")
    dense = rankcut.load(path, network=Own)
    small = dense.prune("digits", macs=0.5, **QUICK)
    before, after = small.results["macs"]
    assert after <= before / 2
    assert [step["name"] for step in small.results["steps"]][:2] == ["cut", "refitted"]
    assert small.network is not dense.network
    assert torch.load(small.path)["dense"]["path"] == str(path)
    smaller = small.prune("digits", macs=0.8, **QUICK)
    assert "dense" in torch.load(small.save(tmp_path / "small.pt"))
    assert "dense" not in torch.load(smaller.save(tmp_path / "sub" / "smaller.pt"))  # which lies in a temporary folder


def test_images_of_any_kind_give_the_same_classes(digits):
    from PIL import Image

    from utils.data.images import read_image

    wanted = digits.predict(DIGIT, topk=3)
    assert len(wanted) == 3
    assert wanted[0][0] == "3"
    pixels = read_image(DIGIT, 1)
    kinds = [str(DIGIT), pixels, pixels[:, :, 0], torch.from_numpy(pixels), np.repeat(pixels, 3, axis=2), Image.fromarray(pixels[:, :, 0])]
    for image in kinds:
        assert digits.predict(image, topk=3) == wanted
    batch = digits.predict(np.stack([pixels] * 3), topk=3, batch_size=2)
    assert len(batch) == 3
    for classes in batch:  # which may be rounded in another way than one image's
        assert dict(classes) == pytest.approx(dict(wanted), abs=1e-5)
    assert digits.predict([DIGIT, pixels], topk=3) == [wanted] * 2
    assert digits.predict([DIGIT], topk=3) == [wanted]
    assert [classes[0][0] for classes in digits.predict(DIGIT.parent)] == list(CLASSES)


@pytest.mark.usefixtures("plots")
@pytest.mark.parametrize("wrapper", [lambda network: network, nn.DataParallel, torch.compile], ids=["bare", "DataParallel", "compiled"])
def test_a_network_that_nobody_registered(wrapper, tmp_path):
    own = rankcut.wrap(wrapper(Own()), CLASSES, imgsz=16, channels=1)
    small = own.prune("digits", macs=0.5, **QUICK).finetune("digits", epochs=1, workers=0)
    assert small.network.stem.weight.shape[0] < 12
    path = small.save(tmp_path / "own.pt")
    for again in (rankcut.load(path), rankcut.load(path, network=Own), rankcut.load(path, network=Own())):
        assert again.predict(DIGIT) == small.predict(DIGIT)
    assert rankcut.load(small.export("torchscript", tmp_path)).predict(DIGIT)[0][0] == small.predict(DIGIT)[0][0]


class Flattening(nn.Module):
    """A network that takes a view of its last feature map, which must be contiguous."""

    def __init__(self, channels):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(channels, 10, 5), nn.Conv2d(10, 20, 5), nn.Linear(80, 10)

    def forward(self, images):
        hidden = torch.max_pool2d(self.stem(images).relu(), 2)
        return self.head(torch.max_pool2d(self.body(hidden).relu(), 2).view(-1, 80))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_needs_contiguous_tensors_goes_all_the_way(channels, tmp_path):
    def build():
        return Flattening(channels)

    dense = rankcut.wrap(build(), CLASSES, imgsz=20, channels=channels).finetune("digits", epochs=1, workers=0)
    small = dense.prune("digits", macs=0.5, **QUICK).finetune("digits", epochs=1, workers=0)  # with the dense one as teacher
    assert small.network.body.weight.shape[1] < 10
    again = rankcut.load(small.save(tmp_path / "own.pt"), network=build)
    assert again.validate("digits", workers=0).top1 == small.results["top1"]
    shipped = rankcut.load(small.export("onnx", tmp_path))
    assert dict(shipped.predict(DIGIT)[0:5]) == pytest.approx(dict(small.predict(DIGIT)[0:5]), abs=1e-4)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_norms_of_weights_are_folded_and_then_cut(norm, tmp_path):
    def build():
        torch.manual_seed(0)
        network = Own()
        norm(network.stem), norm(network.body)
        return network

    network = build()
    dense = rankcut.wrap(network, CLASSES, imgsz=16, channels=1)
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.allclose(dense.network(images), network.eval()(images), atol=1e-5)
    assert hasattr(network.stem, "parametrizations")  # the user's own is as it was
    small = dense.prune("digits", macs=0.5, **QUICK)
    assert len(small.network.stem.weight) < 12
    again = rankcut.load(small.save(tmp_path / "x.pt"), network=build)
    assert again.predict(DIGIT) == small.predict(DIGIT)


def test_a_file_of_own_code_says_what_it_lacks(tmp_path):
    path = rankcut.wrap(Own(), list(CLASSES), imgsz=16, channels=1).save(tmp_path / "own.pt")
    done = subprocess.run([sys.executable, ROOT / "val.py", "--weights", path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Own is a network of your own code, which is not in the file: rankcut.load(FILE, network=Own)" in done.stderr


def test_wrappers_are_looked_through():
    bare = nn.Linear(2, 2)
    assert unwrapped(nn.DataParallel(torch.compile(nn.DataParallel(bare)))) is bare
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert unwrapped(nn.parallel.DistributedDataParallel(bare)) is bare
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda one: one.prune("digits", mac=0.5), "unknown argument 'mac'. Did you mean 'macs'?"),
        (lambda one: one.prune("digits"), "say how much goes"),
        (lambda one: one.prune("digits", macs="half"), "macs is 'half'; it must be a number"),
        (lambda one: one.prune("digits", macs=0.5, round_to=1.5), "round_to is 1.5; it must be a whole number"),
        (lambda one: one.prune("digits", macs=0.5, refit=1), "refit is 1; it must be true or false"),
        (lambda one: one.prune("digits", macs=0.5, criterion="rang"), "criterion is 'rang'. Did you mean 'rank'?"),
        (lambda one: one.finetune("nowhere"), "nowhere"),
        (lambda one: one.export("onyx"), "include is 'onyx'. Did you mean 'onnx'?"),
        (lambda one: one.validate("digits", "tests"), "tests"),
        (lambda one: one.predict("nowhere.png"), "no file or folder nowhere.png"),
        (lambda one: one.predict(np.zeros((8, 8))), "this one is float64, [8 x 8]"),
        (lambda one: one.predict(np.zeros((8, 8, 5), np.uint8)), "[8 x 8 x 5]"),
        (lambda one: rankcut.load("resnet21"), "unknown model 'resnet21'"),
        (lambda one: rankcut.load("nowhere.pt"), "no weights file nowhere.pt"),
        (lambda one: rankcut.load(one.path, network=3), "network must be a module"),
        (lambda one: rankcut.wrap(Own(), []), "num_classes is 0"),
    ],
)
def test_what_can_be_mended_is_one_line(use, message, digits):
    with pytest.raises(UserError) as caught:
        use(digits)
    assert message in str(caught.value)


def test_an_exported_file_can_be_used_but_not_cut(digits, tmp_path):
    shipped = rankcut.load(digits.export("torchscript", tmp_path))
    assert shipped.save(tmp_path / "copy.torchscript").read_bytes() == shipped.path.read_bytes()
    with pytest.raises(UserError, match="is an exported file"):
        _ = shipped.network
    with pytest.raises(UserError):
        shipped.prune("digits", macs=0.5)


def test_the_package_takes_one_name_only(tmp_path):
    package(tmp_path / "site" / "rankcut")
    code = (
        "import importlib.util, sys, rankcut; "
        f"print(rankcut.load({str(ROOT / 'weights' / 'digits.pt')!r}).predict({str(DIGIT)!r})[0][0]); "
        "print([name for name in ('utils', 'models', 'compression', 'train') if importlib.util.find_spec(name) or name in sys.modules])"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert done.stdout.split("\n")[:2] == ["3", "[]"]
    command = [sys.executable, "-c", "import rankcut, sys; sys.argv[1:] = ['predict', '--nosave', '--project', 'runs']; rankcut.main()"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert "digit_9.png" in done.stdout


def test_the_command_names_the_scripts():
    done = subprocess.run([sys.executable, ROOT / "rankcut.py", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "rankcut {train,prune,val,export,predict}" in done.stderr
