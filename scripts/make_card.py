"""The card of a finished run: written again from what the run keeps, or from new measurements.

python scripts/make_card.py --run runs/student --output model_cards/student
python scripts/make_card.py --run runs/student --dataset data/potsdam --teacher runs/teacher --student_alone runs/alone

With --dataset everything is measured anew: scores of the three models, their cost, pictures and examples. A model whose
scoring failed after the training needs that, and a run that an older version finished. With --output only that folder gets
the card and its pictures; the run stays as it is.
"""

import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from drd_hf import DistillationConfig, UserError, load_image_processor, load_splits, load_teacher
from drd_hf.arguments import parse_arguments, require
from drd_hf.cards import CARD_KEY, ORIGINS_KEY, read_facts, read_run, write_model_card
from drd_hf.cards.measure import Origins, TrainedModel, finish_record, measure_run
from drd_hf.errors import run_script
from drd_hf.evaluation import check_labels
from drd_hf.models import find_channels
from drd_hf.runs import check_same_architecture, distillation_settings
from drd_hf.trainer import losses_from_config

PICTURES = ("figures", "examples")


@dataclass
class CardArguments:
    run: str = field(default="", metadata={"help": "Folder of a finished train_teacher.py or distill.py."})
    output: str | None = field(default=None, metadata={"help": "Folder for the card. Default: that of the run."})
    name: str | None = field(default=None, metadata={"help": "Name of the model in the card. Default: as it was."})
    dataset: str | None = field(default=None, metadata={"help": "Prepared dataset, to measure everything anew."})
    teacher: str | None = field(default=None, metadata={"help": "Folder or Hub id of the teacher, scored beside."})
    student_alone: str | None = field(default=None, metadata={"help": "The student trained alone, scored beside."})
    evaluate_on: list[str] = field(
        default_factory=lambda: ["validation", "test"],
        metadata={"help": "Splits to score; the last one on whole images too."},
    )
    license: str | None = field(default=None, metadata={"help": "Licence of the model. Default: as it was."})
    batch_size: int = field(default=8, metadata={"help": "Tiles per forward pass."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; default: a GPU if there is one."})


def main() -> None:
    (args,) = parse_arguments(CardArguments, description=__doc__)
    require(run=args.run)
    if args.output and Path(args.output).resolve() == Path(args.run).resolve():
        args.output = None
    run, folder = read_run(args.run, scored=args.dataset is None), Path(args.output or args.run)
    if args.dataset is None:
        if args.teacher or args.student_alone:
            raise UserError("--teacher and --student_alone are scored on the tiles of a dataset: give --dataset")
        read_facts(args.run)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".card-", dir=folder) as staging:
        source = Path(args.run)
        if args.dataset is not None:
            source = Path(staging, "measured") if args.output else source
            source.mkdir(exist_ok=True)
            measure(args, run, source)
        facts = read_facts(source)
        if args.output:
            for name in PICTURES:
                shutil.rmtree(folder / name, ignore_errors=True)
                if (source / name).is_dir():
                    shutil.move(shutil.copytree(source / name, Path(staging, name)), folder / name)
        changed = {"model_name": args.name, "license": args.license}
        changed = {name: value for name, value in changed.items() if value is not None}
        facts = replace(facts, **changed)
        if args.output:
            write_model_card(folder, facts)
        else:  # and the record, from which a push renders the card
            finish_record(folder, read_run(folder), facts)
        print(folder / "README.md")


def measure(args: CardArguments, run: dict, folder: Path) -> None:
    splits = load_splits(args.dataset)
    for split in args.evaluate_on:
        if split not in splits or not any(splits.info.pixel_shares[split].values()):
            raise UserError(f"--evaluate_on {split}: {args.dataset} has no labelled split of this name")
    names = {"model": args.run, "teacher": args.teacher, "student_alone": args.student_alone}
    models = {}
    for name, path in names.items():
        if path is not None:
            model = load_teacher(path)
            channels = find_channels(model, splits.info.bands, path)
            models[name] = TrainedModel(model, load_image_processor(path), channels)
    check_labels(models["model"].model, splits.info.id2label, args.run)
    if args.student_alone:
        check_labels(models["student_alone"].model, splits.info.id2label, args.student_alone)
        check_same_architecture(models["model"].model, models["student_alone"].model, args.student_alone)
    if ORIGINS_KEY in run:
        origins = Origins(**run[ORIGINS_KEY])
        given = {"teacher": args.teacher, "license": args.license}
        origins = replace(origins, dataset=args.dataset, **{name: value for name, value in given.items() if value})
    else:
        origins = origins_of_older_run(args, run, models)
    run = {"hardware": run.get("milliseconds_per_tile", {}).get("device"), **run}
    measure_run(folder, run, models, splits, args.evaluate_on, origins, args.batch_size, args.device)


def origins_of_older_run(args: CardArguments, run: dict, models: dict) -> Origins:
    """From its options and facts: older versions did not keep them."""
    kept, settings = run.get(CARD_KEY) or {}, run["settings"]
    distillation = kept.get("distillation")
    if not kept and args.teacher and "teacher" in settings:  # the losses follow from the options and the models
        known = {name: value for name, value in settings.items() if name in DistillationConfig.__dataclass_fields__}
        config = DistillationConfig(output_dir="unused", **{"method": ["drd"], **known})  # the default of that time
        distillation = distillation_settings(
            losses_from_config(config, models["model"].model, models["teacher"].model)
        )
    return Origins(
        model_name=kept.get("model_name") or Path(args.run).resolve().name,
        dataset=args.dataset,
        teacher=args.teacher or kept.get("teacher") or settings.get("teacher"),
        base_model=next(iter(kept["base_model"]), None)
        if kept
        else settings.get("pretrained_weights") or settings.get("student") or settings.get("model"),
        license=args.license or kept.get("license"),
        distillation=distillation,
    )


if __name__ == "__main__":
    run_script(main)
