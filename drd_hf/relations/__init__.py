"""Relation maps of feature maps, and exact distances between them that never form a large map.

Definition
----------
A feature map F with C channels and N = H * W positions is read as a C x N matrix.

``cosine``     Columns (spatial) or rows (channel) are scaled to unit length; the relation map is their Gram matrix,
               spatial N x N, channel C x C.
``attention``  Spatial: ``softmax(F^T F / (sqrt(C) * T))`` over the last axis. Channel: ``softmax(G / T)`` with G the
               Gram matrix of the unit-length rows. T is the temperature.

The distance of two relation maps is the mean of the squared differences over all entries and the batch. Dual
Relation Distillation (arXiv 2506.20688) minimises such distances; its abstract does not fix the normalisation, so
these definitions are this project's own.

The identity
------------
Let S (C_s x N) and Z (C_t x N) have columns of unit length. The squared Frobenius norm is the trace of a matrix times
its transpose, and factors of a trace may be rotated, tr(S^T S Z^T Z) = tr(Z S^T S Z^T) = ||S Z^T||^2. So::

    ||S^T S - Z^T Z||^2 = ||S S^T||^2 + ||Z Z^T||^2 - 2 ||S Z^T||^2

The left side compares two N x N maps; the right side needs products of at most C x C entries. Nothing is approximated.
The gradient follows the same way, ``4 (A S - P Z)`` with A = S S^T and P = S Z^T. The term of the teacher alone has no
gradient. For channel relations the roles of rows and columns are exchanged.

What all vectors have in common is split off first. For a unit vector u, S = u a^T + S' with a = S^T u and S'^T u = 0, and
Z = v b^T + Z' likewise. With p = a + b and q = a - b::

    S^T S - Z^T Z = (p q^T + q p^T) / 2 + (S'^T S' - Z'^T Z')

and the squared norm of the right side is ``(|p|^2 |q|^2 + (p.q)^2) / 2 + 2 (S'p . S'q - Z'p . Z'q) + ||S' S'^T||^2 + ||Z' Z'^T||^2 -
2 ||S' Z'^T||^2``: the identity for the small rests, and products with a few vectors. It holds for every u and v. The mean
direction of the vectors is taken, from some hundred of them, so that as little as possible is left to cancel.

A student of another width than the teacher is projected, Y = W F, before its channels are compared. The Gram matrix of the
projected rows is ``W (F F^T) W^T``: with many positions the projected features, C_t x N, are not formed either.

Routes and cost
---------------
Multiplications in products of matrices, forward and backward, for maps of M x M items (N positions or C channels) that
are described by vectors of K_s and K_t numbers, and the largest tensors held:

============  ================================  ===========================  =============================
route         forward                           backward                     memory
============  ================================  ===========================  =============================
``direct``    M^2 (K_s + K_t)                   M^2 K_s                      M^2, gradient
``identity``  M (K_s^2 + K_s K_t + K_t^2)       M (K_s^2 + K_s K_t)          K^2, gradient, a piece of M K
plain         M^2 (K_s + K_t)                   2 M^2 K_s                    several times M^2
============  ================================  ===========================  =============================

`cosine_route` counts and chooses: ``identity`` for spatial relations of more than a few hundred positions, ``direct`` for
most channel relations. On a CPU products of a matrix with itself are computed above the diagonal only. ``M K_t^2`` is the
teacher's own term, which the value needs and the gradient does not; ``teacher_term=False`` leaves it out.

Splitting off the common direction adds products with vectors, of the order of M (K_s + K_t), and passes over pieces that are
in cache. A map of up to some hundred positions on a CPU, where those would count, goes without as long as its mean cosine is at
most 0.5, too little to lose digits.

``attention`` has no such identity, for the softmax is not linear. Its cost stays N^2 (3 C_s + C_t), but blocks of rows of
both maps are formed, compared, differentiated and dropped in one pass: memory is these blocks, of 64 MiB at most on a CPU and
256 MiB on a GPU, and a few tensors of the features' own size. A CPU uses products of the teacher's features again below the
diagonal, as far as 80 MiB hold them. Maps of few positions are formed at once (`attention_route`), the plain definition being faster.

The gradient is formed in the forward pass, while its ingredients are in cache, and only where one is needed. The
backward pass multiplies it by the incoming factor; features are not kept for it.

Numerical care
--------------
- The right side of the identity subtracts nearly equal numbers. Products are therefore true float32 (autocast and TF32
  are off inside, float64 features stay float64), sums over about 4096 columns are added up in float64, and so are all other sums.
- What would cancel there is what all vectors share: a common mean or an outlier channel makes all cosines close to 1. It is split
  off, on both routes, into the vectors a and b, which are float64; what is left is multiplied in float32, and its rounding is as
  small as it is. For features in float32 the relative error of value and gradient stays near 1e-6 or below up to a mean
  cosine of 0.999, where the plain definition in float32 is 1e-4 and 1e-3 off. Features that take only two or three different
  values have still more in common; of them the absolute error is about 1e-7.
- A projection of few positions is multiplied out in float32 before anything is split off, as the plain definition does.
- With equal widths the products are taken of U = S' + Z' and V = S' - Z', since S'^T S' - Z'^T Z' = (U^T V + V^T U) / 2: nothing
  cancels where student and teacher nearly agree, and identical features give exactly 0.
- A projection may cancel most of the features, so that the little Gram matrix of the student is formed in float64 there. So
  are products of vectors of at most 64 numbers, where the rounding of a sum of equal terms does not average out.
- Entries of a Gram matrix of half-precision features overflow; they are widened to float32 a piece at a time.
- A zero vector (squared length under 1e-24) has no direction: its relations are 0 and its gradient is 0, not infinite.
"""

