"""What relation distances cost: ours, their plain definition, and the relation losses of other methods, in one run.

    python benchmarks/relations.py                    # the full table: about 15 minutes on 2 cores
    python benchmarks/relations.py --sizes 32 64      # a part of it
    python benchmarks/relations.py --batch 4 --sizes 16 32 48 --output benchmarks/results/relations_aligned.json --methods \
        "spatial aligned, plain" "spatial aligned" "bare products" "channel aligned, plain" "channel aligned" \
        "bare products, projection"                   # the form that relates all positions of a batch

Forward and backward of one loss on features of C_s 256 and C_t 768 channels. Prints a table and writes
benchmarks/results/relations.json (relations_cuda.json on a GPU). Columns:

time      median of the repetitions; the methods of one size take turns, so that a drift of the machine hits all alike
x plain   time of the plain definition divided by this time
x bare    this time divided by the time of the matrix products that the identity needs, and nothing else
memory    peak above the features, the gradient included, in a process of its own (CPU: resident memory; GPU: allocated)
share     multiplications in the method's formula / (time * the machine's own rate in a large matrix product); above 1 where
          symmetric products are computed above the diagonal only
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import peers
from drd_hf.relations import (
    channel_alignment_distance,
    channel_relation_distance,
    cosine_route,
    spatial_alignment_distance,
    spatial_relation_distance,
)

RESULTS = Path(__file__).resolve().parent / "results"
C_S, C_T = 256, 768


def bare(student, teacher, with_teacher_term: bool) -> None:
    """The products of the identity alone, forward and backward, in their full size and without normalisation."""
    with torch.no_grad():
        s, t = student.flatten(2), teacher.flatten(2)
        a, p = s @ s.mT, s @ t.mT
        if with_teacher_term:
            t @ t.mT
        a @ s, p @ t


def bare_projection(student, teacher, projection) -> None:
    """The products that projecting the student needs alone, forward and backward."""
    with torch.no_grad():
        s, gradient = student.transpose(0, 1).flatten(1), teacher.transpose(0, 1).flatten(1)
        projection @ s
        gradient @ s.mT, projection.mT @ gradient


def multiplications(method: str, n: int, batch: int) -> int | None:
    """Of the matrix products, forward and backward, in the formula that each method uses, for each image."""
    k, m = C_S, C_T
    direct = n * n * (2 * k + m)
    return {
        "spatial cosine": direct if cosine_route(n, k, m) == "direct" else n * (2 * k * k + 2 * k * m + m * m),
        "spatial cosine, no teacher term": direct
        if cosine_route(n, k, m) == "direct"
        else n * (2 * k * k + 2 * k * m),
        "spatial cosine, plain": n * n * (3 * k + m),
        "bare products": n * (2 * k * k + 2 * k * m + m * m),
        "bare products, no teacher term": n * (2 * k * k + 2 * k * m),
        "spatial attention": n * n * (3 * k + m),
        "spatial attention, plain": n * n * (3 * k + m),
        "spatial aligned": n * (3 * k * k + 2 * k * m + m * m),
        "spatial aligned, plain": batch * n * n * (3 * k + m),
        "channel aligned": 3 * n * k * m,
        "channel aligned, plain": 3 * n * k * m,
        "bare products, projection": 3 * n * k * m,
    }.get(method)


METHODS = {
    "spatial cosine, plain": peers.plain_spatial_cosine,
    "spatial cosine": lambda s, t, **_: spatial_relation_distance(s, t),
    "spatial cosine, no teacher term": lambda s, t, **_: spatial_relation_distance(s, t, teacher_term=False),
    "bare products": lambda s, t, **_: bare(s, t, True),
    "bare products, no teacher term": lambda s, t, **_: bare(s, t, False),
    "spatial attention, plain": peers.plain_spatial_attention,
    "spatial attention": lambda s, t, **_: spatial_relation_distance(s, t, "attention"),
    "channel cosine, plain": peers.plain_channel_cosine,
    "channel cosine": lambda s, t, projection, **_: channel_relation_distance(s, t, projection=projection),
    "channel attention, plain": peers.plain_channel_attention,
    "channel attention": lambda s, t, projection, **_: channel_relation_distance(
        s, t, "attention", projection=projection
    ),
    "spatial aligned, plain": peers.plain_spatial_aligned,
    "spatial aligned": lambda s, t, **_: spatial_alignment_distance(s, t),
    "channel aligned, plain": peers.plain_channel_aligned,
    "channel aligned": lambda s, t, projection, **_: channel_alignment_distance(s, t, projection=projection),
    "bare products, projection": lambda s, t, projection, **_: bare_projection(s, t, projection),
    "SKD pair-wise": peers.skd_pairwise,
    "IFVD": peers.ifvd,
    "CIRKD mini-batch": peers.cirkd_minibatch,
    "ICKD": peers.ickd,
    "SP": peers.sp,
    "AT": peers.at,
}
PLAIN = {name: f"{name.split(',')[0]}, plain" for name in METHODS if name.startswith(("spatial", "channel"))}
BARE = {
    "spatial cosine": "bare products",
    "spatial cosine, no teacher term": "bare products, no teacher term",
    "spatial aligned": "bare products",
    "channel aligned": "bare products, projection",
}
# N x N maps of more positions than this do not fit a small machine.
LARGEST = {name: 128 for name in METHODS if "attention" in name or "plain" in name or name.startswith("CIRKD")}


def inputs(size: int, batch: int, device: str, dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator}
    features = [torch.randn(batch, c, size, size, **make) for c in (C_S, C_T)]
    projection = torch.randn(C_T, C_S, **make) / C_S**0.5
    labels = torch.randint(0, 6, (batch, 4 * size, 4 * size), **make)
    return {
        "student": features[0].to(device, dtype).requires_grad_(),
        "teacher": features[1].to(device, dtype),
        "projection": projection.to(device, dtype).requires_grad_(),
        "labels": labels.to(device),
    }


def measure(method: str, data: dict, times: int = 1) -> float:
    """Seconds of one forward and backward, the mean of so many one after the other."""
    synchronise(data["student"])
    start = time.perf_counter()
    for _ in range(times):
        data["student"].grad = data["projection"].grad = None
        student, teacher = data["student"], data["teacher"]
        loss = METHODS[method](student, teacher, projection=data["projection"], labels=data["labels"])
        if loss is not None:
            loss.backward()
    synchronise(data["student"])
    return (time.perf_counter() - start) / times


def synchronise(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def timings(methods: list[str], size: int, batch: int, device: str, dtype: torch.dtype, budget: float) -> dict:
    """{method: median seconds}; each gets about `budget` seconds, between 3 and 50 turns of at least 10 ms."""
    data = inputs(size, batch, device, dtype)
    first = {method: min(measure(method, data), measure(method, data)) for method in methods}
    times = {method: max(1, math.ceil(0.01 / seconds)) for method, seconds in first.items()}
    turns = {method: max(3, min(50, round(budget / (times[method] * first[method])))) for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(max(turns.values())):
        for method in methods:
            if turn < turns[method]:
                seconds[method].append(measure(method, data, times[method]))
    return {method: statistics.median(values) for method, values in seconds.items()}


def peak_memory(method: str, size: int, batch: int, device: str, dtype: torch.dtype) -> int:
    """Bytes above the features, to be called in a fresh process."""
    small = inputs(4, 1, device, dtype)
    measure(method, small)  # libraries are loaded and have their work space
    data = inputs(size, batch, device, dtype)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measure(method, data)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
    before = _resident("VmRSS")
    measure(method, data)
    return _resident("VmHWM") - before


def in_a_process(*of) -> int:
    """`peak_memory` in a process that has done nothing else. A server that has loaded torch makes them quickly."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "benchmarks.peers", "drd_hf.relations"])
    with context.Pool(1) as pool:
        return pool.apply(peak_memory, of)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Multiplications a second in a large matrix product, the best of several."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        synchronise(a)
        start = time.perf_counter()
        a @ b
        synchronise(a)
        best = min(best, time.perf_counter() - start)
    return side**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 12, 16, 24, 32, 48, 64, 96, 128, 256])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each method and size")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--output", help="JSON file; default benchmarks/results/relations[_cuda].json")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)

    rate = product_rate(args.device, torch.float32)
    rows = []
    print(f"{torch.get_num_threads()} threads, {rate / 1e9:.0f} G multiplications/s in a float32 matrix product")
    print(f"{'grid':>9} {'method':32}{'time':>11}{'x plain':>9}{'x bare':>8}{'memory':>10}{'share':>7}")
    for size in args.sizes:
        methods = [name for name in args.methods if size <= LARGEST.get(name, size)]
        seconds = timings(methods, size, args.batch, args.device, dtype, args.seconds)
        for method in methods:
            spent, count = seconds[method], multiplications(method, size * size, args.batch)
            plain = seconds.get(PLAIN.get(method))
            products = seconds.get(BARE.get(method))
            row = {
                "size": size,
                "method": method,
                "milliseconds": round(1e3 * spent, 4),
                "times_plain": plain and round(plain / spent, 3),
                "times_bare": products and round(spent / products, 3),
                "peak_megabytes": round(in_a_process(method, size, args.batch, args.device, dtype) / 1e6, 1),
                "share_of_rate": count and round(args.batch * count / spent / rate, 3),
            }
            rows.append(row)
            cells = (row["times_plain"], row["times_bare"], row["peak_megabytes"], row["share_of_rate"])
            shown = [
                "" if value is None else f"{value:.{digits}f}"
                for value, digits in zip(cells, (2, 2, 1, 2), strict=True)
            ]
            print(
                f"{size:>5}x{size:<3} {method:32}{row['milliseconds']:9.2f}ms{shown[0]:>9}{shown[1]:>8}{shown[2]:>8}MB{shown[3]:>7}",
                flush=True,
            )
    report = {
        "command": "python benchmarks/relations.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "batch": args.batch,
        "channels": {"student": C_S, "teacher": C_T},
        "multiplications_per_second": round(rate),
        "rows": rows,
    }
    path = Path(args.output or RESULTS / f"relations{'_cuda' if args.device == 'cuda' else ''}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(report, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
