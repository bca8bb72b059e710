"""What every benchmark writes beside its figures."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def write_report(path: str | Path, device: str, **figures) -> None:
    """Figures as JSON, with the command, the device, the threads and torch's version."""
    command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
    gpu = device == "cuda"
    name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    report = {"command": command, "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(report | figures, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)
    print(f"written to {path}")
