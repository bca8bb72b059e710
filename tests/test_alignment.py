"""Alignment of relations against its definition, with the M x M maps formed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drd_hf.errors import UserError
from drd_hf.losses import class_alignment_distances
from drd_hf.models import encoder_stages, load_student, stage_pairs
from drd_hf.relations import channel_alignment_distance, spatial_alignment_distance

from .conftest import SEGMENTERS, UNIVERSAL, known, tiny_encoder, tiny_model, tiny_universal


def plain_distance(student, teacher):
    """The definition as written: centre each image, relate all positions of all images, compare the maps by their angle."""
    if teacher.shape[-2:] != student.shape[-2:]:
        teacher = torch.nn.functional.interpolate(teacher, student.shape[-2:], mode="bilinear", antialias=True)
    maps = []
    for features in (student, teacher):
        columns = [image.flatten(1) - image.flatten(1).mean(1, keepdim=True) for image in features]
        columns = torch.cat(columns, dim=1)  # C x M
        maps.append(columns.T @ columns)
    own, other = maps
    return 1 - (own * other).sum() / (own.norm() * other.norm())


def plain_channel_distance(student, teacher, projection=None):
    if teacher.shape[-2:] != student.shape[-2:]:
        teacher = torch.nn.functional.interpolate(teacher, student.shape[-2:], mode="bilinear", antialias=True)
    if projection is not None:
        student = torch.einsum("ij,bjhw->bihw", projection, student)
    cosines = []
    for channel in range(teacher.shape[1]):
        y, z = (torch.cat([(i[channel] - i[channel].mean()).flatten() for i in f]) for f in (student, teacher))
        cosines.append((y @ z) / (y.norm() * z.norm()))
    return 1 - torch.stack(cosines).mean()


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_gradient(distance, student, teacher):
    student = student.clone().requires_grad_()
    value = distance(student, teacher)
    return value.detach(), torch.autograd.grad(value, student)[0]


sides = st.integers(1, 7)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), sides, sides, sides, sides, st.integers(0, 10**6))
def test_value_and_gradient_are_those_of_the_definition(batch, c_s, c_t, height, width, height_t, width_t, seed):
    student, teacher = draw(seed, batch, c_s, height, width), draw(seed + 1, batch, c_t, height_t, width_t)
    value, gradient = with_gradient(spatial_alignment_distance, student, teacher)
    assert -1e-12 < value <= 1 + 1e-12
    expected, expected_gradient = with_gradient(plain_distance, student, teacher)
    if expected.isnan():  # a single position, or all alike
        assert value == 1 and not gradient.any()
        return
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=1e-8, atol=1e-9 * expected_gradient.abs().max() + 1e-13
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), sides, sides, sides, sides, st.integers(0, 10**6))
def test_channels_are_correlated_as_the_definition_says(batch, c_s, c_t, height, width, height_t, width_t, seed):
    student, teacher = draw(seed, batch, c_s, height, width), draw(seed + 1, batch, c_t, height_t, width_t)
    weight = draw(seed + 2, c_t, c_s)
    for projection in [weight] + [None] * (c_s == c_t):
        inputs = [student, weight] if projection is not None else [student]
        results = []
        for distance in (channel_alignment_distance, plain_channel_distance):
            leaves = [x.clone().requires_grad_() for x in inputs]
            arguments = {"projection": leaves[1]} if projection is not None else {}
            value = distance(leaves[0], teacher, **arguments)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        if results[1][0].isnan():  # a single position, or all alike
            assert results[0][0] == 1 and not any(gradient.any() for gradient in results[0][1:])
            continue
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9 * max(1, expected.abs().max()))


def plain_class_distances(student, teacher):
    """Relations of all positions of the batch and of all classes, each class less its mean over the batch."""
    if teacher.shape[-2:] != student.shape[-2:]:
        teacher = torch.nn.functional.interpolate(teacher, student.shape[-2:], mode="bilinear", antialias=True)
    s, t = (torch.cat([scores.flatten(1) for scores in logits.softmax(1)], dim=1) for logits in (student, teacher))
    s, t = (p - p.mean(1, keepdim=True) for p in (s, t))  # K x B N
    own, other = s.T @ s, t.T @ t
    classes = torch.stack([(a @ b) / (a.norm() * b.norm()) for a, b in zip(s, t, strict=True)])
    return 1 - (own * other).sum() / (own.norm() * other.norm()), 1 - classes.mean()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(2, 9), sides, sides, sides, sides, st.integers(0, 10**6))
def test_relations_of_classes_are_those_of_the_definition(batch, classes, height, width, height_t, width_t, seed):
    student, teacher = draw(seed, batch, classes, height, width), draw(seed + 1, batch, classes, height_t, width_t)
    for term in range(2):
        value, gradient = with_gradient(
            lambda s, t, term=term: class_alignment_distances(s, t)[term], student, teacher
        )
        expected, expected_gradient = with_gradient(
            lambda s, t, term=term: plain_class_distances(s, t)[term], student, teacher
        )
        if expected.isnan() or batch * min(height * width, height_t * width_t) == 1:  # nothing varies
            assert value == 1 and not gradient.any()
            continue
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(
            gradient, expected_gradient, rtol=1e-7, atol=1e-8 * expected_gradient.abs().max() + 1e-12
        )


def test_a_rare_class_counts_as_much_as_a_frequent_one():
    teacher = torch.full((2, 3, 8, 8), -4.0, dtype=torch.float64)
    teacher[:, 0], teacher[:, 1, 4:], teacher[0, 2, 0, 0] = 0.0, 4.0, 8.0  # the last one in a single position
    without = teacher.clone()
    without[0, 2, 0, 0] = -4.0
    positions, classes = class_alignment_distances(without, teacher)
    assert classes > 0.25 and positions < 0.05


def test_agreeing_channels_have_the_teachers_relations_to_all_others():
    teacher = draw(0, 3, 4, 5, 4)
    student = teacher * draw(1, 1, 4, 1, 1).abs() + draw(2, 3, 4, 1, 1)
    torch.testing.assert_close(channel_alignment_distance(student, teacher), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(channel_alignment_distance(-student, teacher), 2 * torch.ones((), dtype=torch.float64))


def test_a_channel_without_variation_counts_as_uncorrelated():
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    teacher[:, 1] = 1e4 / 3
    value = channel_alignment_distance(student, teacher)
    value.backward()
    assert value.isfinite() and not student.grad[:, 1].any() and student.grad[:, ::2].any(0).any()


def test_gradients_pass_gradcheck():
    student, teacher = draw(0, 2, 3, 4, 3).requires_grad_(), draw(1, 2, 5, 4, 3)
    assert torch.autograd.gradcheck(lambda s: spatial_alignment_distance(s, teacher), student)
    weight = draw(2, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, w: channel_alignment_distance(s, teacher, projection=w), (student, weight)
    )


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_float32_is_near_float64(mean, scale):
    student, teacher = draw(0, 4, 24, 16, 16) + mean, draw(1, 4, 16, 16, 16)
    value, gradient = with_gradient(spatial_alignment_distance, *(f.mul(scale).float() for f in (student, teacher)))
    expected, expected_gradient = with_gradient(plain_distance, student * scale, teacher)
    tolerance = 1e-6 * max(1, mean)  # what is left of the digits after the mean is taken away
    assert value.dtype == torch.float32 and abs(value - expected) < tolerance
    assert (gradient - expected_gradient).norm() < tolerance * expected_gradient.norm()


def test_turning_the_channels_scaling_and_an_offset_of_each_image_change_nothing():
    student, teacher = draw(0, 3, 6, 5, 4), draw(1, 3, 4, 5, 4)
    turn, _ = torch.linalg.qr(draw(2, 6, 6))
    turned = torch.einsum("ij,bjhw->bihw", turn, student) * 7 + draw(3, 3, 6, 1, 1)
    before, after = spatial_alignment_distance(student, teacher), spatial_alignment_distance(turned, teacher)
    torch.testing.assert_close(before, after)
    torch.testing.assert_close(spatial_alignment_distance(turned, student), torch.zeros((), dtype=torch.float64))


def test_relations_reach_across_the_images_of_a_batch():
    # Within each image student and teacher agree. The second image of the student uses the channels of the first for other things.
    teacher = torch.zeros(2, 4, 2, 2, dtype=torch.float64)
    teacher[0, :2], teacher[1, 2:] = draw(0, 2, 2, 2), draw(1, 2, 2, 2)
    student = teacher[:, :2] + teacher[:, 2:]
    for image in (slice(0, 1), slice(1, 2)):
        assert spatial_alignment_distance(student[image], teacher[image]).abs() < 1e-12
    assert spatial_alignment_distance(student, teacher) > 0.05


@pytest.mark.parametrize("constant", [0.0, 3.3, 1e4])
def test_features_without_relations_have_distance_1_and_no_gradient(constant):
    student = torch.full((2, 3, 4, 4), constant)
    value, gradient = with_gradient(spatial_alignment_distance, student, torch.randn(2, 5, 4, 4))
    assert value == 1 and not gradient.any()
    value, gradient = with_gradient(spatial_alignment_distance, torch.randn(2, 5, 4, 4), student)
    assert value == 1 and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_under_autocast(dtype):
    student, teacher = draw(0, 2, 16, 8, 8, dtype=dtype) * 100, draw(1, 2, 8, 8, 8, dtype=dtype) * 100
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = with_gradient(spatial_alignment_distance, student, teacher)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value, plain_distance(student.float(), teacher.float()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])  # the square of the last is beyond float32
@pytest.mark.parametrize("distance", [spatial_alignment_distance, channel_alignment_distance])
def test_features_that_are_not_finite_are_not_hidden(distance, value):
    student = torch.randn(1, 3, 4, 4)
    student[0, 0, 0, 0] = value
    assert distance(student, torch.randn(1, 3, 4, 4)).isnan()


def test_wrong_features_are_refused():
    with pytest.raises(UserError, match="differ in batch size"):
        spatial_alignment_distance(torch.randn(2, 3, 4, 4), torch.randn(1, 3, 4, 4))
    with pytest.raises(UserError, match="floating point"):
        spatial_alignment_distance(torch.randn(3, 4, 4), torch.randn(3, 4, 4))
    with pytest.raises(UserError, match="need equal widths"):
        channel_alignment_distance(torch.randn(1, 3, 4, 4), torch.randn(1, 4, 4, 4))
    with pytest.raises(UserError, match="projection has shape"):
        channel_alignment_distance(torch.randn(1, 3, 4, 4), torch.randn(1, 4, 4, 4), projection=torch.randn(3, 4))


def test_stages_are_the_last_blocks_of_each_resolution():
    folder = "scripts/configs/models"
    labels = {i: str(i) for i in range(3)}
    resnet = load_student(f"{folder}/upernet_resnet_mini.json", labels)
    stages = encoder_stages(resnet)
    assert [stages[stride] for stride in (4, 8, 16, 32)] == [f"backbone.encoder.stages.{i}" for i in range(4)]
    mobilenet = load_student(f"{folder}/mobilenet_v2_0.35.json", labels)  # dilated: nothing coarser than 16
    stages = encoder_stages(mobilenet)
    assert {s: stages[s] for s in (8, 16)} == {8: "mobilenet_v2.layer.4", 16: "mobilenet_v2.layer.15"}
    assert max(stages) == 16
    # The coarsest of both belong together, whatever their strides; the others go by stride.
    assert stage_pairs(mobilenet, resnet) == [
        ("mobilenet_v2.layer.4", "backbone.encoder.stages.1"),
        ("mobilenet_v2.layer.15", "backbone.encoder.stages.3"),
    ]


def test_a_teacher_of_one_resolution_gives_one_pair():
    pairs = stage_pairs(tiny_model("segformer"), tiny_encoder("vit"))
    assert len(pairs) == 1 and "3" in pairs[0][0]


def test_hiera_has_no_stages_before_its_end_where_tokens_lie_in_order():
    assert not any("stages." in name for name in encoder_stages(tiny_encoder("hiera")).values())


@pytest.mark.parametrize("family", [name for name in UNIVERSAL if known(name) and name != "oneformer"])
def test_stages_of_a_universal_segmenter_are_those_of_its_encoder(family):
    # Without OneFormer, which runs only as load_teacher prepares it.
    stages = encoder_stages(tiny_universal(family))
    start = "layers." if "eomt" in family else "model.pixel_level_module.encoder."
    assert stages and all(name.startswith(start) for name in stages.values())


@pytest.mark.parametrize("family", [name for name in SEGMENTERS if known(name)])
def test_stages_are_of_the_encoder_in_every_family(family):
    stages = encoder_stages(tiny_model(family))
    assert stages and list(stages) == sorted(stages) and all(stride & (stride - 1) == 0 for stride in stages)
    assert not any(word in name for name in stages.values() for word in ("head", "classifier", "bias", "attention"))
