"""Scores of segmentations, counted batch by batch in constant memory."""

from pathlib import Path

from drd_hf.metrics.boundary import BoundaryIoU, boundary_band
from drd_hf.metrics.confusion import TRAINER_PADDING, SegmentationMetrics, count_pairs

# evaluate.load(EVALUATE_MODULE) loads these scores as an `evaluate` metric, without the network.
EVALUATE_MODULE = str(Path(__file__).with_name("segmentation_scores"))

__all__ = ["EVALUATE_MODULE", "TRAINER_PADDING", "BoundaryIoU", "SegmentationMetrics", "boundary_band", "count_pairs"]
