"""What the conversion of a Potsdam tile costs, and how fast its tiles are fed to a model, on one core.

    python benchmarks/data.py                                  # about 6 minutes
    python benchmarks/data.py --images ../shared/data/aerial_dubai --rounds 5

Conversion: one image of 6000 x 6000 RGB pixels and its colour label, as uncompressed and LZW-compressed TIFF in the official
layout, becomes tiles of 512 pixels. The pixels are a mosaic of real aerial images where there are some (--images), else of
generated scenes.

plain     Pillow opens both files, six comparisons of all pixels with a colour give the label, every tile is saved as a PNG of
          Pillow's default settings
package   `find_isprs` and `prepare_dataset`, one process: parquet files with a card, everything counted and checked
floor     the package's decoder and encoder alone, labels known beforehand: no label is decoded, nothing counted or written

Feeding: compressed tiles of that dataset become normalised tensors of 512 pixels: random scale and crop, flips, quarter
turns, and colour jitter of every other tile. The peer does the same with Pillow and NumPy. Methods take turns in another
order in every round; medians. Prints tables and writes benchmarks/results/data.json.
"""

import argparse
import io
import itertools
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import disable_progress_bars
from PIL import Image, ImageEnhance
from transformers import SegformerImageProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.report import RESULTS, write_report
from drd_hf import load_splits
from drd_hf.data.facts import ISPRS_CLASSES, POTSDAM
from drd_hf.data.isprs import find_isprs
from drd_hf.data.prepare import prepare_dataset
from drd_hf.data.prepare.shards import _png
from drd_hf.data.rasters import read_raster
from drd_hf.data.scenes import generate_scene
from drd_hf.data.tiles import tile_origins
from drd_hf.data.transforms import (
    ColorJitterOfThree,
    RandomQuarterTurn,
    RandomScaledCrop,
    SegmentationCollator,
    TrainTransform,
    _to_tv_tensors,
    undecoded,
)

TILE = 512
NAME = "2_10"
COLORS = np.array([c.color for c in ISPRS_CLASSES], np.uint8)

# Nobody measured the following on an H100 for this table; the figures are assumptions, and are called so.
B0_FLOPS = 2 * 8.4e9  # forward at 512 x 512: 8.4 G multiplications with additions, as the SegFormer paper counts them
B2_FLOPS = 2 * 62.4e9
H100_FLOPS = 989e12  # dense bfloat16
UTILISATION = 0.05  # of that, of a small model of narrow layers, with optimizer, loss and resizing of logits
CORES = 16  # beside one GPU


# The source


