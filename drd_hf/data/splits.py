"""Prepared datasets as `datasets` splits, together with what their card says about them."""

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from datasets import DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from huggingface_hub import DatasetCard
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from drd_hf.data.facts import DatasetFacts, SegmentationClass
from drd_hf.errors import UserError

SPLITS = ("train", "validation", "test")
REMEDY = "give the output folder of prepare_dataset.py or the Hub id of a dataset made with it"


@dataclass(frozen=True)
class SegmentationInfo:
    """What a prepared dataset is. It is written under the key `segmentation` of the dataset card.

    `colors[i]` is the RGB colour of label `i`. `pixel_shares[split][class]` and `ignored_shares[split]` are shares of
    all pixels of the split's sources at the scale of the tiles, each pixel counted once; they add up to 1.
    They are 0 for a split without labels.
    `unknown_pixels[value]` counts source pixels of a mask value without a meaning that became `ignore_index`;
    `off_palette_pixels[source]` label pixels that are none of the colours exactly and were decoded to the nearest.
    `band_mean` and `band_std` are of values in 0..1 over the pixels of train, of the first split if there is no train.
    `left_out[source]` says why a broken source is not in the dataset; `source_names[split]` are those that are.
    """

    name: str
    id2label: dict[int, str]
    colors: tuple[tuple[int, int, int], ...]
    ignore_index: int
    tile_size: int
    stride: int
    scale: float
    num_tiles: dict[str, int]
    num_sources: dict[str, int]
    pixel_shares: dict[str, dict[str, float]]
    ignored_shares: dict[str, float]
    license: str | None = None
    unknown_pixels: dict[str, int] = field(default_factory=dict)
    bands: tuple[str, ...] = ("red", "green", "blue")
    band_mean: tuple[float, ...] = ()
    band_std: tuple[float, ...] = ()
    has_eroded: bool = False
    georeferenced: bool = False
    off_palette_pixels: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    may_be_shared: bool = True
    terms: str | None = None
    notes: tuple[str, ...] = ()
    source_names: dict[str, list[str]] = field(default_factory=dict)
    prepared_with: str | None = None

    @property
    def label2id(self) -> dict[str, int]:
        return {label: i for i, label in self.id2label.items()}

    @property
    def facts(self) -> DatasetFacts:
        """Name, classes, licence and terms as the record that other parts of the package take."""
        classes = tuple(SegmentationClass(self.id2label[i], color) for i, color in enumerate(self.colors))
        return DatasetFacts(
            self.name,
            classes,
            license=self.license,
            ignore_index=self.ignore_index,
            terms=self.terms,
            may_be_shared=self.may_be_shared,
        )

    def to_card(self) -> dict[str, Any]:
        """The value of the card's key `segmentation`; `from_card` reads it back."""
        content = {
            "name": self.name,
            "classes": [{"name": self.id2label[i], "color": list(color)} for i, color in enumerate(self.colors)],
            "ignore_index": self.ignore_index,
            "tile_size": self.tile_size,
            "stride": self.stride,
            "scale": self.scale,
            "bands": list(self.bands),
            "may_be_shared": self.may_be_shared,
            "has_eroded": self.has_eroded,
            "georeferenced": self.georeferenced,
            "splits": {
                split: {
                    "tiles": tiles,
                    "sources": self.num_sources[split],
                    "pixel_shares": dict(self.pixel_shares[split]),
                    "ignored_share": self.ignored_shares[split],
                    **({"source_names": list(self.source_names[split])} if split in self.source_names else {}),
                }
                for split, tiles in self.num_tiles.items()
            },
        }
        for key in ("license", "terms", "prepared_with"):
            if getattr(self, key):
                content[key] = getattr(self, key)
        for key in ("band_mean", "band_std", "notes"):
            if getattr(self, key):
                content[key] = list(getattr(self, key))
        for key in ("unknown_pixels", "off_palette_pixels", "left_out"):
            if getattr(self, key):
                content[key] = dict(getattr(self, key))
        return content

    @classmethod
    def from_card(cls, content: Mapping[str, Any]) -> "SegmentationInfo":
        splits = content["splits"]
        return cls(
            name=content["name"],
            id2label={i: entry["name"] for i, entry in enumerate(content["classes"])},
            colors=tuple(tuple(entry["color"]) for entry in content["classes"]),
            ignore_index=content["ignore_index"],
            tile_size=content["tile_size"],
            stride=content["stride"],
            scale=content["scale"],
            num_tiles={name: split["tiles"] for name, split in splits.items()},
            num_sources={name: split["sources"] for name, split in splits.items()},
            pixel_shares={name: split["pixel_shares"] for name, split in splits.items()},
            ignored_shares={name: split["ignored_share"] for name, split in splits.items()},
            license=content.get("license"),
            unknown_pixels=content.get("unknown_pixels", {}),
            bands=tuple(content.get("bands", ("red", "green", "blue"))),
            band_mean=tuple(content.get("band_mean", ())),
            band_std=tuple(content.get("band_std", ())),
            has_eroded=content.get("has_eroded", False),
            georeferenced=content.get("georeferenced", False),
            off_palette_pixels=content.get("off_palette_pixels", {}),
            left_out=content.get("left_out", {}),
            may_be_shared=content.get("may_be_shared", True),
            terms=content.get("terms"),
            notes=tuple(content.get("notes", ())),
            source_names={name: split["source_names"] for name, split in splits.items() if "source_names" in split},
            prepared_with=content.get("prepared_with"),
        )


