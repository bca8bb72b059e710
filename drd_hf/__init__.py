"""Dual Relation Distillation for small, fast, accurate segmentation models of aerial images."""

__version__ = "0.1.0"

_EXPORTS = {
    "spatial_relation_map": "relations",
    "channel_relation_map": "relations",
    "spatial_relation_distance": "relations",
    "channel_relation_distance": "relations",
    "DistillationLoss": "losses",
    "AlignedRelationLoss": "losses",
    "DualRelationLoss": "losses",
    "PixelLogitLoss": "losses",
    "FeatureHooks": "features",
    "SegmentationConfig": "trainer",
    "SegmentationTrainer": "trainer",
    "DistillationConfig": "trainer",
    "DistillationTrainer": "trainer",
    "SegmentationMetrics": "metrics",
    "BoundaryIoU": "metrics",
    "predict_image": "inference",
    "predict_raster": "inference",
    "draw_relations": "relation_pictures",
    "load_splits": "data",
    "prepare_dataset": "data",
    "push_dataset": "hub",
    "push_model": "hub",
    "check_widget_ready": "hub",
    "load_teacher": "models",
    "load_student": "models",
    "load_image_processor": "models",
    "export_onnx": "export",
    "OnnxSegmenter": "export",
    "UserError": "errors",
}

__all__ = list(_EXPORTS)


def __getattr__(name):  # imports what is used: the converter does not wait for transformers
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
