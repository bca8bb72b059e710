"""The losses beside Dual Relation Distillation: each against its definition, restated here image by image, and in a trainer."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation, SegformerImageProcessor

from drd_hf.arguments import parse_arguments
from drd_hf.errors import UserError
from drd_hf.losses import (
    AfDCDLoss,
    ATLoss,
    CIRKDLoss,
    ClassRelationLoss,
    CWDLogitLoss,
    CWDLoss,
    DISTLoss,
    DSDLoss,
    FitNetLoss,
    ICKDLoss,
    IFVDLoss,
    MGDLoss,
    PixelLogitLoss,
    SKDLoss,
    SPLoss,
    attention_transfer_distance,
    batch_similarity_distance,
    category_similarity_distance,
    channel_correlation_distance,
    channel_kl,
    cirkd,
    correlation_distances,
    cross_image_kl,
    feature_distance,
    intra_class_distance,
    omni_contrast,
    pairwise_distance,
    pixel_similarity_distance,
    summed_square_distance,
)
from drd_hf.losses.methods import METHODS, losses_from_config, parse_methods
from drd_hf.losses.mgd import random_mask
from drd_hf.models import default_feature_layer, stage_pairs
from drd_hf.trainer import DistillationConfig, DistillationTrainer

from .conftest import RandomTiles, tiny_model

ROOT = Path(__file__).resolve().parents[1]


# Definitions, as the papers or the authors' code have them. Features are (B, C, H, W) of one grid.


def direction(vector):
    length = vector.norm()
    return vector / length if length > 1e-12 else vector * 0


def mean(values):
    return sum(values) / len(values)


def square(values):
    return (values**2).mean()


def plain_skd(student, teacher):
    distances = []
    for s, t in zip(student, teacher, strict=True):
        maps = []
        for f in (s, t):
            rows, columns = math.ceil(f.shape[1] / 2), math.ceil(f.shape[2] / 2)
            regions = [f[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] for i in range(rows) for j in range(columns)]
            regions = torch.stack([direction(region.amax((1, 2))) for region in regions])
            maps.append(regions @ regions.T)
        distances.append(square(maps[0] - maps[1]))
    return mean(distances)


def plain_ifvd(student, teacher, labels):
    total, count = 0.0, 0
    for image, ids in enumerate(labels.flatten(1).tolist()):
        cosines = []
        for f in (student[image].flatten(1), teacher[image].flatten(1)):
            means = {c: mean([f[:, n] for n, i in enumerate(ids) if i == c]) for c in set(ids)}
            cosines.append([direction(f[:, n]) @ direction(means[c]) for n, c in enumerate(ids)])
        for s, t, label in zip(*cosines, ids, strict=True):
            if label != 255:
                total, count = total + (s - t) ** 2, count + 1
    return total / max(count, 1)


def plain_cwd(student, teacher, temperature=4.0):
    divergences = []
    for s, t in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        p, q = torch.softmax(t.flatten() / temperature, 0), torch.softmax(s.flatten() / temperature, 0)
        divergences.append((p * (p / q).log()).sum())
    return mean(divergences) * temperature**2


def plain_at(student, teacher):
    maps = [torch.stack([direction((f**2).mean(0).flatten()) for f in images]) for images in (student, teacher)]
    return square(maps[0] - maps[1])


def plain_fitnet(student, teacher):
    return square(student - teacher)


def plain_csd(student, teacher):
    maps = []
    for logits in (student, teacher):
        rows, columns = math.ceil(logits.shape[2] / 2), math.ceil(logits.shape[3] / 2)
        cells = [
            logits[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
            for i in range(rows)
            for j in range(columns)
        ]
        p = torch.softmax(torch.stack(cells, 2) / 4, 2)
        maps.append(torch.stack([image @ image.T for image in p]))
    return square(maps[0] - maps[1])


def plain_psd(student_taps, teacher_taps):
    residuals = []
    for taps in (student_taps, teacher_taps):
        maps = [torch.stack([direction((f**2).mean(0).flatten()) for f in tap]) for tap in taps]
        pairs = [(m, n) for n in range(len(maps)) for m in range(n + 1, len(maps))]
        residuals.append([torch.stack([direction(v) for v in maps[m] - maps[n]]) for m, n in pairs])
    return mean([square(s - t) for s, t in zip(*residuals, strict=True)])


def plain_cirkd(student, teacher, temperature=0.1):
    s, t = ([torch.stack([direction(v) for v in image.flatten(1).T]) for image in f] for f in (student, teacher))
    divergences = []
    for i in range(len(s)):
        for j in range(len(s)):
            for row_s, row_t in zip(s[i] @ s[j].T / temperature, t[i] @ t[j].T / temperature, strict=True):
                p, q = torch.softmax(row_t, 0), torch.softmax(row_s, 0)
                divergences.append((p * (p / q).log()).sum())
    return mean(divergences)


def plain_dist(student, teacher):
    s, t = (torch.softmax(z, 1).permute(0, 2, 3, 1).reshape(-1, z.shape[1]) for z in (student, teacher))

    def correlation(a, b):
        return direction(a - a.mean()) @ direction(b - b.mean())

    inter = mean([1 - correlation(a, b) for a, b in zip(s, t, strict=True)])
    intra = mean([1 - correlation(a, b) for a, b in zip(s.T, t.T, strict=True)])
    return inter, intra


def plain_ickd(student, teacher):
    total = 0.0
    for s, t in zip(student.flatten(2), teacher.flatten(2), strict=True):
        maps = [torch.stack([direction(row) for row in f @ f.T]) for f in (s, t)]
        total = total + ((maps[0] - maps[1]) ** 2).sum()
    return total / (student.shape[0] * student.shape[1])


def plain_sp(student, teacher):
    grams = [f.flatten(1) @ f.flatten(1).T for f in (student, teacher)]
    maps = [torch.stack([direction(row) for row in gram]) for gram in grams]
    return square(maps[0] - maps[1])


def plain_omni(student, teacher, groups=16, temperature=0.07):
    """Of maps whose sides are multiples of 16 and whose width is one of `groups`."""
    s, t = F.max_pool2d(student, 4), F.max_pool2d(teacher, 4)
    batch, channels, height, width = s.shape
    terms = []
    for b in range(batch):
        for top in range(0, height, 4):
            for left in range(0, width, 4):
                keys = [(i, j, g) for i in range(top, top + 4) for j in range(left, left + 4) for g in range(groups)]
                size = channels // groups
                vectors = [{(i, j, g): f[b, g * size : (g + 1) * size, i, j] for i, j, g in keys} for f in (s, t)]
                targets = torch.stack([vectors[1][key] for key in keys])
                for n, key in enumerate(keys):
                    scores = -(vectors[0][key] - targets).abs().sum(1) / temperature
                    others = [m for m, other in enumerate(keys) if other[2] != key[2]]
                    terms.append(torch.logsumexp(scores[[n, *others]], 0) - scores[n])
    return sum(terms) / (batch * height * width)


# Shapes: batch, student's and teacher's width, student's and teacher's grid.

SHAPES = [
    (2, 4, 4, (6, 6), (6, 6)),
    (1, 3, 3, (5, 7), (10, 13)),
    (3, 5, 5, (4, 3), (2, 3)),
    (2, 4, 4, (1, 1), (3, 2)),
    (1, 2, 2, (1, 9), (1, 1)),
]
WIDTHS_DIFFER = [(b, c, c + 3, grid, other) for b, c, _, grid, other in SHAPES]


def pair_of_maps(batch, c_s, c_t, grid, other, seed=0):
    make = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(seed)}
    student, teacher = torch.randn(batch, c_s, *grid, **make), torch.randn(batch, c_t, *other, **make)
    return student.requires_grad_(), teacher.requires_grad_()


def on_grid(features, grid):
    return F.interpolate(features, size=grid, mode="bilinear", antialias=True, align_corners=False)


def labels_for(batch, grid, seed=0):
    labels = torch.randint(0, 4, (batch, *grid), generator=torch.Generator().manual_seed(seed))
    return torch.where(labels == 3, 255, labels)


def assert_same_with_gradient(loss, definition, student, teacher):
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, torch.as_tensor(definition, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    grads = [
        torch.autograd.grad(value, student, retain_graph=True, allow_unused=True)[0] for value in (loss, definition)
    ]
    grads = [torch.zeros_like(student) if grad is None else grad for grad in grads]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-10)
    assert torch.autograd.grad(loss, teacher, retain_graph=True, allow_unused=True)[0] is None


ANY_WIDTHS = {
    "skd": (pairwise_distance, plain_skd),
    "at": (attention_transfer_distance, plain_at),
    "cirkd": (cross_image_kl, plain_cirkd),
}
EQUAL_WIDTHS = {
    "cwd": (channel_kl, plain_cwd),
    "fitnet": (feature_distance, plain_fitnet),
    "csd": (category_similarity_distance, plain_csd),
    "mgd": (summed_square_distance, lambda s, t: ((s - t) ** 2).sum() / len(s)),
}


@pytest.mark.parametrize("shape", SHAPES + WIDTHS_DIFFER, ids=str)
@pytest.mark.parametrize("name", ANY_WIDTHS)
def test_distance_of_any_widths_equals_its_definition(name, shape):
    loss, definition = ANY_WIDTHS[name]
    student, teacher = pair_of_maps(*shape)
    assert_same_with_gradient(
        loss(student, teacher), definition(student, on_grid(teacher, student.shape[2:])), student, teacher
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EQUAL_WIDTHS)
def test_distance_of_equal_widths_equals_its_definition(name, shape):
    loss, definition = EQUAL_WIDTHS[name]
    student, teacher = pair_of_maps(*shape)
    assert_same_with_gradient(
        loss(student, teacher), definition(student, on_grid(teacher, student.shape[2:])), student, teacher
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ickd_equals_its_definition_on_each_model_s_own_grid(shape):
    student, teacher = pair_of_maps(*shape)
    assert_same_with_gradient(
        channel_correlation_distance(student, teacher), plain_ickd(student, teacher), student, teacher
    )


@pytest.mark.parametrize("shape", SHAPES + WIDTHS_DIFFER, ids=str)
def test_sp_equals_its_definition_on_each_model_s_own_grid(shape):
    student, teacher = pair_of_maps(*shape)
    assert_same_with_gradient(
        batch_similarity_distance(student, teacher), plain_sp(student, teacher), student, teacher
    )


@pytest.mark.parametrize("shape", SHAPES + WIDTHS_DIFFER, ids=str)
def test_ifvd_equals_its_definition_over_the_labelled_positions(shape):
    student, teacher = pair_of_maps(*shape)
    labels = labels_for(shape[0], shape[3])
    fine = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)  # the nearest label of a position is its own
    assert_same_with_gradient(
        intra_class_distance(student, teacher, fine),
        plain_ifvd(student, on_grid(teacher, student.shape[2:]), labels),
        student,
        teacher,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dist_equals_its_definition(shape):
    student, teacher = pair_of_maps(*shape)
    definition = plain_dist(student, on_grid(teacher, student.shape[2:]))
    for value, expected in zip(correlation_distances(student, teacher), definition, strict=True):
        assert_same_with_gradient(value, expected, student, teacher)


@pytest.mark.parametrize("shape", WIDTHS_DIFFER, ids=str)
def test_psd_equals_its_definition_on_the_grid_of_the_last_layer(shape):
    student, teacher = pair_of_maps(*shape)
    deep_s, deep_t = pair_of_maps(shape[0], 6, 7, (2, 3), (4, 4), seed=1)
    scores_s, scores_t = pair_of_maps(shape[0], 3, 3, (8, 9), (5, 5), seed=2)
    taps = [deep_s, student, scores_s], [deep_t, teacher, scores_t]
    loss = pixel_similarity_distance(*taps)
    definition = plain_psd(*([on_grid(f, student.shape[2:]) for f in side] for side in taps))
    for tap in (student, deep_s, scores_s):
        assert_same_with_gradient(loss, definition, tap, teacher)


@pytest.mark.parametrize("grid", [(16, 16), (32, 16)])
def test_omni_contrast_equals_its_definition(grid):
    student, teacher = pair_of_maps(2, 8, 8, grid, grid)
    assert_same_with_gradient(
        omni_contrast(student, teacher, groups=4), plain_omni(student, teacher, groups=4), student, teacher
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_omni_contrast_takes_sizes_that_public_code_does_not(shape):
    student, teacher = pair_of_maps(*shape)
    loss = omni_contrast(student, teacher)
    (grad,) = torch.autograd.grad(loss, student, allow_unused=True)
    assert torch.isfinite(loss) and (grad is None or torch.isfinite(grad).all())


def test_afdcd_refuses_channels_that_make_no_groups():
    student, teacher = pair_of_maps(2, 4, 15, (8, 8), (8, 8))
    loss = AfDCDLoss([("s", "head.conv")], student_widths={"s": 4}, teacher_widths={"head.conv": 15})
    with pytest.raises(UserError, match=r"head\.conv has 15 channels, an odd number"):
        loss.compare(0, student, teacher, None)


@pytest.mark.parametrize("temperature", [0.02, 0.04, 2.0])
def test_cirkd_of_any_temperature_equals_its_definition(temperature):
    """A cosine of -1 at T 0.02 is exp(-100) of that of 1, which float32 cannot hold: such maps go another way."""
    student, teacher = pair_of_maps(3, 4, 6, (3, 5), (3, 5))
    assert_same_with_gradient(
        cross_image_kl(student, teacher, temperature), plain_cirkd(student, teacher, temperature), student, teacher
    )
    single = student.detach().float().requires_grad_()
    loss = cross_image_kl(single, teacher.float(), temperature)
    (grad,) = torch.autograd.grad(loss, single)
    (expected,) = torch.autograd.grad(plain_cirkd(student, teacher, temperature), student)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-5 / temperature)


def test_cirkd_of_opposite_features_is_finite_in_float32():
    student = torch.zeros(2, 4, 2, 2)
    student[0, 0], student[1, 0] = 1.0, -1.0  # cosines of 1 within an image, of -1 between the two
    student.requires_grad_()
    loss = cross_image_kl(student, torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)), 2 / 60)
    (grad,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss) and loss > 0 and torch.isfinite(grad).all()


def test_cirkd_in_blocks_of_rows_is_the_same(monkeypatch):
    student, teacher = pair_of_maps(2, 4, 6, (5, 7), (5, 7))
    whole = cross_image_kl(student, teacher)
    (grad,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(cirkd, "BLOCK_BYTES", 3 * 2 * 35 * 8)  # three rows of 35 float64 for two images
    blocks = cross_image_kl(student, teacher)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(torch.autograd.grad(blocks, student)[0], grad)


@pytest.mark.parametrize(("limit", "side"), [(None, 1), (35, 1), (34, 2), (12, 2), (11, 3), (1, 7)])
def test_cirkd_pools_a_grid_that_is_too_large(limit, side):
    student, teacher = pair_of_maps(1, 4, 4, (5, 7), (5, 7))
    pooled = [F.avg_pool2d(f, side, ceil_mode=True) for f in (student, teacher)]
    assert_same_with_gradient(
        cross_image_kl(student, teacher, max_positions=limit), plain_cirkd(*pooled), student, teacher
    )


def test_the_mask_covers_the_share_of_positions_that_was_asked_for():
    torch.manual_seed(0)
    mask = random_mask(torch.zeros(4, 3, 100, 100), 0.75)
    assert mask.shape == (4, 1, 100, 100) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.25, abs=0.01)
    assert random_mask(torch.zeros(1, 3, 9, 9), 0.0).all()


def test_mgd_compares_what_the_generator_makes_of_the_masked_projected_features():
    loss = MGDLoss([("s", "t")], masked_share=0.5, student_widths={"s": 3}, teacher_widths={"t": 5}).double()
    student, teacher = pair_of_maps(2, 3, 5, (4, 4), (4, 4))
    torch.manual_seed(7)
    value = loss({"s": student}, {"t": teacher})["mgd"]
    torch.manual_seed(7)
    first, _, last = loss.generators["0"]
    kept = (torch.rand(2, 1, 4, 4) <= 0.5).double()
    projected = F.conv2d(student, loss.projectors["0"].weight, loss.projectors["0"].bias) * kept
    made = F.conv2d(F.conv2d(projected, first.weight, first.bias, padding=1).relu(), last.weight, last.bias, padding=1)
    torch.testing.assert_close(value, ((made - teacher) ** 2).sum() / 2)


# The losses as objects: all feature losses, of layers of different widths.

TOGETHER = [name for name in METHODS if name != "drd_channels"]  # which is a term of drd_aligned
WIDTHS = {"student_widths": {"s": 4}, "teacher_widths": {"t": 6}}
PAIR = [("s", "t")]
LOSSES = {
    "skd": lambda: SKDLoss(PAIR, **WIDTHS),
    "ifvd": lambda: IFVDLoss(PAIR, **WIDTHS),
    "cwd": lambda: CWDLoss(PAIR, **WIDTHS),
    "cwd_logits": CWDLogitLoss,
    "drd_classes": ClassRelationLoss,
    "at": lambda: ATLoss(PAIR, **WIDTHS),
    "fitnet": lambda: FitNetLoss(PAIR, **WIDTHS),
    "dsd": lambda: DSDLoss(PAIR),
    "cirkd": lambda: CIRKDLoss(PAIR, **WIDTHS),
    "dist": DISTLoss,
    "mgd": lambda: MGDLoss(PAIR, **WIDTHS),
    "afdcd": lambda: AfDCDLoss(PAIR, **WIDTHS),
    "ickd": lambda: ICKDLoss(PAIR, **WIDTHS),
    "sp": lambda: SPLoss(PAIR, **WIDTHS),
}
# Default weights as the authors' or CIRKD's code has them.
WEIGHTS = {
    "skd": {"skd": 10},
    "ifvd": {"ifvd": 20},
    "cwd": {"cwd": 50},
    "cwd_logits": {"cwd_logits": 3},
    "drd_classes": {"spatial_class_alignment": 2, "channel_class_alignment": 6},
    "at": {"at": 10000},
    "fitnet": {"fitnet": 10},
    "dsd": {"psd": 1000, "csd": 10},
    "cirkd": {"cirkd": 1},
    "dist": {"dist_inter": 1, "dist_intra": 1},
    "mgd": {"mgd": 2e-5},
    "afdcd": {"afdcd_masked": 2e-6, "afdcd_contrast": 5e-3},
    "ickd": {"ickd": 2.5},
    "sp": {"sp": 3000},
}


def run(loss, student, teacher, student_logits, teacher_logits, labels):
    terms = loss({"s": student}, {"t": teacher}, student_logits, teacher_logits, labels)
    return sum(loss.weights[name] * value for name, value in terms.items())


def inputs(dtype=torch.float32, scale=1.0, batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, 4, 6, 7), (batch, 6, 9, 5), (batch, 3, 6, 7), (batch, 3, 12, 14)
    maps = [(scale * torch.randn(shape, generator=generator)).clamp(-6e4, 6e4).to(dtype) for shape in shapes]
    for own in (maps[0], maps[2]):
        own.requires_grad_()
    return [*maps, labels_for(batch, (24, 28))]


def gradients(loss, value, tensors):
    value.backward()
    return [t.grad for t in (*tensors, *loss.parameters()) if t.grad is not None]


@pytest.mark.parametrize("name", LOSSES)
def test_terms_have_the_published_default_weights(name):
    loss = LOSSES[name]()
    assert loss.weights == WEIGHTS[name]
    assert set(loss({"s": inputs()[0]}, {"t": inputs()[1]}, *inputs()[2:])) == set(WEIGHTS[name])


@pytest.mark.parametrize("scale", [1.0, 1e3, 6e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_features_of_any_size_give_finite_losses(name, dtype, scale):
    torch.manual_seed(0)
    loss, values = LOSSES[name](), inputs(dtype, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = run(loss, *values)
    assert value.dtype == torch.float32 and torch.isfinite(value)
    value.backward()
    for parameter in loss.parameters():
        assert torch.isfinite(parameter.grad).all()
    for own in (values[0], values[2]):
        # A gradient can be too large for float16, and for that the trainer scales the loss; it is never NaN.
        assert own.grad is None or not own.grad.isnan().any()


@pytest.mark.parametrize("constant", [0.0, 3.0])
@pytest.mark.parametrize("name", LOSSES)
def test_constant_features_give_no_nan_and_no_exploding_gradient(name, constant):
    torch.manual_seed(0)
    loss, values = LOSSES[name](), inputs()
    with torch.no_grad():
        for own in values[:4]:
            own.fill_(constant)
    value = run(loss, *values)
    found = gradients(loss, value, (values[0], values[2]))
    assert torch.isfinite(value)
    assert all(torch.isfinite(grad).all() and grad.abs().max() < 1e6 for grad in found)


def test_what_rounding_leaves_of_a_constant_student_is_no_direction():
    """DIST centred the probabilities of a student that says the same everywhere: the rounding that was left, 1e-6 long, was
    scaled to length 1, and gradients were a thousand times those of a student that differs."""
    teacher = torch.randn(2, 5, 64, 64, generator=torch.Generator().manual_seed(0))
    student = (0.1 * torch.arange(5.0))[:, None, None].expand(2, 5, 64, 64).clone().requires_grad_()
    inter, intra = correlation_distances(student, teacher)
    assert intra.item() == 1.0
    (inter + intra).backward()
    assert student.grad.abs().max() < 1
    features = torch.full((2, 37, 61, 61), 0.37).requires_grad_()
    scores = torch.full((2, 5, 61, 61), 0.1).requires_grad_()
    pixel_similarity_distance([features, scores], [torch.randn(2, 8, 61, 61), teacher]).backward()
    assert features.grad.abs().max() < 1 and scores.grad.abs().max() < 1


@pytest.mark.parametrize("name", LOSSES)
def test_tiles_without_labels_give_finite_losses_and_ifvd_gives_none(name):
    torch.manual_seed(0)
    loss, values = LOSSES[name](), inputs()
    values[4] = torch.full_like(values[4], 255)
    value = run(loss, *values)
    found = gradients(loss, value, (values[0], values[2]))
    assert found and all(torch.isfinite(grad).all() for grad in found)
    moved = any(grad.abs().max() > 0 for grad in found)
    assert (value.item() == 0 and not moved) if name == "ifvd" else (value.item() > 0 and moved)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_one_image_is_finite(name):
    torch.manual_seed(0)
    loss, values = LOSSES[name](), inputs(batch=1)
    value = run(loss, *values)
    assert torch.isfinite(value)
    assert all(torch.isfinite(grad).all() for grad in gradients(loss, value, (values[0], values[2])))


PROJECTED = ["cwd", "fitnet", "mgd", "afdcd", "ickd"]


@pytest.mark.parametrize("name", LOSSES)
def test_a_projector_exists_only_where_a_definition_needs_equal_widths_and_gets_a_gradient(name):
    torch.manual_seed(0)
    loss, values = LOSSES[name](), inputs()
    projectors = {n: p for n, p in loss.named_parameters() if n.startswith("projectors")}
    assert bool(projectors) == (name in PROJECTED)
    run(loss, *values).backward()
    for parameter in loss.parameters():
        assert parameter.grad.abs().max() > 0
    assert values[0].grad is None or values[0].grad.abs().max() > 0


@pytest.mark.parametrize("name", PROJECTED)
def test_layers_of_one_width_have_no_projector(name):
    equal = type(LOSSES[name]())(PAIR, student_widths={"s": 4}, teacher_widths={"t": 4})
    assert not [n for n, _ in equal.named_parameters() if n.startswith("projectors")]


@pytest.mark.parametrize("name", ["cwd", "fitnet", "mgd", "ickd"])
def test_different_widths_without_a_projector_say_what_to_do(name):
    bare = type(LOSSES[name]())(PAIR)
    with pytest.raises(UserError, match="student_widths and teacher_widths"):
        run(bare, *inputs())


@pytest.mark.parametrize("name", ["skd", "at", "cirkd"])
def test_pairs_of_layers_enter_the_mean_with_their_weights(name):
    kind = type(LOSSES[name]())
    a, b = pair_of_maps(2, 4, 5, (4, 4), (4, 4)), pair_of_maps(2, 3, 6, (3, 5), (6, 6), seed=1)
    student, teacher = {"a": a[0], "b": b[0]}, {"x": a[1], "y": b[1]}
    first, second = (kind([pair])(student, teacher)[name] for pair in (("a", "x"), ("b", "y")))
    both = kind([("a", "x", 3), ("b", "y")])(student, teacher)[name]
    torch.testing.assert_close(both, (3 * first + second) / 4)


def test_identical_models_have_zero_distance():
    features, logits = inputs()[0].detach(), inputs()[2].detach()
    labels = inputs()[4]
    for name in set(LOSSES) - {"mgd", "afdcd"}:  # which compare generated features
        kind = type(LOSSES[name]())
        loss = LOSSES[name]() if kind in (ClassRelationLoss, DISTLoss, CWDLogitLoss, DSDLoss) else kind(PAIR)
        assert run(loss, features, features, logits, logits, labels).item() == pytest.approx(0, abs=1e-3), name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SKDLoss([]), "SKDLoss needs at least one"),
        (lambda: ATLoss(PAIR, weight=0), "at weight 0 must be a number above 0"),
        (lambda: CWDLoss(PAIR, weight=float("nan")), "cwd weight nan"),
        (lambda: CWDLogitLoss(temperature=0), "temperature=0 must be"),
        (lambda: PixelLogitLoss(weight=-1), "logit weight -1 must be a number above 0"),
        (lambda: DSDLoss([("a", "b", -1)]), "a=b has weight -1.0"),
        (lambda: MGDLoss(PAIR, masked_share=1.0), "masked_share=1.0"),
        (lambda: IFVDLoss(PAIR)({"s": inputs()[0]}, {"t": inputs()[1]}), "needs labels"),
        (lambda: run(DISTLoss(), *inputs()[:3], inputs()[0], None), "3 and 4 classes"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(build, message):
    with pytest.raises(UserError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


# By name, in a trainer.


@pytest.mark.parametrize("name", LOSSES)
def test_the_default_weight_of_a_method_is_that_of_its_loss(name):
    args = DistillationConfig(output_dir="unused", method=[name], use_cpu=True)
    (weight,) = parse_methods(args.method).values()
    built, tenfold = (METHODS[name].build(args, PAIR, factor * weight) for factor in (1, 10))
    assert built.weights == pytest.approx(WEIGHTS[name])
    assert tenfold.weights == pytest.approx({term: 10 * value for term, value in WEIGHTS[name].items()})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cdw"], "'cdw' is not known; nearest: cwd"),
        (["none"], "train_teacher.py"),
        (["skd", "skd=3"], "given twice"),
        (["skd=much"], "'much' is no number"),
        (["skd=-1"], "above 0"),
        (["skd=0"], "leave the method out"),
        (["drd_aligned", "drd_channels"], "is a part of drd_aligned"),
    ],
)
def test_wrong_methods_are_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=message) as error:
        DistillationConfig(output_dir="unused", method=given)
    assert "\n" not in str(error.value)


def test_similarities_of_a_batch_of_one_image_are_refused(tmp_path):
    with pytest.raises(UserError, match="per_device_train_batch_size of 2 or more"):
        trainer_of(tmp_path, ["sp"], per_device_train_batch_size=1)


@pytest.mark.parametrize(
    ("given", "plain", "aligned"),
    [
        ({}, (3, 3), (2, 10)),
        ({"method": ["drd=0.5", "drd_aligned=2"]}, (1.5, 1.5), (4, 20)),
        ({"spatial_relation_weight": 7}, (7, 3), (7, 10)),
        ({"channel_relation_weight": 0}, (3, None), (2, None)),
    ],
)
def test_relation_weights_have_a_default_for_each_form(given, plain, aligned):
    args = DistillationConfig(output_dir="unused", **{"method": ["drd", "drd_aligned"], **given})
    first, second = losses_from_config(args, tiny_model("segformer"), tiny_model("upernet"))
    assert (first.weights.get("spatial_relation"), first.weights.get("channel_relation")) == plain
    assert (second.weights.get("spatial_alignment"), second.weights.get("channel_alignment")) == aligned


def test_aligned_relations_read_the_stages_unless_layers_are_named():
    student, teacher = tiny_model("segformer"), tiny_model("upernet")
    args = DistillationConfig(output_dir="unused", method=["drd_aligned"])
    (loss,) = losses_from_config(args, student, teacher)
    assert loss.layers == [(default_feature_layer(student), default_feature_layer(teacher))]
    assert [pair for pair, _, channel in loss.pairs if not channel] == stage_pairs(student, teacher) != []
    args.feature_layers = [f"{loss.layers[0][0]}={loss.layers[0][1]}"]
    (named,) = losses_from_config(args, student, teacher)
    assert len(named.pairs) == 1 and named.layers == loss.layers
    args.spatial_relation_weight = args.channel_relation_weight = 0.0
    assert losses_from_config(args, student, teacher) == []


def test_class_relations_leave_out_a_term_of_weight_0():
    logits = inputs()[2].detach(), inputs()[3]
    whole, alone = (ClassRelationLoss(2.0, weight)({}, {}, *logits) for weight in (6.0, 0.0))
    assert alone == {"spatial_class_alignment": whole["spatial_class_alignment"]} and len(whole) == 2
    with pytest.raises(UserError, match="both relation weights are 0"):
        ClassRelationLoss(0.0, 0.0)


def test_relation_weights_that_no_named_method_reads_are_refused():
    for methods in (["drd_channels"], ["drd_classes", "kd"]):
        with pytest.raises(UserError, match="channel_relation_weight is of drd and drd_aligned.*drd_channels=FACTOR"):
            DistillationConfig(output_dir="unused", method=methods, channel_relation_weight=1.0)
    DistillationConfig(output_dir="unused", method=["drd", "drd_classes"], channel_relation_weight=1.0)


def test_kd_beside_a_logit_weight_is_refused():
    with pytest.raises(UserError, match="the same loss"):
        DistillationConfig(output_dir="unused", method=["drd", "kd"], logit_weight=1.0)


def test_methods_come_from_the_command_line_and_from_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("method: [drd, cwd=5]\n")
    for words, expected in [
        ([], None),
        (["--method", "drd", "kd"], ["drd", "kd"]),
        (["--config", str(tmp_path / "c.yaml")], ["drd", "cwd=5"]),
        (["--config", str(tmp_path / "c.yaml"), "--method", "cwd_logits=3"], ["cwd_logits=3"]),
    ]:
        (args,) = parse_arguments(DistillationConfig, description="", argv=["--output_dir", "unused", *words])
        assert args.method == expected


def trainer_of(tmp_path, method, student="segformer", teacher="upernet", data=None, **changes):
    settings = {
        "output_dir": str(tmp_path / "run"),
        "method": method,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return DistillationTrainer(
        tiny_model(student, seed=1),
        tiny_model(teacher, width=2, seed=2),
        DistillationConfig(**(settings | changes)),
        train_dataset=data or RandomTiles(),
        processing_class=SegformerImageProcessor(do_resize=False),
    )


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("student", "teacher", "name"),
    [("segformer", "upernet", name) for name in METHODS]
    + [("upernet", "segformer", name) for name in ("ifvd", "dsd", "afdcd", "dist", "drd_classes")],
)
def test_every_method_trains_a_student_of_another_width(tmp_path, name, student, teacher):
    trainer = trainer_of(tmp_path, [name], student, teacher)
    trainer.train()
    (loss,) = trainer.losses
    for entry in logs_of(trainer):
        for term, weight in loss.weights.items():
            assert math.isfinite(entry[term]) and entry[term] > 0
            assert entry[f"{term}_weighted"] == pytest.approx(weight * entry[term], rel=1e-3)
        parts = [entry[f"{term}_weighted"] for term in loss.weights]
        assert entry["loss"] == pytest.approx(entry["task_loss"] + sum(parts), rel=1e-3, abs=1e-3)


class UnlabelledTiles(RandomTiles):
    def __getitem__(self, index):
        return {"image": self.images[index], "labels": torch.full_like(self.labels[index], 255)}


def test_all_methods_together_train_on_tiles_without_labels(tmp_path):
    trainer = trainer_of(tmp_path, TOGETHER, data=UnlabelledTiles())
    trainer.train()
    for entry in logs_of(trainer):
        assert math.isfinite(entry["loss"]) and entry["task_loss"] == 0 and entry["ifvd"] == 0


class HalfLabelledTiles(RandomTiles):
    def __getitem__(self, index):
        ignored = torch.full_like(self.labels[index], 255)
        return {"image": self.images[index], "labels": ignored if index % 2 else self.labels[index]}


def test_all_methods_together_train_with_accumulated_batches_of_which_some_have_no_labels(tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 1e-4}
    trainer = trainer_of(tmp_path, TOGETHER, data=HalfLabelledTiles(), **settings)
    trainer.train()
    weights = {term: weight for loss in trainer.losses for term, weight in loss.weights.items()}
    assert len(logs_of(trainer)) == 2
    for entry in logs_of(trainer):
        parts = [entry["task_loss"], *(weight * entry[term] for term, weight in weights.items())]
        assert entry["loss"] == pytest.approx(sum(parts), rel=1e-3) and entry["task_loss"] > 0


RANKS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from safetensors.torch import save_file
from drd_hf.errors import leave_process_group
from tests.test_other_losses import TOGETHER, HalfLabelledTiles, trainer_of
settings = {"ddp_backend": "gloo", "gradient_accumulation_steps": 2, "distillation_stop_ratio": 0.7, "max_steps": 3}
trainer = trainer_of(Path(sys.argv[2]), TOGETHER, data=HalfLabelledTiles(), **settings)
trainer.train()
parameters = {name: value.detach().contiguous() for name, value in trainer._step.named_parameters()}
save_file(parameters, f"{sys.argv[2]}/rank{trainer.args.process_index}.safetensors")
leave_process_group()
"""


