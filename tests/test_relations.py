import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drd_hf.errors import UserError
from drd_hf.relations import (
    channel_relation_distance,
    channel_relation_map,
    spatial_relation_distance,
    spatial_relation_map,
)

DISTANCES = {"spatial": spatial_relation_distance, "channel": channel_relation_distance}


def plain_map(features, kind, relation, temperature=1.0):
    """The definition, entry by entry as written, with no regard for cost."""
    x = features.flatten(2)  # (B, C, N)
    if kind == "spatial":
        x = x.transpose(1, 2)  # (B, N, C)
        if relation == "attention":
            return torch.softmax(x @ x.transpose(1, 2) / (math.sqrt(x.shape[-1]) * temperature), dim=-1)
    norm = x.norm(dim=-1, keepdim=True)
    unit = torch.where(norm > 0, x / torch.where(norm > 0, norm, 1.0), 0.0)
    gram = unit @ unit.transpose(1, 2)
    return gram if relation == "cosine" else torch.softmax(gram / temperature, dim=-1)


def plain_distance(student, teacher, kind, relation, temperature=1.0):
    difference = plain_map(student, kind, relation, temperature) - plain_map(teacher, kind, relation, temperature)
    return difference.square().mean()


def pair(batch, c_s, c_t, height, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, c_s, height, width, generator=generator, dtype=torch.float64)
    teacher = torch.randn(batch, c_t, height, width, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["spatial", "channel"]),
    relation=st.sampled_from(["cosine", "attention"]),
    batch=st.sampled_from([1, 2, 7]),
    c_s=st.integers(1, 9),
    c_t=st.integers(1, 9),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    temperature=st.sampled_from([0.1, 1.0, 4.0]),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradient_equal_the_plain_definition(
    kind, relation, batch, c_s, c_t, height, width, temperature, zeros, seed
):
    c_t = c_s if kind == "channel" else c_t
    student, teacher = pair(batch, c_s, c_t, height, width, seed=seed)
    if zeros:  # a position and a channel without any activation, as after a ReLU
        student[:, :, 0, 0] = 0
        student[:, 0] = 0
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = DISTANCES[kind](ours, teacher, relation, temperature)
    expected = plain_distance(plain, teacher, kind, relation, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    loss.backward()
    expected.backward()
    if zeros and (relation == "cosine" or kind == "channel"):
        # The unit vector of a zero vector has no derivative; ours is 0 there.
        dead = student.flatten(2).norm(dim=1 if kind == "spatial" else 2) == 0
        assert torch.isfinite(ours.grad).all()
        alive = ~(dead[:, None, :] if kind == "spatial" else dead[:, :, None]).expand_as(student.flatten(2))
        torch.testing.assert_close(ours.grad.flatten(2)[alive], plain.grad.flatten(2)[alive], rtol=1e-7, atol=1e-12)
        assert not ours.grad.flatten(2)[~alive].any()
    else:
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kind", ["spatial", "channel"])
@pytest.mark.parametrize("relation", ["cosine", "attention"])
def test_distance_agrees_with_the_materialised_maps(kind, relation):
    student, teacher = pair(2, 5, 5, 6, 7)
    maps = {"spatial": spatial_relation_map, "channel": channel_relation_map}[kind]
    expected = (maps(student, relation, 0.5) - maps(teacher, relation, 0.5)).square().mean()
    torch.testing.assert_close(DISTANCES[kind](student, teacher, relation, 0.5), expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(maps(student, relation, 0.5), plain_map(student, kind, relation, 0.5))


def test_maps_have_the_promised_shapes():
    features = torch.randn(2, 5, 3, 4)
    assert spatial_relation_map(features).shape == (2, 12, 12)
    assert channel_relation_map(features).shape == (2, 5, 5)


@pytest.mark.parametrize("shape", [(1, 4, 20, 20), (1, 16, 2, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("kind", ["spatial", "channel"])
@pytest.mark.parametrize("relation", ["cosine", "attention"])
def test_identical_features_have_zero_distance(kind, relation, shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert DISTANCES[kind](features, features.clone(), relation).item() == 0


@pytest.mark.parametrize("kind", ["spatial", "channel"])
def test_nearly_identical_features_give_no_negative_distance(kind):
    for seed in range(20):
        features = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(seed))
        teacher = features + 1e-6 * torch.randn(features.shape, generator=torch.Generator().manual_seed(seed + 99))
        distance = DISTANCES[kind](features, teacher).item()
        assert 0 <= distance < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_features_are_compared_in_float32(dtype):
    # Gram entries of float16 features overflow from a standard deviation of about 5 on.
    student, teacher = pair(1, 64, 32, 12, 12)
    student, teacher = (8 * student).to(dtype).requires_grad_(), (8 * teacher).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = spatial_relation_distance(student, teacher)
    expected = plain_distance(student.detach().double(), teacher.double(), "spatial", "cosine")
    torch.testing.assert_close(distance.double(), expected, rtol=1e-5, atol=1e-7)
    distance.backward()
    assert student.grad.dtype == dtype and torch.isfinite(student.grad).all()


def test_teacher_is_resized_in_float32_under_autocast():
    # Antialiased interpolation has no bfloat16 form on CPU.
    student, teacher = pair(1, 4, 4, 8, 8, torch.bfloat16)
    expected = spatial_relation_distance(student, torch.nn.functional.interpolate(teacher.float(), (8, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(spatial_relation_distance(student, teacher), expected)
        assert torch.isfinite(spatial_relation_distance(student, teacher[:, :, :6, :5]))


def test_spatial_attention_is_the_same_in_blocks_of_rows(monkeypatch):
    student, teacher = pair(2, 3, 5, 5, 7)
    whole, blocks = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = spatial_relation_distance(whole, teacher, "attention")
    expected.backward()
    monkeypatch.setattr("drd_hf.relations.attention._CPU_BYTES", 8 * 35 * 4)  # 4 rows of 35 at a time
    distance = spatial_relation_distance(blocks, teacher, "attention")
    distance.backward()
    torch.testing.assert_close(distance, expected)
    torch.testing.assert_close(blocks.grad, whole.grad)


def test_gradients_pass_gradcheck():
    student, teacher = pair(2, 2, 3, 4, 5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: spatial_relation_distance(s, teacher), student)
    assert torch.autograd.gradcheck(lambda s: spatial_relation_distance(s, teacher, "attention", 0.7), student)


def test_teacher_gets_no_gradient_and_may_have_another_size():
    student = torch.randn(2, 4, 8, 8, requires_grad=True)
    teacher = torch.randn(2, 6, 5, 11, requires_grad=True)
    spatial_relation_distance(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: spatial_relation_distance(f, f, relation="euclid"), "choose one of cosine, attention"),
        (lambda f: spatial_relation_distance(f, f, temperature=0), "greater than 0"),
        (lambda f: spatial_relation_distance(f[0], f), r"\(B, C, H, W\)"),
        (lambda f: spatial_relation_distance(f, f[:1]), "batch size"),
        (lambda f: channel_relation_distance(f, f[:, :2]), "project the student's features"),
        (lambda f: spatial_relation_map(f.long()), "floating point"),
    ],
)
def test_wrong_input_is_refused_with_the_remedy(call, message):
    with pytest.raises(UserError, match=message):
        call(torch.randn(2, 4, 3, 3))
