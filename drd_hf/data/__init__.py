"""From raw imagery to splits of tiles, and from tiles to batches."""

_EXPORTS = {
    "CITYSCAPES": "facts",
    "IGNORE_INDEX": "facts",
    "ISPRS_CLASSES": "facts",
    "POTSDAM": "facts",
    "VAIHINGEN": "facts",
    "DatasetFacts": "facts",
    "SegmentationClass": "facts",
    "SourceHeader": "source",
    "SourceImage": "source",
    "SourceReader": "source",
    "find_isprs": "isprs",
    "find_cityscapes": "cityscapes",
    "FolderLayout": "folder",
    "FolderReader": "folder",
    "FolderRecord": "folder",
    "find_pairs": "folder",
    "folder_reader": "folder",
    "read_layout": "folder",
    "covered_before": "tiles",
    "cut_tiles": "tiles",
    "tile_origins": "tiles",
    "prepare_dataset": "prepare",
    "SegmentationInfo": "splits",
    "SegmentationSplits": "splits",
    "StreamedSegmentationSplits": "splits",
    "load_splits": "splits",
    "EvalTransform": "transforms",
    "SegmentationCollator": "transforms",
    "TrainTransform": "transforms",
}

__all__ = list(_EXPORTS)


def __getattr__(name):  # imports what is used: each process of the converter saves the 600 MB and seconds of torch
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