@pytest.mark.slow
def test_all_methods_keep_student_projectors_and_generators_equal_on_two_ranks(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert {name.split(".")[2] for name in first if name.startswith("losses.")} == {"projectors", "generators"}
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("names", [["mgd", "cwd=5"], ["afdcd", "dsd"]])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, names):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
    whole = trainer_of(tmp_path, names, **settings)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    saved = load_file(checkpoint / "projectors.safetensors")
    assert any("projectors" in key for key in saved) and any("generators" in key for key in saved)
    AutoModelForSemanticSegmentation.from_pretrained(checkpoint)
    assert not any("projector" in key or "generator" in key for key in load_file(checkpoint / "model.safetensors"))
    assert json.loads((checkpoint / "run_settings.json").read_text())["method"] == names
    resumed = trainer_of(tmp_path, names, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for model in ("model", "_step"):
        ours, theirs = getattr(resumed, model).state_dict(), getattr(whole, model).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    other = trainer_of(tmp_path, ["skd"], **settings)
    with pytest.raises(UserError, match="method="):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_dsd_reads_the_end_of_the_encoder_and_the_decoder(tmp_path):
    (loss,) = trainer_of(tmp_path, ["dsd"]).losses
    assert loss.student_layers[0].startswith("segformer.") and loss.student_layers[1].startswith("decode_head.")
    assert loss.teacher_layers[0].startswith("backbone.") and loss.teacher_layers[1].startswith("decode_head.")


def test_the_grid_of_relations_holds_for_cirkd():
    args = DistillationConfig(output_dir="unused", method=["cirkd"], resize_relations_to=16, use_cpu=True)
    assert METHODS["cirkd"].build(args, PAIR, 1.0).max_positions == 256
    args.resize_relations_to = 0
    assert METHODS["cirkd"].build(args, PAIR, 1.0).max_positions is None


@pytest.mark.parametrize(
    ("labels", "given", "methods"),
    [
        (None, {}, ["drd_channels", "drd_classes"]),
        ({0: "water", 1: "land", 2: "cloud"}, {}, ["drd_aligned"]),
        (None, {"channel_relation_weight": 3.0}, ["drd_aligned"]),
        (None, {"method": ["kd"]}, ["kd"]),
    ],
)
def test_without_a_method_it_is_the_one_that_the_models_allow(tmp_path, caplog, labels, given, methods):
    teacher = tiny_model("upernet", width=2)
    teacher.config.id2label = labels or teacher.config.id2label
    args = DistillationConfig(
        **{"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "max_steps": 1, "save_steps": 1, **given}
    )
    trainer = DistillationTrainer(
        tiny_model("segformer"),
        teacher,
        args,
        train_dataset=RandomTiles(),
        processing_class=SegformerImageProcessor(do_resize=False),
    )
    assert trainer.methods == methods and len(trainer.losses) == len(methods)
    assert args.method == given.get("method")  # the caller's own stays as it was
    told = [message for message in caplog.messages if message.startswith("no method was given, and ")]
    assert len(told) == (methods == ["drd_aligned"])
    trainer.train()
    kept = json.loads((tmp_path / "checkpoint-1/run_settings.json").read_text())
    assert kept["method"] == methods


def test_feature_layers_serve_every_method(tmp_path):
    layers = ["decode_head.batch_norm=decode_head.fpn_bottleneck.batch_norm"]
    trainer = trainer_of(tmp_path, TOGETHER, feature_layers=layers)
    for loss in trainer.losses:
        assert loss.student_layers in ((), ("decode_head.batch_norm",))


def test_class_scores_of_other_labels_are_refused_by_every_method_that_compares_them(tmp_path):
    for name in ("kd", "cwd_logits", "dsd", "dist", "drd_classes"):
        teacher = tiny_model("upernet", width=2)
        teacher.config.id2label = {0: "a", 1: "b", 2: "c"}
        with pytest.raises(UserError, match="need equal labels"):
            DistillationTrainer(
                tiny_model("segformer"),
                teacher,
                DistillationConfig(output_dir=str(tmp_path), method=[name], report_to="none", use_cpu=True),
                train_dataset=RandomTiles(),
                processing_class=SegformerImageProcessor(do_resize=False),
            )