def mosaic(images: Path | None, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (side, side, 3) and labels uint8 (side, side) of six classes, of blocks of at most 500 pixels."""
    pixels, labels = np.empty((side, side, 3), np.uint8), np.empty((side, side), np.uint8)
    blocks = itertools.cycle(_real_blocks(images) if images else _generated_blocks())
    for top, left in itertools.product(range(0, side, 500), repeat=2):
        block, label = next(blocks)
        height, width = pixels[top : top + 500, left : left + 500].shape[:2]
        pixels[top : top + 500, left : left + 500] = block[:height, :width]
        labels[top : top + 500, left : left + 500] = label[:height, :width]
    return pixels, labels


def _real_blocks(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    blocks = []
    for path in sorted(folder.glob("*/images/*.jpg")):
        image = Image.open(path).convert("RGB")
        mask = Image.open(path.parents[1] / "masks" / f"{path.stem}.png").convert("RGB")
        if min(image.size) < 500:
            continue
        image, mask = (np.asarray(x.crop((0, 0, 500, 500))) for x in (image, mask))
        # Any six classes will do: the colours of the mask, numbered in order.
        _, label = np.unique(mask.reshape(-1, 3), axis=0, return_inverse=True)
        blocks.append((image, (label.reshape(500, 500) % 6).astype(np.uint8)))
    return blocks


def _generated_blocks() -> list[tuple[np.ndarray, np.ndarray]]:
    return [(image, label % 6) for image, label in (generate_scene(seed, 500) for seed in range(8))]


def write_source(folder: Path, pixels: np.ndarray, labels: np.ndarray) -> tuple[Path, Path]:
    image = folder / "2_Ortho_RGB" / f"top_potsdam_{NAME}_RGB.tif"
    label = folder / "5_Labels_all" / f"top_potsdam_{NAME}_label.tif"
    for path in (image, label):
        path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(image)
    Image.fromarray(COLORS[labels]).save(label, compression="tiff_lzw")
    return image, label


# Conversion


def windows(side: int):
    for row, column in itertools.product(tile_origins(side, TILE, TILE), repeat=2):
        yield row, column, np.s_[row : row + TILE, column : column + TILE]


def plain(image: Path, label: Path, output: Path) -> None:
    output.mkdir()
    pixels, mask = (np.asarray(Image.open(path)) for path in (image, label))
    classes = np.full(mask.shape[:2], 255, np.uint8)
    for index, color in enumerate(COLORS):
        classes[(mask == color).all(axis=-1)] = index
    for row, column, window in windows(len(classes)):
        Image.fromarray(pixels[window]).save(output / f"{row}_{column}.png")
        Image.fromarray(classes[window]).save(output / f"{row}_{column}_label.png")


def package(source: Path, output: Path) -> None:
    others = [tile for tile in (*POTSDAM.train, *POTSDAM.test) if tile != NAME]
    sources, reader, facts, notes = find_isprs(POTSDAM, source, validation=[], leave_out=others)
    prepare_dataset(sources, reader, facts, output, TILE, notes=notes)


def floor(image: Path, label: Path, labels: np.ndarray) -> None:
    pixels, _ = read_raster(image).pixels, read_raster(label).pixels
    for _, _, window in windows(len(labels)):
        _png(pixels[window])
        _png(labels[window])


def check_labels(output: Path, labels: np.ndarray) -> None:
    tiles = load_splits(output)["train"]
    for tile in tiles:
        window = np.s_[tile["row"] : tile["row"] + TILE, tile["column"] : tile["column"] + TILE]
        if not np.array_equal(np.asarray(tile["label"]), labels[window]):
            sys.exit(f"the label of the tile at {tile['row']}, {tile['column']} is not what was written")


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


# Feeding


def peer(row: dict, rng: random.Random) -> torch.Tensor:
    """The same variations as `TrainTransform`, with Pillow and NumPy, up to normalised tensors."""
    image, label = (Image.open(io.BytesIO(row[name]["bytes"])) for name in ("image", "label"))
    image.load()
    window = round(TILE / rng.uniform(0.5, 2.0))
    best = 2.0, None
    for _ in range(10):
        left, top = (rng.randint(*sorted((0, length - window))) for length in label.size)
        counts = np.bincount(np.asarray(label.crop((left, top, left + window, top + window))).ravel(), minlength=256)
        share = counts[:255].max() / max(counts[:255].sum(), 1)
        best = min(best, (share, (left, top)))
        if share <= 0.75 or window >= max(label.size):
            break
    left, top = best[1]
    ignored = Image.new("L", (window, window), 255)
    ignored.paste(label, (-left, -top))
    image = image.crop((left, top, left + window, top + window)).resize((TILE, TILE), Image.Resampling.BILINEAR)
    label = ignored.resize((TILE, TILE), Image.Resampling.NEAREST)
    jitter = rng.random() < 0.5
    if jitter:
        steps = [
            lambda x: ImageEnhance.Brightness(x).enhance(rng.uniform(0.8, 1.2)),
            lambda x: ImageEnhance.Contrast(x).enhance(rng.uniform(0.7, 1.3)),
            lambda x: ImageEnhance.Color(x).enhance(rng.uniform(0.7, 1.3)),
            lambda x: _pillow_hue(x, rng.uniform(-0.03, 0.03)),
        ]
        for step in rng.sample(steps, 4):
            image = step(image)
    image, label = np.asarray(image), np.asarray(label)
    if rng.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    if rng.random() < 0.5:
        image, label = image[::-1], label[::-1]
    turns = rng.randrange(4)
    image, label = np.rot90(image, turns), np.rot90(label, turns)
    image = (image.astype(np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(label.astype(np.int64))


MEAN, STD = (np.array(x, np.float32) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def _pillow_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.uint8(round(turns * 255) % 256))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def feeding(rows: list[dict], rounds: int) -> dict[str, float]:
    """Median seconds a tile: whole pipelines, and the stages of ours."""
    transform, collate = TrainTransform(TILE), SegmentationCollator(SegformerImageProcessor(do_resize=False))
    rng = random.Random(0)

    def ours(row):
        out = transform({name: [row[name]] for name in ("image", "label")})
        return collate([{name: values[0] for name, values in out.items()}])

    decoded = {id(row): _to_tv_tensors(row["image"], None, row["label"]) for row in rows}
    crop = RandomScaledCrop(TILE, (0.5, 2.0), 0.75)
    jitter = ColorJitterOfThree(brightness=0.2, contrast=0.3, saturation=0.3, hue=0.03)
    turn = RandomQuarterTurn()
    methods = {
        "package": ours,
        "Pillow and NumPy": lambda row: peer(row, rng),
        "decode": lambda row: _to_tv_tensors(row["image"], None, row["label"]),
        "decode with Pillow": lambda row: [
            np.asarray(Image.open(io.BytesIO(row[name]["bytes"]))) for name in ("image", "label")
        ],
        "scale and crop": lambda row: crop(*decoded[id(row)]),
        "quarter turn": lambda row: turn(*decoded[id(row)]),
        "jitter, where it is": lambda row: jitter(*decoded[id(row)]),
        "normalise and stack": lambda row: collate(
            [dict(zip(("image", "labels"), (x.as_subclass(torch.Tensor) for x in decoded[id(row)]), strict=True))]
        ),
    }
    return turns({name: lambda f=f: [f(row) for row in rows] for name, f in methods.items()}, rounds, len(rows))


def turns(methods: dict, rounds: int, share: int = 1) -> dict[str, float]:
    """Median seconds of each, run one after another, forwards and backwards in turn; one more round warms up."""
    seconds = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name in list(methods)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            methods[name]()
            seconds[name].append((time.perf_counter() - start) / share)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "aerial_dubai"
    parser.add_argument(
        "--images", type=Path, default=beside if beside.is_dir() else None, help="folder of real images"
    )
    parser.add_argument("--side", type=int, default=6000, help="of the image in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=48, help="number of tiles in a round of feeding")
    parser.add_argument("--output", default=RESULTS / "data.json", help="JSON file")
    parser.add_argument("--peak_of", nargs=2, metavar=("SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)
    if args.peak_of:
        before = peak_memory()
        package(*map(Path, args.peak_of))
        print(before, peak_memory())
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pixels, labels = mosaic(args.images, args.side)
        image, label = write_source(folder / "source", pixels, labels)
        places = (folder / f"{i}" for i in itertools.count())
        conversion = turns(
            {
                "plain": lambda: plain(image, label, next(places)),
                "package": lambda: package(folder / "source", next(places)),
                "floor": lambda: floor(image, label, labels),
            },
            args.rounds,
        )
        tiles = folder / "tiles"
        peak = [sys.executable, __file__, "--peak_of", str(folder / "source"), str(tiles)]
        done = subprocess.run(peak, capture_output=True, text=True, check=True).stdout
        idle, peak = (int(word) / 1e6 for word in done.split()[-2:])
        check_labels(tiles, labels)
        dataset = undecoded(load_splits(tiles)["train"])
        rows = [dataset[i] for i in range(min(args.tiles, len(dataset)))]
    fed = feeding(rows, args.rounds)

    rate = 1 / fed["package"]
    wanted = {
        "student alone": UTILISATION * H100_FLOPS / (3 * B0_FLOPS),
        "distillation from B2": UTILISATION * H100_FLOPS / (3 * B0_FLOPS + B2_FLOPS),
    }
    print(f"conversion of {args.side} x {args.side} pixels{'':8}time   x plain   x floor")
    for method, seconds in conversion.items():
        print(
            f"{method:34}{seconds:9.2f}s{conversion['plain'] / seconds:9.2f}{seconds / conversion['floor']:10.2f}",
        )
    print(f"peak memory of the package's process {peak:.0f} MB, {idle:.0f} MB of it before the conversion")
    print("labels are byte-exact")
    print(f"\nfeeding of {TILE} x {TILE} pixels{'':16}time   tiles/s a core")
    for method, seconds in fed.items():
        print(f"{method:34}{1e3 * seconds:8.2f}ms{1 / seconds:12.0f}")
    print(f"package over Pillow and NumPy: {fed['Pillow and NumPy'] / fed['package']:.2f}x")
    for what, tiles_a_second in wanted.items():
        print(
            f"one H100, {what}: {tiles_a_second:.0f} tiles/s assumed, {UTILISATION:.0%} of {H100_FLOPS / 1e12:.0f} TFLOPS, "
            f"are {tiles_a_second / rate:.1f} cores; {CORES} cores give {CORES * rate:.0f}"
        )
    write_report(
        args.output,
        "cpu",
        side=args.side,
        pixels="real images" if args.images else "generated scenes",
        rounds=args.rounds,
        conversion_seconds={name: round(seconds, 3) for name, seconds in conversion.items()},
        times_faster_than_plain=round(conversion["plain"] / conversion["package"], 3),
        times_floor=round(conversion["package"] / conversion["floor"], 3),
        labels_byte_exact=True,
        peak_megabytes=round(peak),
        idle_megabytes=round(idle),
        feeding_milliseconds={name: round(1e3 * seconds, 3) for name, seconds in fed.items()},
        tiles_a_second_a_core=round(rate, 1),
        times_pillow_and_numpy=round(fed["Pillow and NumPy"] / fed["package"], 3),
        assumed_h100={
            "utilisation": UTILISATION,
            "peak_flops": H100_FLOPS,
            "student_forward_flops": B0_FLOPS,
            "teacher_forward_flops": B2_FLOPS,
            "tiles_a_second": {what: round(value) for what, value in wanted.items()},
            "cores_needed": {what: round(value / rate, 1) for what, value in wanted.items()},
        },
    )


if __name__ == "__main__":
    main()
