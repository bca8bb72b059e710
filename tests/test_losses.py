import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drd_hf.errors import UserError
from drd_hf.losses import AlignedRelationLoss, DualRelationLoss, PixelLogitLoss, pixel_kl
from drd_hf.losses.dual_relation import grid_within
from drd_hf.relations import (
    channel_alignment_distance,
    channel_relation_distance,
    spatial_alignment_distance,
    spatial_relation_distance,
)


def features(channels, size=6, seed=0):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(seed))


def test_dual_relation_terms_are_the_two_distances():
    student, teacher = features(4), features(4, seed=1)
    terms = DualRelationLoss([("s", "t")])({"s": student}, {"t": teacher})
    torch.testing.assert_close(terms["spatial_relation"], spatial_relation_distance(student, teacher))
    torch.testing.assert_close(terms["channel_relation"], channel_relation_distance(student, teacher))


def test_several_layer_pairs_are_averaged():
    student = {"a": features(4), "b": features(5, seed=2)}
    teacher = {"x": features(4, seed=3), "y": features(5, size=9, seed=4)}
    terms = DualRelationLoss([("a", "x"), ("b", "y")])(student, teacher)
    first = spatial_relation_distance(student["a"], teacher["x"])
    second = spatial_relation_distance(student["b"], teacher["y"])
    torch.testing.assert_close(terms["spatial_relation"], (first + second) / 2)


def test_projector_exists_only_where_widths_differ():
    loss = DualRelationLoss([("a", "x"), ("b", "y")], student_widths={"a": 4, "b": 5}, teacher_widths={"x": 4, "y": 8})
    assert {name: tuple(p.shape) for name, p in loss.named_parameters()} == {"projectors.1.weight": (8, 5, 1, 1)}
    alone = DualRelationLoss([("b", "y")], channel_weight=0, student_widths={"b": 5}, teacher_widths={"y": 8})
    assert not list(alone.parameters()), "spatial relations need no projector"


def test_channel_term_without_a_projector_says_what_to_do():
    with pytest.raises(UserError, match="project the student"):
        DualRelationLoss([("s", "t")])({"s": features(4)}, {"t": features(8)})


def test_a_term_of_weight_zero_is_left_out():
    loss = DualRelationLoss([("s", "t")], spatial_weight=0)
    assert set(loss({"s": features(4)}, {"t": features(4, seed=1)})) == set(loss.weights) == {"channel_relation"}


def test_relations_can_be_compared_on_a_coarser_grid():
    student, teacher = features(4, size=8), features(4, size=16, seed=1)
    loss = DualRelationLoss([("s", "t")], resize_relations_to=4)
    pooled_student = torch.nn.functional.interpolate(student, size=(4, 4), mode="bilinear", antialias=True)
    pooled_teacher = torch.nn.functional.interpolate(teacher, size=(4, 4), mode="bilinear", antialias=True)
    terms = loss({"s": student}, {"t": teacher})
    torch.testing.assert_close(terms["spatial_relation"], spatial_relation_distance(pooled_student, pooled_teacher))


@pytest.mark.parametrize(
    ("limit", "size", "grid"),
    [
        (6, (6, 6), (6, 6)),
        (6, (4, 9), (4, 9)),
        (6, (12, 12), (6, 6)),
        (6, (8, 18), (4, 9)),
        (6, (1, 90), (1, 36)),
        (6, (30, 5), (15, 2)),
        (None, (20, 9), (20, 9)),
    ],
)
def test_the_grid_is_bounded_in_positions_and_keeps_its_proportions(limit, size, grid):
    student, teacher = torch.randn(1, 4, *size), torch.randn(1, 4, 5, 7)
    assert grid_within(*size, limit) == grid
    terms = DualRelationLoss([("s", "t")], resize_relations_to=limit)({"s": student}, {"t": teacher})
    resize = torch.nn.functional.interpolate
    student = resize(student, grid, mode="bilinear", antialias=True)
    teacher = resize(teacher, grid, mode="bilinear", antialias=True)
    torch.testing.assert_close(terms["spatial_relation"], spatial_relation_distance(student, teacher))
    torch.testing.assert_close(terms["channel_relation"], channel_relation_distance(student, teacher))


