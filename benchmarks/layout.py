"""What the order of values in memory costs: the usual one, channel by channel, against channels last.

    python benchmarks/layout.py               # about 2 minutes on 2 cores; on a GPU without options
    python benchmarks/layout.py --size 1024 --batch_size 1

Prints a table and writes benchmarks/results/layout.json (layout_cuda.json on a GPU). Models of scripts/configs/models with
random values, batches of noise; one pass forward, as a map is made, and one forward and backward, as a student trains.
The two orders take turns, medians over the rounds. `predict.py` has channels last, training with `--channels_last true`.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.report import RESULTS, write_report
from drd_hf.models import load_student

CONFIGS = Path(__file__).resolve().parents[1] / "scripts/configs/models"
MODELS = ("mobilenet_v2_1.0", "upernet_resnet18", "segformer_b0")
ORDERS = {"usual": torch.contiguous_format, "channels last": torch.channels_last}


def seconds(model, pixels, train: bool, bf16: bool) -> float:
    """Of one pass, with the gradients of all weights where `train`."""
    synchronize = torch.cuda.synchronize if pixels.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    with torch.set_grad_enabled(train), torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        scores = model(pixel_values=pixels).logits
    if train:
        scores.float().square().mean().backward()
        model.zero_grad()
    synchronize()
    return time.perf_counter() - start


def measured(name: str, bf16: bool, args: argparse.Namespace) -> list[dict]:
    """Rows of prediction and training of one model in one number format."""
    torch.manual_seed(0)
    base = load_student(str(CONFIGS / f"{name}.json"), {i: str(i) for i in range(6)}).to(args.device)
    models = {order: copy.deepcopy(base).to(memory_format=layout) for order, layout in ORDERS.items()}
    pixels = torch.randn(args.batch_size, 3, args.size, args.size, device=args.device)
    rows = []
    for train in (False, True):
        times = {order: [] for order in models}
        for turn in range(args.rounds + 1):  # the first one prepares kernels
            for order, model in models.items():
                took = seconds(model.train(train), pixels, train, bf16)
                times[order] += [took] if turn else []
        medians = {order: 1000 * statistics.median(values) for order, values in times.items()}
        row = {"model": name, "pass": "forward and backward" if train else "forward"}
        row |= {"type": "bfloat16" if bf16 else "float32", "milliseconds": medians}
        rows.append(row | {"ratio": medians["usual"] / medians["channels last"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", type=int, default=512)
    add("--batch_size", type=int, default=4)
    add("--rounds", type=int, default=5)
    add("--models", nargs="+", choices=MODELS, default=MODELS)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output")
    args = parser.parse_args()
    rows = []
    print(f"{'model':18} {'pass':22} {'type':9} {'usual':>8} {'channels last':>14} {'ratio':>6}")
    for name in args.models:
        for bf16 in (False, True):
            for row in measured(name, bf16, args):
                usual, last = row["milliseconds"].values()
                print(
                    f"{name:18} {row['pass']:22} {row['type']:9} {usual:8.0f} {last:14.0f} {row['ratio']:6.2f}",
                    flush=True,
                )
                rows.append(row)
    output = args.output or RESULTS / f"layout{'_cuda' * (args.device == 'cuda')}.json"
    write_report(output, args.device, size=args.size, batch_size=args.batch_size, rounds=args.rounds, rows=rows)


if __name__ == "__main__":
    main()
