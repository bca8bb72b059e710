"""Cut a dataset into tiles and write it as parquet files with a dataset card.

ISPRS Potsdam and Vaihingen, and Cityscapes, from the zip files as downloaded or from folders:
    python scripts/prepare_dataset.py --dataset potsdam --source PATH --output data/potsdam --num_proc 8

A folder of images and masks, described by a layout file:
    python scripts/prepare_dataset.py --dataset folder --source PATH --layout layout.yaml --output data/mine --num_proc 8

Generated scenes, nothing to download:
    python scripts/prepare_dataset.py --dataset scenes --output data/scenes --tile_size 256

A conversion that was stopped goes on where it was when the same command is given again. The output is read with
`drd_hf.load_splits`. It can be uploaded later as well:
    python scripts/prepare_dataset.py --push_only --output data/scenes --push_to_hub ORG/NAME
"""

import argparse
from pathlib import Path

from drd_hf.data.cityscapes import find_cityscapes
from drd_hf.data.facts import POTSDAM, VAIHINGEN
from drd_hf.data.folder import find_pairs, folder_reader, read_layout
from drd_hf.data.isprs import find_isprs
from drd_hf.data.prepare import prepare_dataset
from drd_hf.data.scenes import SCENES, SceneReader, scene_records
from drd_hf.errors import UserError, run_script
from drd_hf.hub import check_push, push_dataset

ISPRS = {"potsdam": POTSDAM, "vaihingen": VAIHINGEN}
DATASETS = (*ISPRS, "cityscapes", "folder", "scenes")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, help="what to prepare")
    add("--source", type=Path, help="folder with the images and masks, or with the zip files, or a zip file")
    add("--output", required=True, type=Path, help="folder to write")
    add("--tile_size", type=int, default=512, help="side of a tile in pixels (default: 512)")
    add("--stride", type=int, help="pixels from one tile to the next (default: the tile size)")
    add("--scale", type=float, default=1.0, help="resample before cutting; 0.5 halves the resolution (default: 1)")
    add("--num_proc", type=int, default=1, help="processes; the result is the same (default: 1)")
    add("--overwrite", action="store_true", help="replace another dataset in --output, and in the repository")
    add("--skip_broken", action="store_true", help="leave out images that cannot be read, and list them")
    add("--push_to_hub", metavar="REPO", help="upload the result to this dataset repository of the Hub")
    add("--push_only", action="store_true", help="upload what is in --output already, prepare nothing")
    add("--i_have_the_right", action="store_true", help="upload pixels whose terms forbid it (private by default)")
    add("--public", action="store_true", help="make the uploaded repository public")

    datasets_of = {}  # the datasets that an option belongs to

    def options_of(*datasets: str):
        group = parser.add_argument_group(f"--dataset {', '.join(datasets)}")

        def add(option: str, **kwargs) -> None:
            datasets_of[group.add_argument(option, **kwargs).dest] = datasets

        return add

    add = options_of(*ISPRS)
    add("--bands", help="imagery to take: RGB, IRRG or RGBIR of Potsdam (default: RGB), IRRG of Vaihingen")
    add("--height", action="store_true", help="add the normalised height as a further band")
    add("--reference", choices=["full", "eroded", "both"], help="labels (default: both where there are eroded ones)")
    add("--validation_tiles", nargs="*", help="training tiles for validation (default: Potsdam 2_10, Vaihingen 30)")
    add("--leave_out", nargs="*", default=[], help="tiles to leave out, for example 7_10 of Potsdam")

    add = options_of("cityscapes")
    add("--with_test", action="store_true", help="keep the test images, which have no labels")

    add = options_of("folder")
    add("--layout", type=Path, help="YAML file: which files pair up, mask values of classes, splits")
    add(
        "--unknown",
        choices=["error", "ignore"],
        default="error",
        help="mask values that the layout does not name: stop, or ignore these pixels (default: error)",
    )

    add = options_of("scenes")
    add("--scenes_train", type=int, default=24, help="training scenes, 0 for no such split (default: 24)")
    add("--scenes_validation", type=int, default=6, help="validation scenes (default: 6)")
    add("--scenes_test", type=int, default=8, help="test scenes (default: 8)")
    add("--scene_size", type=int, default=384, help="side of a scene in pixels (default: 384)")
    add("--seed", type=int, default=0, help="seed; no scene is in two splits (default: 0)")
    args = parser.parse_args()
    if args.push_only:
        if not args.push_to_hub:
            raise UserError("--push_only needs --push_to_hub, the repository to upload to")
        return args
    if args.dataset is None:
        raise UserError(f"give --dataset, one of {', '.join(DATASETS)}")
    datasets_of["source"] = [name for name in DATASETS if name != "scenes"]
    for option, datasets in datasets_of.items():
        if args.dataset not in datasets and getattr(args, option) != parser.get_default(option):
            raise UserError(f"--{option} is for --dataset {' or '.join(datasets)}; leave it out for {args.dataset}")
    return args


