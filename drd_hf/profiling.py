"""What a model costs: parameters, arithmetic, time and memory of a forward pass."""

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from drd_hf.errors import UserError
from drd_hf.evaluation import milliseconds_per_tile
from drd_hf.features import input_channels
from drd_hf.models import count_parameters, load_teacher

FLOPS_COUNTED = "convolutions and matrix products, attention among them; a multiplication and an addition are 2"
MEMORY_COUNTED = {
    "cuda": "peak of torch's allocations above the loaded model",
    "cpu": "peak of the resident memory above the loaded model, in a process of its own",
}


def profile_model(model: PreTrainedModel, sizes: Sequence[int] = (256, 512, 1024), **options) -> list[dict]:
    """`profile_models` of one model; its `model` is the model type."""
    return profile_models({model.config.model_type: model}, sizes, **options)


def profile_models(
    models: Mapping[str, PreTrainedModel],
    sizes: Sequence[int] = (256, 512, 1024),
    batch_size: int = 1,
    device: str | torch.device | None = None,
    rounds: int = 15,
    memory: bool = True,
) -> list[dict]:
    """Measure forward passes of blank square images, float32, for each model and size.

    Args:
        models: {name: model}, segmenters or encoders; they take turns when timed. Put in eval mode on the device.
        sizes: sides of the images in pixels.
        batch_size: images in a forward pass.
        device: default CUDA if there is one, else CPU.
        rounds: timed passes, of which the median is taken.
        memory: False leaves the memory out, which on a CPU needs a process for each model.

    Returns:
        One dict for each size and model: `model`, `device`, `threads` (of a CPU), `size`, `batch_size`, `parameters`,
        `flops` of one image (`FLOPS_COUNTED`), `milliseconds` of a batch, `images_per_second`, and `memory_bytes`
        (`MEMORY_COUNTED`), None where it cannot be measured.

    Raises:
        UserError: size or batch below 1, or a device that is not there.
    """
    for option, values in (("sizes", sizes), ("batch_size", [batch_size]), ("rounds", [rounds])):
        if not values or min(values) < 1:
            raise UserError(f"--{option} {' '.join(map(str, values))}: give positive numbers")
    sizes = sorted(set(sizes))
    timed = {size: milliseconds_per_tile(models.values(), size, device, rounds, batch_size) for size in sizes}
    placed = next(iter(models.values())).device
    peaks = {
        name: _peak_memory(model, sizes, batch_size) if memory else dict.fromkeys(sizes)
        for name, model in models.items()
    }
    return [
        {
            "model": name,
            "device": torch.cuda.get_device_name(placed) if placed.type == "cuda" else str(placed),
            "threads": torch.get_num_threads() if placed.type == "cpu" else None,
            "size": size,
            "batch_size": batch_size,
            "parameters": count_parameters(model),
            "flops": count_flops(model, size),
            "milliseconds": milliseconds,
            "images_per_second": 1000 * batch_size / milliseconds,
            "memory_bytes": peaks[name][size],
        }
        for size in sizes
        for (name, model), milliseconds in zip(models.items(), timed[size], strict=True)
    ]


def device_name(device: str | torch.device) -> str:
    """A device in words for tables and cards."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads != 1)}"


def count_flops(model: nn.Module, size: int) -> int:
    """Floating-point operations of one image of `size` x `size` pixels: see `FLOPS_COUNTED`.

    Norms, activations and interpolation do not count. Attention counts as the matrix products that it is made of:
    the fused kernels of some devices are unknown to some versions of PyTorch's counter.
    """

    def count(model: nn.Module, device) -> int:
        image = torch.zeros(1, input_channels(model), size, size, device=device)
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(pixel_values=image)
        return counter.get_total_flops()

    try:
        return count(copy.deepcopy(model).to("meta"), "meta")  # costs nothing, whatever the size
    except (RuntimeError, NotImplementedError):  # a model that looks at values, or at the name of its device
        return count(model, next(model.parameters()).device)


def _peak_memory(model: PreTrainedModel, sizes: Sequence[int], batch_size: int) -> dict[int, int | None]:
    """{size: bytes above the loaded model}; see `MEMORY_COUNTED`."""
    if model.device.type == "cuda":
        return {size: _cuda_peak(model, size, batch_size) for size in sizes}
    if not Path("/proc/self/clear_refs").exists():  # only Linux can forget the peak that loading left
        return dict.fromkeys(sizes)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        done = subprocess.run(
            [sys.executable, "-m", "drd_hf.profiling", folder, str(batch_size), *map(str, sizes)],
            capture_output=True,
            text=True,
            # Tensors above 64 kB go back to the system when they are freed, and do not count at the next size.
            env=os.environ
            | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(torch.get_num_threads())}
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    if done.returncode:
        raise UserError(f"measuring memory failed: {(done.stderr.strip().splitlines() or ['out of memory'])[-1]}")
    return dict(zip(sizes, map(int, done.stdout.split()), strict=True))


def _cuda_peak(model: PreTrainedModel, size: int, batch_size: int) -> int:
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    with torch.inference_mode():
        model(pixel_values=torch.zeros(batch_size, input_channels(model), size, size, device=model.device))
    return torch.cuda.max_memory_allocated(model.device) - before


def _resident(name: str) -> int:
    """VmRSS, resident memory, or VmHWM, its peak, of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _print_resident_growth(folder: str, batch_size: int, sizes: Sequence[int]) -> None:
    model = load_teacher(folder)
    with torch.inference_mode():
        model(
            pixel_values=torch.zeros(1, input_channels(model), 64, 64)
        )  # kernels and threads come with the first pass
        before = _resident("VmRSS")
        for size in sizes:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            model(pixel_values=torch.zeros(batch_size, input_channels(model), size, size))
            print(max(_resident("VmHWM") - before, 0), flush=True)


if __name__ == "__main__":
    _print_resident_growth(sys.argv[1], int(sys.argv[2]), [int(word) for word in sys.argv[3:]])