import torch
import torch.nn.functional as F
from torch import library

from drd_hf.errors import UserError
from drd_hf.relations import alignment
from drd_hf.relations.attention import attention_distance, attention_route
from drd_hf.relations.cosine import (
    channel_route,
    cosine_route,
    direct_channel_distance,
    direct_spatial_distance,
    identity_channel_distance,
    identity_distance,
)
from drd_hf.relations.precision import compute_dtype, full_precision, inverse_length

__all__ = [
    "RELATIONS",
    "ROUTES",
    "attention_route",
    "channel_alignment_distance",
    "channel_relation_distance",
    "channel_relation_map",
    "cosine_route",
    "resize_to",
    "spatial_alignment_distance",
    "spatial_relation_distance",
    "spatial_relation_map",
]

RELATIONS = ("cosine", "attention")
ROUTES = ("direct", "identity")


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
    with full_precision(features.device.type):
        rows = features.to(compute_dtype(features)).flatten(2).mT  # (B, N, C)
        if relation == "cosine":
            rows = _unit(rows)
            return rows @ rows.mT
        return torch.softmax(rows @ rows.mT / (rows.shape[-1] ** 0.5 * temperature), dim=-1)


def channel_relation_map(features: torch.Tensor, relation: str = "cosine", temperature: float = 1.0) -> torch.Tensor:
    """Relations between the channels of a feature map.

    Args and dtype as in `spatial_relation_map`.

    Returns:
        (B, C, C).
    """
    _check(relation, temperature, features)
    with full_precision(features.device.type):
        rows = _unit(features.to(compute_dtype(features)).flatten(2))  # (B, C, N)
        gram = rows @ rows.mT
        return gram if relation == "cosine" else torch.softmax(gram / temperature, dim=-1)


def spatial_relation_distance(
    student: torch.Tensor,
    teacher: torch.Tensor,
    relation: str = "cosine",
    temperature: float = 1.0,
    *,
    route: str | None = None,
    teacher_term: bool = True,
) -> torch.Tensor:
    """Mean squared difference of the two spatial relation maps, without forming large ones.

    Args:
        student: (B, C_s, H, W); receives the gradient.
        teacher: (B, C_t, H_t, W_t); no gradient flows to it. Another H, W than the student's is resized to the
            student's grid (bilinear, antialiased where it shrinks).
        relation, temperature: as in `spatial_relation_map`.
        route: how ``cosine`` is computed, ``"identity"`` or ``"direct"``; None takes what `cosine_route` finds cheaper.
        teacher_term: False leaves ||Z Z^T||^2 out, wherever it need not be formed. It belongs to the teacher alone: the gradient is
            the same at a lower cost, but the value is lower by a constant and no distance any more.

    Returns:
        Scalar, float32 (float64 where both are float64), never negative. Products and gradient are computed in this
        call, the backward pass only scales the gradient; twice differentiable it is not.
    """
    _check(relation, temperature, student, teacher, route=route)
    teacher = resize_to(teacher.detach(), student.shape[-2:])
    settings = (relation, float(temperature), route or "", teacher_term)
    if torch.compiler.is_compiling():
        return _spatial_operator(student, teacher, *settings, _needs_grad(student))[0]
    return _SpatialDistance.apply(student, teacher, *settings, _needs_grad(student))