def find_sources(args: argparse.Namespace):
    """Records of each split, their reader, the facts of the dataset, and notes for its card."""
    if args.dataset == "scenes":
        counts = {"train": args.scenes_train, "validation": args.scenes_validation, "test": args.scenes_test}
        return scene_records(counts, args.seed), SceneReader(args.scene_size), SCENES, []
    if args.source is None or (args.dataset == "folder" and args.layout is None):
        raise UserError(f"--dataset {args.dataset} needs --source{' and --layout' * (args.dataset == 'folder')}")
    if args.dataset == "folder":
        layout = read_layout(args.layout)
        sources = find_pairs(layout, args.source)
        reader = folder_reader(layout, sources, args.unknown)
        return sources, reader, layout.facts(name=args.source.resolve().name), []
    if args.dataset == "cityscapes":
        return find_cityscapes(args.source, args.with_test, skip_broken=args.skip_broken)
    facts, chosen = ISPRS[args.dataset], (args.validation_tiles, args.leave_out)
    return find_isprs(
        facts, args.source, args.bands, args.height, args.reference, *chosen, skip_broken=args.skip_broken
    )


def main() -> None:
    args = parse_args()
    rights = {
        "private": False if args.public else None,
        "i_have_the_right": args.i_have_the_right,
        "overwrite": args.overwrite,
    }
    if args.push_only:
        print("uploaded to", push_dataset(args.output, args.push_to_hub, **rights))
        return
    sources, reader, facts, notes = find_sources(args)
    if args.push_to_hub:
        check_push(facts, args.push_to_hub, **rights)
    try:
        info = prepare_dataset(
            sources,
            reader,
            facts,
            args.output,
            tile_size=args.tile_size,
            stride=args.stride,
            scale=args.scale,
            num_proc=args.num_proc,
            overwrite=args.overwrite,
            skip_broken=args.skip_broken,
            notes=notes,
        )
    except UserError as error:
        if args.push_to_hub and not args.overwrite and (args.output / "README.md").is_file():
            raise UserError(f"{error}; or give --push_only to upload what is there") from None
        raise
    for split, tiles in info.num_tiles.items():
        shares = info.pixel_shares[split] | {"ignored": info.ignored_shares[split]}
        shown = (
            ", ".join(f"{name} {share:.1%}" for name, share in shares.items()) if any(shares.values()) else "no labels"
        )
        print(f"{split}: {tiles} tiles of {info.num_sources[split]} images; {shown}")
    if info.unknown_pixels:
        print("ignored pixels of unknown value:", ", ".join(f"{k}: {v}" for k, v in info.unknown_pixels.items()))
    for name, pixels in info.off_palette_pixels.items():
        print(f"{name}: {pixels} label pixels are off the palette and took the nearest colour")
    print(f"written to {args.output}")
    if args.push_to_hub:
        try:
            print("uploaded to", push_dataset(args.output, args.push_to_hub, **rights))
        except UserError as error:
            raise UserError(
                f"{error}; the dataset is complete in {args.output}, --push_only uploads it without preparing it again"
            ) from None


if __name__ == "__main__":
    run_script(main)
