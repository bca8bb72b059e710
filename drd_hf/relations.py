"""Relation maps of feature maps, and distances between them that never form a large map.

A feature map F with C channels and N = H * W positions is read as a C x N matrix.

``cosine``     Columns (spatial) or rows (channel) are scaled to unit length; the relation map is their Gram matrix,
               spatial N x N, channel C x C.
``attention``  Spatial: ``softmax(F^T F / (sqrt(C) * T))`` over the last axis. Channel: ``softmax(G / T)`` with G the
               Gram matrix of the unit-length rows. T is the temperature.

The distance of two relation maps is the mean of the squared differences over all entries and the batch. Dual
Relation Distillation (arXiv 2506.20688) minimises such distances; its abstract does not fix the normalisation, so
these definitions are this project's own.

Everything is computed in float32 with autocast off (float64 stays float64): Gram entries of half-precision features
overflow, and the exact form below subtracts nearly equal numbers, which TF32 would spoil.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

from drd_hf.errors import UserError

RELATIONS = ("cosine", "attention")
# Rows of an attention map that are formed at a time: block * N entries of float32 within this many bytes.
_BLOCK_BYTES = 32 * 2**20


def spatial_relation_map(features: torch.Tensor, relation: str = "cosine", temperature: float = 1.0) -> torch.Tensor:
    """Relations between the positions of a feature map.

    Args:
        features: (B, C, H, W), any floating dtype.
        relation: ``"cosine"`` or ``"attention"``.
        temperature: T of the attention relation, > 0; ``cosine`` does not use it.

    Returns:
        (B, N, N) with N = H * W, float32 (float64 for float64 features).
    """
    _check(relation, temperature, features)
    with _full_precision(features):
        rows = _positions(features)  # (B, N, C)
        if relation == "cosine":
            rows = _unit(rows)
            return rows @ rows.mT
        return torch.softmax(rows @ rows.mT * _attention_scale(rows, temperature), dim=-1)


def channel_relation_map(features: torch.Tensor, relation: str = "cosine", temperature: float = 1.0) -> torch.Tensor:
    """Relations between the channels of a feature map.

    Args and dtype as in `spatial_relation_map`.

    Returns:
        (B, C, C).
    """
    _check(relation, temperature, features)
    with _full_precision(features):
        rows = _unit(_wide(features).flatten(2))  # (B, C, N)
        gram = rows @ rows.mT
        return gram if relation == "cosine" else torch.softmax(gram / temperature, dim=-1)


def spatial_relation_distance(
    student: torch.Tensor, teacher: torch.Tensor, relation: str = "cosine", temperature: float = 1.0
) -> torch.Tensor:
    """Mean squared difference of the two spatial relation maps, without forming them.

    ``cosine`` takes whichever form is cheaper for the shapes. Below about N = C the maps themselves are small. Above,
    with unit columns S (C_s x N) and Z (C_t x N),
    ``||S^T S - Z^T Z||^2 = ||S S^T||^2 + ||Z Z^T||^2 - 2 ||S Z^T||^2`` costs O(N C^2). ``attention`` compares blocks
    of rows and takes the gradient in the same pass, so memory is O(block * N).

    Args:
        student: (B, C_s, H, W); receives the gradient.
        teacher: (B, C_t, H_t, W_t); no gradient flows to it. Another H, W than the student's is resized to the
            student's grid (bilinear, antialiased where it shrinks).
        relation, temperature: as in `spatial_relation_map`.

    Returns:
        Scalar, float32 (float64 where both are float64), never negative.
    """
    _check(relation, temperature, student, teacher)
    with _full_precision(student):
        teacher = resize_to(_wide(teacher.detach()), student.shape[-2:])
        s, t = _positions(student), _positions(teacher)  # (B, N, C_s), (B, N, C_t)
        if s.dtype != t.dtype:
            s, t = s.float(), t.float()
        if relation == "cosine":
            return _gram_distance(_unit(s), _unit(t))
        return _SpatialAttentionDistance.apply(s, t, temperature)


def channel_relation_distance(
    student: torch.Tensor, teacher: torch.Tensor, relation: str = "cosine", temperature: float = 1.0
) -> torch.Tensor:
    """Mean squared difference of the two channel relation maps.

    Args and result as in `spatial_relation_distance`.

    Raises:
        UserError: the two have different numbers of channels, so that their C x C maps cannot be compared. Give
            `DualRelationLoss` a projector (it makes one where widths differ).
    """
    _check(relation, temperature, student, teacher)
    if student.shape[1] != teacher.shape[1]:
        raise UserError(
            f"channel relations need equal widths, the student has {student.shape[1]} channels and the teacher "
            f"{teacher.shape[1]}: project the student's features to the teacher's width first"
        )
    with _full_precision(student):
        teacher = resize_to(_wide(teacher.detach()), student.shape[-2:])
        s, t = _unit(_wide(student).flatten(2)), _unit(teacher.flatten(2))  # (B, C, N)
        if s.dtype != t.dtype:
            s, t = s.float(), t.float()
        if relation == "cosine":
            return _gram_distance(s, t)
        s_map = torch.softmax(s @ s.mT / temperature, dim=-1)
        t_map = torch.softmax(t @ t.mT / temperature, dim=-1)
        return (s_map - t_map).square().mean()


def resize_to(features: torch.Tensor, size) -> torch.Tensor:
    """(B, C, H, W) resized to the grid `size` = (h, w): bilinear, antialiased where it shrinks, in float32; unchanged if equal."""
    size = tuple(int(n) for n in size)
    if tuple(features.shape[-2:]) == size:
        return features
    with torch.autocast(device_type=features.device.type, enabled=False):  # antialiasing has no bfloat16 form on CPU
        return F.interpolate(_wide(features), size=size, mode="bilinear", align_corners=False, antialias=True)


def _gram_distance(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """mean((S S^T - T T^T)^2) for S (B, M, K_s) and T (B, M, K_t), both with rows of unit (or zero) length."""
    m, k_s, k_t = s.shape[1], s.shape[2], t.shape[2]
    # Multiplications: M^2 (K_s + K_t) for the maps, M (K_s^2 + K_s K_t + K_t^2) for the small products.
    if m * (k_s + k_t) <= k_s * k_s + k_s * k_t + k_t * k_t:
        return (s @ s.mT - t @ t.mT).square().mean()
    return _ExactGramDistance.apply(s, t)


class _ExactGramDistance(torch.autograd.Function):
    """The three small products; their squared norms are summed in float64, where subtracting them is safe.

    With A = S^T S and P = S^T T the gradient of ||S S^T - T T^T||^2 with respect to S is 4 (S A - T P^T).
    """

    @staticmethod
    def forward(ctx, s, t):
        a, p = s.mT @ s, s.mT @ t  # (B, K_s, K_s), (B, K_s, K_t)
        b = t.mT @ t  # (B, K_t, K_t); constant for the student, needed for the true value only
        total = _sum_of_squares(a) + _sum_of_squares(b) - 2 * _sum_of_squares(p)
        ctx.save_for_backward(s, t, a, p)
        ctx.entries = s.shape[0] * s.shape[1] ** 2
        return (total / ctx.entries).clamp_min(0).to(s.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        s, t, a, p = ctx.saved_tensors
        with _full_precision(s):
            return (s @ a - t @ p.mT).mul_(4 * grad / ctx.entries), None


class _SpatialAttentionDistance(torch.autograd.Function):
    """Row blocks of both attention maps: formed, compared, differentiated and dropped in one pass."""

    @staticmethod
    def forward(ctx, s, t, temperature):
        batch, n, _ = s.shape
        scale_s, scale_t = _attention_scale(s, temperature), _attention_scale(t, temperature)
        block = max(1, min(n, _BLOCK_BYTES // (4 * n)))
        total = torch.zeros((), dtype=torch.float64, device=s.device)
        need_grad = ctx.needs_input_grad[0]
        grad_s = torch.zeros_like(s) if need_grad else None
        for one in range(batch):  # one image at a time: memory does not grow with the batch
            for start in range(0, n, block):
                rows = slice(start, start + block)
                p = torch.softmax(s[one, rows] @ s[one].mT * scale_s, dim=-1)  # (block, N)
                difference = p - torch.softmax(t[one, rows] @ t[one].mT * scale_t, dim=-1)
                total += _sum_of_squares(difference)
                if need_grad:  # d/dlogits of ||p - q||^2 is 2 p (d - sum(p d)) with d = p - q
                    weighted = p * difference
                    inner = weighted.sum(dim=-1, keepdim=True)
                    g = weighted.sub_(p * inner)
                    grad_s[one, rows] += g @ s[one]
                    grad_s[one] += g.mT @ s[one, rows]
        entries = batch * n * n
        if need_grad:
            ctx.save_for_backward(grad_s.mul_(2 * scale_s / entries))
        return (total / entries).to(s.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (grad_s,) = ctx.saved_tensors
        return grad_s * grad, None, None


def _sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().sum()


def _attention_scale(rows: torch.Tensor, temperature: float) -> float:
    return 1.0 / (math.sqrt(rows.shape[-1]) * temperature)


def _wide(features: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything else becomes float32."""
    return features if features.dtype == torch.float64 else features.float()


