"""What every training script does before and after `trainer.train()`: options of the data, output folder, results, card."""

import os
import platform
import shlex
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from transformers import TrainingArguments

from drd_hf import __version__
from drd_hf.cards import ORIGINS_KEY, RUN_NAME, TRAINED_NAME, hub_id
from drd_hf.cards.measure import Origins, TrainedModel, measure_run, write_record
from drd_hf.cards.text import last_part
from drd_hf.checkpoints import (
    STAGING_PREFIX,
    checkpoint_folders,
    checkpoint_problem,
    checkpoint_to_resume,
    newest_complete_checkpoint,
)
from drd_hf.data.splits import SegmentationInfo, SegmentationSplits, StreamedSegmentationSplits
from drd_hf.data.streaming import StreamedTiles, tiles_of_files
from drd_hf.data.transforms import EvalTransform, TrainTransform, undecoded
from drd_hf.errors import UserError
from drd_hf.evaluation import same_labels
from drd_hf.evaluation.tiles import require_size
from drd_hf.features import gives_class_scores
from drd_hf.models import count_parameters, find_channels
from drd_hf.profiling import device_name
from drd_hf.trainer import SegmentationTrainer

# What the folder of a run may hold, so that --overwrite never touches anything else.
OF_A_RUN = ("config.json", RUN_NAME, TRAINED_NAME)
# What a run that was interrupted before its first checkpoint may have left: half a checkpoint, logs of integrations.
BEFORE_THE_FIRST_CHECKPOINT = (STAGING_PREFIX, "runs", "logs")


@dataclass
class StartArguments:
    """From what the trained model starts, beside its name."""

    pretrained_weights: str | None = field(
        default=None,
        metadata={
            "help": "For an architecture file: checkpoint folder or Hub id whose weights fit it, or a .safetensors file "
            "for its backbone. Default: random values."
        },
    )
    image_mean: list[float] | None = field(
        default=None,
        metadata={
            "help": "Normalisation of the trained model: one value for each band, for images in 0..1. Default: that of the "
            "model if it was made for these bands, else what was measured on the training tiles."
        },
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "The same for the standard deviation."})


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
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the tiles from the files as they are needed: a dataset on the Hub is not downloaded."},
    )
    shuffle_buffer: int = field(
        default=256,
        metadata={"help": "Streamed training: tiles among which each loader worker draws the next one, in memory."},
    )
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


def train_and_validation(splits: SegmentationSplits | StreamedSegmentationSplits, data: DataArguments) -> dict:
    """`train_dataset` and `eval_dataset` of a trainer, with their transforms.

    Raises:
        UserError: a split is missing, or one that the model is to be scored on has no labels.
    """
    if not data.evaluate_on:
        raise UserError("--evaluate_on names no split: give at least validation")
    missing = [name for name in ("train", "validation", *data.evaluate_on) if name not in splits]
    if missing:
        raise UserError(f"{data.dataset} has no split {missing[0]!r}, only {', '.join(splits)}: see --evaluate_on")
    for name in data.evaluate_on:
        if not any(splits.info.pixel_shares[name].values()):
            raise UserError(f"{data.dataset}: {name} has no labels to be scored on, leave it out of --evaluate_on")
    train, validation = data.train_transform(), EvalTransform(info=splits.info)
    if isinstance(splits, StreamedSegmentationSplits):
        files = {split: tiles_of_files(data.dataset, split) for split in ("train", "validation")}
        return {
            "train_dataset": StreamedTiles(splits["train"], files["train"], train, data.shuffle_buffer),
            "eval_dataset": StreamedTiles(splits["validation"], files["validation"], validation),
        }
    return {
        "train_dataset": undecoded(splits["train"]).with_transform(train),
        "eval_dataset": undecoded(splits["validation"]).with_transform(validation),
    }


def check_sizes(info: SegmentationInfo, data: DataArguments, student, teacher=None, student_alone=None) -> None:
    """Run every model once on a blank image of each size that it will see: crops in training, tiles when it is scored.

    Raises:
        UserError: a model does not run on one of these, which would else come out after the training.
    """
    tile, crop = info.tile_size, data.crop_size
    wanted = [("the student", student, (crop, tile))]
    if teacher is not None:
        wanted.append(("the teacher", teacher, (crop, tile) if _scores(teacher, info.id2label) else (crop,)))
    if student_alone is not None:
        wanted.append(("the student alone", student_alone, (tile,)))
    for what, model, sizes in wanted:
        for size in dict.fromkeys(sizes):
            try:
                require_size(model, size)
            except UserError as error:
                raise UserError(f"{what} meets {'crops' if size == crop else 'tiles'} of {size}: {error}") from error


