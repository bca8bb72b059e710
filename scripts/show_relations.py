r"""Draw the relations that distillation transfers: of chosen pixels to all others, and of the channels, for each model.

python scripts/show_relations.py --teacher runs/teacher --student runs/student --image tile.png --output relations.png

docs/images/relations.png, after `make dubai`:
python scripts/show_relations.py --teacher runs/dubai/upernet-lite2 --student runs/dubai/default_steps600_seed0 \
    --student_alone runs/dubai/none_steps600_seed0 --image "../shared/data/aerial_dubai/Tile 8/images/image_part_001.jpg" \
    --box 600 300 1432 1132 --scale 0.5 --output docs/images/relations.png
"""

import argparse
from pathlib import Path

import numpy as np

from drd_hf.data.rasters import read_raster
from drd_hf.data.tiles import rescale
from drd_hf.errors import UserError, run_script
from drd_hf.evaluation.tiles import usable_device
from drd_hf.models import load_image_processor, load_teacher
from drd_hf.relation_pictures import ShownModel, draw_relations
from drd_hf.relations import RELATIONS

LARGEST = 1024 * 1024  # pixels of one forward pass


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, help="Folder or Hub id of the teacher.")
    add("--student", required=True, help="Folder or Hub id of the distilled student.")
    add("--student_alone", help="The same student trained without a teacher.")
    add("--image", required=True, help="TIFF, PNG or JPEG file; it is read as a whole.")
    add("--output", required=True, type=Path, help="PNG file to write.")
    add(
        "--box",
        type=int,
        nargs=4,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="Part of the image, in its pixels.",
    )
    add("--scale", type=float, default=1.0, help="Resample the image, as the dataset was. Default: 1.")
    add(
        "--point", type=int, nargs=2, action="append", metavar=("X", "Y"),
        help="Pixel of what --box and --scale leave, as the picture names it; several times for several. Default: one in "
        "each of the three classes that the teacher predicts most.",
    )  # fmt: skip
    add("--layers", metavar="STUDENT=TEACHER", help="Feature layers. Default: the ones before the classifiers.")
    add("--bands", type=int, nargs="+", help="Numbers of the bands that the student reads, from 1. Default: all.")
    add("--teacher_bands", type=int, nargs="+", help="The same of the teacher. Default: those of the student.")
    add("--relation", choices=RELATIONS, default="cosine", help="Default: cosine.")
    add("--temperature", type=float, default=1.0, help="Of the attention relation. Default: 1.")
    add("--keep_channel_order", action="store_true", help="Do not sort channels into blocks of like ones.")
    add("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.output.suffix.lower() != ".png" or args.output.is_dir():
        raise UserError(f"--output {args.output}: give the name of a .png file")
    pixels = read_raster(args.image).pixels
    left, top, right, bottom = box = args.box or (0, 0, pixels.shape[1], pixels.shape[0])
    if not (0 <= left < right <= pixels.shape[1] and 0 <= top < bottom <= pixels.shape[0]):
        raise UserError(
            f"--box {' '.join(map(str, box))}: {args.image} has {pixels.shape[1]} x {pixels.shape[0]} pixels"
        )
    image = rescale(np.ascontiguousarray(pixels[top:bottom, left:right]), args.scale)
    if image.shape[0] * image.shape[1] > LARGEST:
        raise UserError(
            f"{args.image}: {image.shape[1]} x {image.shape[0]} pixels are too many to relate to each other, choose a part of at most {LARGEST:,} with --box"
        )
    if not args.box:
        image = image[: image.shape[0] // 32 * 32 or None, : image.shape[1] // 32 * 32 or None]

    student_layer, _, teacher_layer = (args.layers or "").partition("=")
    device = usable_device(args.device)
    chosen = [("teacher", args.teacher, teacher_layer or student_layer, args.teacher_bands or args.bands)]
    if args.student_alone:
        chosen.append(("student alone", args.student_alone, student_layer, args.bands))
    chosen.append(("distilled student", args.student, student_layer, args.bands))
    models = [
        ShownModel(
            title,
            load_teacher(name).to(device),
            load_image_processor(name),
            layer.strip() or None,
            bands and [band - 1 for band in bands],
        )
        for title, name, layer, bands in chosen
    ]
    try:
        path = draw_relations(
            models, image, args.point, args.output, args.relation, args.temperature, not args.keep_channel_order
        )
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written ({error})") from error
    print(path)


if __name__ == "__main__":
    run_script(main)
