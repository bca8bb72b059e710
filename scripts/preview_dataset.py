"""Draw a contact sheet of a prepared dataset: tiles beside their labels, legend, class shares.

python scripts/preview_dataset.py --dataset data/potsdam --output potsdam.png
python scripts/preview_dataset.py --dataset data/potsdam --bands near_infrared red green --reference eroded --output irrg.png
"""

from dataclasses import dataclass, field
from pathlib import Path

from drd_hf import load_splits
from drd_hf.arguments import parse_arguments, require
from drd_hf.data.preview import preview_tiles
from drd_hf.errors import UserError, run_script
from drd_hf.evaluation import references_of
from drd_hf.pictures import contact_sheet


@dataclass
class PreviewArguments:
    dataset: str = field(default="", metadata={"help": "Prepared dataset: folder of prepare_dataset.py or Hub id."})
    output: str = field(default="", metadata={"help": "PNG file to write."})
    split: str = field(default="train", metadata={"help": "Split to show."})
    tiles: int = field(default=24, metadata={"help": "Number of tiles, spread over the images of the split."})
    seed: int = field(default=0, metadata={"help": "Another seed shows other tiles."})
    bands: list[str] | None = field(
        default=None,
        metadata={"help": "Bands to show as red, green, blue, or one band as grey. Default: the first three."},
    )
    reference: str | None = field(
        default=None,
        metadata={"help": "full, or eroded (no object borders). Default: full where the dataset has it."},
    )
    cell_size: int = field(default=224, metadata={"help": "Side of a tile in the picture, in pixels."})


def main() -> None:
    (args,) = parse_arguments(PreviewArguments, description=__doc__)
    require(dataset=args.dataset, output=args.output)
    if Path(args.output).suffix.lower() != ".png" or Path(args.output).is_dir():
        raise UserError(f"--output {args.output}: give the name of a .png file")
    if not 32 <= args.cell_size <= 2048:
        raise UserError(f"--cell_size {args.cell_size}: give 32 to 2048 pixels")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: give 0 or above")
    if args.reference not in (None, "full", "eroded"):
        raise UserError(f"--reference {args.reference}: give full or eroded")
    splits = load_splits(args.dataset)
    reference, label = next(iter(references_of(splits.info, args.reference).items()))
    tiles = preview_tiles(splits, args.split, args.tiles, args.seed, args.bands, label)

    info = splits.info
    title = (
        f"{info.name}, {args.split}: {len(tiles)} of {info.num_tiles[args.split]} tiles of {info.tile_size} pixels "
        f"from {info.num_sources[args.split]} images; shares of the classes in the whole split"
    )
    if label != "label" or list(references_of(info)) != ["full"]:
        title += f"; {reference} reference" + (", shares in the full one" if label == "label_eroded" else "")
    if args.bands or info.bands != ("red", "green", "blue"):
        title += f"; bands shown: {', '.join(args.bands or info.bands[:3])}, there are {', '.join(info.bands)}"
    shares = info.pixel_shares[args.split] | {"ignored": info.ignored_shares[args.split]}
    try:
        path = contact_sheet(tiles, title, info.colors, info.id2label, shares, args.output, args.cell_size)
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written ({error})") from error
    print(f"{path}: {len(tiles)} tiles of {args.split}")


if __name__ == "__main__":
    run_script(main)
