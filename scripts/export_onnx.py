"""Write a trained student as an ONNX file that runs without PyTorch, compared with PyTorch before it is published.

    python scripts/export_onnx.py --model runs/student --output student.onnx --dataset data/potsdam
    python scripts/export_onnx.py --model runs/student --output student.onnx --dataset data/potsdam --int8

The file takes any number of images of --size x --size pixels, or of any height and width with --dynamic, and gives the
model's logits; its metadata hold the classes, the bands and the normalisation. --int8 writes student_int8.onnx too, and
measures what it costs in mean IoU and gains in time. What was measured is printed and written to student.json.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from drd_hf import load_image_processor, load_splits, load_teacher
from drd_hf.arguments import parse_arguments, require
from drd_hf.data import EvalTransform
from drd_hf.errors import UserError, run_script
from drd_hf.evaluation import check_labels
from drd_hf.evaluation.report import write_scores
from drd_hf.export import export_onnx, measure_int8, quantize_onnx
from drd_hf.models import find_channels


@dataclass
class ExportArguments:
    model: str = field(default="", metadata={"help": "Hub id or folder of a trained segmentation checkpoint."})
    output: str = field(default="", metadata={"help": "The .onnx file to write."})
    size: int | None = field(
        default=None,
        metadata={"help": "Side of the images in pixels. Default: that of the dataset's tiles, else 512."},
    )
    dynamic: bool = field(default=False, metadata={"help": "Images of any height and width instead of --size."})
    opset: int = field(default=17, metadata={"help": "ONNX operator set."})
    tolerance: float = field(
        default=1e-3, metadata={"help": "Largest difference of a logit from PyTorch's; above it, nothing is written."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Prepared dataset: tiles to compare on, to calibrate int8 and to score it."}
    )
    split: str = field(default="validation", metadata={"help": "Split to compare and to score on."})
    image: str | None = field(default=None, metadata={"help": "Without --dataset: an RGB image to compare on."})
    int8: bool = field(default=False, metadata={"help": "Write an int8 form too; needs --dataset."})
    calibration_tiles: int = field(default=64, metadata={"help": "Tiles of train that the int8 ranges come from."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of calibration tiles."})


def some_tiles(dataset, number: int, channels: list[int] | None, seed: int) -> list[torch.Tensor]:
    """Images uint8 (C, H, W) of some tiles, chosen at random."""
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:number]
    images = dataset.select(sorted(chosen)).with_transform(EvalTransform())[:]["image"]
    return [image if channels is None else image[channels] for image in images]


def read_image(path: str) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"--image {path}: cannot be read ({error})") from error


def main() -> None:
    (args,) = parse_arguments(ExportArguments, description=__doc__)
    require(model=args.model, output=args.output)
    output = Path(args.output)
    if output.suffix != ".onnx":
        raise UserError(f"--output {output}: give a file name that ends in .onnx")
    if args.int8 and not args.dataset:
        raise UserError("--int8 needs --dataset: ranges come from its train split, the loss is measured on --split")
    if args.dynamic and args.size:
        raise UserError("--dynamic and --size exclude each other: give one of them")
    if args.size is not None and args.size < 1:
        raise UserError(f"--size {args.size}: give a positive number of pixels")
    if args.calibration_tiles < 1:
        raise UserError(f"--calibration_tiles {args.calibration_tiles}: give at least 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: give 0 or above")
    model, processor = load_teacher(args.model), load_image_processor(args.model)
    splits, channels = None, None
    if args.dataset:
        splits = load_splits(args.dataset)
        needed = (args.split, "train") if args.int8 else (args.split,)
        for split in needed:
            if split not in splits:
                raise UserError(f"{args.dataset} has no split {split!r}, only {', '.join(splits)}")
        check_labels(model, splits.info.id2label, args.model)
        channels = find_channels(model, splits.info.bands, args.model)
        images, source = some_tiles(splits[args.split], 4, channels, args.seed), f"tiles of {args.split}"
    elif args.image:
        images, source = [read_image(args.image)], args.image
    else:
        images, source = [], "generated noise (give --dataset or --image for real input)"
    name = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model
    size = args.size or (splits.info.tile_size if splits else 512)
    if args.int8 and not args.dynamic and size < splits.info.tile_size:
        raise UserError(
            f"--size {size}: the tiles of {args.dataset} have {splits.info.tile_size} pixels, give no less"
        )
    size = None if args.dynamic else size
    export = export_onnx(model, processor, output, size, images, args.opset, args.tolerance, name)

    multiple = f"multiples of {export.size_multiple}" if export.size_multiple > 1 else "any"
    print(
        f"{output}: {output.stat().st_size / 1e6:.1f} MB, any batch, "
        + (f"{size} x {size} pixels" if size else f"height and width: {multiple}")
    )
    print(
        f"on {source}: largest difference of a logit {export.max_difference:.2g}, arg-max agreement {export.agreement:.4%}"
    )
    facts = asdict(export) | {"path": output.name, "compared_on": source, "model": name, "tolerance": args.tolerance}
    if args.int8:
        int8 = output.with_name(f"{output.stem}_int8.onnx")
        quantize_onnx(output, int8, some_tiles(splits["train"], args.calibration_tiles, channels, args.seed))
        measured = measure_int8(output, int8, splits[args.split], size or splits.info.tile_size, channels)
        facts["int8"] = measured | {
            "split": args.split,
            "path": int8.name,
            "calibration_tiles": args.calibration_tiles,
            "seed": args.seed,
        }
        (iou, iou8), (ms, ms8) = measured["mean_iou"].values(), measured["milliseconds"].values()
        print(
            f"{int8}: {measured['megabytes']['int8']:.1f} MB, mean IoU on {args.split} {iou8:.4f} instead of {iou:.4f}"
        )
        faster = f"{ms / ms8:.2f} times as fast" if ms8 < ms else "int8 is no faster on this CPU"
        print(f"{ms8:.1f} ms for a tile instead of {ms:.1f} ms with {measured['threads']} threads: {faster}")
    write_scores(output.with_suffix(".json"), facts)


if __name__ == "__main__":
    run_script(main)
