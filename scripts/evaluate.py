"""Score a model on one split of a prepared dataset: a table, and JSON with --output.

python scripts/evaluate.py --model runs/student --dataset data/potsdam --split test
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from drd_hf import load_image_processor, load_splits, load_teacher
from drd_hf.arguments import parse_arguments, require
from drd_hf.errors import UserError, run_script
from drd_hf.evaluation import EVALUATION_PROTOCOL, check_labels, evaluate_model, finite_json


@dataclass
class EvaluationArguments:
    model: str = field(default="", metadata={"help": "Hub id or folder of a trained segmentation checkpoint."})
    dataset: str = field(default="", metadata={"help": "Prepared dataset: folder of prepare_dataset.py or Hub id."})
    split: str = field(default="test", metadata={"help": "Split to score."})
    channels: list[int] | None = field(
        default=None, metadata={"help": "Channels of the tiles that the model reads, in its order. Default: all."}
    )
    batch_size: int = field(default=8, metadata={"help": "Tiles per forward pass."})
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, ...; default: a GPU if there is one."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for scores and confusion matrix."})


def main() -> None:
    (args,) = parse_arguments(EvaluationArguments, description=__doc__)
    require(model=args.model, dataset=args.dataset)
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: give at least 1")
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise UserError(f"--output {args.output}: its folder does not exist")
    splits = load_splits(args.dataset)
    if args.split not in splits:
        raise UserError(f"{args.dataset} has no split {args.split!r}, only {', '.join(splits)}")
    model = load_teacher(args.model)
    check_labels(model, splits.info.id2label, args.model)
    metrics = evaluate_model(
        model, load_image_processor(args.model), splits[args.split], args.batch_size, args.device, args.channels
    )
    scores = metrics.compute()

    print(f"{splits.info.name} {args.split}, {EVALUATION_PROTOCOL}, {splits.info.tile_size} px")
    print(f"{'class':24}{'IoU':>8}{'F1':>8}{'accuracy':>10}")
    for name in splits.info.id2label.values():
        print(f"{name:24}{scores[f'iou_{name}']:8.4f}{scores[f'f1_{name}']:8.4f}{scores[f'accuracy_{name}']:10.4f}")
    print(f"{'mean':24}{scores['mean_iou']:8.4f}{scores['mean_f1']:8.4f}{scores['mean_accuracy']:10.4f}")
    print(f"overall accuracy {scores['overall_accuracy']:.4f}, kappa {scores['kappa']:.4f}")
    if args.output:
        report = {
            "dataset": splits.info.name,
            "split": args.split,
            "protocol": EVALUATION_PROTOCOL,
            "tile_size": splits.info.tile_size,
            "scores": scores,
            "confusion_matrix": metrics.matrix.tolist(),
        }
        temporary = Path(f"{args.output}.tmp")
        temporary.write_text(json.dumps(finite_json(report), indent=1) + "\n")
        os.replace(temporary, args.output)


if __name__ == "__main__":
    run_script(main)