def _positions(features: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, C)."""
    return _wide(features).flatten(2).mT


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows scaled to unit length; a zero row stays zero and gets a zero gradient (x / max(|x|, eps) would get g / eps)."""
    squares = rows.square().sum(dim=-1, keepdim=True)
    is_zero = squares < 1e-24
    return rows * squares.masked_fill(is_zero, 1.0).rsqrt().masked_fill(is_zero, 0.0)


@contextlib.contextmanager
def _full_precision(features: torch.Tensor):
    """Autocast off and, on CUDA, TF32 off for the products inside."""
    with torch.autocast(device_type=features.device.type, enabled=False):
        if features.device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        # Newer versions of torch refuse to read the old switch once the new one was used.
        switch, off = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
        before = getattr(matmul, switch)
        setattr(matmul, switch, off)
        try:
            yield
        finally:
            setattr(matmul, switch, before)


def _check(relation: str, temperature: float, *features: torch.Tensor) -> None:
    if relation not in RELATIONS:
        raise UserError(f"relation={relation!r} is not known, choose one of {', '.join(RELATIONS)}")
    if not temperature > 0:
        raise UserError(f"temperature={temperature} must be greater than 0")
    for f in features:
        if f.ndim != 4 or not f.is_floating_point():
            raise UserError(f"features must be floating point (B, C, H, W), got {f.dtype} {tuple(f.shape)}")
    if len({f.shape[0] for f in features}) > 1:
        raise UserError(f"student and teacher differ in batch size: {[f.shape[0] for f in features]}")