def channel_relation_distance(
    student: torch.Tensor,
    teacher: torch.Tensor,
    relation: str = "cosine",
    temperature: float = 1.0,
    *,
    projection: torch.Tensor | None = None,
    route: str | None = None,
) -> torch.Tensor:
    """Mean squared difference of the two channel relation maps.

    Args:
        student, teacher, relation, temperature, route: as in `spatial_relation_distance`.
        projection: (C_t, C_s) weight of a 1x1 convolution. The relations of the projected student are compared, without
            projecting its features; the weight receives a gradient as well.

    Returns:
        As `spatial_relation_distance`.

    Raises:
        UserError: the two have different numbers of channels, so that their C x C maps cannot be compared, and there
            is no projection. `DualRelationLoss` makes one where widths differ.
    """
    _check(relation, temperature, student, teacher, route=route)
    _check_widths(student, teacher, projection)
    teacher = resize_to(teacher.detach(), student.shape[-2:])
    settings = (relation, float(temperature), route or "", _needs_grad(student, projection))
    if torch.compiler.is_compiling():
        return _channel_operator(student, teacher, projection, *settings)[0]
    return _ChannelDistance.apply(student, teacher, projection, *settings)


def spatial_alignment_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """One minus the alignment of the relations between all positions of a batch, see `drd_hf.relations.alignment`.

    Args:
        student: (B, C_s, H, W); receives the gradient.
        teacher: (B, C_t, H_t, W_t), of any width; no gradient flows to it. Resized to the student's grid as in
            `spatial_relation_distance`.

    Returns:
        Scalar, float32 (float64 where both are float64): 0 where the relation maps of features centred in each image agree up
        to a factor, 1 where they have nothing in common. No map is formed.
    """
    _check("cosine", 1.0, student, teacher)
    return alignment.spatial_distance(student, resize_to(teacher.detach(), student.shape[-2:]))


def channel_alignment_distance(
    student: torch.Tensor, teacher: torch.Tensor, *, projection: torch.Tensor | None = None
) -> torch.Tensor:
    """One minus the mean correlation of each channel with its counterpart, see `drd_hf.relations.alignment`.

    Args:
        student, teacher: as in `spatial_alignment_distance`.
        projection: (C_t, C_s) weight of a 1x1 convolution of the student's features; receives a gradient as well.

    Returns:
        Scalar as in `spatial_alignment_distance`; 2 where every channel is the negative of its counterpart.

    Raises:
        UserError: the two have different numbers of channels, and there is no projection.
    """
    _check("cosine", 1.0, student, teacher)
    _check_widths(student, teacher, projection)
    return alignment.channel_distance(student, resize_to(teacher.detach(), student.shape[-2:]), projection)


def resize_to(features: torch.Tensor, size) -> torch.Tensor:
    """(B, C, H, W) resized to the grid `size` = (h, w): bilinear, antialiased where it shrinks, in float32; unchanged if equal."""
    size = tuple(int(n) for n in size)
    if tuple(features.shape[-2:]) == size:
        return features
    with torch.autocast(device_type=features.device.type, enabled=False):  # antialiasing has no bfloat16 form on CPU
        features = features.to(compute_dtype(features))
        return F.interpolate(features, size=size, mode="bilinear", align_corners=False, antialias=True)


# The two computations below know nothing of autograd. An autograd function calls them; where torch.compile traces, an
# operator that it does not look into. A gradient that is not needed is an empty tensor.