def test_aligned_relations_are_the_two_distances_and_more_layers_have_half_of_the_positions():
    student, fine = features(4), features(4, size=20, seed=2)
    teacher, other = features(8, seed=1), features(8, seed=3)
    shrunk = torch.nn.functional.interpolate(fine, size=(10, 10), mode="bilinear", antialias=True)
    widths = {"student_widths": {"s": 4, "fine": 4}, "teacher_widths": {"t": 8, "u": 8}}
    stages = [("fine", "t", 1), ("s", "u", 3)]
    loss = AlignedRelationLoss([("s", "t")], stages, 5.0, 7.0, resize_relations_to=10, **widths)
    terms = loss({"s": student, "fine": fine}, {"t": teacher, "u": other})
    first, *more = (
        spatial_alignment_distance(s, t) for s, t in ((student, teacher), (shrunk, teacher), (student, other))
    )
    weight = loss.projectors["0"].weight[:, :, 0, 0]
    expected = {
        "spatial_alignment": first / 2 + more[0] / 8 + more[1] * 3 / 8,
        "channel_alignment": channel_alignment_distance(student, teacher, projection=weight),
    }
    torch.testing.assert_close(terms, expected)
    assert loss.weights == {"spatial_alignment": 5.0, "channel_alignment": 7.0} and list(loss.projectors) == ["0"]
    alone = AlignedRelationLoss([("s", "t")], channel_weight=0)({"s": student}, {"t": teacher})
    torch.testing.assert_close(alone, {"spatial_alignment": first})
    loss = AlignedRelationLoss([("s", "t")], stages, spatial_weight=0, **widths)
    assert loss.student_layers == ("s",) and set(loss({"s": student}, {"t": teacher})) == {"channel_alignment"}


def test_pairs_enter_the_mean_with_their_weights():
    student = {"a": features(4), "b": features(4, seed=2)}
    teacher = {"x": features(4, seed=3), "y": features(4, seed=4)}
    terms = DualRelationLoss([("a", "x", 3), ("b", "y")])(student, teacher)
    first = channel_relation_distance(student["a"], teacher["x"])
    second = channel_relation_distance(student["b"], teacher["y"])
    torch.testing.assert_close(terms["channel_relation"], (3 * first + second) / 4)


def test_losses_survive_deepcopy_and_pickle():
    loss = DualRelationLoss([("s", "t")], student_widths={"s": 4}, teacher_widths={"t": 8})
    expected = loss({"s": features(4)}, {"t": features(8)})["channel_relation"]
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(twin({"s": features(4)}, {"t": features(8)})["channel_relation"], expected)


@settings(max_examples=30, deadline=None)
@given(
    classes=st.integers(2, 6),
    height=st.integers(1, 5),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_pixel_kl_equals_its_definition(classes, height, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, classes, height, 3, generator=generator, dtype=torch.float64)
    total = 0.0
    for s, t in zip(
        student.permute(0, 2, 3, 1).reshape(-1, classes), teacher.permute(0, 2, 3, 1).reshape(-1, classes), strict=True
    ):
        p, q = torch.softmax(t / temperature, 0), torch.softmax(s / temperature, 0)
        total += sum(p[k] * torch.log(p[k] / q[k]) for k in range(classes))
    expected = total / (2 * height * 3) * temperature**2  # a mean over pixels, not over the batch
    torch.testing.assert_close(pixel_kl(student, teacher, temperature), expected)


def test_pixel_kl_counts_only_masked_pixels_and_survives_an_empty_mask():
    student, teacher = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert pixel_kl(student, teacher, mask=mask).item() == 0
    mask[:, :2] = True
    torch.testing.assert_close(pixel_kl(student, teacher, mask=mask), pixel_kl(student[:, :, :2], teacher[:, :, :2]))


def test_pixel_kl_of_equal_logits_is_zero_even_in_float16():
    logits = 100 * torch.randn(1, 3, 4, 4).half()
    assert abs(pixel_kl(logits, logits).item()) < 1e-6


def test_logit_loss_resizes_the_teacher_and_refuses_other_classes():
    loss = PixelLogitLoss()
    assert loss({}, {}, torch.randn(1, 3, 4, 4), torch.randn(1, 3, 16, 16))["logit"].item() > 0
    with pytest.raises(UserError, match="3 and 4 classes"):
        loss({}, {}, torch.randn(1, 3, 4, 4), torch.randn(1, 4, 4, 4))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DualRelationLoss([]), "at least one"),
        (lambda: DualRelationLoss([("a", "b")], relation="l2"), "choose one of"),
        (lambda: DualRelationLoss([("a", "b", -1)]), "a=b has weight -1.0"),
        (lambda: DualRelationLoss([("a",)]), "give .student layer, teacher layer"),
        (lambda: DualRelationLoss([("a", "b")], spatial_weight=float("nan")), "relation weight nan"),
        (lambda: DualRelationLoss([("a", "b")], spatial_weight=0, channel_weight=0), "both relation weights are 0"),
        (lambda: DualRelationLoss([("a", "b")], resize_relations_to=0), "at least 1, or None"),
        (lambda: AlignedRelationLoss([("a", "b")], resize_relations_to=0), "at least 1, or None"),
        (lambda: AlignedRelationLoss([("a", "b")], spatial_weight=-1), "relation weight -1"),
        (lambda: AlignedRelationLoss([("a", "b")], [("a",)]), "give .student layer, teacher layer"),
        (lambda: PixelLogitLoss(temperature=0), "greater than 0"),
    ],
)
def test_wrong_settings_are_refused_at_construction(build, message):
    with pytest.raises(UserError, match=message):
        build()
