import math
import pickle
import zipfile

import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.files import pickled_tensors


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3))
        self.head = nn.Linear(4, 2)
        self.head.weight = nn.Parameter(torch.arange(8.0).reshape(2, 4).half())
        self.register_buffer("kept", torch.tensor([5, 6]))
        self.view = nn.Parameter(torch.arange(10.0)[3:9].reshape(2, 3).t())


def pickled(path, content):
    """A zip as torch writes it around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return path


@pytest.fixture
def net(tmp_path):
    torch.manual_seed(0)
    module = Net()
    torch.save({"model": module, "epoch": 7, "names": {0: "a"}}, tmp_path / "net.pt")
    return module, pickled_tensors.read_pickled(tmp_path / "net.pt")


def test_pickled_module_yields_its_state_dict(net):
    module, content = net
    assert content["epoch"] == 7
    assert content["names"] == {0: "a"}
    assert pickled_tensors.is_module(content["model"])
    tensors, expected = pickled_tensors.module_tensors(content["model"]), module.state_dict()
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) and tensors[name].dtype == expected[name].dtype for name in expected)
    assert tensors["view"].tolist() == [[3.0, 6.0], [4.0, 7.0], [5.0, 8.0]]  # 3..8 in rows of three, transposed


def test_plain_attributes_of_submodules_are_collected_by_name(net):
    assert pickled_tensors.module_values(net[1]["model"], "eps") == {"body.1": 1e-3}
    assert pickled_tensors.module_values(net[1]["model"], "out_features") == {"head": 2}


def test_buffers_that_are_not_in_the_state_dict_are_left_out(tmp_path):
    module = nn.BatchNorm1d(2)
    module.register_buffer("scratch", torch.ones(3), persistent=False)
    torch.save(module, tmp_path / "x.pt")
    assert set(pickled_tensors.module_tensors(pickled_tensors.read_pickled(tmp_path / "x.pt"))) == set(module.state_dict())


@pytest.mark.parametrize("dtype", pickled_tensors._STORAGE_DTYPES.values(), ids=str)
def test_every_storage_type_is_read(tmp_path, dtype):
    torch.save({"full": torch.tensor([[0, 1], [1, 0]]).to(dtype), "none": torch.empty(0, dtype=dtype)}, tmp_path / "x.pt")
    content = pickled_tensors.read_pickled(tmp_path / "x.pt")
    assert content["full"].tolist() == [[0, 1], [1, 0]]
    assert (content["full"].dtype, content["none"].shape) == (dtype, (0,))


def test_globals_become_stubs_that_do_nothing(tmp_path):
    content = pickled_tensors.read_pickled(pickled(tmp_path / "x.pt", pickle.dumps({"f": math.floor, "t": complex(1, 2)}, protocol=2)))
    assert issubclass(content["f"], pickled_tensors.Stub)
    assert content["f"].pickled_as == "math.floor"
    assert not pickled_tensors.is_module(content["t"])
    assert content["t"].state == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", pickle.dumps([1, 2, 3], protocol=2)[:-2], b"\x80\x02X\xff\xff\xff\x7fa.", b"0.", b"I1\nQ."],
)
def test_damaged_pickles_end_in_one_clear_error(tmp_path, content):
    with pytest.raises(UserError, match=r"x.pt can't be read as a pickled network"):
        pickled_tensors.read_pickled(pickled(tmp_path / "x.pt", content))


@pytest.mark.parametrize("names", [[], ["a/data.pkl", "b/data.pkl"], ["readme.txt"]])
def test_zips_that_torch_did_not_write_are_refused(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in names:
            archive.writestr(name, b"N.")
    with pytest.raises(UserError, match=r"x\.pt is not a weights file that torch wrote"):
        pickled_tensors.read_pickled(tmp_path / "x.pt")


def test_zip_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "x.pt")
    monkeypatch.setattr(pickled_tensors, "MAX_BYTES", 4000)
    with pytest.raises(UserError, match=r"x\.pt unpacks to more than"):
        pickled_tensors.read_pickled(tmp_path / "x.pt")


def test_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.pt"):
        pickled_tensors.read_pickled(tmp_path / "absent.pt")


def test_module_that_contains_itself_is_refused(tmp_path):
    module = nn.Module()
    module._modules["again"] = module
    torch.save(module, tmp_path / "x.pt")
    content = pickled_tensors.read_pickled(tmp_path / "x.pt")
    with pytest.raises(UserError):
        pickled_tensors.module_tensors(content)
