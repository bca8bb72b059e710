"""Train a segmentation model on labels alone: a teacher, or the student without a teacher as the baseline.

accelerate launch scripts/train_teacher.py --config scripts/configs/scenes_upernet-small.yaml
python scripts/train_teacher.py --model nvidia/mit-b2 --dataset data/potsdam --output_dir runs/teacher --max_steps 20000
"""

from dataclasses import dataclass, field

from transformers import set_seed

from drd_hf import SegmentationConfig, SegmentationTrainer, load_image_processor, load_splits, load_student
from drd_hf.arguments import parse_arguments, require
from drd_hf.errors import run_script
from drd_hf.models import select_bands
from drd_hf.runs import (
    DataArguments,
    StartArguments,
    check_output_dir,
    check_sizes,
    finish_run,
    train_and_validation,
    train_run,
)


@dataclass
class ModelArguments(StartArguments):
    model: str = field(
        default="",
        metadata={
            "help": "Hub id or folder of a checkpoint, or an architecture file (.json) to start from random values."
        },
    )


def main() -> None:
    model_args, data, args = parse_arguments(ModelArguments, DataArguments, SegmentationConfig, description=__doc__)
    require(model=model_args.model, dataset=data.dataset)
    resume = check_output_dir(args, data.overwrite)
    set_seed(args.seed)

    splits = load_splits(data.dataset, data.streaming)
    bands = select_bands(splits.info.bands, args.student_channels)
    model = load_student(model_args.model, splits.info.id2label, model_args.pretrained_weights, bands=bands)
    processor = load_image_processor(
        model_args.model,
        model_args.image_mean,
        model_args.image_std,
        model_args.pretrained_weights,
        bands=bands,
        info=splits.info,
    )

    datasets = train_and_validation(splits, data)
    check_sizes(splits.info, data, model)
    trainer = SegmentationTrainer(model, args, processing_class=processor, **datasets)
    train_run(trainer, resume)
    base_model = model_args.pretrained_weights or model_args.model
    run = finish_run(trainer, splits, data, model_args, base_model=base_model)
    for split, scores in run.get("results", {}).get("model", {}).items():
        print(
            f"{split}: mIoU {scores['mean_iou']:.4f}, mF1 {scores['mean_f1']:.4f}, OA {scores['overall_accuracy']:.4f}"
        )
    if args.push_to_hub and (url := trainer.push_to_hub()):
        print(f"pushed to {url}")


if __name__ == "__main__":
    run_script(main)
