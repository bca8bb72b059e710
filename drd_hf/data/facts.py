"""Facts of a segmentation dataset as data: classes, colours, ignore value, terms."""

from dataclasses import dataclass, field

IGNORE_INDEX = 255


@dataclass(frozen=True)
class SegmentationClass:
    """One class: its name and the RGB colour (0-255) it is drawn with."""

    name: str
    color: tuple[int, int, int]


@dataclass(frozen=True)
class DatasetFacts:
    """What does not change about a dataset. `classes[i]` is the class with label `i`; 255 is ignored everywhere.

    `may_be_shared` is False where the terms forbid to hand the pixels on; `terms` says in words what they ask for.
    """

    name: str
    classes: tuple[SegmentationClass, ...]
    description: str = ""
    license: str | None = None
    citation: str | None = None
    ignore_index: int = field(default=IGNORE_INDEX)
    terms: str | None = None
    may_be_shared: bool = True

    @property
    def id2label(self) -> dict[int, str]:
        return {i: c.name for i, c in enumerate(self.classes)}


# Class order and colours of the ISPRS 2D semantic labelling contest (Potsdam and Vaihingen).
ISPRS_CLASSES = (
    SegmentationClass("impervious_surface", (255, 255, 255)),
    SegmentationClass("building", (0, 0, 255)),
    SegmentationClass("low_vegetation", (0, 255, 255)),
    SegmentationClass("tree", (0, 255, 0)),
    SegmentationClass("car", (255, 255, 0)),
    SegmentationClass("clutter", (255, 0, 0)),
)
