"""Which classes a mean is taken over and which reference is compared with, by the names that papers use."""

from dataclasses import dataclass

from drd_hf.data.facts import CITYSCAPES, ISPRS_CLASSES
from drd_hf.data.splits import SegmentationInfo
from drd_hf.errors import UserError, nearest
from drd_hf.metrics import BoundaryIoU, SegmentationMetrics

PROTOCOLS = ("isprs", "cityscapes", "plain")
REFERENCES = ("full", "eroded", "both")
# What a dataset says in its notes whose only reference is the eroded one.
ONLY_ERODED = "Labels are the reference with eroded boundaries"
MEANS = ("mean_iou", "mean_f1", "mean_accuracy")


@dataclass(frozen=True)
class Protocol:
    """How scores are counted.

    All scores of one reference come from one confusion matrix of all classes over all images. A group of classes
    changes the means alone: pixels of a class outside it still count against the others, and overall accuracy and
    kappa are those of all classes.

    - `isprs`: means over the five classes without clutter and over all six, for the full and the eroded reference;
      overall accuracy over six. Means over five with the eroded reference is what most papers report (as GeoSeg).
    - `cityscapes`: means over the 19 classes.
    - `plain`: means over all classes of the dataset, whatever they are.

    Attributes:
        name: one of `PROTOCOLS`, with what was done beside whole images at their own scale: `isprs-tiles`, `isprs-tta`.
        groups: names of the classes of each mean; the last group has all classes.
    """

    name: str
    groups: dict[str, tuple[str, ...]]

    def scores(
        self, metrics: dict[str, SegmentationMetrics], outlines: dict[str, BoundaryIoU] | None = None
    ) -> dict[str, float]:
        """Scores under keys that say the protocol: `isprs/eroded/5_classes/mean_iou`.

        Scores of single classes, overall accuracy and kappa do not depend on the group and stand in that of all classes.

        Args:
            metrics: by reference, `full` or `eroded`.
            outlines: the Boundary IoU by reference; its keys end with the distance, `mean_boundary_iou_5px`.
        """
        scores, everything = {}, list(self.groups)[-1]
        for reference, counted in metrics.items():
            outline = (outlines or {}).get(reference)
            for group, names in self.groups.items():
                found = counted.compute(mean_over=names)
                if outline is not None:
                    distance = distance_label(outline.distance)
                    found |= {f"{key}_{distance}": value for key, value in _over(outline, names).compute().items()}
                start = f"{self.name}/{reference}/{group}"
                scores |= {
                    f"{start}/{key}": value
                    for key, value in found.items()
                    if group == everything or key.startswith("mean_")
                }
        return scores


def find_protocol(name: str, info: SegmentationInfo, suffix: str = "") -> Protocol:
    """The protocol of a dataset.

    Args:
        name: one of `PROTOCOLS`, or `auto`: the one that has the classes of the dataset.
        suffix: of the protocol's name, such as `-tiles`.

    Raises:
        UserError: unknown name, or a protocol of other classes than the dataset has.
    """
    classes = tuple(info.id2label[i] for i in range(len(info.id2label)))
    known = {
        "isprs": tuple(c.name for c in ISPRS_CLASSES),
        "cityscapes": tuple(c.name for c in CITYSCAPES.dataset.classes),
    }
    if name == "auto":
        name = next((protocol for protocol, its in known.items() if set(its) == set(classes)), "plain")
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}; nearest: {nearest(name, ('auto', *PROTOCOLS))}")
    if name in known and set(known[name]) != set(classes):
        raise UserError(
            f"protocol {name} is for the classes {', '.join(known[name])}, and {info.name} has {', '.join(classes)}: "
            "take protocol plain"
        )
    groups = {f"{len(classes)}_classes": classes}
    if name == "isprs":
        groups = {"5_classes": tuple(c for c in classes if c != "clutter")} | groups
    return Protocol(name + suffix, groups)


def references_of(info: SegmentationInfo, chosen: str | None = None) -> dict[str, str]:
    """Name of each reference of a dataset (`full`, `eroded`) -> its column.

    Args:
        chosen: `full`, `eroded`, or `both`. None: all that the dataset has.

    Raises:
        UserError: the dataset does not have what was chosen.
    """
    if any(note.startswith(ONLY_ERODED) for note in info.notes):
        found = {"eroded": "label"}
    else:
        found = {"full": "label"} | ({"eroded": "label_eroded"} if info.has_eroded else {})
    if chosen is not None and chosen not in REFERENCES:
        raise UserError(f"unknown reference {chosen!r}; nearest: {nearest(chosen, REFERENCES)}")
    wanted = list(found) if chosen is None else ["full", "eroded"] if chosen == "both" else [chosen]
    for name in wanted:
        if name not in found:
            raise UserError(
                f"{info.name} has no {name} reference, only the {next(iter(found))} one: prepare it with both, or take "
                "the one that it has"
            )
    return {name: found[name] for name in wanted}


def distance_label(distance: float) -> str:
    """How a key names the width of the boundary: pixels, or a share of the image's diagonal."""
    return f"{distance:g}px" if distance >= 1 else f"{100 * distance:g}%"


def _over(outlines: BoundaryIoU, names: tuple[str, ...]) -> BoundaryIoU:
    """The same counts with means over other classes."""
    id2label = dict(enumerate(outlines.class_names))
    of_names = BoundaryIoU(id2label, outlines.distance, outlines.ignore_index, names, outlines.frame_is_border)
    of_names.merge(outlines)
    return of_names
