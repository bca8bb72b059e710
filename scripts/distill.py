"""Distil a small student from a trained teacher, with Dual Relation Distillation or another method.

accelerate launch scripts/distill.py --config scripts/configs/scenes_upernet-mini_from_upernet-small.yaml
python scripts/distill.py --teacher runs/teacher --student nvidia/mit-b0 --dataset data/potsdam --output_dir runs/student --max_steps 20000
accelerate launch scripts/distill.py --config scripts/configs/potsdam_segformer-b0_from_dinov2-base.yaml
python scripts/distill.py --config scripts/configs/scenes_upernet-mini_from_upernet-small.yaml --method drd kd=0.5 --output_dir runs/drd_kd
"""

import copy
from dataclasses import dataclass, field

from transformers import set_seed

from drd_hf import (
    DistillationConfig,
    DistillationTrainer,
    load_image_processor,
    load_splits,
    load_student,
    load_teacher,
)
from drd_hf.arguments import parse_arguments, require
from drd_hf.errors import run_script
from drd_hf.evaluation import check_labels
from drd_hf.models import find_channels, select_bands
from drd_hf.runs import (
    DataArguments,
    StartArguments,
    check_output_dir,
    check_same_architecture,
    check_sizes,
    finish_run,
    train_and_validation,
    train_run,
)


@dataclass
class ModelArguments(StartArguments):
    teacher: str = field(
        default="",
        metadata={
            "help": "Hub id or folder of a trained segmentation checkpoint, or of an encoder such as facebook/dinov2-base, "
            "which teaches by its features alone."
        },
    )
    student: str = field(
        default="",
        metadata={
            "help": "Hub id or folder of a checkpoint, or an architecture file (.json) to start from random values."
        },
    )
    student_alone: str | None = field(
        default=None,
        metadata={"help": "Folder of the same student trained without a teacher, to be scored beside it in the card."},
    )
    score_teacher: bool = field(
        default=True, metadata={"help": "Score the teacher too, for the card. false saves its time."}
    )


def main() -> None:
    models, data, args = parse_arguments(ModelArguments, DataArguments, DistillationConfig, description=__doc__)
    require(teacher=models.teacher, student=models.student, dataset=data.dataset)
    resume = check_output_dir(args, data.overwrite)
    set_seed(args.seed)

    splits = load_splits(data.dataset, data.streaming)
    bands = select_bands(splits.info.bands, args.student_channels)
    student = load_student(models.student, splits.info.id2label, models.pretrained_weights, bands=bands)
    processor = load_image_processor(
        models.student, models.image_mean, models.image_std, models.pretrained_weights, bands=bands, info=splits.info
    )
    teacher = load_teacher(models.teacher)
    teacher_processor = load_image_processor(models.teacher)
    args.teacher_channels = find_channels(
        teacher, splits.info.bands, models.teacher, "teacher_channels", args.teacher_channels, args.student_channels
    )

    student_alone = None
    if models.student_alone:
        student_alone = load_teacher(models.student_alone), load_image_processor(models.student_alone)
        check_labels(student_alone[0], splits.info.id2label, models.student_alone)
        find_channels(student_alone[0], splits.info.bands, models.student_alone, default=args.student_channels)
        check_same_architecture(student, student_alone[0], models.student_alone)

    datasets = train_and_validation(splits, data)
    check_sizes(splits.info, data, student, teacher, student_alone and student_alone[0])
    # The trainer casts its teacher in place; the one that is scored keeps the weights of its checkpoint.
    scored_teacher = teacher if args.teacher_dtype == "float32" else copy.deepcopy(teacher)
    trainer = DistillationTrainer(
        student,
        teacher,
        args,
        processing_class=processor,
        teacher_processor=teacher_processor,
        **datasets,
    )
    train_run(trainer, resume)
    run = finish_run(
        trainer,
        splits,
        data,
        models,
        teacher=(scored_teacher, teacher_processor) if models.score_teacher else None,
        student_alone=student_alone,
        teacher_name=models.teacher,
        base_model=models.pretrained_weights or models.student,
    )
    for name, by_split in run.get("results", {}).items():
        for split, scores in by_split.items():
            print(
                f"{name} on {split}: mIoU {scores['mean_iou']:.4f}, mF1 {scores['mean_f1']:.4f}, OA {scores['overall_accuracy']:.4f}"
            )
    if args.push_to_hub and (url := trainer.push_to_hub()):
        print(f"pushed to {url}")


if __name__ == "__main__":
    run_script(main)