def _spatial(
    student: torch.Tensor,
    teacher: torch.Tensor,
    relation: str,
    temperature: float,
    route: str,
    teacher_term: bool,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, c_s, height, width = student.shape
    items, dtype = height * width, compute_dtype(student, teacher)
    s, t = student.flatten(2), teacher.flatten(2)  # (B, C_s, N), (B, C_t, N)
    with full_precision(student.device.type):
        if relation == "attention":
            total, grad = attention_distance(s, t, dtype, temperature, need_grad)
        elif (route or cosine_route(items, c_s, t.shape[1])) == "identity":
            total, grad = identity_distance(s, t, dtype, teacher_term, need_grad)
        else:
            teacher_term = True  # the maps are there, the value is the true one
            total, grad = direct_spatial_distance(s, t, dtype, need_grad)
    factor = 1 / (batch * items**2)
    value = (total * factor).to(dtype)
    if grad is None:
        return value.clamp_min_(0) if teacher_term else value, student.new_empty(0)
    return value.clamp_min_(0) if teacher_term else value, grad.mul_(factor).reshape(student.shape)


def _channel(
    student: torch.Tensor,
    teacher: torch.Tensor,
    projection: torch.Tensor | None,
    relation: str,
    temperature: float,
    route: str,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(student, teacher)
    s, t = student.flatten(2), teacher.flatten(2)  # (B, C_s, N), (B, C_t, N)
    weight = None if projection is None else projection.to(dtype)
    if relation == "attention":
        route = "direct"
    route = route or channel_route(s.shape[1], t.shape[1], s.shape[2], projected=weight is not None)
    compute = identity_channel_distance if route == "identity" else direct_channel_distance
    with full_precision(student.device.type):
        total, grad, weight_grad = compute(s, t, weight, dtype, relation, temperature, need_grad)
    factor = 1 / (s.shape[0] * t.shape[1] ** 2)
    value = (total * factor).to(dtype).clamp_min_(0)
    return (
        value,
        student.new_empty(0) if grad is None else grad.mul_(factor).reshape(student.shape),
        student.new_empty(0) if weight_grad is None else weight_grad.mul_(factor),
    )


def _check_widths(student: torch.Tensor, teacher: torch.Tensor, projection: torch.Tensor | None) -> None:
    if projection is None and student.shape[1] != teacher.shape[1]:
        raise UserError(
            f"channel relations need equal widths, the student has {student.shape[1]} channels and the teacher "
            f"{teacher.shape[1]}: project the student's features to the teacher's width first"
        )
    if projection is not None and projection.shape != (teacher.shape[1], student.shape[1]):
        raise UserError(
            f"projection has shape {tuple(projection.shape)}, from {student.shape[1]} to {teacher.shape[1]} channels "
            f"it must be {(teacher.shape[1], student.shape[1])}"
        )


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _SpatialDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, *settings):
        value, *grads = _spatial(student, teacher, *settings)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [student.dtype]
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return _spatial_backward(ctx, slope)


class _ChannelDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, projection, *settings):
        value, *grads = _channel(student, teacher, projection, *settings)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [student.dtype, None if projection is None else projection.dtype]
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return _channel_backward(ctx, slope)


def _scaled(ctx, slope):
    """Gradients of the inputs: scaled before they are narrowed, since those of a mean underflow in half precision."""
    return [
        (grad * slope).to(dtype) if needed and dtype is not None else None
        for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[::2], strict=False)
    ]


_spatial_operator = library.custom_op("drd_hf::spatial_relation_distance", _spatial, mutates_args=())
_channel_operator = library.custom_op("drd_hf::channel_relation_distance", _channel, mutates_args=())


@_spatial_operator.register_fake
def _(student, teacher, relation, temperature, route, teacher_term, need_grad):
    make = {"dtype": compute_dtype(student, teacher)}
    return student.new_empty((), **make), student.new_empty(student.shape, **make) if need_grad else student.new_empty(
        0
    )


@_channel_operator.register_fake
def _(student, teacher, projection, relation, temperature, route, need_grad):
    make = {"dtype": compute_dtype(student, teacher)}
    grads = [
        student.new_empty(x.shape, **make) if need_grad and x is not None else student.new_empty(0)
        for x in (student, projection)
    ]
    return student.new_empty((), **make), *grads


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [inputs[0].dtype, inputs[2].dtype if isinstance(inputs[2], torch.Tensor) else None]


def _spatial_backward(ctx, slope, *_):
    return _scaled(ctx, slope)[0], *[None] * 6


_spatial_operator.register_autograd(_spatial_backward, setup_context=_keep)


def _channel_backward(ctx, slope, *_):
    grad, weight_grad = _scaled(ctx, slope)
    return grad, None, weight_grad, *[None] * 4


_channel_operator.register_autograd(_channel_backward, setup_context=_keep)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows scaled to unit length; a zero row stays zero."""
    return rows * inverse_length(rows.square().sum(dim=-1, keepdim=True))


def _check(relation: str, temperature: float, *features: torch.Tensor, route: str | None = None) -> None:
    if relation not in RELATIONS:
        raise UserError(f"relation={relation!r} is not known, choose one of {', '.join(RELATIONS)}")
    if not temperature > 0:
        raise UserError(f"temperature={temperature} must be greater than 0")
    if route is not None and (route not in ROUTES or relation != "cosine"):
        raise UserError(f"route={route!r} must be one of {', '.join(ROUTES)} and goes with relation='cosine'")
    for f in features:
        if f.ndim != 4 or not f.is_floating_point() or f.numel() == 0:
            raise UserError(
                f"features must be floating point (B, C, H, W) and not empty, got {f.dtype} {tuple(f.shape)}"
            )
    if len({f.shape[0] for f in features}) > 1:
        raise UserError(f"student and teacher differ in batch size: {[f.shape[0] for f in features]}")
