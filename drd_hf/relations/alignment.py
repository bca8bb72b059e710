"""Alignment of relations: how far two models agree, whatever the scale of their features.

X (C_s x M) and Z (C_t x M) are the features of student and teacher at all positions of all images of a batch, M = B N,
each channel less its mean over the positions of the image. Centring each image by itself leaves out what is common to its
positions, such as its exposure. Both distances are one minus a cosine: 0 where the models agree, 1 where they have nothing in
common; that of the channels reaches 2 where they are each other's negative.

Spatial
-------
The relation maps K = X^T X and L = Z^T Z, M x M, hold the relations of every two positions, within images and across them.
The distance is one minus the cosine of the angle between the maps::

    1 - <K, L> / (||K|| ||L||),        <K, L> = sum over all entries of K * L

Rotating the channels of one model, or scaling its features, changes nothing, and widths need not be equal. Of maps centred
over all positions at once the fraction is the centred alignment of kernels (Cortes et al., JMLR 2012), also known as linear CKA
(Kornblith et al., ICML 2019).

The traces of products may be rotated, so that ``<K, L> = ||X Z^T||^2``, ``||K|| = ||X X^T||`` and ``||L|| = ||Z Z^T||``. The
matrices on the right have at most C x C entries, and no M x M map is formed. Cost is ``M (C_s^2 + C_s C_t + C_t^2)``
multiplications forward and ``M (2 C_s^2 + C_s C_t)`` backward, linear in the number of positions, so that relations across
images cost no more than those within.

Channel
-------
The relations between the channels of the student, projected to the teacher's width, and those of the teacher are their
correlations over all positions. The student agrees where each of its channels correlates fully with its counterpart::

    1 - mean over i of  y_i . z_i / (|y_i| |z_i|),        Y = W X, rows y_i

Then its correlations with all other channels of the teacher are the teacher's own. For features of one image this is the
distance of Cao et al., "PKD", NeurIPS 2022, up to a factor. Cost is ``M C_s C_t`` multiplications forward, twice that backward.

After the means are taken away no numbers are subtracted that nearly cancel, but for the one minus at the end: its error is that
of the products. They follow the user's choice of TF32, which the exact identity of the plain form could not.
"""

import torch
from torch import Tensor

from drd_hf.relations.precision import compute_dtype


def spatial_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Of two (B, C, H, W) on the same grid; a scalar between 0 and 1.

    The gradient flows to the student alone. Features that are the same everywhere in each image have no relations: the
    distance is then 1, without a gradient.
    """
    dtype = compute_dtype(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        x, z = (_of_length_1(*_centred(f, dtype)) for f in (student, teacher.detach()))
        own, teachers, both = ((first @ second.mT).square().sum() for first, second in ((x, x), (z, z), (x, z)))
        lengths = own * teachers
        return 1 - both * lengths.masked_fill(lengths == 0, 1.0).rsqrt()


def channel_distance(student: Tensor, teacher: Tensor, projection: Tensor | None) -> Tensor:
    """Of two (B, C, H, W) on the same grid and W (C_t, C_s) or None; a scalar between 0 and 2.

    The gradient flows to the student and to W. A channel that is the same everywhere in each image correlates with nothing.
    """
    dtype = compute_dtype(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        y, z = _centred(student, dtype), _centred(teacher.detach(), dtype)
        if projection is not None:
            weight = projection.to(dtype)
            y = weight @ y[0], weight.detach().square() @ y[1]  # roughly will do for the size of the rounding
        y, z = (_of_length_1(*rows, dim=1) for rows in (y, z))
        return 1 - (y * z).sum(dim=1).mean()


def _centred(features: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(C, B N), each channel less its mean in the image, and the squared lengths (C, 1) before that."""
    features = features.flatten(2).to(dtype)
    centred = features - features.mean(dim=2, keepdim=True)
    squares = features.detach().square().sum(dim=(0, 2))[:, None]
    return centred.transpose(0, 1).flatten(1), squares


def _of_length_1(rows: Tensor, before: Tensor, dim: int | None = None) -> Tensor:
    """Rows over the root of their summed squares, each by itself (dim 1) or all together.

    Zero where no more is left of what they were `before` than its rounding. The length of all together changes no angle and
    counts as a constant.
    """
    if dim is None:
        squares, before = rows.detach().square().sum(), before.sum()
    else:
        squares = rows.square().sum(dim, keepdim=True)
    is_zero = (squares <= (16 * torch.finfo(rows.dtype).eps) ** 2 * before) & squares.isfinite()
    lengths = squares.masked_fill(is_zero, 1.0)
    # Adding 0 * lengths gives NaN where a square is beyond the number format.
    return rows * (lengths.rsqrt() + 0 * lengths).masked_fill(is_zero, 0.0)
