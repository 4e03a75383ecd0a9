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
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.errors import UserError

MAX_DEPTH = 100  # modules within modules
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
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
    if not isinstance(storage, Tensor) or not storage.numel():  # of the old format, storages are not known at first
        return torch.empty(0) if isinstance(storage, Tensor) and 0 in size else Stub()
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

    storages: dict[str, Tensor]

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        return _ALLOWED.get((module, name)) or type(name, (Stub,), {"pickled_as": f"{module}.{name}"})


class _ZipUnpickler(_TensorUnpickler):
    """Takes the storages from a zip archive."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))  # an open entry would keep the archive's file open
        self.archive, self.root = archive, root
        self.storages = {}

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, *_ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


class _LegacyUnpickler(_TensorUnpickler):
    """Takes the storages from those that were read already; notes the types of the others."""

    def __init__(self, file: BinaryIO, storages: dict[str, Tensor]) -> None:
        super().__init__(file)
        self.storages, self.types = storages, dict[str, torch.dtype]()

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] != "storage":  # a module's class, and its source
            return pid[1]
        _, dtype, key, *_ = pid
        self.types[key] = dtype
        return self.storages.get(key, torch.empty(0, dtype=dtype))


def read_pickled(path: Path) -> Any:
    """Read a file that torch wrote, a zip or of the format before torch 1.6, with every class in it replaced by a stub.

    Raises:
        UserError: the file is neither, or is damaged.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                return _read_legacy(file)
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise UserError(f"{path} unpacks to more than {MAX_BYTES >> 30} GiB; it is refused")
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path} is not a weights file that torch wrote")
            return _ZipUnpickler(archive, pickles[0].removesuffix("data.pkl")).load()
    except UserError:
        raise
    except Exception as error:  # a hostile pickle can raise anything from inside the unpickler
        raise UserError(f"{path} can't be read as a pickled network ({type(error).__name__}); save a plain state dict") from None


def _read_legacy(file: BinaryIO) -> Any:
    """Read the format of torch before 1.6: pickles of a magic number, a version, the system, the content, the storages' keys; the storages.

    The content is read twice: tensors can only be made of it when the storages behind it are known.
    """
    file.seek(0)
    if [_LegacyUnpickler(file, {}).load() for _ in range(2)] != [LEGACY_MAGIC, LEGACY_VERSION]:
        raise ValueError("not torch's")
    _LegacyUnpickler(file, {}).load()
    begin = file.tell()
    first = _LegacyUnpickler(file, {})
    first.load()
    storages = {}
    for key in _LegacyUnpickler(file, {}).load():
        length, itemsize = file.read(8), first.types[key].itemsize
        data = bytearray(file.read(int.from_bytes(length, "little") * itemsize))
        if len(length) != 8 or len(data) != int.from_bytes(length, "little") * itemsize:
            raise EOFError("a storage is cut off")
        storages[key] = torch.frombuffer(data, dtype=first.types[key]) if data else torch.empty(0, dtype=first.types[key])
    file.seek(begin)
    return _LegacyUnpickler(file, storages).load()


def classes_in(content: Any, depth: int = 0) -> set[str]:
    """Return the names of the classes and functions whose results a file holds in its dicts and lists."""
    if isinstance(content, Stub):
        return {getattr(type(content), "pickled_as", "an object")}
    if isinstance(content, type) and issubclass(content, Stub):
        return {getattr(content, "pickled_as", "a class")}
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return {name for value in inner for name in classes_in(value, depth + 1)} if depth < MAX_DEPTH else set()


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
