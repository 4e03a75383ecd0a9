"""The README's flags are those of the scripts. To renew its table: python -m tests.test_readme"""

from __future__ import annotations

import predict
import val
from compression.exporting.arguments import ExportArguments
from compression.pruning.arguments import PruneArguments
from compression.training.arguments import TrainArguments
from tests.conftest import ROOT
from utils.arguments import flag_table

SCRIPTS = {
    "train.py": TrainArguments,
    "prune.py": PruneArguments,
    "export.py": ExportArguments,
    "val.py": val.ValArguments,
    "predict.py": predict.PredictArguments,
}
BEGIN, END = "<!-- flags -->\n", "\n<!-- /flags -->"


def test_the_table_of_flags_is_that_of_the_scripts():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == flag_table(SCRIPTS), "run: python -m tests.test_readme"


if __name__ == "__main__":
    path = ROOT / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    path.write_text(before + BEGIN + flag_table(SCRIPTS) + END + rest.split(END)[1], encoding="utf-8")
