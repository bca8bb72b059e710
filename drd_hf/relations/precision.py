"""The arithmetic that relation distances are computed in: float32 that is really float32, sums in float64."""

import contextlib

import torch

# Squared length under which a feature vector counts as zero. It then has no direction: its relations and its gradient are 0.
ZERO_SQUARED = 1e-24


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 where all are float64, else float32: Gram entries of half-precision features overflow."""
    return torch.float64 if all(t.dtype == torch.float64 for t in tensors) else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, which subtracting nearly equal sums needs; Apple's GPUs have float32 only."""
    return torch.float32 if device.type == "mps" else torch.float64


def inverse_length(squares: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(squares), 0 for vectors that count as zero, NaN for those whose length is beyond the number format."""
    return (squares.rsqrt() + 0 * squares).masked_fill_(squares < ZERO_SQUARED, 0.0)


@contextlib.contextmanager
def full_precision(device_type: str):
    """Autocast off, and matrix products in true float32 whatever the user allows elsewhere.

    The identity of `drd_hf.relations.cosine` subtracts nearly equal numbers; TF32 (CUDA) and the bfloat16 products
    that `torch.set_float32_matmul_precision("medium")` allows on a CPU would spoil them.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
                if (before := switch.fp32_precision) != "ieee":
                    switch.fp32_precision = "ieee"
                    stack.callback(setattr, switch, "fp32_precision", before)
        elif (before := torch.get_float32_matmul_precision()) != "highest":  # torch before 2.9 has this switch alone
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, before)
        yield
