"""Distillation losses as public code computes them, for the benchmarks: what a user would run instead.

Each takes the features of student and teacher (B, C, H, W), and some a 1x1 projection (C_t, C_s) or labels (B, H, W). They
are written plainly, without the care that `drd_hf.losses` takes of number formats, sizes and memory, and differentiated by autograd.
"""

import torch
import torch.nn.functional as F


def plain_spatial_cosine(student, teacher, **_):
    """The distance of `drd_hf.spatial_relation_distance` with both N x N maps in memory."""
    s, t = F.normalize(student.flatten(2), dim=1), F.normalize(teacher.flatten(2), dim=1)
    return (s.mT @ s - t.mT @ t).square().mean()


def plain_spatial_attention(student, teacher, **_):
    s, t = student.flatten(2), teacher.flatten(2)
    s_map = torch.softmax(s.mT @ s / s.shape[1] ** 0.5, dim=-1)
    return (s_map - torch.softmax(t.mT @ t / t.shape[1] ** 0.5, dim=-1)).square().mean()


def plain_channel_cosine(student, teacher, projection=None, **_):
    """The distance of `drd_hf.channel_relation_distance` with the projected features in memory."""
    s, t = F.normalize(_projected(student, projection).flatten(2), dim=2), F.normalize(teacher.flatten(2), dim=2)
    return (s @ s.mT - t @ t.mT).square().mean()


def plain_channel_attention(student, teacher, projection=None, **_):
    s, t = F.normalize(_projected(student, projection).flatten(2), dim=2), F.normalize(teacher.flatten(2), dim=2)
    return (torch.softmax(s @ s.mT, dim=-1) - torch.softmax(t @ t.mT, dim=-1)).square().mean()


def plain_spatial_aligned(student, teacher, **_):
    """The distance of `drd_hf.spatial_alignment_distance` with the maps of all positions of the batch in memory."""
    x, z = _centred(student), _centred(teacher)
    x_map, z_map = x.mT @ x, z.mT @ z
    return 1 - (x_map * z_map).sum() / (x_map.norm() * z_map.norm())


def plain_channel_aligned(student, teacher, projection=None, **_):
    """The distance of `drd_hf.channel_alignment_distance`, without its care of constant channels."""
    return 1 - F.cosine_similarity(_centred(_projected(student, projection)), _centred(teacher), dim=1).mean()


def skd_pairwise(student, teacher, **_):
    """Structured knowledge distillation: cosine maps of the positions that a 2x2 max-pooling leaves."""
    s, t = (F.normalize(F.max_pool2d(f, 2, ceil_mode=True).flatten(2), dim=1) for f in (student, teacher))
    return (s.mT @ s - t.mT @ t).square().mean()


def ifvd(student, teacher, labels, classes=6, **_):
    """Intra-class feature variation: cosine of each position to the mean feature of its class."""
    labels = F.interpolate(labels[:, None].float(), student.shape[-2:], mode="nearest")[:, 0].long()

    def variation(f):
        centres = torch.zeros_like(f)
        for c in range(classes):
            mask = (labels == c)[:, None]
            mean = (f * mask).sum(dim=(2, 3), keepdim=True) / (mask.sum(dim=(2, 3), keepdim=True) + 1e-6)
            centres = centres * ~mask + mean * mask
        return F.cosine_similarity(f, centres, dim=1)

    return (variation(student) - variation(teacher)).square().mean()


def cirkd_minibatch(student, teacher, temperature=0.1, **_):
    """Cross-image relations within a batch: similarities of all positions of every pair of images, softmax, KL."""
    s, t = F.normalize(student.flatten(2), dim=1), F.normalize(teacher.flatten(2), dim=1)
    total = 0.0
    for i in range(len(s)):
        for j in range(len(s)):
            log_p = F.log_softmax(s[i].mT @ s[j] / temperature, dim=-1)
            q = F.softmax(t[i].mT @ t[j] / temperature, dim=-1)
            total = total + F.kl_div(log_p, q, reduction="batchmean")
    return total / len(s) ** 2


def ickd(student, teacher, projection=None, **_):
    """Inter-channel correlation: Gram matrices of the channels, rows of unit length."""
    s, t = _projected(student, projection).flatten(2), teacher.flatten(2)
    s_map, t_map = F.normalize(s @ s.mT, dim=-1), F.normalize(t @ t.mT, dim=-1)
    return (s_map - t_map).square().sum() / (s_map.shape[1] * len(s))


def sp(student, teacher, **_):
    """Similarity preserving: Gram matrices of the images of a batch, rows of unit length."""
    s, t = student.flatten(1), teacher.flatten(1)
    return (F.normalize(s @ s.mT, dim=1) - F.normalize(t @ t.mT, dim=1)).square().sum() / len(s) ** 2


def at(student, teacher, **_):
    """Attention transfer: mean over channels of the squares, unit length."""
    s, t = (F.normalize(f.square().mean(dim=1).flatten(1), dim=1) for f in (student, teacher))
    return (s - t).square().mean()


def fitnet(student, teacher, projection=None, **_):
    return (_projected(student, projection) - teacher).square().mean()


def cwd(student, teacher, projection=None, temperature=4.0, **_):
    """Channel-wise distillation: softmax over the positions of each channel, KL."""
    s, t = _projected(student, projection).flatten(2) / temperature, teacher.flatten(2) / temperature
    log_t = F.log_softmax(t, dim=-1)
    divergence = (log_t.exp() * (log_t - F.log_softmax(s, dim=-1))).sum()
    return divergence * temperature**2 / (t.shape[0] * t.shape[1])


def csd(student, teacher, **_):
    """Category-wise similarity of class scores, average pooled by 2."""
    maps = [torch.softmax(F.avg_pool2d(f, 2, ceil_mode=True).flatten(2) / 4, dim=-1) for f in (student, teacher)]
    return (maps[0] @ maps[0].mT - maps[1] @ maps[1].mT).square().mean()


def pixel_kd(student, teacher, **_):
    log_t = F.log_softmax(teacher, dim=1)
    return (log_t.exp() * (log_t - F.log_softmax(student, dim=1))).sum(dim=1).mean()


def _projected(features, projection):
    return features if projection is None else F.conv2d(features, projection[:, :, None, None])


def _centred(features):
    """(C, B N), each channel less its mean in the image."""
    features = features.flatten(2)
    return (features - features.mean(dim=2, keepdim=True)).transpose(0, 1).flatten(1)
