"""Distances of cosine relation maps, and of channel attention maps, with their gradients.

Tensors here are (B, K, M): M items, each a column of K numbers, and the maps compared are M x M. Spatial relations
have the positions as items, channel relations the channels. The mathematics is in `drd_hf.relations`.
"""

import torch

from drd_hf.relations.precision import ZERO_SQUARED, inverse_length, sum_dtype

# Both routes work through the batch in pieces: small enough for a CPU's cache, large enough to fill a GPU.
_CPU_BYTES, _GPU_BYTES = 4 * 2**20, 256 * 2**20
# About so many columns are added up in float32 before their sum goes into one of float64.
_MAX_COLUMNS = 4096
# Sums of equal terms, as over areas where a map is constant, are biased in float32. Over the entries of a wide product that averages
# out; the products of vectors up to this length are taken in float64.
_NARROW = 64
# Rows of a self product that are computed at a time; the lower triangle is copied from the upper one.
_TRIANGLE_BLOCK = 128
# Items from which a direction common to all is found.
_SAMPLES, _ROW_SAMPLES = 512, 64
# Up to so many positions a CPU does without splitting off a common direction, if the mean cosine is not above this.
_FEW, _MUCH_IN_COMMON = 800, 0.5
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

    S = u a^T + S' and Z = v b^T + Z' are the inputs with columns of unit length, see `_Items`. With p = a + b and q = a - b the
    maps differ by (p q^T + q p^T) / 2 + (S'^T S' - Z'^T Z'). With equal widths the products are taken of U = S' + Z' and
    V = S' - Z', since S'^T S' - Z'^T Z' = (U^T V + V^T U) / 2 does not cancel where student and teacher nearly agree.
    """
    batch, k_s, items = student.shape
    k_t = teacher.shape[1]
    columns, images = _pieces(student, k_s + k_t, items)
    total = torch.zeros((), dtype=sum_dtype(student.device), device=student.device)
    grad = torch.empty_like(student, dtype=dtype, memory_format=_ROWS) if need_grad else None
    for start in range(0, batch, images):
        group = slice(start, start + images)
        pair = _Pair(student[group], teacher[group], columns, dtype)
        total += pair.value(teacher_term)
        if need_grad:
            pair.gradient(out=grad[group])
    return total, grad


class _Items:
    """Items (B, K, M) of unit length, each split into what lies along a direction u, common to all, and the rest.

    F_i = c_i u + F'_i and r_i = 1 / sqrt(c_i^2 + |F'_i|^2) give a_i = c_i r_i and S'_i = r_i F'_i. The vector a is float64; S' is
    small where the items have much in common, and the rounding of its products with it.
    """

    def __init__(self, features: torch.Tensor, dtype: torch.dtype):
        self.features = features
        self.direction = _common_direction(features, dtype)  # (B, K, 1)
        self.length = self.direction.norm(dim=1, keepdim=True, dtype=sum_dtype(features.device))
        make = {"dtype": dtype, "device": features.device}
        one_each = (features.shape[0], 1, features.shape[2])
        self.share, self.scale, self.rest = (torch.empty(one_each, **make) for _ in range(3))  # c, r, |S'_i|^2
        self.along = torch.empty(one_each, dtype=sum_dtype(features.device), device=features.device)  # a

    def fill(self, piece: slice, out: torch.Tensor, work: torch.Tensor | None = None) -> None:
        """S' of a piece; on the first pass, with a buffer to work in, its lengths are taken."""
        x = self.features[:, :, piece].to(out.dtype)
        share, scale = self.share[:, :, piece], self.scale[:, :, piece]
        if work is not None:
            torch.matmul(self.direction.mT, x, out=share)
        torch.addcmul(x, self.direction, share, value=-1, out=out)
        if work is not None:
            missed = self.direction.mT @ out
            out.addcmul_(self.direction, missed, value=-1)
            share.add_(missed)
            squares = torch.mul(out, out, out=work).sum(1, keepdim=True)
            exact = self.length * share  # u has unit length up to float32 only
            inverse = inverse_length(exact * exact + squares)
            torch.mul(exact, inverse, out=self.along[:, :, piece])
            scale.copy_(inverse)
            torch.mul(squares, scale, out=self.rest[:, :, piece]).mul_(scale)
        out.mul_(scale)

    def gradient(self, g: torch.Tensor, gamma: torch.Tensor, piece: slice, unit: torch.Tensor, work, out) -> None:
        """4 times the derivative with respect to the features, given those by S' and by a, which are overwritten.

        Of each column's derivative the part along the column changes its length alone, which a relation does not see.
        With s_i = S'_i . g_i what remains is u (gamma_i |S'_i|^2 - a_i s_i) + g_i - S'_i (a_i gamma_i + s_i).
        """
        a, scale = self.along[:, :, piece].to(g.dtype), self.scale[:, :, piece]
        s = torch.mul(g, unit, out=work).sum(1, keepdim=True)
        g.addcmul_(unit, a * gamma + s, value=-1)
        g.addcmul_(self.direction, gamma.mul_(self.rest[:, :, piece]).sub_(a.mul_(s)))
        torch.mul(g, 4 * scale, out=out)