def check_same_architecture(student, alone, name: str) -> None:
    """Refuse to call `alone` the student without a teacher where it is another model; it is named `name`."""
    ours, theirs = ((model.config.model_type, count_parameters(model)) for model in (student, alone))
    if ours != theirs:
        raise UserError(
            f"--student_alone {name} is a {theirs[0]} of {theirs[1]:,} parameters, the student a {ours[0]} of {ours[1]:,}: "
            "give the same student trained without a teacher"
        )


def check_output_dir(args: TrainingArguments, overwrite: bool) -> str | None:
    """Refuse to mix two runs in one folder; gives the checkpoint to resume from, if any. Changes nothing.

    `--resume_from_checkpoint true` is the newest complete checkpoint; a run that was interrupted before its first one
    starts at the beginning.

    Raises:
        UserError: the folder holds a run and neither overwriting nor resuming was asked for, or the checkpoint to
            resume from is not complete, or none of several is.
    """
    output_dir, main_process = Path(args.output_dir), args.process_index == 0
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir} is a file: give another --output_dir")
    resume = str(args.resume_from_checkpoint or "")
    interrupted_early = False
    if resume.lower() == "true":
        held = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
        resume, interrupted_early = None, all(name.startswith(BEFORE_THE_FIRST_CHECKPOINT) for name in held)
        if interrupted_early or checkpoint_folders(output_dir):
            if checkpoint := checkpoint_to_resume(output_dir, quiet=not main_process):
                return str(checkpoint)
        elif not overwrite:
            if TRAINED_NAME in held:
                raise UserError(
                    f"{output_dir}: its model is trained: make_card.py --run {output_dir} --dataset DATASET scores it, "
                    "--overwrite true trains anew"
                )
            raise UserError(
                f"{output_dir} has no checkpoint to resume from: give --overwrite true to start anew in it"
            )
    elif resume.lower() not in ("", "none", "false"):
        if problem := checkpoint_problem(resume):
            raise UserError(f"--resume_from_checkpoint {resume}: not a complete checkpoint folder, {problem}")
        if Path(resume).resolve().parent == output_dir.resolve():
            return resume
    else:
        resume = None
    if main_process and output_dir.is_dir() and any(output_dir.iterdir()) and not interrupted_early:
        if not overwrite:
            raise UserError(f"{output_dir} is there already: give --overwrite true, or --resume_from_checkpoint true")
        held = [p.name for p in output_dir.iterdir()]
        if not any(name in OF_A_RUN or name.startswith(("checkpoint-", STAGING_PREFIX)) for name in held):
            raise UserError(f"{output_dir} holds something that is not a run: choose another --output_dir")
    return resume


def train_run(trainer: SegmentationTrainer, resume: str | None) -> None:
    """Train; a run that is overwritten loses its checkpoints and its `run.json` only now that everything is loaded.

    Ctrl-C ends the script with status 130 and a line that says how to go on.
    """
    if resume is not None:
        trainer.require_same_settings(resume)
    if trainer.is_world_process_zero():
        output_dir = Path(trainer.args.output_dir)
        _require_writable(output_dir)
        for name in (RUN_NAME, TRAINED_NAME):
            (output_dir / name).unlink(missing_ok=True)
        if resume is None or Path(resume).resolve().parent != output_dir.resolve():
            for checkpoint in output_dir.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
    trainer.accelerator.wait_for_everyone()
    trainer.args.resume_from_checkpoint = resume
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            print(f"\n{_how_to_go_on(trainer.args.output_dir)}", file=sys.stderr)
        sys.exit(130)


