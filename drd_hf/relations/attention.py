"""Distance of spatial attention maps: blocks of rows, formed, compared, differentiated and dropped in one pass."""

import torch

from drd_hf.relations.cosine import image_groups, self_product
from drd_hf.relations.precision import sum_dtype

# Bytes of a block of rows of one map; two are held at a time. What is done entry by entry is done to a strip of it, which
# stays in a CPU's cache.
_CPU_BYTES, _GPU_BYTES = 64 * 2**20, 256 * 2**20
_CPU_STRIP_BYTES = 2 * 2**20
# Bytes of the teacher's products that are kept on a CPU to be used again below the diagonal, where they stand transposed.
_CPU_TILE_BYTES = 80 * 2**20
# Up to so many positions blocks cost more than they save.
_FEW = 256


def attention_route(items: int) -> str:
    """``"whole"`` for maps of few items, which are formed at once, and ``"blocks"`` for all others."""
    return "whole" if items <= _FEW else "blocks"


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
    # Logits are F^T F times this.
    scales = [1 / (c**0.5 * temperature) for c in (c_s, teacher.shape[1])]
    if attention_route(n) == "whole":
        return _whole_distance(student, teacher, dtype, scales, need_grad)
    on_cpu = student.device.type == "cpu"
    block = max(1, min(n, (_CPU_BYTES if on_cpu else _GPU_BYTES) // (dtype.itemsize * n)))
    strip = max(1, min(block, _CPU_STRIP_BYTES // (dtype.itemsize * n))) if on_cpu else block
    make = {"dtype": dtype, "device": student.device}
    blocks = [torch.empty(block, n, **make) for _ in range(2)]
    strips = [torch.empty(strip, n, **make) for _ in range(2)]
    total = torch.zeros((), dtype=sum_dtype(student.device), device=student.device)
    grad = torch.empty(batch, c_s, n, **make) if need_grad else None
    tiles = _CPU_TILE_BYTES // (dtype.itemsize * block**2) if on_cpu else 0
    window = int(
        ((8 * tiles + 1) ** 0.5 - 1) / 2
    )  # blocks ahead for which tiles are kept: w (w + 1) / 2 of them at a time
    for image in range(batch):
        # The root of the scale goes to both factors, so that whole maps stay symmetric.
        s, t = (f[image].to(dtype) * scale**0.5 for f, scale in zip((student, teacher), scales, strict=True))
        s_rows = s.mT.contiguous()  # (N, C_s)
        image_grad = torch.zeros_like(s_rows) if need_grad else None
        kept = {}  # start of a block: [(start of an earlier one, its tile)]
        for start in range(0, n, block):
            rows = slice(start, min(start + block, n))
            slope, logits = (buffer[: rows.stop - start] for buffer in blocks)
            _products(s, rows, out=slope)
            _products(t, rows, out=logits, known=kept.pop(start, ()))
            for ahead in range(rows.stop, min(n, rows.stop + window * block), block):
                kept.setdefault(ahead, []).append((start, logits[:, ahead : ahead + block].clone()))
            for slope_strip, logits_strip in zip(slope.split(strip), logits.split(strip), strict=True):
                p, q = (buffer[: len(slope_strip)] for buffer in strips)
                torch.softmax(slope_strip, dim=-1, out=p)
                torch.softmax(logits_strip, dim=-1, out=q)
                difference = torch.sub(p, q, out=q)
                if need_grad:  # d/dlogits of ||p - q||^2 is 2 p (d - sum(p d)) with d = p - q
                    torch.mul(p, difference, out=slope_strip)
                    slope_strip.addcmul_(p, slope_strip.sum(dim=-1, keepdim=True), value=-1)
                total += difference.square_().sum(dim=-1).sum(dtype=total.dtype)
            if need_grad and slope.nbytes <= _CPU_STRIP_BYTES and block == n:  # one product, of what is still in cache
                torch.mm(torch.add(slope, slope.mT, out=logits), s_rows, out=image_grad)
            elif need_grad:
                image_grad[rows].addmm_(slope, s_rows)
                image_grad.addmm_(slope.mT, s_rows[rows])
        if need_grad:
            torch.mul(image_grad.mT, 2 * scales[0] ** 0.5, out=grad[image])
    return total, grad


def _products(features: torch.Tensor, rows: slice, out: torch.Tensor, known=()) -> torch.Tensor:
    """Rows of F^T F for F (C, N); on a CPU the square on the diagonal without its lower triangle, and without `known` tiles."""
    if features.device.type != "cpu":
        return torch.mm(features[:, rows].mT, features, out=out)
    some, left = features[:, rows].mT, rows.start
    self_product(some[None], out=out[:, rows][None])
    for start, tile in known:  # those of the blocks just before
        out[:, start : start + len(tile)] = tile.mT
        left = min(left, start)
    for others in (slice(0, left), slice(rows.stop, features.shape[1])):
        torch.mm(some, features[:, others], out=out[:, others])
    return out


def _whole_distance(student, teacher, dtype, scales, need_grad):
    """`attention_distance` from whole maps."""
    total, grads = 0, []
    for group in image_groups(student, items=student.shape[2]):
        s, t = student[group].to(dtype), teacher[group].to(dtype)
        p, q = (torch.softmax((x.mT @ x).mul_(scale), dim=-1) for x, scale in zip((s, t), scales, strict=True))
        difference = torch.sub(p, q, out=q)
        if need_grad:
            slope = p * difference
            slope.addcmul_(p, slope.sum(dim=-1, keepdim=True), value=-1)
            grads.append(s @ torch.add(slope, slope.mT, out=p).mul_(2 * scales[0]))
        total = difference.square_().sum(dtype=sum_dtype(student.device)) + total
    return total, torch.cat(grads) if need_grad else None
