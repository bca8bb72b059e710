"""Distances of cosine relation maps, and of channel attention maps, with their gradients.

Tensors here are (B, K, M): M items, each a column of K numbers, and the maps compared are M x M. Spatial relations
have the positions as items, channel relations the channels. The mathematics is in `drd_hf.relations`.
"""

import torch

from drd_hf.relations.precision import inverse_length, sum_dtype

# Both routes work through the batch in pieces: small enough for a CPU's cache, large enough to fill a GPU.
_CPU_BYTES, _GPU_BYTES = 4 * 2**20, 256 * 2**20
# About so many columns are added up in float32 before their sum goes into one of float64.
_MAX_COLUMNS = 4096
# Sums over a map with the same vector everywhere are biased in float32. Over the entries of a wide product that averages
# out; the products of vectors up to this length are taken in float64.
_NARROW = 64
# Rows of a self product that are computed at a time; the lower triangle is copied from the upper one.
_TRIANGLE_BLOCK = 128
_ROWS = torch.contiguous_format
# The element-wise passes over M x M maps cost as much as this many multiplications of a matrix product for each entry.
_MAP_PASSES = 100


def cosine_route(items: int, student_width: int, teacher_width: int) -> str:
    """``"direct"`` or ``"identity"``, whichever needs fewer operations, forward and backward.

    Args:
        items: M, the maps compared are M x M (positions for spatial relations, channels for channel relations).
        student_width, teacher_width: length of the vectors whose cosines the maps hold.
    """
    k_s, k_t, m = student_width, teacher_width, items
    direct = m * m * (2 * k_s + k_t + _MAP_PASSES)
    identity = m * (2 * k_s * k_s + 2 * k_s * k_t + k_t * k_t)
    return "direct" if direct <= identity else "identity"


def channel_route(student_channels: int, teacher_channels: int, positions: int, projected: bool) -> str:
    """`cosine_route` for channel relations; what the projection costs comes on top of both."""
    c_s, c_t, n = student_channels, teacher_channels, positions
    if not projected:
        return cosine_route(c_t, n, n)
    direct = min(_folding(c_s, c_t, n), 3 * n * c_s * c_t + n * c_t * c_t) + (n + _MAP_PASSES) * c_t * c_t
    identity = 3 * n * c_s * c_t + 5 * c_t * n * n
    return "direct" if direct <= identity else "identity"


def _folding(c_s: int, c_t: int, n: int) -> int:
    """Multiplications of W (F F^T) W^T and its gradient; those in float64 count twice."""
    return 3 * n * c_s * c_s + 6 * c_t * c_s * c_s + 4 * c_t * c_t * c_s


