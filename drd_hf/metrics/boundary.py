"""Boundary IoU: how well the outlines fit, which the IoU of large objects hides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.errors import UserError
from drd_hf.metrics.confusion import SegmentationMetrics, class_maps, equal, refuse_unknown

UNCOUNTED = -1


def boundary_band(
    ids: torch.Tensor, distance: int, known: torch.Tensor | None = None, frame_is_border: bool = True
) -> torch.Tensor:
    """Pixels within `distance` of a pixel of another class.

    The distance is the larger of the steps in x and in y, as of repeated 3x3 erosions. All classes are done at once:
    a pixel belongs to the band of its class where its window of `2 * distance + 1` holds more than one value.

    Args:
        ids: class ids `(..., H, W)`, any signed integer type, or uint8 below 255.
        distance: pixels, at least 1.
        known: bool, same shape. Where it is false there is no class: such a pixel is in no band and makes no border.
        frame_is_border: beyond the frame of the image lies another class, so the pixels along it are in the band.

    Returns:
        bool `(..., H, W)`
    """
    known = torch.ones_like(ids, dtype=torch.bool) if known is None else known
    ids = ids.to(torch.int16)
    lowest, highest = torch.iinfo(torch.int16).min, torch.iinfo(torch.int16).max
    largest = _windowed(ids.masked_fill(~known, lowest), distance, torch.maximum, lowest)
    smallest = _windowed(ids.masked_fill(~known, highest), distance, torch.minimum, highest)
    band = largest != smallest
    if frame_is_border:
        band[..., :distance, :] = band[..., -distance:, :] = True
        band[..., :, :distance] = band[..., :, -distance:] = True
    return band & known


class BoundaryIoU:
    """Streaming Boundary IoU of a semantic segmentation (Cheng et al., Boundary IoU, CVPR 2021, arXiv 2103.16562).

    For each class c: |R and P| / |R or P|, where R are the pixels of c in the reference that lie within a distance d
    of its contour, P those of c in the prediction within d of theirs. Intersections and unions are summed over all
    images before they are divided, like those of `SegmentationMetrics`. Memory: three integers for each class.

    What the definition does at the edges of the data:
        - At the frame of an image. The authors take the frame as a contour of whatever touches it, and so does the
          default. Where the frame merely cuts a larger scene into tiles, the pixels along it lie near no outline of
          an object, are mostly easy, and raise the score: evaluate whole images, or set `frame_is_border=False`.
        - At ignored pixels, which the paper does not have. They are not counted, and they are no border, neither of
          the reference nor of the prediction: nobody knows what class goes on there. References from which the
          outlines were cut out (the eroded ISPRS labels) therefore leave next to nothing to measure: use full ones.

    Args:
        id2label: class names, as for `SegmentationMetrics`.
        distance: d. At least 1: pixels, the clearer choice for images of one ground sampling distance. Below 1: share
            of the diagonal of each image, at least one pixel; the paper takes 0.02.
        ignore_index: reference value that is not counted; None counts every pixel.
        mean_over: names of the classes that the mean averages over; default all.
        frame_is_border: see above.

    >>> outlines = BoundaryIoU({0: "ground", 1: "building"}, distance=1)
    >>> outlines.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 1]]))
    >>> outlines.compute()["mean_boundary_iou"]
    1.0
    """

    def __init__(
        self,
        id2label: Mapping[int | str, str],
        distance: float = 0.02,
        ignore_index: int | None = IGNORE_INDEX,
        mean_over: Iterable[str] | None = None,
        frame_is_border: bool = True,
    ):
        if not (math.isfinite(distance) and distance > 0) or (distance >= 1 and distance != int(distance)):
            raise UserError(f"distance {distance}: give whole pixels from 1 up, or a share of the diagonal below 1")
        named = SegmentationMetrics(id2label, ignore_index, mean_over)
        self.class_names, self.mean_over, self.ignore_index = named.class_names, named.mean_over, ignore_index
        self.distance, self.frame_is_border = distance, frame_is_border
        # One more class, the pixels outside the bands: then the IoU of each other class is its Boundary IoU.
        self._bands = SegmentationMetrics({i: str(i) for i in range(len(self.class_names) + 1)}, UNCOUNTED)

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._bands.reset()

    def update(self, predictions, references) -> None:
        """Count one batch.

        Args:
            predictions: integer class ids of the shape of `references`, or float logits `(B, K, h, w)`, as for
                `SegmentationMetrics.update`.
            references: integer class ids, `(B, H, W)` or `(H, W)`.

        Raises:
            UserError: shapes that do not fit, or a value outside 0..K-1 at a pixel that is not ignored. Nothing of
                the batch is counted then.
        """
        k = len(self.class_names)
        predictions, references = class_maps(predictions, references, k)
        if references.ndim < 2:
            raise UserError(f"references have shape {tuple(references.shape)}: outlines need maps (B, H, W) or (H, W)")
        refuse_unknown(predictions, references, k, self.ignore_index)
        known = ~equal(references, self.ignore_index)
        distance = self.distance
        if distance < 1:
            distance = max(1, round(distance * math.hypot(*references.shape[-2:])))
        reference, prediction = (
            ids.to(torch.int16).masked_fill(~boundary_band(ids, int(distance), known, self.frame_is_border), k)
            for ids in (references, predictions)
        )
        self._bands.update(prediction, reference.masked_fill(~known, UNCOUNTED))

    def merge(self, other: BoundaryIoU) -> None:
        """Add the counts of `other`, which must have the same classes, distance and treatment of the frame."""
        ours, theirs = ((m.class_names, m.distance, m.frame_is_border) for m in (self, other))
        if ours != theirs:
            raise UserError(f"cannot merge a Boundary IoU of {theirs} into one of {ours}: classes, distance and frame")
        self._bands.merge(other._bands)

    def summed_over_ranks(self) -> BoundaryIoU:
        """New metrics with the counts of all ranks, as `SegmentationMetrics.summed_over_ranks`."""
        names = dict(enumerate(self.class_names))
        total = type(self)(names, self.distance, self.ignore_index, self.mean_over, self.frame_is_border)
        total._bands = self._bands.summed_over_ranks()
        return total

    def compute(self, reset: bool = False) -> dict[str, float]:
        """`mean_boundary_iou`, then `boundary_iou_<name>` for every class, from 0 to 1.

        A class without a boundary in the reference is left out of the mean; its own score is 0 where the prediction
        has one and NaN where it has not.
        """
        averaged = [str(self.class_names.index(name)) for name in self.mean_over]
        scores = self._bands.compute(reset, averaged)
        return {"mean_boundary_iou": scores["mean_iou"]} | {
            f"boundary_iou_{name}": scores[f"iou_{i}"] for i, name in enumerate(self.class_names)
        }


def _windowed(values: torch.Tensor, distance: int, of_two, beyond: int) -> torch.Tensor:
    """Largest or smallest value in the square window around each pixel: log2(window) steps for each axis.

    max_pool2d looks at every pixel of the window and knows only floats: a hundred times slower on a CPU.
    """
    window = 2 * distance + 1
    values = F.pad(values, (distance,) * 4, value=beyond)
    for axis in (-1, -2):
        seen = 1
        while seen < window:
            step = min(seen, window - seen)
            length = values.shape[axis] - step
            values = of_two(values.narrow(axis, 0, length), values.narrow(axis, step, length))
            seen += step
    return values
