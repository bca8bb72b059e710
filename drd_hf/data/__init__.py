"""From raw imagery to splits of tiles, and from tiles to batches."""

from drd_hf.data.facts import IGNORE_INDEX, ISPRS_CLASSES, DatasetFacts, SegmentationClass
from drd_hf.data.folder import FolderLayout, FolderRecord, find_pairs, read_layout, read_pair
from drd_hf.data.prepare import prepare_dataset
from drd_hf.data.splits import SegmentationInfo, SegmentationSplits, load_splits
from drd_hf.data.tiles import covered_before, cut_tiles, tile_origins
from drd_hf.data.transforms import EvalTransform, SegmentationCollator, TrainTransform

__all__ = [
    "IGNORE_INDEX",
    "ISPRS_CLASSES",
    "DatasetFacts",
    "EvalTransform",
    "FolderLayout",
    "FolderRecord",
    "SegmentationClass",
    "SegmentationCollator",
    "SegmentationInfo",
    "SegmentationSplits",
    "TrainTransform",
    "covered_before",
    "cut_tiles",
    "find_pairs",
    "load_splits",
    "prepare_dataset",
    "read_layout",
    "read_pair",
    "tile_origins",
]