class SegmentationSplits(DatasetDict):
    """Splits with the columns image, label (PIL images), source, row, column and those that `prepare_dataset` names for
    more bands, eroded labels and georeference, and the dataset's `info`."""

    info: SegmentationInfo

    def __init__(self, splits: Mapping[str, Any], info: SegmentationInfo):
        super().__init__(splits)
        self.info = info


class StreamedSegmentationSplits(IterableDatasetDict):
    """The same splits as `datasets.IterableDataset`s, read while they are iterated."""

    info: SegmentationInfo

    def __init__(self, splits: Mapping[str, Any], info: SegmentationInfo):
        super().__init__(splits)
        self.info = info


def load_splits(path_or_repo: str | Path, streaming: bool = False) -> SegmentationSplits | StreamedSegmentationSplits:
    """Load a dataset that `prepare_dataset` wrote, from its folder or from the Hub.

    Args:
        streaming: give `datasets.IterableDataset`s that read the parquet files as they go and keep no copy of them.

    Raises:
        UserError: no such folder or Hub dataset, no card that `prepare_dataset` wrote, or damaged data files. Of a
            streamed dataset only the splits are checked, in a folder the number of their tiles as well.
    """
    info = read_info(path_or_repo)
    try:
        splits = load_dataset(**_files(path_or_repo, info), streaming=streaming)
        found = _tiles_in_folder(Path(path_or_repo), info) if streaming else {s: len(d) for s, d in splits.items()}
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{path_or_repo}: the data files cannot be loaded ({_line(error)}); prepare it again"
        ) from None
    for split, expected in info.num_tiles.items():
        if split not in splits or found.get(split) != expected:
            raise UserError(
                f"{path_or_repo}: {split} has {found.get(split, 0)} of its {expected} tiles; prepare or download it again"
            )
    return (StreamedSegmentationSplits if streaming else SegmentationSplits)(splits, info)


def read_info(path_or_repo: str | Path) -> SegmentationInfo:
    """What the card of a prepared dataset, in a folder or on the Hub, says about it.

    Raises:
        UserError: no such folder or Hub dataset, or no card that `prepare_dataset` wrote.
    """
    try:
        return SegmentationInfo.from_card(_read_card(path_or_repo))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path_or_repo}: 'segmentation' in its card is damaged ({error!r}); prepare it again"
        ) from None


def _files(path_or_repo: str | Path, info: SegmentationInfo) -> dict[str, Any]:
    """What `load_dataset` is to load. It would take brackets in the name of a folder for a pattern."""
    if not Path(path_or_repo).is_dir():
        return {"path": str(path_or_repo)}
    folder = glob.escape(str(path_or_repo))
    files = {s: f"{folder}/data/{s}-*.parquet" for s in info.num_tiles}
    # The name becomes part of the cache's key, so that other files under an old name are read anew: of local files
    # `datasets` compares times alone, and tools that restore files restore their times.
    stats = [(path.name, path.stat()) for path in sorted(Path(path_or_repo, "data").glob("*.parquet"))]
    name = "tiles-" + Hasher.hash([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    return {"path": "parquet", "name": name, "data_files": files}


def _tiles_in_folder(folder: Path, info: SegmentationInfo) -> dict[str, int]:
    """Tiles of each split by the footers of its files; of a Hub dataset, whose files are not here, what its card says."""
    if not folder.is_dir():
        return info.num_tiles
    return {
        split: sum(pq.read_metadata(path).num_rows for path in sorted(folder.glob(f"data/{split}-*.parquet")))
        for split in info.num_tiles
    }


def _read_card(path_or_repo: str | Path) -> dict[str, Any]:
    if Path(path_or_repo).is_dir():
        card_path = Path(path_or_repo) / "README.md"
        if not card_path.is_file():
            raise UserError(f"{path_or_repo}: has no dataset card README.md; {REMEDY}")
    else:
        card_path = str(path_or_repo)
        try:
            validate_repo_id(card_path)
        except HFValidationError:
            raise UserError(f"{path_or_repo}: there is no such folder; {REMEDY}") from None
    try:
        content = DatasetCard.load(card_path, ignore_metadata_errors=True).data.to_dict().get("segmentation")
    except GatedRepoError:
        raise UserError(
            f"{path_or_repo}: is for those who ask; ask on its page of the Hub and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{path_or_repo}: no such folder, and on the Hub no such dataset or a private one; check the name, or log in "
            f"with `hf auth login`; {REMEDY}"
        ) from None
    except (OSError, EntryNotFoundError) as error:
        raise UserError(
            f"{path_or_repo}: no such folder, and not loaded from the Hub ({_line(error)}); {REMEDY}"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path_or_repo}: the head of its card is not valid YAML ({_line(error)}); {REMEDY}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path_or_repo}: its card has no key 'segmentation'; {REMEDY}")
    return content


def _line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
