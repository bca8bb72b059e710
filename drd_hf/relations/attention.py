"""Distance of spatial attention maps: blocks of rows, formed, compared, differentiated and dropped in one pass."""

import torch

from drd_hf.relations.cosine import self_product
from drd_hf.relations.precision import sum_dtype

# Bytes of one block of rows; three are held at a time.
_CPU_BYTES, _GPU_BYTES = 32 * 2**20, 256 * 2**20


def attention_distance(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype, temperature: float, need_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum over the batch of the squared differences of two softmax maps, and its gradient.

    Args:
        student, teacher: (B, C_s, N), (B, C_t, N).
        dtype: of the computation.

    Returns:
        The sum, and the gradient (B, C_s, N) unless it is not needed. One image is worked on at a time, so memory
        does not grow with the batch beyond the gradient itself.
    """
    batch, c_s, n = student.shape
    scale_s, scale_t = (1 / (c**0.5 * temperature) for c in (c_s, teacher.shape[1]))
    block = max(1, min(n, (_CPU_BYTES if student.device.type == "cpu" else _GPU_BYTES) // (dtype.itemsize * n)))
    buffers = [torch.empty(block, n, dtype=dtype, device=student.device) for _ in range(3)]
    total = torch.zeros((), dtype=sum_dtype(student.device), device=student.device)
    grad = torch.zeros(batch, c_s, n, dtype=dtype, device=student.device) if need_grad else None
    for image in range(batch):
        s, t = student[image].to(dtype), teacher[image].to(dtype)
        for start in range(0, n, block):
            rows = slice(start, min(start + block, n))
            work, p, q = (buffer[: rows.stop - start] for buffer in buffers)
            torch.softmax(_products(s, rows, out=work).mul_(scale_s), dim=-1, out=p)
            torch.softmax(_products(t, rows, out=work).mul_(scale_t), dim=-1, out=q)
            difference = torch.sub(p, q, out=q)
            if need_grad:  # d/dlogits of ||p - q||^2 is 2 p (d - sum(p d)) with d = p - q
                slope = torch.mul(p, difference, out=work)
                slope.addcmul_(p, slope.sum(dim=-1, keepdim=True), value=-1)
                if block == n:
                    torch.mm(s, torch.add(slope, slope.mT, out=p), out=grad[image])
                else:
                    grad[image].addmm_(s[:, rows], slope)
                    grad[image][:, rows].addmm_(s, slope.mT)
            total += difference.square_().sum(dim=-1).sum(dtype=total.dtype)
    return total, grad.mul_(2 * scale_s) if need_grad else None


def _products(features: torch.Tensor, rows: slice, out: torch.Tensor) -> torch.Tensor:
    """Rows of F^T F for F (C, N)."""
    if out.shape[0] == out.shape[1]:
        return self_product(features.mT[None], out=out[None])[0]
    return torch.mm(features[:, rows].mT, features, out=out)
