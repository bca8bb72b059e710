"""Parameters, FLOPs, time and memory of a model at some image sizes, beside those of its teacher.

python scripts/profile_model.py --model runs/student --teacher runs/teacher --sizes 256 512 1024
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from drd_hf import load_teacher
from drd_hf.arguments import parse_arguments, require
from drd_hf.errors import UserError, run_script
from drd_hf.evaluation.report import write_scores
from drd_hf.profiling import FLOPS_COUNTED, MEMORY_COUNTED, profile_models


@dataclass
class ProfileArguments:
    model: str = field(default="", metadata={"help": "Hub id or folder of a checkpoint."})
    teacher: str | None = field(default=None, metadata={"help": "Another checkpoint, to compare with."})
    sizes: list[int] = field(default_factory=lambda: [256, 512, 1024], metadata={"help": "Sides of images in pixels."})
    batch_size: int = field(default=1, metadata={"help": "Images in a forward pass."})
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, ...; default: a GPU if there is one."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for the numbers."})


def main() -> None:
    (args,) = parse_arguments(ProfileArguments, description=__doc__)
    require(model=args.model)
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise UserError(f"--output {args.output}: its folder does not exist")
    if args.output and (Path(args.output).is_dir() or not os.access(Path(args.output).resolve().parent, os.W_OK)):
        raise UserError(f"--output {args.output}: is a folder, or in one that cannot be written")
    models = {"model": load_teacher(args.model)}
    if args.teacher:
        models["teacher"] = load_teacher(args.teacher)
    rows = profile_models(models, args.sizes, args.batch_size, args.device)

    columns = ("size", "params M", "GFLOPs", "ms", "images/s", "memory MB")
    print(f"{'':10}" + "".join(f"{name:>12}" for name in columns))
    for row in rows:
        print(f"{row['model']:10}" + "".join(f"{value:>12}" for value in shown(row)))
        if row["model"] == "teacher":
            model = rows[rows.index(row) - 1]
            print(f"{'ratio':10}{row['size']:12}" + "".join(f"{ratio(row[key], model[key]):>12}" for key in COMPARED))
    threads = f", {rows[0]['threads']} threads" if rows[0]["threads"] else ""
    print(f"\n{rows[0]['device']}{threads}, float32, {args.batch_size} images in a pass; median of 15 passes")
    kind = "cpu" if rows[0]["threads"] else "cuda"
    print(f"FLOPs of one image: {FLOPS_COUNTED}\nmemory: {MEMORY_COUNTED[kind]}")
    if args.teacher:
        print("ratio: the teacher's number, divided by the model's")
    if args.output:
        report = {"flops": FLOPS_COUNTED, "memory": MEMORY_COUNTED[kind], "rows": rows}
        write_scores(Path(args.output), report)


COMPARED = ("parameters", "flops", "milliseconds", "images_per_second", "memory_bytes")


def shown(row: dict) -> list[str]:
    memory = "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:.0f}"
    return [
        f"{row['size']}",
        f"{row['parameters'] / 1e6:.2f}",
        f"{row['flops'] / 1e9:.2f}",
        f"{row['milliseconds']:.1f}",
        f"{row['images_per_second']:.1f}",
        memory,
    ]


def ratio(teacher, model) -> str:
    return f"{teacher / model:.2f}" if teacher and model else "-"


if __name__ == "__main__":
    run_script(main)