def identity_distance(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype, teacher_term: bool, need_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum over the batch of ||S^T S - Z^T Z||^2 from K x K products, and its gradient (B, K_s, M).

    S and Z are the inputs with columns of unit length. With equal widths the products are taken of U = S + Z and
    V = S - Z, since S^T S - Z^T Z = (U^T V + V^T U) / 2 does not cancel where student and teacher nearly agree.
    """
    batch, k_s, items = student.shape
    k_t = teacher.shape[1]
    equal = k_s == k_t
    columns, images = _pieces(student, k_s + k_t, items)
    total = torch.zeros((), dtype=sum_dtype(student.device), device=student.device)
    grad = torch.empty_like(student, dtype=dtype, memory_format=_ROWS) if need_grad else None
    for start in range(0, batch, images):
        group = slice(start, start + images)
        s, t = student[group], teacher[group]
        work = _Columns(s, t, columns, dtype, equal)
        a, p, b = work.products(need_teacher=teacher_term or equal)
        if equal:  # a = U U^T, p = U V^T, b = V V^T
            total += 0.5 * (_dot(a, b) + _dot(p, p.mT))
        else:  # a = S S^T, p = S Z^T, b = Z Z^T
            total += _dot(a, a) - 2 * _dot(p, p)
            if teacher_term:
                total += _dot(b, b)
        if need_grad:
            if equal:  # 4 S (S^T S - Z^T Z) = 2 ((S V^T) U + (S U^T) V) and 2 S = U + V
                work.gradient((p + b).to(dtype), (a + p.mT).to(dtype), 1.0, out=grad[group])
            else:  # 4 S (S^T S - Z^T Z) = 4 (A S - P Z)
                work.gradient(a.to(dtype), p.neg().to(dtype), 4.0, out=grad[group])
    return total, grad


class _Columns:
    """A group of images whose columns are normalised a piece at a time, into buffers that stay in cache."""

    def __init__(self, student, teacher, columns: int, dtype, equal: bool):
        self.student, self.teacher, self.equal = student, teacher, equal
        self.images, self.k_s, self.items = student.shape
        self.k_t = teacher.shape[1]
        self.pieces = [slice(i, min(i + columns, self.items)) for i in range(0, self.items, columns)]
        make = {"dtype": dtype, "device": student.device}
        width = self.pieces[0].stop
        self.first = torch.empty(self.images, self.k_s, width, **make)
        self.second = torch.empty(self.images, self.k_t, width, **make)
        self.scale_s = torch.empty(self.images, 1, self.items, **make)
        self.scale_t = torch.empty(self.images, 1, self.items, **make)
        self.filled = None

    def fill(self, piece: slice, measure: bool):
        """(S, Z) of a piece, or (U, V) where widths are equal; lengths are taken on the first pass alone."""
        width = piece.stop - piece.start
        first, second = self.first[:, :, :width], self.second[:, :, :width]
        if self.filled != piece:
            _unit_columns(self.student[:, :, piece], first, self.scale_s[:, :, piece], measure)
            _unit_columns(self.teacher[:, :, piece], second, self.scale_t[:, :, piece], measure)
            if self.equal:
                torch.sub(first, second, out=second)  # V = S - Z
                first.mul_(2).sub_(second)  # U = 2 S - V
            self.filled = piece
        return first, second

    def products(self, need_teacher: bool):
        """Sums over all columns of first first^T, first second^T and second second^T."""
        exact = sum_dtype(self.first.device)
        narrow = min(self.k_s, self.k_t) <= _NARROW
        dtypes = [exact if narrow else self.first.dtype] * 2 + [exact if self.k_t <= _NARROW else self.first.dtype]
        sides = [(self.k_s, self.k_s), (self.k_s, self.k_t), (self.k_t, self.k_t)][: 3 if need_teacher else 2]
        make = {"device": self.first.device}
        sums = [torch.zeros(self.images, *side, dtype=d, **make) for side, d in zip(sides, dtypes, strict=False)]
        totals, added = None, 0
        for piece in self.pieces:
            first, second = self.fill(piece, measure=True)
            x, y = (first.to(exact), second.to(exact)) if narrow else (first, second)
            _add_self_product(x, sums[0])
            torch.baddbmm(sums[1], x, y.mT, out=sums[1])
            if need_teacher:
                _add_self_product(y if self.k_t <= _NARROW else second, sums[2])
            added += piece.stop - piece.start
            if added >= _MAX_COLUMNS and piece.stop < self.items:
                totals = totals or [torch.zeros_like(s, dtype=exact) for s in sums]
                for total, part in zip(totals, sums, strict=True):
                    total.add_(part)
                    part.zero_()
                added = 0
        sums = sums if totals is None else [t.add_(s) for t, s in zip(totals, sums, strict=True)]
        for product in sums[::2]:
            _mirror(product)
        return *sums, *[None] * (3 - len(sums))

    def gradient(self, left: torch.Tensor, right: torch.Tensor, factor: float, out: torch.Tensor) -> None:
        """factor * (left first + right second), carried back through the normalisation of the student's columns."""
        result, product = torch.empty_like(self.first), torch.empty_like(self.first)
        for piece in self.pieces:
            first, second = self.fill(piece, measure=False)
            g, radial = (buffer[:, :, : piece.stop - piece.start] for buffer in (result, product))
            torch.matmul(left, first, out=g)
            torch.baddbmm(g, right, second, out=g)
            # The part of g along the column changes its length alone, which the relation does not see.
            x, scale = self.student[:, :, piece].to(g.dtype), self.scale_s[:, :, piece]
            torch.mul(g, x, out=radial)
            g.addcmul_(x, radial.sum(1, keepdim=True).mul_(scale).mul_(scale), value=-1)
            torch.mul(g, factor * scale, out=out[:, :, piece])


def direct_distance(
    student_gram: torch.Tensor,
    teacher_gram: torch.Tensor,
    dtype: torch.dtype,
    relation: str,
    temperature: float,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum over the batch of the squared differences of two relation maps, given the Gram matrices (B, M, M) of the items, which are overwritten.

    Cosines come from a Gram matrix R and its diagonal, so that no normalised copy of the features is made.

    Returns:
        The sum and its derivative with respect to `student_gram`, a symmetric (B, M, M); None unless asked for.
    """
    cosines, scale = _cosines(student_gram, dtype)
    teacher_map, _ = _cosines(teacher_gram, dtype)
    if relation == "cosine":
        difference = teacher_map.neg_().add_(cosines)
    else:
        student_map = torch.softmax(cosines / temperature, dim=-1)
        difference = torch.softmax(teacher_map.div_(temperature), dim=-1).neg_().add_(student_map)
    total = (difference * difference).sum(dtype=sum_dtype(student_gram.device))
    if not need_grad:
        return total, None
    if relation == "cosine":
        slope = difference.mul_(2)
    else:
        slope = difference.mul_(student_map)
        slope.addcmul_(student_map, slope.sum(dim=-1, keepdim=True), value=-1)
        slope = torch.add(slope, slope.mT, out=student_map).div_(temperature)  # 2 / T times the symmetric part
    # cos_ij = R_ij r_i r_j with r_i = R_ii^(-1/2)
    along = (slope * cosines).sum(dim=-1).mul_(scale).mul_(scale)
    slope = slope.mul_(scale[:, :, None]).mul_(scale[:, None, :])
    slope.diagonal(dim1=-2, dim2=-1).sub_(along)
    return total, slope


def direct_spatial_distance(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype, need_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `identity_distance`, from the M x M maps."""
    total, grad = 0, torch.empty_like(student, dtype=dtype, memory_format=_ROWS) if need_grad else None
    for group in _groups(student, items=student.shape[2]):
        s, t = student[group].to(dtype), teacher[group].to(dtype)
        part, slope = direct_distance(self_product(s.mT), self_product(t.mT), dtype, "cosine", 1.0, need_grad)
        total = part + total
        if need_grad:
            torch.matmul(s, slope.mul_(2), out=grad[group])
    return total, grad


def direct_channel_distance(
    student: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor | None,
    dtype: torch.dtype,
    relation: str,
    temperature: float,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Sum over the batch of the squared differences of C_t x C_t maps, and gradients of student and projection weight.

    The Gram matrix of projected rows is W (F F^T) W^T. W may cancel most of F, and what is left counts twice over in the
    product; F F^T, its folding and their gradients are taken in float64. With few positions it is cheaper to project the features.
    """
    c_s, c_t, n = student.shape[1], teacher.shape[1], student.shape[2]
    if weight is not None and 3 * n * c_s * c_t + n * c_t * c_t < _folding(c_s, c_t, n):
        projected = weight @ student.to(dtype)
        total, grad, _ = direct_channel_distance(projected, teacher, None, dtype, relation, temperature, need_grad)
        return total, *_through_projection(grad, student, weight)
    total, grad, weight_grad = 0, None, None
    if need_grad:
        grad = torch.empty_like(student, dtype=dtype, memory_format=_ROWS)
        weight_grad = None if weight is None else torch.zeros_like(weight)
    wide = dtype if weight is None else sum_dtype(student.device)
    for group in _groups(student, items=teacher.shape[1]):
        gram = rows_gram = _gram_of_rows(student[group], wide)
        if weight is not None:
            rows_gram = _folded(weight.to(wide), gram)
        teacher_gram = _gram_of_rows(teacher[group], dtype)
        part, slope = direct_distance(rows_gram, teacher_gram, dtype, relation, temperature, need_grad)
        total = part + total
        if not need_grad:
            continue
        if weight is None:
            slope.mul_(2)
        else:
            half = (slope.to(wide) @ weight.to(wide)).mul_(2)
            weight_grad += (half @ gram).sum(0)
            slope = (weight.to(wide).mT @ half).to(dtype)
        torch.matmul(slope, student[group].to(dtype), out=grad[group])
    return total, grad, weight_grad


def identity_channel_distance(
    student: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor | None,
    dtype: torch.dtype,
    relation: str,
    temperature: float,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As `direct_channel_distance` from N x N products, for fewer positions than channels; ``cosine`` only."""
    rows = student if weight is None else weight @ student.to(dtype)
    total, grad = identity_distance(rows.mT, teacher.mT, dtype, True, need_grad)
    return total, *_through_projection(grad if grad is None else grad.mT, student, weight)


def _through_projection(
    grad: torch.Tensor | None, student: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of student and weight, given that of the projected student."""
    if grad is None or weight is None:
        return grad if grad is None else grad.contiguous(), None
    return weight.mT @ grad, (grad @ student.to(grad.dtype).mT).sum(0)


def _groups(features: torch.Tensor, items: int) -> list[slice]:
    """The batch in groups of images whose M x M maps may be formed together."""
    images = max(1, _budget(features.device) // (16 * items * items))
    return [slice(i, i + images) for i in range(0, features.shape[0], images)]


def _gram_of_rows(features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, K, N) -> (B, K, K); features of another dtype are converted a piece at a time."""
    if features.dtype == dtype:
        return self_product(features)
    columns, _ = _pieces(features, 4 * features.shape[1], features.shape[2])
    out = features.new_zeros(features.shape[0], features.shape[1], features.shape[1], dtype=dtype)
    for piece in features.split(columns, dim=2):
        _add_self_product(piece.to(dtype), out)
    return _mirror(out)


def _folded(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """W G W^T for W (C_t, C_s) and G (B, C_s, C_s)."""
    half = weight @ gram
    if not _in_triangles(half):
        return half @ weight.mT
    out = half.new_empty(len(half), len(weight), len(weight))
    for image, result in zip(half, out, strict=True):
        for block in _blocks(half):
            torch.mm(image[block], weight[block.start :].mT, out=result[block, block.start :])
    return _mirror(out)


def self_product(rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """rows @ rows^T for (B, M, K); on a CPU without computing the lower triangle."""
    if not _in_triangles(rows):
        return torch.bmm(rows, rows.mT, out=out)
    out = rows.new_empty(rows.shape[0], rows.shape[1], rows.shape[1]) if out is None else out
    for image, result in zip(rows, out, strict=True):
        for block in _blocks(rows):
            torch.mm(image[block], image[block.start :].mT, out=result[block, block.start :])
    return _mirror(out)


def _add_self_product(rows: torch.Tensor, out: torch.Tensor) -> None:
    """out += rows @ rows^T, to be mirrored in the end."""
    if not _in_triangles(rows):
        torch.baddbmm(out, rows, rows.mT, out=out)
        return
    for image, result in zip(rows, out, strict=True):
        for block in _blocks(rows):
            upper = result[block, block.start :]
            torch.addmm(upper, image[block], image[block.start :].mT, out=upper)


def _mirror(product: torch.Tensor) -> torch.Tensor:
    """Copies the upper triangle of blocks to the lower one, where only the upper was computed."""
    if _in_triangles(product):
        for block in _blocks(product):
            product[:, block, : block.start] = product[:, : block.start, block].mT
    return product


def _in_triangles(rows: torch.Tensor) -> bool:
    return rows.device.type == "cpu" and rows.shape[1] >= 2 * _TRIANGLE_BLOCK


def _blocks(rows: torch.Tensor) -> list[slice]:
    return [slice(start, start + _TRIANGLE_BLOCK) for start in range(0, rows.shape[1], _TRIANGLE_BLOCK)]


def _unit_columns(x: torch.Tensor, out: torch.Tensor, scale: torch.Tensor, measure: bool) -> None:
    x = x.to(out.dtype)
    if measure:
        torch.mul(x, x, out=out)
        scale.copy_(inverse_length(out.sum(1, keepdim=True)))
    torch.mul(x, scale, out=out)


def _cosines(gram: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines (B, M, M) and inverse lengths (B, M) of the items of a Gram matrix, which is overwritten."""
    scale = inverse_length(gram.diagonal(dim1=-2, dim2=-1))
    gram.mul_(scale[:, :, None])
    if gram.dtype == dtype:
        return gram.mul_(scale[:, None, :]), scale
    return torch.mul(gram, scale[:, None, :], out=torch.empty_like(gram, dtype=dtype)), scale.to(dtype)


def _pieces(features: torch.Tensor, width: int, items: int) -> tuple[int, int]:
    """Columns and images worked on at a time, for `width` numbers a column."""
    numbers = _budget(features.device) // 4
    columns = min(items, _MAX_COLUMNS, max(64, numbers // width))
    return columns, max(1, numbers // (width * columns))


def _budget(device: torch.device) -> int:
    return _CPU_BYTES if device.type == "cpu" else _GPU_BYTES


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x * y).sum(dtype=sum_dtype(x.device))
