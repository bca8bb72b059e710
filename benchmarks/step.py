"""What distillation adds to a training step, and what the trainer adds to the sum of its parts.

    python benchmarks/step.py          # about 6 minutes on 2 cores; on a GPU with bfloat16 autocast and batch 8

A SegFormer of B2's size teaches one of B0's size, both from random values, on 512 x 512 pixels. Teacher and student run
once in each round, every loss is run on the features or class scores of that round, forward and backward down to them, so
that a drift of the machine hits all alike; medians over the rounds. Then `DistillationTrainer` trains the same pair for as
many steps, timed from the start of a step to its end without the loading of tiles; this comes after the rounds, so that
differences of a few percent to the sum of the parts are drift. Prints a table and writes benchmarks/results/step.json (step_cuda.json on a GPU).
"""

import argparse
import contextlib
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerImageProcessor,
    TrainerCallback,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import peers
from benchmarks.report import RESULTS, write_report
from drd_hf import DistillationConfig, DistillationTrainer, DualRelationLoss, FeatureHooks
from drd_hf.losses import AlignedRelationLoss, ClassRelationLoss, PixelLogitLoss
from drd_hf.models import default_feature_layer

CLASSES = 6


def models(device: str):
    torch.manual_seed(0)
    labels = {"num_labels": CLASSES}
    b2 = SegformerConfig(
        depths=[3, 4, 6, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768, semantic_loss_ignore_index=255
    )
    b0 = SegformerConfig(semantic_loss_ignore_index=255, **labels)
    b2.num_labels = CLASSES
    teacher, student = (AutoModelForSemanticSegmentation.from_config(c).to(device) for c in (b2, b0))
    return teacher.eval().requires_grad_(False), student.train()


def losses(layers: tuple[str, str], widths: tuple[int, int], device: str) -> dict:
    """{name: function of (features, scores, labels)}; features and scores are pairs (student, teacher)."""
    projection = torch.randn(widths[1], widths[0], device=device).requires_grad_()

    def relations(**options):
        named = {"student_widths": {"s": widths[0]}, "teacher_widths": {"t": widths[1]}}
        loss = DualRelationLoss([("s", "t")], **named, **options).to(device)
        return lambda f, z, y: sum(loss({"s": f[0]}, {"t": f[1]}).values())

    def aligned(**options):
        named = {"student_widths": {"s": widths[0]}, "teacher_widths": {"t": widths[1]}}
        loss = AlignedRelationLoss([("s", "t")], **named, **options).to(device)
        return lambda f, z, y: sum(loss({"s": f[0]}, {"t": f[1]}).values())

    channels, classes = aligned(spatial_weight=0), ClassRelationLoss()

    def of_classes(f, z, y):
        return sum(classes({}, {}, *z).values())

    def on_features(function):
        return lambda f, z, y: function(f[0], f[1].to(f[0].dtype), projection=projection.to(f[0].dtype), labels=y)

    def on_scores(function):
        return lambda f, z, y: function(z[0].float(), z[1].float())

    logit = PixelLogitLoss()
    return {
        "DRD, drd_channels and drd_classes": lambda f, z, y: channels(f, z, y) + of_classes(f, z, y),
        "DRD, drd_classes": of_classes,
        "DRD, plain form": relations(),
        "DRD, spatial alone": relations(channel_weight=0),
        "DRD, channel alone": relations(spatial_weight=0),
        "DRD, attention": relations(relation="attention"),
        "DRD, aligned, at one layer": aligned(),
        "DRD, student's own grid": relations(resize_relations_to=None),
        "DRD, own grid, no teacher term": relations(resize_relations_to=None, teacher_term=False),
        "pixel KD (PixelLogitLoss)": lambda f, z, y: logit({}, {}, *z)["logit"],
        "SKD pair-wise": on_features(peers.skd_pairwise),
        "IFVD": on_features(peers.ifvd),
        "CIRKD mini-batch": on_features(peers.cirkd_minibatch),
        "ICKD": on_features(peers.ickd),
        "SP": on_features(peers.sp),
        "AT": on_features(peers.at),
        "FitNet": on_features(peers.fitnet),
        "CWD, features": on_features(peers.cwd),
        "CWD, scores": on_scores(peers.cwd),
        "DSD, category-wise": on_scores(peers.csd),
    }


class StepTimes(TrainerCallback):
    def __init__(self, synchronise):
        self.synchronise, self.seconds, self.start = synchronise, [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.synchronise()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.synchronise()
        self.seconds.append(time.perf_counter() - self.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, help="default 1, on a GPU 8")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, help="default 7, on a GPU 30")
    parser.add_argument("--only", nargs="+", metavar="LOSS", help="names of losses; default: all")
    parser.add_argument("--output", help="JSON file; default benchmarks/results/step[_cuda].json")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    batch, rounds = args.batch or (8 if on_gpu else 1), args.rounds or (30 if on_gpu else 7)
    synchronise = torch.cuda.synchronize if on_gpu else lambda: None
    autocast = torch.autocast("cuda", dtype=torch.bfloat16) if on_gpu else contextlib.nullcontext()

    teacher, student = models(args.device)
    layers = default_feature_layer(student), default_feature_layer(teacher)
    hooks = FeatureHooks(student, layers[:1]), FeatureHooks(teacher, layers[1:])
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    pixels = torch.randn(batch, 3, args.size, args.size, device=args.device)
    labels = torch.randint(0, CLASSES, (batch, args.size, args.size), device=args.device)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call):
        synchronise()
        start = time.perf_counter()
        result = call()
        synchronise()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def teach():
        with torch.no_grad(), autocast:
            return teacher(pixel_values=pixels).logits

    def learn():
        optimizer.zero_grad()
        with autocast:
            outputs = student(pixel_values=pixels, labels=labels)
        outputs.loss.backward()
        optimizer.step()
        return outputs.logits.detach()

    def distil(loss, features, scores):
        features = (features[0].detach().requires_grad_(), features[1])
        scores = (scores[0].detach().requires_grad_(), scores[1])
        with autocast:
            value = loss(features, scores, labels)
        value.backward()

    candidates = None
    for _ in range(rounds + 1):  # the first round warms up
        teacher_scores = timed("teacher, forward", teach)
        student_scores = timed("student, step", learn)
        features = tuple(h.pop()[layer] for h, layer in zip(hooks, layers, strict=True))
        if candidates is None:
            candidates = losses(layers, tuple(f.shape[1] for f in features), args.device)
            candidates = {name: loss for name, loss in candidates.items() if not args.only or name in args.only}
        for name, loss in candidates.items():
            timed(name, functools.partial(distil, loss, features, (student_scores, teacher_scores)))
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    step = medians["teacher, forward"] + medians["student, step"]

    for hook in hooks:
        hook.remove()
    times = StepTimes(synchronise)
    item = {"image": torch.randint(0, 256, (3, args.size, args.size), dtype=torch.uint8), "labels": labels[0].cpu()}
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            method=["drd"],
            per_device_train_batch_size=batch,
            max_steps=rounds + 1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            logging_steps=10_000,
        )
        trainer = DistillationTrainer(
            student,
            teacher,
            config,
            train_dataset=[item] * (batch * (rounds + 1)),
            processing_class=SegformerImageProcessor(do_resize=False),
            callbacks=[times],
        )
        trainer.train()
    whole = statistics.median(times.seconds[1:])

    print(
        f"batch {batch}, {args.size} x {args.size} pixels, features {tuple(features[0].shape)} and {tuple(features[1].shape)}"
    )
    print(f"{'':34}{'time':>11}{'of teacher + student':>22}")
    for name, value in medians.items():
        print(f"{name:34}{1e3 * value:9.1f}ms{100 * value / step:21.1f}%")
    parts = step + medians.get("DRD, plain form", 0.0)
    print(
        f"{'DistillationTrainer, whole step':34}{1e3 * whole:9.1f}ms{100 * (whole / parts - 1):+21.1f}% against its parts"
    )
    write_report(
        args.output or RESULTS / f"step{'_cuda' if on_gpu else ''}.json",
        args.device,
        batch=batch,
        size=args.size,
        rounds=rounds,
        milliseconds={name: round(1e3 * value, 2) for name, value in medians.items()},
        share_of_teacher_and_student={name: round(value / step, 4) for name, value in medians.items()},
        trainer_step_milliseconds=round(1e3 * whole, 2),
        trainer_over_its_parts=round(whole / parts - 1, 4),
    )


if __name__ == "__main__":
    main()
