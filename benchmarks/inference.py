"""What prediction by windows costs and changes, in one run.

    python benchmarks/inference.py --model runs/student        # about 20 minutes on 2 cores
    python benchmarks/inference.py --quick                     # a minute, figures of no meaning

Prints a table and writes benchmarks/results/inference.json. Rasters are 8-bit noise over a pattern; the model of the cost
is a SegFormer B0 of 6 classes with random weights (float32).

exactness   a model whose answer depends on each pixel alone: pixels of a class other than without windows
agreement   --model on --image, windows and one pass over the whole image: share of pixels with the same class
time        `predict_raster` in the time of the bare forward passes of the same windows. Each batch passes twice, once for
            each, in turns, so that a drift of the machine hits both alike
memory      peak of a process above what it had with the model loaded, one process for each size
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin
from rasterio.windows import Window
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor
from transformers.modeling_outputs import SemanticSegmenterOutput

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.report import RESULTS, write_report
from drd_hf.inference import predict_image, predict_raster
from drd_hf.models import load_image_processor, load_teacher

CLASSES = 6
PROCESSOR = SegformerImageProcessor()
IMAGE = Path(__file__).resolve().parents[2] / "shared/data/aerial_dubai/Tile 1/images/image_part_001.jpg"


class PixelModel(nn.Module):
    """Scores of six classes from the colour of each pixel alone."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.config = SegformerConfig(num_labels=CLASSES)
        self.mix = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(0))

    def forward(self, pixel_values):
        return SemanticSegmenterOutput(logits=torch.einsum("kc,bchw->bkhw", self.mix, pixel_values))


class TwicePassed(nn.Module):
    """A model that passes each batch a second time, for the time of that alone."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.device, self.dtype = model, model.config, model.device, model.dtype
        self.bare, self.passes = 0.0, 0

    def _bare(self, pixel_values):
        _wait(self.device)
        start = time.perf_counter()
        self.model(pixel_values=pixel_values)
        _wait(self.device)
        self.bare += time.perf_counter() - start

    def forward(self, pixel_values):
        self.passes += 1
        if self.passes % 2:
            self._bare(pixel_values)
        output = self.model(pixel_values=pixel_values)
        if not self.passes % 2:
            self._bare(pixel_values)
        return output


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def b0(device: str) -> SegformerForSemanticSegmentation:
    torch.manual_seed(0)
    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES)).to(device).eval()


def write_raster(path: Path, side: int) -> None:
    """Tiles of 512, deflate, as orthophotos come."""
    noise = np.random.default_rng(0).integers(0, 64, (3, 512, side), dtype=np.uint8)
    profile = {"driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
    profile |= {"transform": from_origin(5e5, 5e6, 0.05, 0.05), "compress": "deflate", "zlevel": 1}
    profile |= {"tiled": True, "blockxsize": 512, "blockysize": 512, "interleave": "pixel"}
    columns = np.arange(side)
    with rasterio.Env(GDAL_CACHEMAX=64), rasterio.open(path, "w", **profile) as dataset:
        for row in range(0, side, 512):
            rows = np.arange(row, min(row + 512, side))
            pattern = ((rows[:, None] // 40 + columns // 60) * 37 % 192).astype(np.uint8)
            dataset.write(noise[:, : len(rows)] + pattern, window=Window(0, row, side, len(rows)))


def exactness(tile: int) -> dict:
    image = np.random.default_rng(1).integers(0, 256, (1500, 1300, 3), dtype=np.uint8)
    whole = predict_image(PixelModel(), PROCESSOR, image, tile=1536)
    windows = predict_image(PixelModel(), PROCESSOR, image, tile=tile)
    return {"pixels": whole.size, "other_class": int((whole != windows).sum())}


def agreement(model, processor, image: np.ndarray, tile: int, overlap: float) -> float:
    whole = predict_image(model, processor, image, tile=max(image.shape) + 31)
    return float((predict_image(model, processor, image, tile=tile, overlap=overlap) == whole).mean())


def run_time(args, folder: Path) -> dict:
    write_raster(folder / "source.tif", args.size)
    model = TwicePassed(b0(args.device))
    start = time.perf_counter()
    options = {"tile": args.tile, "overlap": args.overlap, "batch_size": args.batch_size}
    predict_raster(model, PROCESSOR, folder / "source.tif", folder / "map.tif", **options)
    _wait(model.device)
    seconds = time.perf_counter() - start - model.bare
    return {"size": args.size, "seconds": seconds, "bare_seconds": model.bare, "ratio": seconds / model.bare}


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the most since the peak was reset."""
    return next(
        1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line
    )


