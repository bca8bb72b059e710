"""A few tiles that stand for a split, ready to be drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from drd_hf.data.splits import SegmentationSplits
from drd_hf.data.transforms import decode, undecoded
from drd_hf.errors import UserError


@dataclass(frozen=True)
class PreviewTile:
    """One tile: `image` (H, W, 3) uint8 for the eye, `label` (H, W) uint8 or None without a reference, and its place."""

    image: np.ndarray
    label: np.ndarray | None
    caption: str


def spread_over_sources(sources: Sequence[str], count: int, seed: int) -> list[int]:
    """Indices of `count` random tiles, as evenly over their sources as these allow, in the order of the split.

    Args:
        sources: source of each tile.
        count: how many; all tiles if there are fewer.
    """
    generator = np.random.default_rng(seed)
    tiles_of: dict[str, list[int]] = {}
    for index in generator.permutation(len(sources)).tolist():
        tiles_of.setdefault(sources[index], []).append(index)
    # The first tile of every source, in random order of sources, then the second of every source, and so on.
    rounds = sorted((turn, i, index) for i, tiles in enumerate(tiles_of.values()) for turn, index in enumerate(tiles))
    return sorted(index for _, _, index in rounds[:count])


def preview_tiles(
    splits: SegmentationSplits,
    split: str,
    count: int = 24,
    seed: int = 0,
    bands: Sequence[str] | None = None,
    label: str = "label",
) -> list[PreviewTile]:
    """Tiles of a split that `spread_over_sources` chooses.

    Args:
        bands: names of the one or three bands to show as grey or as red, green, blue. None: the first three.
        label: column of the reference, `label` or `label_eroded`.

    Raises:
        UserError: no such split, band or reference, no tile, or a damaged one.
    """
    info = splits.info
    if split not in splits:
        raise UserError(f"{info.name} has no split {split!r}, only {', '.join(splits)}")
    if count < 1:
        raise UserError(f"{count} tiles: give at least 1")
    shown = list(info.bands[:3] if len(info.bands) >= 3 else info.bands[:1]) if bands is None else list(bands)
    unknown = [name for name in shown if name not in info.bands]
    if unknown or len(shown) not in (1, 3):
        raise UserError(f"bands {' '.join(shown)}: name one or three of {', '.join(info.bands)}")
    if label == "label_eroded" and not info.has_eroded:
        raise UserError(f"{info.name} has no eroded reference: prepare it with both, or show the full one")
    dataset = undecoded(splits[split])
    tiles = []
    for index in spread_over_sources(dataset["source"][:], count, seed):
        tile = dataset[index]
        caption = f"{tile['source']} ({tile['row']}, {tile['column']})"
        try:
            planes = torch.cat([decode(plane) for plane in (tile["image"], *(tile.get("extra_bands") or ()))])
            reference = None if tile.get(label) is None else decode(tile[label])[0].numpy()
        except UserError as error:
            raise UserError(f"{caption}: {error}") from error
        image = planes[[info.bands.index(name) for name in shown]].permute(1, 2, 0).numpy()
        image = image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)
        tiles.append(PreviewTile(image=image, label=reference, caption=caption))
    return tiles
