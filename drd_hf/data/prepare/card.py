"""What a prepared dataset is, from the counts of its shards, and the card that says so."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import DatasetInfo, SplitDict, SplitInfo
from huggingface_hub import DatasetCard, DatasetCardData

from drd_hf import __version__
from drd_hf.data.facts import DatasetFacts
from drd_hf.data.prepare.shards import Conversion, ShardCounts
from drd_hf.data.splits import SegmentationInfo

TEMPLATE = Path(__file__).parents[2] / "templates" / "dataset_card.md.jinja"
NAMES_IN_TEXT = 60  # of a split's sources; the head of the card has all


def describe(
    conversion: Conversion,
    counts: Mapping[str, Sequence[ShardCounts]],
    left_out: Mapping[str, str],
    notes: Sequence[str],
) -> SegmentationInfo:
    """The info of a dataset whose splits have these shards."""
    facts, shards = conversion.facts, [shard for split in counts.values() for shard in split]
    shares = {split: _shares([shard.labels for shard in parts]) for split, parts in counts.items()}
    measured = counts.get("train") or next(iter(counts.values()))
    mean, std = band_statistics([_sums(bands) for bands in zip(*(shard.bands for shard in measured), strict=True)])
    return SegmentationInfo(
        name=facts.name,
        id2label=facts.id2label,
        colors=tuple(c.color for c in facts.classes),
        ignore_index=facts.ignore_index,
        tile_size=conversion.tile_size,
        stride=conversion.stride,
        scale=float(conversion.scale),
        num_tiles={split: sum(shard.tiles for shard in parts) for split, parts in counts.items()},
        num_sources={split: sum(len(shard.names) for shard in parts) for split, parts in counts.items()},
        pixel_shares={
            split: {name: share[i] for i, name in facts.id2label.items()} for split, share in shares.items()
        },
        ignored_shares={split: share[facts.ignore_index] for split, share in shares.items()},
        license=facts.license,
        unknown_pixels=dict(sum((Counter(shard.unknown) for shard in shards), Counter()).most_common(20)),
        bands=tuple(conversion.reader.bands),
        band_mean=mean,
        band_std=std,
        has_eroded=conversion.eroded,
        georeferenced=conversion.georeferenced,
        off_palette_pixels={name: pixels for shard in shards for name, pixels in shard.off_palette.items()},
        left_out={**left_out, **{name: why for shard in shards for name, why in shard.left_out.items()}},
        may_be_shared=facts.may_be_shared,
        terms=facts.terms,
        notes=tuple(notes),
        source_names={split: [name for shard in parts for name in shard.names] for split, parts in counts.items()},
        prepared_with=f"drd_hf {__version__}",
    )


def band_statistics(counts: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each band, in 0..1, from how many pixels have each of the values 0 to 255."""
    means, deviations = [], []
    for band in counts:
        pixels = max(sum(band), 1)
        total = sum(value * count for value, count in enumerate(band))
        squares = sum(value**2 * count for value, count in enumerate(band))
        means.append(round(total / pixels / 255, 6))
        # In whole numbers up to the division, so that the order of the shards cannot show.
        deviations.append(round(math.sqrt((pixels * squares - total**2) / pixels**2) / 255, 6))
    return tuple(means), tuple(deviations)


def _sums(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(values) for values in zip(*rows, strict=True)]


def _shares(labels: Sequence[Sequence[int]]) -> list[float]:
    counts = _sums(labels)
    return [round(count / max(sum(counts), 1), 6) for count in counts]


def render_card(conversion: Conversion, info: SegmentationInfo, counts: Mapping[str, Sequence[ShardCounts]]) -> str:
    """The dataset card, README.md, of a dataset with these shards."""
    facts: DatasetFacts = conversion.facts
    splits = SplitDict()
    for split, parts in counts.items():
        splits.add(SplitInfo(split, num_bytes=sum(p.image_bytes for p in parts), num_examples=info.num_tiles[split]))
    shards = [shard for parts in counts.values() for shard in parts]
    features = DatasetInfo(
        features=conversion.features,
        splits=splits,
        download_size=sum(shard.file_bytes for shard in shards if shard.tiles),
        dataset_size=sum(shard.image_bytes for shard in shards),
    )
    # The Hub takes identifiers such as cc0-1.0; any other terms are "other" there and stand in the text.
    license_id = info.license if re.fullmatch(r"[a-z0-9.-]+", info.license or "") else "other"
    data = DatasetCardData(
        **({"license": license_id} if info.license or info.terms else {}),
        task_categories=["image-segmentation"],
        pretty_name=info.name,
        tags=["semantic-segmentation", "aerial-imagery", "drd_hf"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in counts],
            }
        ],
        dataset_info=features._to_yaml_dict(),
        segmentation=info.to_card(),
    )
    card = DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        facts=facts,
        info=info,
        columns=list(conversion.features),
        labelled={split: any(sum(part.labels) for part in parts) for split, parts in counts.items()},
        names_in_text=NAMES_IN_TEXT,
    )
    return f"{str(card).rstrip()}\n"