def _require_writable(folder: Path) -> None:
    """Before hours of training that may write nothing until they end."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=folder))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}): give another --output_dir"
        ) from None


def _how_to_go_on(output_dir: str) -> str:
    newest = newest_complete_checkpoint(output_dir, quiet=True)
    if newest is None:
        return "interrupted before a checkpoint was saved: the same command starts at the beginning"
    return f"interrupted; to go on from {newest}, give the same command with --resume_from_checkpoint true"


def finish_run(
    trainer: SegmentationTrainer,
    splits: SegmentationSplits,
    data: DataArguments,
    options,
    *,
    teacher=None,
    student_alone=None,
    teacher_name: str | None = None,
    base_model: str | None = None,
) -> dict:
    """Save the trained model, score it, and write its card, pictures and examples, and `run.json`, which marks the end.

    Every process of a training calls this: whole images are shared among them, the main process does the rest. A teacher
    that knows the same classes and the student trained alone, where given, are scored in the same way, for the card.

    The model is saved before anything else, with a record of its training (`TRAINED_NAME`). Where the scoring fails,
    make_card.py goes on from these, and the command for that is printed.

    Args:
        options: the script's dataclass of model options, for `run.json`.
        teacher, student_alone: (model, image processor).
        teacher_name: Hub id or folder of the teacher.
        base_model: what the model started from; it is named in the card if it is a Hub id.

    Returns:
        What `run.json` holds: options, versions, command, the facts of the card (`cards.read_facts`), and
        {split: {metric: value}} for every model. {} on other processes than the main one.

    Raises:
        UserError: the trained model cannot be saved, or not be scored.
    """
    args, device, is_main = trainer.args, trainer.args.device, trainer.is_world_process_zero()
    trainer.model.config.class_colors = [list(color) for color in splits.info.colors]  # read by `models.colors_of`
    if is_main:
        _save_model(trainer)
    if dist.is_available() and dist.is_initialized():
        # Ranks have seen other tiles since the last step began, which the running statistics of batch norm keep.
        for buffer in trainer.model.buffers():
            dist.broadcast(buffer, src=0)
    models = {"model": TrainedModel(trainer.model, trainer.processing_class, args.student_channels)}
    if teacher is not None:
        models["teacher"] = TrainedModel(*teacher, getattr(args, "teacher_channels", None) or args.student_channels)
    if student_alone is not None:
        found = find_channels(student_alone[0], splits.info.bands, "the student alone", default=args.student_channels)
        models["student_alone"] = TrainedModel(*student_alone, found or args.student_channels)
    always = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "max_steps",
        "num_train_epochs",
    )
    best = trainer.state.best_model_checkpoint if args.load_best_model_at_end else None
    origins = Origins(
        model_name=args.hub_model_id or Path(args.output_dir).resolve().name,
        dataset=data.dataset,
        teacher=teacher_name and (hub_id(teacher_name) or last_part(teacher_name)),
        base_model=hub_id(base_model),
        license=data.license,
        distillation=distillation_settings(getattr(trainer, "losses", None)),
    )
    run = {
        "steps": trainer.state.global_step,
        "seconds": _train_seconds(trainer),  # null if the run was resumed: only its last part is known
        "seed": args.seed,
        "command": command_line(),
        "settings": {
            **changed_settings(options, type(options)),
            **changed_settings(data, DataArguments),
            **{name: getattr(args, name) for name in always},
            "world_size": args.world_size,
            **changed_settings(args, type(args)),
            **({"method": trainer.methods} if getattr(trainer, "methods", None) else {}),
            **({"weights": f"the best of the training, {Path(best).name}"} if best else {}),
        },
        "hardware": device_name(device),
        "versions": versions(),
        "log": trainer.state.log_history,
        ORIGINS_KEY: asdict(origins),
    }
    try:
        if is_main:
            write_record(Path(args.output_dir) / TRAINED_NAME, run)
        return measure_run(
            args.output_dir, run, models, splits, data.evaluate_on, origins, args.per_device_eval_batch_size, device
        )
    except (Exception, KeyboardInterrupt):
        if is_main:
            beside = {
                "teacher": teacher_name if teacher is not None else None,
                "student_alone": getattr(options, "student_alone", None) if student_alone is not None else None,
            }
            command = ["python", "scripts/make_card.py", "--run", args.output_dir, "--dataset", data.dataset]
            command += [word for name, path in beside.items() if path for word in (f"--{name}", path)]
            command += ["--evaluate_on", *data.evaluate_on]
            print(
                f"\nThe model is trained and saved in {args.output_dir}. To score it without training it again:\n"
                f"{shlex.join(command)}",
                file=sys.stderr,
            )
        raise


def _save_model(trainer: SegmentationTrainer) -> None:
    """Model and image processor into a folder beside, then file by file into place, the weights last.

    Raises:
        UserError: they cannot be written; names the checkpoint that has them, if there is one.
    """
    output_dir = Path(trainer.args.output_dir)
    staging = None
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=output_dir))
        trainer._save(str(staging))
        for file in staging.glob("*.safetensors"):  # some versions write it for its owner alone
            shutil.copymode(staging / "config.json", file)
        (output_dir / "README.md").unlink(missing_ok=True)  # of the run that is overwritten
        for file in sorted(staging.iterdir(), key=lambda p: p.suffix == ".safetensors"):
            os.replace(file, output_dir / file.name)
    except (OSError, SafetensorError) as error:
        newest = newest_complete_checkpoint(output_dir, quiet=True)
        way = f"then give the same command with --resume_from_checkpoint true, {newest} is complete" if newest else ""
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"{output_dir}: the trained model cannot be saved ({reason}): make room, {way or 'no checkpoint has it'}"
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _train_seconds(trainer) -> float | None:
    if trainer.args.resume_from_checkpoint:
        return None
    log = reversed(trainer.state.log_history)
    return next((entry["train_runtime"] for entry in log if "train_runtime" in entry), None)


def distillation_settings(losses) -> dict | None:
    """The losses of a distillation as a card shows them; None without any."""
    if losses is None:
        return None
    settings = {}
    for loss in losses:
        settings.update({f"{name} weight": weight for name, weight in loss.weights.items()})
        if hasattr(loss, "relation"):
            settings["relation"] = loss.relation
        if hasattr(loss, "temperature") and getattr(loss, "relation", None) != "cosine":  # which has none
            settings[f"{next(iter(loss.weights)).removesuffix('_relation')} temperature"] = loss.temperature
        if loss.student_layers:
            pairs = zip(loss.student_layers, loss.teacher_layers, strict=True)
            layers = ", ".join(f"{s} = {t}" for s, t in pairs)
            if settings.setdefault("layers (student = teacher)", layers) != layers:
                settings[f"layers of {next(iter(loss.weights))} (student = teacher)"] = layers
    return settings


def changed_settings(values, dataclass_type) -> dict:
    """Fields of a dataclass that differ from their defaults, without paths, tokens and bookkeeping."""
    skipped = {
        "output_dir", "logging_dir", "hub_token", "push_to_hub_token", "dataset", "overwrite", "license", "disable_tqdm",
        "resume_from_checkpoint", "report_to", "run_name", "hub_model_id", "hub_private_repo", "push_to_hub", "accelerator_config", "seed",
        "local_rank", "logging_steps", "save_steps", "eval_steps", "save_total_limit", "dataloader_num_workers", "evaluate_on",
        "use_cpu", "dataloader_pin_memory", "save_strategy",
    }  # fmt: skip
    default = (
        dataclass_type(output_dir="unused", use_cpu=values.use_cpu)  # else it warns about the ranks of a CPU
        if issubclass(dataclass_type, TrainingArguments)
        else dataclass_type()
    )
    changed = {}
    for f in fields(dataclass_type):
        value = getattr(values, f.name)
        if f.name not in skipped and not f.name.startswith("_") and f.init and value != getattr(default, f.name):
            value = getattr(value, "value", value)  # of an enum
            changed[f.name] = value if isinstance(value, (int, float, str, bool, list, type(None))) else str(value)
    return changed


def versions() -> dict[str, str]:
    """Versions of this package and of what it stands on."""
    names = ("torch", "torchvision", "transformers", "accelerate", "datasets")
    return {"drd_hf": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def command_line(argv: list[str] | None = None) -> str:
    """The command of this process as a shell reads it, the script named from the project's root, tokens hidden."""
    argv = sys.argv if argv is None else argv
    script = Path(argv[0])
    words = ["python", f"{script.parent.name}/{script.name}" if script.parent.name else script.name]
    hide = False
    for word in argv[1:]:
        name, equals, _ = word.partition("=")
        secret = name.startswith("--") and "token" in name
        words.append("***" if hide else f"{name}=***" if secret and equals else word)
        hide = secret and not equals
    return shlex.join(words)


def _scores(teacher, id2label: dict[int, str]) -> bool:
    """Whether a teacher can be scored on a task: it has class scores, for the same classes."""
    return gives_class_scores(teacher) and same_labels(teacher, id2label)
