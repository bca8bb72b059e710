"""Score a model on the whole images of a prepared dataset: a table, and JSON and pictures with --output.

python scripts/evaluate.py --model runs/student --dataset data/potsdam --split test --output runs/student/test
python scripts/evaluate.py --model runs/student --dataset data/potsdam --tta flips quarter_turns scales
accelerate launch --num_processes 4 scripts/evaluate.py --model runs/student --dataset data/potsdam
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from drd_hf import load_splits
from drd_hf.arguments import parse_arguments, require
from drd_hf.errors import UserError, run_script
from drd_hf.evaluation import (
    SourceEvaluation,
    check_labels,
    evaluate_model,
    evaluate_sources,
    find_protocol,
    references_of,
)
from drd_hf.evaluation.report import (
    check_output,
    join_processes,
    print_report,
    staged_folder,
    without_empty,
    write_report,
    write_source_picture,
)
from drd_hf.export import load_segmenter
from drd_hf.models import bands_of, find_channels


@dataclass
class EvaluationArguments:
    model: str = field(default="", metadata={"help": "Hub id or folder of a segmentation checkpoint, or .onnx file."})
    dataset: str = field(default="", metadata={"help": "Prepared dataset: folder of prepare_dataset.py or Hub id."})
    split: str = field(default="test", metadata={"help": "Split to score."})
    protocol: str = field(
        default="auto",
        metadata={"help": "isprs, cityscapes or plain: over which classes means are taken; auto: by the classes."},
    )
    reference: str | None = field(
        default=None, metadata={"help": "full, eroded (no object borders) or both. Default: all the dataset has."}
    )
    windows: str = field(
        default="blended",
        metadata={"help": "blended: whole images, overlapping windows merged. tiles: each tile by itself."},
    )
    tile: int | None = field(default=None, metadata={"help": "Side of a window. Default: of the dataset's tiles."})
    overlap: float = field(default=0.25, metadata={"help": "Share of a window that the next one covers again."})
    tta: list[str] | None = field(
        default=None, metadata={"help": "Test-time augmentation: any of flips, quarter_turns, scales."}
    )
    tta_scales: list[float] = field(
        default_factory=lambda: [0.75, 1.0, 1.25], metadata={"help": "Factors of --tta scales."}
    )
    boundary_distance: float = field(
        default=5,
        metadata={"help": "Pixels from outlines that Boundary IoU counts, below 1 a share of the diagonal; 0: off."},
    )
    channels: list[int] | None = field(
        default=None,
        metadata={"help": "Channels of the dataset that the model reads. Default: found by the names of the bands."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the tiles as they come: nothing is downloaded whole."}
    )
    batch_size: int = field(default=8, metadata={"help": "Windows or tiles per forward pass."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; default: a GPU if there is one."})
    output: str | None = field(
        default=None, metadata={"help": "Folder for scores, plots and pictures; FILE.json: the scores alone."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the evaluation that the output folder holds."})
    pictures: bool = field(default=True, metadata={"help": "Also a picture of each image into the output folder."})


def main() -> None:
    (args,) = parse_arguments(EvaluationArguments, description=__doc__)
    require(model=args.model, dataset=args.dataset)
    by_tiles, folder = args.windows == "tiles", bool(args.output) and not args.output.endswith(".json")
    if args.windows not in ("blended", "tiles"):
        raise UserError(f"--windows {args.windows}: give blended or tiles")
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: give at least 1")
    if by_tiles and (args.tta or args.tile):
        raise UserError("--windows tiles takes no --tta and no --tile: leave them out, or score whole images")
    if args.output:
        check_output(args.output, args.overwrite)
    splits = load_splits(args.dataset, args.streaming)
    if args.split not in splits:
        raise UserError(f"{args.dataset} has no split {args.split!r}, only {', '.join(splits)}")
    info, dataset = splits.info, splits[args.split]
    references = references_of(info, args.reference)
    protocol = find_protocol(args.protocol, info, "-tiles" if by_tiles else "-tta" if args.tta else "")
    model, processor = load_segmenter(args.model)
    check_labels(model, info.id2label, args.model)
    channels = find_channels(model, info.bands, args.model, "channels", args.channels)
    state = join_processes(args.device)
    if by_tiles and state is not None:
        raise UserError("--windows tiles works in one process: leave it out, or start the script with python")
    device = args.device if state is None else state.device
    names = bands_of(model.config)
    if args.channels and names and [info.bands[i] for i in args.channels] != names:
        chosen = ", ".join(info.bands[i] for i in args.channels)
        print(f"warning: the model reads {', '.join(names)}, --channels gives it {chosen}", file=sys.stderr)

    with staged_folder(args.output, state) if folder else nullcontext() as staging:
        if by_tiles:
            metrics = {
                name: evaluate_model(model, processor, dataset, args.batch_size, device, channels, column, info)
                for name, column in references.items()
            }
            evaluation = SourceEvaluation(metrics, {}, (), (), f"tiles of {info.tile_size} px, each pixel once")
        else:

            def picture(source, prediction):
                write_source_picture(staging, source, prediction, next(iter(references.values())), info)

            evaluation = evaluate_sources(
                model,
                processor,
                dataset,
                info,
                args.tile,
                args.overlap,
                args.reference,
                args.tta or (),
                args.tta_scales,
                args.batch_size,
                device,
                channels,
                args.boundary_distance or None,
                picture if folder and args.pictures else None,
            )
        evaluation = without_empty(evaluation, args.reference, f"{args.dataset} {args.split}")
        if state is None or state.is_main_process:
            print_report(evaluation, protocol, info, args.split)
            if args.output:
                write_report(staging if folder else Path(args.output), evaluation, protocol, info, args.split)


if __name__ == "__main__":
    run_script(main)
