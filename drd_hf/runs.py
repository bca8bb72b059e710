"""What every training script does before and after `trainer.train()`: options of the data, output folder, results, card."""

import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from . import __version__
from .cards import MeasuredResult, ModelCardFacts, Timing, hub_id, write_model_card
from .data.splits import SegmentationSplits
from .data.transforms import EvalTransform, TrainTransform
from .errors import UserError
from .evaluation import EVALUATION_PROTOCOL, check_labels, evaluate_model, milliseconds_per_tile
from .models import count_parameters
from .trainer import DistillationConfig, SegmentationConfig, SegmentationTrainer

RUN_NAME = "run.json"


@dataclass
class DataArguments:
    """Which tiles are trained on and how they are varied."""

    dataset: str = field(default="", metadata={"help": "Prepared dataset: folder of prepare_dataset.py or Hub id."})
    crop_size: int = field(default=512, metadata={"help": "Side of the training crops in pixels."})
    scale_min: float = field(default=0.5, metadata={"help": "Smallest random magnification of a crop."})
    scale_max: float = field(default=2.0, metadata={"help": "Largest random magnification of a crop."})
    max_class_share: float = field(
        default=0.75, metadata={"help": "Crops in which one class covers more than this share are drawn again."}
    )
    photometric: bool = field(default=True, metadata={"help": "Vary brightness, contrast, saturation and hue."})
    evaluate_on: list[str] = field(
        default_factory=lambda: ["validation", "test"],
        metadata={"help": "Splits that the final model is scored on. While choosing settings, leave test out."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the run that output_dir holds already."})
    license: str | None = field(default=None, metadata={"help": "Licence of the trained model, for its card."})

    def train_transform(self) -> TrainTransform:
        return TrainTransform(
            self.crop_size,
            scale=(self.scale_min, self.scale_max),
            max_class_share=self.max_class_share,
            photometric=self.photometric,
        )


def train_and_validation(splits: SegmentationSplits, data: DataArguments) -> dict:
    """`train_dataset` and `eval_dataset` of a trainer, with their transforms."""
    missing = [name for name in ("train", "validation", *data.evaluate_on) if name not in splits]
    if missing:
        raise UserError(f"{data.dataset} has no split {missing[0]!r}, only {', '.join(splits)}: see --evaluate_on")
    validation = splits["validation"]
    return {
        "train_dataset": splits["train"].with_transform(data.train_transform()),
        "eval_dataset": validation.with_transform(EvalTransform(validation)),
    }


def prepare_output_dir(args: TrainingArguments, overwrite: bool) -> bool | str | None:
    """Refuse to mix two runs in one folder; gives what `trainer.train(resume_from_checkpoint=...)` wants.

    Raises:
        UserError: the folder holds a run and neither overwriting nor resuming was asked for, or there is no checkpoint
            to resume from.
    """
    output_dir = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if str(resume).lower() in ("none", "false", ""):
        resume = None
    if resume is not None:
        if str(resume).lower() == "true":
            resume = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
            if resume is None:
                raise UserError(f"{output_dir} has no checkpoint to resume from: leave --resume_from_checkpoint out")
        elif not Path(resume, "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {resume}: not a complete checkpoint folder")
        return str(resume)
    if args.process_index == 0 and output_dir.is_dir() and any(output_dir.iterdir()):
        if not overwrite:
            raise UserError(f"{output_dir} is there already: give --overwrite, or --resume_from_checkpoint true")
        held = [p.name for p in output_dir.iterdir()]
        if not any(name in ("config.json", RUN_NAME) or name.startswith("checkpoint-") for name in held):
            raise UserError(f"{output_dir} holds something that is not a run: choose another --output_dir")
        for checkpoint in output_dir.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return None


def finish_run(
    trainer: SegmentationTrainer,
    splits: SegmentationSplits,
    data: DataArguments,
    *,
    teacher=None,
    teacher_processor=None,
    student_alone=None,
    student_alone_processor=None,
    teacher_name: str | None = None,
    base_model: str | None = None,
) -> dict:
    """Score the trained model, and save it with its image processor, card and `run.json`, all at once at the end.

    Only the main process works here. The teacher and the student trained alone, where given, are scored in the same
    way, for the card.

    Returns:
        What `run.json` holds: options, versions, command, and {split: {metric: value}} for every model.
    """
    if not trainer.is_world_process_zero():
        return {}
    args, device = trainer.args, trainer.args.device
    models = {
        "model": (trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class),
        "teacher": (teacher, teacher_processor or trainer.processing_class),
        "student_alone": (student_alone, student_alone_processor or trainer.processing_class),
    }
    results = {}
    for name, (model, processor) in models.items():
        # A teacher may know other classes; it then has no score here.
        if model is None or (name == "teacher" and not _same_labels(model, splits)):
            continue
        check_labels(model, splits.info.id2label, f"the {name.replace('_', ' ')}")
        results[name] = {
            split: evaluate_model(model, processor, splits[split], args.per_device_eval_batch_size, device).compute()
            for split in data.evaluate_on
        }
    student = models["model"][0]
    tile_size = splits.info.tile_size
    (milliseconds,) = milliseconds_per_tile([student], tile_size, device)
    run = {
        "results": results,
        "num_parameters": count_parameters(student),
        "milliseconds_per_tile": {"tile_size": tile_size, "milliseconds": milliseconds, "device": device_name(device)},
        "steps": trainer.state.global_step,
        "seconds": _train_seconds(trainer),
        "seed": args.seed,
        "command": command_line(),
        "settings": {**changed_settings(data, DataArguments), **changed_settings(args, type(args))},
        "versions": versions(),
        "log": trainer.state.log_history,
    }
    facts = ModelCardFacts(
        model_name=args.hub_model_id or Path(args.output_dir).resolve().name,
        architecture=type(student).__name__,
        num_parameters=run["num_parameters"],
        id2label=splits.info.id2label,
        colors=splits.info.colors,
        license=data.license,
        base_model=[base_model] if hub_id(base_model) else [],
        dataset_name=splits.info.name,
        dataset_id=hub_id(data.dataset),
        dataset_license=splits.info.license,
        teacher=teacher_name,
        teacher_num_parameters=count_parameters(teacher) if teacher is not None else None,
        results=[
            MeasuredResult(
                dataset=splits.info.name,
                split=split,
                protocol=f"{EVALUATION_PROTOCOL}, {tile_size} px",
                metrics=results["model"][split],
                teacher_metrics=results.get("teacher", {}).get(split),
                student_alone_metrics=results.get("student_alone", {}).get(split),
            )
            for split in data.evaluate_on
        ],
        distillation=_distillation_settings(trainer),
        dual_relation=any("relation" in name for name in _distillation_settings(trainer) or ()),
        training=run["settings"],
        seed=args.seed,
        steps=run["steps"],
        hardware=device_name(device),
        versions=run["versions"],
        command=run["command"],
        timing=Timing(milliseconds, tile_size, device_name(device)),
    )
    _save_all(trainer, facts, run)
    return run


def _save_all(trainer: SegmentationTrainer, facts: ModelCardFacts, run: dict) -> None:
    """Everything into a folder beside, then file by file into place, the weights last."""
    output_dir = Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=output_dir))
    try:
        trainer._save(str(staging))
        write_model_card(staging, facts)
        (staging / RUN_NAME).write_text(json.dumps(run, indent=1) + "\n")
        for file in sorted(staging.iterdir(), key=lambda p: p.suffix == ".safetensors"):
            os.replace(file, output_dir / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _same_labels(model, splits: SegmentationSplits) -> bool:
    return {int(i): name for i, name in model.config.id2label.items()} == dict(splits.info.id2label)


def _train_seconds(trainer) -> float | None:
    return next(
        (entry["train_runtime"] for entry in reversed(trainer.state.log_history) if "train_runtime" in entry), None
    )


def _distillation_settings(trainer) -> dict | None:
    losses = getattr(trainer, "losses", None)
    if losses is None:
        return None
    settings = {}
    for loss in losses:
        settings.update({f"{name} weight": weight for name, weight in loss.weights.items()})
        if hasattr(loss, "relation"):
            settings["relation"] = loss.relation
        if hasattr(loss, "temperature"):
            settings[f"{next(iter(loss.weights)).split('_')[0]} temperature"] = loss.temperature
        if loss.student_layers:
            pairs = zip(loss.student_layers, loss.teacher_layers, strict=True)
            settings["layers (student = teacher)"] = ", ".join(f"{s} = {t}" for s, t in pairs)
    return settings


def changed_settings(values, dataclass_type) -> dict:
    """Fields of a dataclass that differ from their defaults, without paths, tokens and bookkeeping."""
    skipped = {
        "output_dir", "logging_dir", "hub_token", "push_to_hub_token", "dataset", "overwrite", "license", "disable_tqdm",
        "resume_from_checkpoint", "report_to", "run_name", "hub_model_id", "push_to_hub", "accelerator_config", "seed",
        "local_rank", "logging_steps", "save_steps", "eval_steps", "save_total_limit", "dataloader_num_workers", "evaluate_on",
    }  # fmt: skip
    default = (
        dataclass_type(output_dir="unused") if issubclass(dataclass_type, TrainingArguments) else dataclass_type()
    )
    changed = {}
    for f in fields(dataclass_type):
        value = getattr(values, f.name)
        if f.name not in skipped and not f.name.startswith("_") and f.init and value != getattr(default, f.name):
            changed[f.name] = value if isinstance(value, (int, float, str, bool, list, type(None))) else str(value)
    return changed


def versions() -> dict[str, str]:
    """Versions of this package and of what it stands on."""
    names = ("torch", "torchvision", "transformers", "accelerate", "datasets")
    return {"drd_hf": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def command_line() -> str:
    """The command of this process, the script named from the project's root."""
    script = Path(sys.argv[0])
    return " ".join(
        ["python", f"{script.parent.name}/{script.name}" if script.parent.name else script.name, *sys.argv[1:]]
    )


def device_name(device) -> str:
    """A device in words for tables and cards."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


__all__ = [
    "DataArguments",
    "DistillationConfig",
    "SegmentationConfig",
    "changed_settings",
    "command_line",
    "finish_run",
    "prepare_output_dir",
    "train_and_validation",
    "versions",
]
