"""Reading the tensors of a pickled module without running its code.

Official YOLOv5 ``*-cls.pt`` files are pickles of live modules. Here every class and function that such a pickle names
becomes an inert stub that only keeps its state; nothing is imported, nothing is called. What remains are parameters,
buffers and plain values, which is all that is needed.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

MAX_DEPTH = 100  # modules within modules
MAX_BYTES = 8 << 30  # more than any classifier has; larger zips are refused

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Stub:
    """Stands in for an object of any pickled class: keeps the state that the pickle gives it and does nothing."""

    state: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:  # a pickle may make an object without calling __init__
        stub = super().__new__(cls)
        stub.state = {}
        return stub

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept the arguments of any class."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state[key] = value

    def append(self, value: Any) -> None:
        """Accept an item of a pickled list subclass."""

    def extend(self, values: Any) -> None:
        """Accept items of a pickled list subclass."""

    def __call__(self, *args: Any, **kwargs: Any) -> Stub:
        return Stub()

    def __hash__(self) -> int:
        return id(self)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor | Stub:
    if not isinstance(storage, Tensor):
        return Stub()
    return storage.as_strided(size, stride, offset).clone()


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,  # as pickle protocol 2, which torch writes, spells it
}


class _TensorUnpickler(pickle.Unpickler):
    """Builds plain values and tensors; every other global becomes a stub."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))  # an open entry would keep the archive's file open
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        return _ALLOWED.get((module, name)) or type(name, (Stub,), {"pickled_as": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, *_ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def read_pickled(path: Path) -> Any:
    """Read torch's zip file with every class in it replaced by a stub.

    Raises:
        UserError: the file is not such a zip, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise UserError(f"{path} unpacks to more than {MAX_BYTES >> 30} GiB; it is refused")
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path} is not a weights file that torch wrote")
            return _TensorUnpickler(archive, pickles[0].removesuffix("data.pkl")).load()
    except UserError:
        raise
    except Exception as error:  # a hostile pickle can raise anything from inside the unpickler
        raise UserError(f"{path} can't be read as a pickled network ({type(error).__name__}); save a plain state dict") from None


def module_tensors(module: Stub, prefix: str = "") -> dict[str, Tensor]:
    """Collect a pickled module's parameters and buffers under their state-dict names.

    Raises:
        UserError: the module contains itself.
    """
    if prefix.count(".") > MAX_DEPTH:
        raise UserError("the pickled network is nested too deeply, or contains itself")
    tensors: dict[str, Tensor] = {}
    skipped = module.state.get("_non_persistent_buffers_set")
    for group in ("_parameters", "_buffers"):
        for name, value in (module.state.get(group) or {}).items():
            if isinstance(value, Tensor) and not (isinstance(skipped, set) and name in skipped):
                tensors[f"{prefix}{name}"] = value
    for name, child in (module.state.get("_modules") or {}).items():
        if isinstance(child, Stub):
            tensors |= module_tensors(child, f"{prefix}{name}.")
    return tensors


def module_values(module: Stub, key: str, prefix: str = "") -> dict[str, Any]:
    """Collect one attribute (such as ``eps``) of all pickled submodules that have it, by module name."""
    found = {prefix.rstrip("."): module.state[key]} if key in module.state else {}
    for name, child in (module.state.get("_modules") or {}).items():
        if isinstance(child, Stub):
            found |= module_values(child, key, f"{prefix}{name}.")
    return found


def is_module(value: Any) -> bool:
    """Whether a stub stands for a torch module."""
    return isinstance(value, Stub) and isinstance(value.state.get("_modules"), dict)
