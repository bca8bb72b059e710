"""Facts of segmentation datasets as data: classes, colours, splits, names of files, terms."""

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
    `ground_sampling_distance` is what a pixel is wide on the ground, in metres.
    """

    name: str
    classes: tuple[SegmentationClass, ...]
    description: str = ""
    license: str | None = None
    citation: str | None = None
    ignore_index: int = field(default=IGNORE_INDEX)
    terms: str | None = None
    may_be_shared: bool = True
    ground_sampling_distance: float | None = None

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


@dataclass(frozen=True)
class Imagery:
    """One kind of image that a dataset comes with.

    Attributes:
        name: as given to `--bands`.
        pattern: regular expression (case does not matter) on a file's path below the source.
        bands: names of the bands that are read.
        numbers: their numbers in the file, from 1.
    """

    name: str
    pattern: str
    bands: tuple[str, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class IsprsFacts:
    """One dataset of the ISPRS 2D semantic labelling contest.

    The groups of a pattern, joined by `_`, are the tile. Patterns are searched in the whole path of a file below the
    source, names of zips and folders included.

    Attributes:
        train, test: tiles of the official split.
        validation: tiles that papers take out of train for validation.
        error_tiles: train tiles with errors in the reference, which some papers leave out.
        imagery: the first one is the default.
        label, label_eroded, height: patterns of the full reference, of the reference without object boundaries, and of
            the normalised height in 8 bits (None where the dataset has none).
        example: for an error message: how an image and its label are called.
        image_words, label_words: where images and labels share their file names: words in the names of folders and
            zips that tell what is in them.
    """

    dataset: DatasetFacts
    train: tuple[str, ...]
    test: tuple[str, ...]
    validation: tuple[str, ...]
    error_tiles: tuple[str, ...]
    imagery: tuple[Imagery, ...]
    label: str
    label_eroded: str
    height: str | None
    example: str
    image_words: frozenset[str] = frozenset()
    label_words: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CityscapesFacts:
    """Cityscapes: `train_ids[i]` is the class with the id `i` in `labelIds` files; ids beyond and -1 are ignored."""

    dataset: DatasetFacts
    train_ids: tuple[int, ...]
    image: str
    label: str
    splits: dict[str, str]


ISPRS_TERMS = (
    "For research; the data must not be handed on to third parties, so the pixels are not to be published. Users get "
    "them from the ISPRS benchmark on semantic labelling and acknowledge their origin in every publication."
)
_POTSDAM_TILE = r"potsdam_0*(\d+)_0*(\d+)"

POTSDAM = IsprsFacts(
    dataset=DatasetFacts(
        name="ISPRS Potsdam",
        classes=ISPRS_CLASSES,
        description="38 true orthophotos of 6000x6000 pixels of Potsdam, 5 cm ground sampling distance.",
        license="other",
        citation="ISPRS 2D Semantic Labeling Contest - Potsdam: "
        "https://www.isprs.org/resources/datasets/benchmarks/UrbanSemLab/2d-sem-label-potsdam.aspx",
        terms=ISPRS_TERMS,
        may_be_shared=False,
        ground_sampling_distance=0.05,
    ),
    train=tuple(
        "2_10 2_11 2_12 3_10 3_11 3_12 4_10 4_11 4_12 5_10 5_11 5_12 6_7 6_8 6_9 6_10 6_11 6_12 7_7 7_8 7_9 7_10 7_11 "
        "7_12".split()
    ),
    test=tuple("2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 7_13".split()),
    validation=("2_10",),
    error_tiles=("7_10",),
    imagery=(
        Imagery("RGB", rf"top_{_POTSDAM_TILE}_RGB\.tiff?$", ("red", "green", "blue"), (1, 2, 3)),
        Imagery("IRRG", rf"top_{_POTSDAM_TILE}_IRRG\.tiff?$", ("near_infrared", "red", "green"), (1, 2, 3)),
        Imagery(
            "RGBIR", rf"top_{_POTSDAM_TILE}_RGBIR\.tiff?$", ("red", "green", "blue", "near_infrared"), (1, 2, 3, 4)
        ),
    ),
    label=rf"top_{_POTSDAM_TILE}_label\.(?:tiff?|png)$",
    label_eroded=rf"top_{_POTSDAM_TILE}_label_noBoundary\.(?:tiff?|png)$",
    height=rf"dsm_{_POTSDAM_TILE}_normalized_lastools\.jpg$",
    example="2_Ortho_RGB/top_potsdam_2_10_RGB.tif with 5_Labels_all/top_potsdam_2_10_label.tif",
)

VAIHINGEN = IsprsFacts(
    dataset=DatasetFacts(
        name="ISPRS Vaihingen",
        classes=ISPRS_CLASSES,
        description="33 true orthophotos (near infrared, red, green) of Vaihingen, 9 cm ground sampling distance.",
        license="other",
        citation="The Vaihingen data set was provided by the German Society for Photogrammetry, Remote Sensing and "
        "Geoinformation (DGPF) [Cramer, 2010]: http://www.ifp.uni-stuttgart.de/dgpf/DKEP-Allg.html.",
        terms=ISPRS_TERMS,
        may_be_shared=False,
        ground_sampling_distance=0.09,
    ),
    train=tuple("1 3 5 7 11 13 15 17 21 23 26 28 30 32 34 37".split()),
    test=tuple("2 4 6 8 10 12 14 16 20 22 24 27 29 31 33 35 38".split()),
    validation=("30",),
    error_tiles=(),
    imagery=(
        Imagery(
            "IRRG",
            r"top_mosaic_09cm_area0*(\d+)\.tiff?$",
            ("near_infrared", "red", "green"),
            (1, 2, 3),
        ),
    ),
    label=r"^(?!.*eroded).*top_mosaic_09cm_area0*(\d+)\.(?:tiff?|png)$",
    label_eroded=r"top_mosaic_09cm_area0*(\d+)_noBoundary\.(?:tiff?|png)$",
    height=None,
    example="top/top_mosaic_09cm_area1.tif with gts_for_participants/top_mosaic_09cm_area1.tif",
    image_words=frozenset("top image images imagery img imgs".split()),
    label_words=frozenset(
        "gt gts groundtruth truth label labels mask masks annotation annotations ann anns complete eroded".split()
    ),
)

_CITYSCAPES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
_CITYSCAPES_IDS = {number: train_id for train_id, (_, number, _) in enumerate(_CITYSCAPES)}

CITYSCAPES = CityscapesFacts(
    dataset=DatasetFacts(
        name="Cityscapes",
        classes=tuple(SegmentationClass(name, color) for name, _, color in _CITYSCAPES),
        description="Street scenes of 50 cities, 2048x1024 pixels, fine annotations, the 19 classes of the benchmark.",
        license="other",
        citation="M. Cordts, M. Omran, S. Ramos, T. Rehfeld, M. Enzweiler, R. Benenson, U. Franke, S. Roth and "
        "B. Schiele, The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016.",
        terms="For non-commercial research and teaching only (https://www.cityscapes-dataset.com/license/); the data "
        "must not be handed on to third parties. Publications cite the CVPR 2016 paper.",
        may_be_shared=False,
    ),
    train_ids=tuple(_CITYSCAPES_IDS.get(number, IGNORE_INDEX) for number in range(34)),
    image=r"(?:^|/)leftImg8bit/(train|val|test)/[^/]+/([^/]+)_leftImg8bit\.png$",
    label=r"(?:^|/)gtFine/(train|val|test)/[^/]+/([^/]+)_gtFine_labelIds\.png$",
    splits={"train": "train", "validation": "val", "test": "test"},
)
