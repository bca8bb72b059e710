"""What counting costs: our metrics and the `mean_iou` form of `evaluate`, on the same arrays in one run.

    python benchmarks/metrics.py                   # about 3 minutes on 2 cores
    python benchmarks/metrics.py --tiles 0         # times only

Prints a table and writes benchmarks/results/metrics.json. Batches of 8 class maps of 512x512 with their references:
blocks of 16 pixels, a fifth of the pixels predicted at random, the outlines of the blocks ignored. Columns:

time      milliseconds of one batch: four batches and, in `evaluate`, the scores, divided by four; median; the methods take
          turns, so that a drift of the machine hits all alike
x peer    time of the mean_iou form (per image, three histograms) divided by this time
memory    growth of the process's peak while so many tiles were counted, and of what stays, after a first batch
disk      files in the cache of `evaluate` before the scores are computed
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_EVALUATE_OFFLINE"] = "1"  # before evaluate is imported

import datasets
import evaluate
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from drd_hf.metrics import EVALUATE_MODULE, BoundaryIoU, SegmentationMetrics, boundary_band

RESULTS = Path(__file__).resolve().parent / "results"
BATCH, SIDE, IGNORED = 8, 512, 255


def maps(num_labels: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and references, (8, 512, 512)."""
    rng = np.random.default_rng(0)
    references = rng.integers(0, num_labels, (BATCH, SIDE // 16, SIDE // 16)).repeat(16, axis=1).repeat(16, axis=2)
    wrong = rng.random(references.shape) < 0.2
    predictions = np.where(wrong, rng.integers(0, num_labels, references.shape), references)
    references[boundary_band(torch.from_numpy(references), 1, frame_is_border=False).numpy()] = IGNORED
    return predictions.astype(dtype), references.astype(dtype)


def mean_iou_counts(predictions, references, num_labels: int) -> list[np.ndarray]:
    """Intersection and union of each class, summed over the images, as mean_iou of evaluate defines them."""
    total = [np.zeros(num_labels), np.zeros(num_labels)]
    for prediction, reference in zip(predictions, references, strict=True):
        prediction, reference = np.array(prediction), np.array(reference)
        counted = reference != IGNORED
        prediction, reference = prediction[counted], reference[counted]
        intersection, predicted, in_reference = (
            np.histogram(ids, bins=num_labels, range=(0, num_labels - 1))[0]
            for ids in (prediction[prediction == reference], prediction, reference)
        )
        total[0] += intersection
        total[1] += predicted + in_reference - intersection
    return total


class MeanIou(evaluate.Metric):
    """mean_iou as a metric of evaluate: every map goes through its Arrow cache."""

    def _info(self):
        ids = datasets.List(datasets.List(datasets.Value("uint16")))
        features = datasets.Features({"predictions": ids, "references": ids})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, num_labels):
        intersection, union = mean_iou_counts(predictions, references, num_labels)
        return {"mean_iou": float(np.nanmean(intersection / union))}


def counter(method: str, num_labels: int, cache: str):
    """(count a batch, scores), both functions."""
    if method == "SegmentationMetrics":
        metrics = SegmentationMetrics({i: str(i) for i in range(num_labels)})
        return metrics.update, lambda: metrics.compute(reset=True)
    if method == "SegmentationMetrics in evaluate":
        metrics = evaluate.load(EVALUATE_MODULE, num_labels=num_labels, cache_dir=cache)
        return lambda p, r: metrics.add_batch(predictions=p, references=r), metrics.compute
    if method == "BoundaryIoU":
        metrics = BoundaryIoU({i: str(i) for i in range(num_labels)})
        return metrics.update, lambda: metrics.compute(reset=True)
    if method == "mean_iou form":
        total = np.zeros((2, num_labels))
        return lambda p, r: np.add(total, mean_iou_counts(p, r, num_labels), out=total), lambda: {
            "mean_iou": float(np.nanmean(total[0] / total[1]))
        }
    metrics = MeanIou(cache_dir=cache)
    add = lambda p, r: metrics.add_batch(predictions=p, references=r)  # noqa: E731
    return add, lambda: metrics.compute(num_labels=num_labels)


METHODS = (
    "SegmentationMetrics",
    "SegmentationMetrics in evaluate",
    "BoundaryIoU",
    "mean_iou form",
    "mean_iou in evaluate",
)
OWN_ROUNDS = {"mean_iou in evaluate": 2}  # half a second a batch
TIMES = 4


def timings(num_labels: int, dtype: str, rounds: int, cache: str) -> dict[str, float]:
    """{method: seconds of one batch}; where evaluate keeps the maps its compute is part of the time."""
    predictions, references = maps(num_labels, dtype)
    seconds, scores = {method: [] for method in METHODS}, {}
    counters = {method: counter(method, num_labels, cache) for method in METHODS}
    for method, (count, compute) in counters.items():  # one round that is not timed
        count(predictions, references)
        scores[method] = compute()
    assert np.allclose(*[scores[m]["mean_iou"] for m in ("SegmentationMetrics", "mean_iou form")]), "not the same"
    for turn in range(rounds):
        for method, (count, compute) in counters.items():
            if turn < OWN_ROUNDS.get(method, rounds):
                start = time.perf_counter()
                for _ in range(TIMES):
                    count(predictions, references)
                if method.endswith("in evaluate"):
                    compute()
                seconds[method].append((time.perf_counter() - start) / TIMES)
    return {method: statistics.median(values) for method, values in seconds.items()}


def memory(method: str, tiles: int, cache: str) -> dict[str, float]:
    """Megabytes that the process has grown by after `tiles` tiles, at its peak and in the end."""
    predictions, references = maps(6, "uint8")
    count, compute = counter(method, 6, cache)
    for _ in range(3):
        count(predictions, references)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
    before = resident("VmRSS")
    for _ in range(tiles // BATCH):
        count(predictions, references)
    on_disk = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
    compute()
    peak, after = resident("VmHWM"), resident("VmRSS")
    return {"peak": (peak - before) / 1e6, "kept": (after - before) / 1e6, "disk": on_disk / 1e6}


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[6, 19])
    parser.add_argument("--dtypes", nargs="+", default=["uint8", "int64"])
    parser.add_argument("--rounds", type=int, default=15, help="timed turns of each method")
    parser.add_argument("--tiles", type=int, default=10_000, help="tiles of the memory run; 0: none")
    parser.add_argument("--peer_tiles", type=int, default=80, help="tiles of that run for the peers")
    parser.add_argument("--output", default=RESULTS / "metrics.json", type=Path)
    args = parser.parse_args()

    rows, growth = [], []
    with tempfile.TemporaryDirectory() as cache:
        print(f"{torch.get_num_threads()} threads, batches of {BATCH} maps of {SIDE}x{SIDE}")
        print(f"{'labels':>6} {'type':6} {'method':33}{'time':>12}{'x peer':>9}")
        for num_labels in args.labels:
            for dtype in args.dtypes:
                seconds = timings(num_labels, dtype, args.rounds, cache)
                for method, spent in seconds.items():
                    times = seconds["mean_iou form"] / spent
                    milliseconds = round(1e3 * spent, 3)
                    rows.append(
                        {"labels": num_labels, "type": dtype, "method": method, "milliseconds": milliseconds}
                        | {"times_peer": round(times, 3)}
                    )
                    print(f"{num_labels:6} {dtype:6} {method:33}{milliseconds:10.2f}ms{times:9.2f}", flush=True)
        for method in METHODS if args.tiles else ():
            tiles = args.peer_tiles if method.startswith("mean_iou") else args.tiles
            grown = {name: round(value, 1) for name, value in memory(method, tiles, cache).items()}
            growth.append({"method": method, "tiles": tiles} | {f"{k}_megabytes": v for k, v in grown.items()})
            print(
                f"{method:33}{tiles:6} tiles: peak {grown['peak']:+.1f} MB, kept {grown['kept']:+.1f} MB, "
                f"disk {grown['disk']:.1f} MB",
                flush=True,
            )
    report = {
        "command": "python benchmarks/metrics.py " + " ".join(sys.argv[1:]),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, np, evaluate, datasets)},
        "batch": [BATCH, SIDE, SIDE],
        "rows": rows,
        "memory": growth,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".tmp").write_text(json.dumps(report, indent=1) + "\n")
    os.replace(args.output.with_suffix(".tmp"), args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