def run_memory(args) -> None:
    """In a process of its own: prints bytes above the loaded model."""
    model = b0(args.device)
    loaded = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    gpu = torch.cuda.memory_allocated() if args.device == "cuda" else 0
    source = Path(args.memory_of)
    options = {"tile": args.tile, "overlap": args.overlap, "batch_size": args.batch_size}
    predict_raster(model, PROCESSOR, source, source.with_name("map.tif"), **options)
    figures = {"host_bytes": resident("VmHWM") - loaded}
    if args.device == "cuda":
        figures["gpu_bytes"] = torch.cuda.max_memory_allocated() - gpu
    print(json.dumps(figures))


def memory(args, folder: Path, side: int) -> dict:
    source = folder / f"{side}.tif"
    write_raster(source, side)
    words = ["--memory_of", str(source), "--tile", str(args.tile), "--overlap", str(args.overlap)]
    words += ["--batch_size", str(args.batch_size), "--device", args.device]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    for path in folder.glob("*.tif*"):
        path.unlink()
    return {"size": side, **json.loads(done.stdout.splitlines()[-1])}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Checkpoint for the agreement; without one, a random B0, whose classes are close to ties.")
    add("--image", default=str(IMAGE))
    add("--size", type=int, default=6000)
    add("--large", type=int, default=12000, help="The second size for memory.")
    add("--tile", type=int, default=512)
    add("--overlap", type=float, default=0.25)
    add("--batch_size", type=int, default=4)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="Sizes 1000 and 2000, windows of 128.")
    add("--output", default=str(RESULTS / "inference.json"))
    add("--memory_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.size, args.large, args.tile = 1000, 2000, 128
    return args


def main() -> None:
    args = parse()
    if args.memory_of:
        return run_memory(args)
    figures = {"tile": args.tile, "overlap": args.overlap, "batch_size": args.batch_size, "classes": CLASSES}
    figures["exactness"] = exactness(args.tile)
    print("exactness: {other_class} of {pixels} pixels differ".format(**figures["exactness"]))
    if Path(args.image).is_file():
        image = np.asarray(Image.open(args.image).convert("RGB"))
        pair = (load_teacher(args.model), load_image_processor(args.model)) if args.model else (b0("cpu"), PROCESSOR)
        shares = {tile: agreement(*pair, image, tile, args.overlap) for tile in (256, 512)}
        figures["agreement"] = {"model": args.model, "image": list(image.shape), "by_tile": shares}
        print("agreement: " + ", ".join(f"{100 * share:.2f} % (tile {tile})" for tile, share in shares.items()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures["time"] = run_time(args, folder)
        print(
            "time, {size}: {seconds:.1f} s, bare passes {bare_seconds:.1f} s, ratio {ratio:.3f}".format(
                **figures["time"]
            )
        )
        for path in folder.glob("*.tif*"):
            path.unlink()
        figures["memory"] = [memory(args, folder, side) for side in (args.size, args.large)]
    for row in figures["memory"]:
        print(
            f"memory, {row['size']}: "
            + ", ".join(f"{key} {value / 1e6:.0f} MB" for key, value in row.items() if key != "size")
        )
    write_report(args.output, args.device, **figures)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