class _Pair:
    """A group of images of student and teacher; S' and Z' are formed a piece at a time, into buffers that stay in cache."""

    def __init__(self, student: torch.Tensor, teacher: torch.Tensor, columns: int, dtype: torch.dtype):
        self.s, self.t = _Items(student, dtype), _Items(teacher, dtype)
        (self.images, self.k_s, self.items), self.k_t = student.shape, teacher.shape[1]
        self.equal = self.k_s == self.k_t
        self.pieces = [slice(i, min(i + columns, self.items)) for i in range(0, self.items, columns)]
        make = {"dtype": dtype, "device": student.device}
        self.first, self.second, self.work = (
            torch.empty(self.images, k, self.pieces[0].stop, **make)
            for k in (self.k_s, self.k_t, max(self.k_s, self.k_t))
        )
        self.filled = None

    def fill(self, piece: slice, measure: bool):
        """(S', Z') of a piece, or (U, V) where widths are equal."""
        width = piece.stop - piece.start
        first, second = self.first[:, :, :width], self.second[:, :, :width]
        if self.filled != piece:
            for side, out in ((self.s, first), (self.t, second)):
                side.fill(piece, out, self.work[:, : out.shape[1], :width] if measure else None)
            if self.equal:
                torch.sub(first, second, out=second)  # V = S' - Z'
                first.mul_(2).sub_(second)  # U = 2 S' - V
            self.filled = piece
        return first, second

    def value(self, teacher_term: bool) -> torch.Tensor:
        a, p, b = self.products(need_teacher=teacher_term or self.equal)
        along, teacher_along = self.s.along, self.t.along
        plus, minus = along + teacher_along, along - teacher_along
        (xp, xq), (yp, yq) = self.vectors  # of first and second with p and q
        pq = (plus * minus).sum(-1)
        total = 0.5 * _dot(plus.square().sum(-1), minus.square().sum(-1)) + 0.5 * _dot(pq, pq)
        if self.equal:  # a = U U^T, p = U V^T, b = V V^T
            total = total + _dot(xp, yq) + _dot(xq, yp) + 0.5 * (_dot(a, b) + _dot(p, p.mT))
            self.left, self.right = (p + b).div_(4), (a + p.mT).div_(4)
            self.by_student = (xq + yq) / 2, (xp + yp - xq - yq) / 4
            self.by_along = (yp + yq) / 4, (xp + xq) / 4
        else:  # a = S' S'^T, p = S' Z'^T, b = Z' Z'^T
            total = total + 2 * (_dot(xp, xq) - _dot(yp, yq)) + _dot(a, a) - 2 * _dot(p, p)
            if teacher_term:
                total = total + _dot(b, b)
            else:  # without ||Z Z^T||^2, of which ||Z' Z'^T||^2 is the part that was not formed
                own = teacher_along.square().sum(-1)
                total = total - _dot(own, own) - 0.5 * _dot(yp - yq, yp - yq)
            self.left, self.right = a, p.neg()
            self.by_student = xq, (xp - xq) / 2
            self.by_along = (xp + xq) / 2, (yp + yq) / -2
        return total

    def products(self, need_teacher: bool):
        """Sums over all columns of first first^T, first second^T and second second^T; `vectors` of those with p and q."""
        exact = sum_dtype(self.first.device)
        narrow = min(self.k_s, self.k_t) <= _NARROW
        dtypes = [exact if narrow else self.first.dtype] * 2 + [exact if self.k_t <= _NARROW else self.first.dtype]
        sides = [(self.k_s, self.k_s), (self.k_s, self.k_t), (self.k_t, self.k_t)][: 3 if need_teacher else 2]
        make = {"device": self.first.device}
        sums = [torch.zeros(self.images, *side, dtype=d, **make) for side, d in zip(sides, dtypes, strict=False)]
        self.vectors = [torch.zeros(2, self.images, k, 1, dtype=exact, **make) for k in (self.k_s, self.k_t)]
        totals, added = None, 0
        for piece in self.pieces:
            first, second = self.fill(piece, measure=True)
            a, b = self.s.along[:, :, piece], self.t.along[:, :, piece]
            for column, v in enumerate((a + b, a - b)):  # two products with a vector are faster than one with two
                v = v.to(first.dtype).mT
                for vectors, x in zip(self.vectors, (first, second), strict=True):
                    vectors[column] += x @ v
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

    def gradient(self, out: torch.Tensor) -> None:
        """Of the value, by the student's features; `value` comes first."""
        dtype = out.dtype
        left, right = self.left.to(dtype), self.right.to(dtype)
        by_a, by_q = (x.to(dtype) for x in self.by_student)  # S' q, S' b
        for_first, for_second = (x.mT.to(dtype) for x in self.by_along)
        a, q = self.s.along, self.s.along - self.t.along
        inner, mixed = (a * q).sum(-1, keepdim=True), (a * self.t.along).sum(-1, keepdim=True)
        result = torch.empty_like(self.first)
        for piece in reversed(self.pieces):  # the last is still there
            first, second = self.fill(piece, measure=False)
            g, work = (x[:, : self.k_s, : piece.stop - piece.start] for x in (result, self.work))
            # by S': S' (a a^T - b b^T) = (S' q) a^T + (S' b) q^T, and S' (S'^T S' - Z'^T Z')
            torch.matmul(left, first, out=g)
            torch.baddbmm(g, right, second, out=g)
            g.addcmul_(by_a, a[:, :, piece].to(dtype)).addcmul_(by_q, q[:, :, piece].to(dtype))
            # by a: a (a . q) + (a . b) q, and S'^T (S' a) - Z'^T (Z' a)
            gamma = (a[:, :, piece] * inner).add_(q[:, :, piece] * mixed).to(dtype)
            gamma = gamma.add_(for_first @ first).add_(for_second @ second)
            unit = first.add_(second).mul_(0.5) if self.equal else first  # S' again
            self.filled = None if self.equal else self.filled
            self.s.gradient(g, gamma, piece, unit, work, out[:, :, piece])


