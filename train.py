"""Train an image classifier: python train.py --model yolov5n-cls --data FOLDER --epochs 10

With several processes: torchrun --nproc_per_node 2 train.py ...
"""

from __future__ import annotations

from compression.analysis.run import chosen_analysis, confusion_text
from compression.training.arguments import TrainArguments
from compression.training.compressor import ClassifierCompressor
from utils import distributed
from utils.arguments import parse
from utils.errors import run_script
from utils.files.runs import check_place
from utils.measures.metrics import accuracy_text
from utils.output.commands import command


def main() -> None:
    arguments, given = parse(TrainArguments, __doc__)
    analysis = chosen_analysis(arguments)
    check_place(arguments.project, arguments.name)
    compressor = ClassifierCompressor(arguments, given=given)
    if distributed.is_main():
        print(compressor.summary(), flush=True)
    text = analysis(compressor) if analysis else training_report(compressor)
    if distributed.is_main():
        print(text)


def training_report(compressor: ClassifierCompressor) -> str:
    """Train, and return the results and the commands for the next step."""
    results = compressor.run_training_loop()
    if not results:  # on ranks other than 0
        return ""
    checkpoint, best = results["checkpoint"], compressor.history.best
    confusion = f"\n{confusion_text(best, compressor.spec.class_names)}" if compressor.arguments.confusion and best else ""
    return (
        f"\nbest epoch {results['best_epoch']}: {accuracy_text(results, compressor.spec.num_classes)}, "
        f"after {results['seconds']:.0f} s of training{confusion}\n"
        f"checkpoint {checkpoint}\n"
        f"next: {command('val', weights=checkpoint, data=compressor.arguments.data)}\n"
        f"      {command('predict', weights=checkpoint, source='IMAGE_OR_FOLDER')}"
    )


if __name__ == "__main__":
    try:
        run_script(main)
    finally:
        distributed.leave()
