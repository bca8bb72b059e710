"""Alignment of relation maps: how far two models agree on which positions go together, whatever the scale of their features.

Definition
----------
X (C_s x M) and Z (C_t x M) are the features of student and teacher at all positions of all images of a batch, M = B N,
each channel less its mean over the positions of the image. Their relation maps are the Gram matrices K = X^T X and L = Z^T Z,
M x M, within images and across them. The distance is one minus the cosine of the angle between the maps::

    1 - <K, L> / (||K|| ||L||),        <K, L> = sum over all entries of K * L

It is 0 where the maps agree up to a factor and 1 where they have nothing in common; rotating the channels of one model, or
scaling its features, changes nothing. Of maps centred over all positions at once the fraction is the centred alignment of
kernels (Cortes et al., JMLR 2012), also known as linear CKA (Kornblith et al., ICML 2019). Centring each image by itself
leaves out what is common to its positions, such as its exposure.

One number for both relations
-----------------------------
The traces of products may be rotated, so that ``<K, L> = ||X Z^T||^2``, ``||K|| = ||X X^T||`` and ``||L|| = ||Z Z^T||``: positions
agree as far as channels vary together. The matrices on the right have at most C x C entries, and no M x M map is formed.
Cost is ``M (C_s^2 + C_s C_t + C_t^2)`` multiplications forward and ``M (2 C_s^2 + C_s C_t)`` backward, linear in the
number of positions, so that relations across images cost no more than those within.

Numbers that nearly cancel are not subtracted, but for the one minus at the end: its error is that of the products.
"""

import torch
from torch import Tensor

from drd_hf.relations.precision import compute_dtype


def alignment_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the alignment of the relation maps of two (B, C, H, W) on the same grid, see above; a scalar between 0 and 1.

    The gradient flows to the student alone. Features that are the same everywhere in each image have no relations: the
    distance is then 1, without a gradient.
    """
    dtype = compute_dtype(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        x, z = _centred(student, dtype), _centred(teacher.detach(), dtype)
        own, teachers, both = ((first @ second.mT).square().sum() for first, second in ((x, x), (z, z), (x, z)))
        lengths = own * teachers
        return 1 - both * lengths.masked_fill(lengths == 0, 1.0).rsqrt()


def _centred(features: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, B N): each channel less its mean in the image, and all over the root of their summed squares, which changes no angle.

    Zero where no more is left than the rounding of the features.
    """
    features = features.flatten(2).to(dtype)
    centred = features - features.mean(dim=2, keepdim=True)
    squares = centred.detach().square().sum()
    is_zero = squares <= (16 * torch.finfo(dtype).eps) ** 2 * features.detach().square().sum()
    scale = squares.masked_fill(is_zero, 1.0).rsqrt().masked_fill(is_zero, 0.0)
    return (centred * scale).transpose(0, 1).flatten(1)