def _common_direction(features: torch.Tensor, dtype: torch.dtype, samples: int = _SAMPLES) -> torch.Tensor:
    """(B, K, 1): unit vector near which the items (B, K, M) lie if they have a direction in common, found from some of them.

    What is split off along it is put back exactly, so that a poor choice costs digits and never makes a result wrong.
    """
    items = features.shape[2]
    if items > samples:
        runs = [items * i // 32 for i in range(32)]
        features = torch.cat([features[:, :, i : i + samples // 32] for i in runs], dim=2)
    x = features.to(dtype)
    x = x * (x * x).sum(1, keepdim=True).clamp_min_(ZERO_SQUARED).rsqrt_()
    # A step of the power iteration: items of either sign do not cancel.
    u = x @ (x.mT @ x.sum(2, keepdim=True))
    return u / u.norm(dim=1, keepdim=True).clamp_min_(ZERO_SQUARED)


class _Rows:
    """As `_Items`, for items that are long rows (B, M, K): they are not held a second time, and the Gram matrix is formed instead."""

    def __init__(self, features: torch.Tensor, dtype: torch.dtype):
        self.features, self.dtype, self.exact = features, dtype, sum_dtype(features.device)
        width, _ = _pieces(features, 2 * features.shape[1], features.shape[2])
        self.pieces = [slice(i, i + width) for i in range(0, features.shape[2], width)]
        self.direction = _common_direction(features.mT, dtype, _ROW_SAMPLES).mT  # (B, 1, K)
        share = sum((features[:, :, x].to(dtype) @ self.direction[:, :, x].mT).to(self.exact) for x in self.pieces)
        self.share = share.to(dtype)  # (B, M, 1)

    def fill(self, piece: slice) -> torch.Tensor:
        """F' of a piece."""
        return torch.addcmul(
            self.features[:, :, piece].to(self.dtype), self.share, self.direction[:, :, piece], value=-1
        )

    def cosines(self) -> torch.Tensor:
        """S' S'^T; lengths and a are taken on the way."""
        batch, items, _ = self.features.shape
        gram = torch.zeros(batch, items, items, dtype=self.dtype, device=self.features.device)
        missed = 0
        for piece in self.pieces:
            rows = self.fill(piece)
            _add_self_product(rows, gram)
            missed = missed + (rows @ self.direction[:, :, piece].mT).to(self.exact)
        _mirror(gram)
        self.share = self.share + missed.to(self.dtype)
        exact = self.direction.norm(dim=2, keepdim=True, dtype=self.exact) * self.share
        inverse = inverse_length(exact * exact + gram.diagonal(dim1=1, dim2=2)[:, :, None])
        self.along, self.scale = (exact * inverse).mT, inverse.to(self.dtype)  # (B, 1, M), (B, M, 1)
        return gram.mul_(self.scale).mul_(self.scale.mT)

    def gradient(self, slope: torch.Tensor, along: torch.Tensor, out: torch.Tensor) -> None:
        """slope F' + along u^T, for (B, M, M) and (B, M, 1)."""
        slope, along = slope.to(self.dtype), along.to(self.dtype)
        for piece in self.pieces:
            product = slope @ self.fill(piece)
            torch.addcmul(product, along, self.direction[:, :, piece], out=out[:, :, piece])


def direct_distance(
    first: torch.Tensor,
    a: torch.Tensor | None,
    second: torch.Tensor,
    b: torch.Tensor | None,
    relation: str,
    temperature: float,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum over the batch of the squared differences of the relation maps of two sets of cosines (B, M, M).

    The cosines are first + a a^T and second + b b^T with vectors (B, 1, M), or None where nothing has been split off. `second` is
    overwritten.

    Returns:
        The sum and its derivative with respect to the first cosines, a symmetric (B, M, M); None unless asked for.
    """
    dtype = second.dtype
    if relation == "cosine":
        difference = _difference(first, a, second, b)
    else:
        cosines, teacher_cosines = (x if v is None else x + v.mT * v for x, v in ((first, a), (second, b)))
        student_map = torch.softmax(cosines / temperature, dim=-1, dtype=dtype)
        difference = torch.softmax(teacher_cosines / temperature, dim=-1, dtype=dtype).neg_().add_(student_map)
    total = _dot(difference, difference)
    if not need_grad:
        return total, None
    if relation == "cosine":
        return total, difference.mul_(2)
    slope = difference.mul_(student_map)
    slope.addcmul_(student_map, slope.sum(dim=-1, keepdim=True), value=-1)
    return total, torch.add(slope, slope.mT, out=student_map).div_(temperature)  # 2 / T times the symmetric part


def _difference(first, a, second, b) -> torch.Tensor:
    """(first + a a^T) - (second + b b^T), for (B, M, M) and (B, 1, M), into `second`."""
    if a is not None:  # a a^T - b b^T = (p q^T + q p^T) / 2 with p = a + b and q = a - b
        p, q = (a + b).to(second.dtype), (a - b).to(second.dtype)
        return second.neg_().add_(first).baddbmm_(torch.cat([p, q], 1).mT, torch.cat([q, p], 1), alpha=0.5)
    if b is not None:
        first = torch.baddbmm(first, b.mT, b, alpha=-1).to(second.dtype)
    return second.neg_().add_(first)


def _by_gram(slope: torch.Tensor, cosines: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """From the derivative by the cosines R_ij r_i r_j, r_i = R_ii^(-1/2), to that by R; (B, M, M), (B, M, 1)."""
    along = (slope * cosines).sum(dim=-1, keepdim=True).mul_(scale).mul_(scale)
    slope = (slope * scale).mul_(scale.mT)
    slope.diagonal(dim1=-2, dim2=-1).sub_(along[:, :, 0])
    return slope


def direct_spatial_distance(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype, need_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `identity_distance`, from the M x M maps."""
    total, grad = 0, torch.empty_like(student, dtype=dtype, memory_format=_ROWS) if need_grad else None
    for group in image_groups(student, items=student.shape[2]):
        of_group = student[group], teacher[group], dtype, need_grad
        part, group_grad = _plain_spatial_distance(*of_group) or _split_spatial_distance(*of_group)
        total = part + total
        if need_grad:
            grad[group] = group_grad
    return total, grad


def _plain_spatial_distance(student, teacher, dtype, need_grad):
    """Of a few items on a CPU, unless they have so much in common that digits would be lost: less work than to split it off."""
    if student.shape[2] > _FEW or student.device.type != "cpu":
        return None
    s, t = student.to(dtype), teacher.to(dtype)
    (first, scale), (second, _) = (_cosines(self_product(x.mT)) for x in (s, t))
    if max(first.mean(), second.mean()) > _MUCH_IN_COMMON:
        return None
    total, slope = direct_distance(first, None, second, None, "cosine", 1.0, need_grad)
    return total, s @ _by_gram(slope, first, scale).mul_(2) if need_grad else None


def _split_spatial_distance(student, teacher, dtype, need_grad):
    sides = [_Items(x, dtype) for x in (student, teacher)]
    units = [torch.empty_like(side.features, dtype=dtype, memory_format=_ROWS) for side in sides]
    everything = slice(0, student.shape[2])
    for side, unit in zip(sides, units, strict=True):
        side.fill(everything, unit, torch.empty_like(unit))
    a, b = (side.along for side in sides)
    difference = _difference(self_product(units[0].mT), a, self_product(units[1].mT), b)
    total, grad = _dot(difference, difference), None
    if need_grad:
        grad, work = torch.empty_like(units[0]), torch.empty_like(units[0])
        by_along = (a @ difference.to(a.dtype)).to(dtype)
        sides[0].gradient(units[0] @ difference, by_along, everything, units[0], work, out=grad)
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
    exact = sum_dtype(student.device)
    for group in image_groups(student, items=c_t):
        rows = _Rows(teacher[group], dtype)
        second, b = rows.cosines(), rows.along
        rows = _Rows(student[group], dtype) if weight is None or need_grad else None
        if weight is None:
            first = rows.cosines()
            a, scale = rows.along, rows.scale
        else:
            gram = _gram_of_rows(student[group], exact)
            wide = weight.to(exact)
            a, (first, scale) = None, _cosines(_folded(wide, gram))
        part, slope = direct_distance(first, a, second, b, relation, temperature, need_grad)
        total = part + total
        if not need_grad:
            continue
        if weight is None:
            # With s_i the sum of slope_ij S'_i . S'_j, and gamma = slope a: what changes the length of an item is taken out
            gamma = (a @ slope.to(exact)).mT
            s = (slope * first).sum(2, keepdim=True, dtype=exact)
            by_u = gamma * first.diagonal(dim1=1, dim2=2)[:, :, None] - a.mT * s
            slope.mul_(scale).mul_(scale.mT)
            slope.diagonal(dim1=1, dim2=2).sub_(((a.mT * gamma + s) * scale * scale)[:, :, 0])
            rows.gradient(slope.mul_(2), 2 * by_u * scale, out=grad[group])
        else:
            half = (_by_gram(slope.to(exact), first, scale) @ wide).mul_(2)
            weight_grad += (half @ gram).sum(0)
            slope = wide.mT @ half
            rows.gradient(slope, slope @ rows.share.to(exact), out=grad[group])
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


def image_groups(features: torch.Tensor, items: int) -> list[slice]:
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


def _cosines(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines (B, M, M) and inverse lengths (B, M, 1) of the items of a Gram matrix, which is overwritten."""
    scale = inverse_length(gram.diagonal(dim1=-2, dim2=-1))[:, :, None]
    return gram.mul_(scale).mul_(scale.mT), scale


def _pieces(features: torch.Tensor, width: int, items: int) -> tuple[int, int]:
    """Columns and images worked on at a time, for `width` numbers a column."""
    numbers = _budget(features.device) // 4
    columns = min(items, _MAX_COLUMNS, max(64, numbers // width))
    return columns, max(1, numbers // (width * columns))


def _budget(device: torch.device) -> int:
    return _CPU_BYTES if device.type == "cpu" else _GPU_BYTES


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x * y).sum(dtype=sum_dtype(x.device))
