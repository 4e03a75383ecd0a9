"""Builds the package ``rankcut``: all modules of this repository under one name, so that ``utils`` and ``models`` stay free.

In the repository modules import each other as ``utils.spec``; in the package they are ``rankcut.utils.spec``, and rankcut.py
is ``rankcut`` itself.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent
FOLDERS = ("utils", "models", "compression")
SCRIPTS = ("train", "prune", "val", "export", "predict")
IMPORT = re.compile(rf"^(\s*(?:from|import) )((?:{'|'.join(FOLDERS)})\b)", re.MULTILINE)
DATA = ("data/digits.npz", "data/*.yaml", "data/schedules/*.yaml", "data/images/*", "weights/digits.pt", "models/networks/*.yaml")


def package(target: Path) -> list[Path]:
    """Write the package's files into a folder, and return their paths."""
    sources = {f"{name}.py": ROOT / f"{name}.py" for name in SCRIPTS} | {"__init__.py": ROOT / "rankcut.py"}
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        sources[path.relative_to(ROOT).as_posix()] = path
    written = []
    for name, path in sources.items():
        written.append(target / name)
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        written[-1].write_text(IMPORT.sub(r"\1rankcut.\2", path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in (path for pattern in DATA for path in ROOT.glob(pattern)):
        written.append(target / path.relative_to(ROOT))
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, written[-1])
    return written


def main() -> None:
    """Build as setuptools asks for it; what lies here is not the package, so it can't be installed in place."""
    from setuptools import setup
    from setuptools.command.build_py import build_py

    class BuildPackage(build_py):
        def run(self) -> None:
            if self.editable_mode:
                raise SystemExit("rankcut can't be installed with -e: run the scripts in the repository, or put it on PYTHONPATH")
            self.written = package(Path(self.build_lib) / "rankcut")

        def get_outputs(self, include_bytecode: bool = True) -> list[str]:
            return [str(path) for path in self.written]

    setup(py_modules=["rankcut"], cmdclass={"build_py": BuildPackage})


if __name__ == "__main__":
    main()
