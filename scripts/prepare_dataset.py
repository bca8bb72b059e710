"""Cut a dataset into tiles and write it as parquet files with a dataset card.

A folder of images and masks, described by a layout file:
    python scripts/prepare_dataset.py --dataset folder --source PATH --layout layout.yaml --output data/mine --num_proc 8

Generated scenes, nothing to download:
    python scripts/prepare_dataset.py --dataset scenes --output data/scenes --tile_size 256

The output is read with `drd_hf.load_splits` and can be uploaded to the Hub as it is.
"""

import argparse
from functools import partial
from pathlib import Path

from drd_hf.data.folder import find_pairs, read_layout, read_pair
from drd_hf.data.prepare import prepare_dataset
from drd_hf.data.scenes import SCENES, generate_scene
from drd_hf.errors import UserError, run_script


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=["folder", "scenes"], help="what to prepare")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--tile_size", type=int, default=512, help="side of a tile in pixels (default: 512)")
    parser.add_argument("--stride", type=int, help="pixels from one tile to the next (default: the tile size)")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="resample images before cutting; 0.5 halves the resolution (default: 1)",
    )
    parser.add_argument("--num_proc", type=int, default=1, help="processes; the result is the same (default: 1)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset that was written to --output before"
    )

    folder = parser.add_argument_group("--dataset folder")
    folder.add_argument("--source", type=Path, help="folder that holds the images and masks")
    folder.add_argument("--layout", type=Path, help="YAML file: which files pair up, mask values of classes, splits")
    folder.add_argument(
        "--unknown",
        choices=["error", "ignore"],
        default="error",
        help="mask values that the layout does not name: stop, or ignore these pixels (default: error)",
    )

    scenes = parser.add_argument_group("--dataset scenes")
    scenes.add_argument(
        "--scenes_train", type=int, default=24, help="training scenes, 0 for no such split (default: 24)"
    )
    scenes.add_argument("--scenes_validation", type=int, default=6, help="validation scenes (default: 6)")
    scenes.add_argument("--scenes_test", type=int, default=8, help="test scenes (default: 8)")
    scenes.add_argument("--scene_size", type=int, default=384, help="side of a scene in pixels (default: 384)")
    scenes.add_argument("--seed", type=int, default=0, help="seed; no scene is in two splits (default: 0)")
    return parser.parse_args()


def folder_sources(args: argparse.Namespace):
    if args.source is None or args.layout is None:
        raise UserError("--dataset folder needs --source and --layout")
    layout = read_layout(args.layout)
    reader = partial(read_pair, layout=layout, unknown=args.unknown)
    return find_pairs(layout, args.source), reader, layout.facts(name=args.source.resolve().name)


def scene_sources(args: argparse.Namespace):
    counts = {"train": args.scenes_train, "validation": args.scenes_validation, "test": args.scenes_test}
    if args.seed < 0 or any(not 0 <= count <= 10_000 for count in counts.values()):
        raise UserError("--seed must be at least 0 and the numbers of scenes 0 to 10000")
    # 30,000 seeds for each --seed and 10,000 for each split: disjoint between both.
    first = {split: 30_000 * args.seed + 10_000 * i for i, split in enumerate(counts)}
    sources = {split: range(first[split], first[split] + count) for split, count in counts.items() if count}
    return sources, partial(read_scene, size=args.scene_size), SCENES


def read_scene(seed: int, size: int):
    image, label = generate_scene(seed, size)
    return image, label, f"scene_{seed:06d}", {}


def main() -> None:
    args = parse_args()
    sources, reader, facts = folder_sources(args) if args.dataset == "folder" else scene_sources(args)
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
    )
    for split, tiles in info.num_tiles.items():
        shares = ", ".join(f"{name} {share:.1%}" for name, share in info.pixel_shares[split].items())
        print(
            f"{split}: {tiles} tiles of {info.num_sources[split]} images; {shares}, ignored {info.ignored_shares[split]:.1%}"
        )
    if info.unknown_pixels:
        print("ignored pixels of unknown value:", ", ".join(f"{k}: {v}" for k, v in info.unknown_pixels.items()))
    print(f"written to {args.output}")


if __name__ == "__main__":
    run_script(main)
