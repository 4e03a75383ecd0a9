"""Train an image classifier: python train.py --model yolov5n-cls --data FOLDER --epochs 10

On several processes: torchrun --nproc_per_node 2 train.py ...
"""

from __future__ import annotations

from compression.arguments import TrainArguments
from compression.compressor import ClassifierCompressor
from utils import distributed
from utils.arguments import parse
from utils.errors import run_script


def main() -> None:
    arguments, given = parse(TrainArguments, "Train an image classifier.")
    compressor = ClassifierCompressor(arguments, given)
    if distributed.is_main():
        print(compressor.summary(), flush=True)
    if arguments.evaluate:
        result = compressor.validate()
        if distributed.is_main():
            print(f"top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.4f} on {result.images} validation images")
        return
    results = compressor.run_training_loop()
    if distributed.is_main():
        checkpoint = results["checkpoint"]
        print(
            f"\nbest epoch {results['best_epoch']}: top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%}, "
            f"loss {results['loss']:.4f}, after {results['seconds']:.0f} s of training\n"
            f"checkpoint {checkpoint}\n"
            f"next: python val.py --weights {checkpoint} --data {arguments.data}\n"
            f"      python predict.py --weights {checkpoint} --source IMAGE_OR_FOLDER"
        )


if __name__ == "__main__":
    try:
        run_script(main)
    finally:
        distributed.leave()
