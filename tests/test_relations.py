import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from drd_hf.errors import UserError
from drd_hf.losses import DualRelationLoss
from drd_hf.relations import (
    attention_route,
    channel_relation_distance,
    channel_relation_map,
    cosine_route,
    spatial_relation_distance,
    spatial_relation_map,
)

DISTANCES = {"spatial": spatial_relation_distance, "channel": channel_relation_distance}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def plain_map(features, kind, relation, temperature=1.0, projection=None):
    """The definition, entry by entry as written, with no regard for cost."""
    x = features.flatten(2)  # (B, C, N)
    if projection is not None:
        x = projection @ x
    if kind == "spatial":
        x = x.transpose(1, 2)  # (B, N, C)
        if relation == "attention":
            return torch.softmax(x @ x.transpose(1, 2) / (math.sqrt(x.shape[-1]) * temperature), dim=-1)
    norm = x.norm(dim=-1, keepdim=True)
    unit = torch.where(norm > 0, x / torch.where(norm > 0, norm, 1.0), 0.0)
    gram = unit @ unit.transpose(1, 2)
    return gram if relation == "cosine" else torch.softmax(gram / temperature, dim=-1)


def plain_distance(student, teacher, kind, relation, temperature=1.0, projection=None):
    if teacher.shape[-2:] != student.shape[-2:]:
        teacher = torch.nn.functional.interpolate(teacher, student.shape[-2:], mode="bilinear", antialias=True)
    student_map = plain_map(student, kind, relation, temperature, projection)
    return (student_map - plain_map(teacher, kind, relation, temperature)).square().mean()


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(batch, c_s, c_t, height, width, dtype=torch.float64, seed=0):
    return draw(seed, batch, c_s, height, width).to(dtype), draw(seed + 1, batch, c_t, height, width).to(dtype)


def largest_entry(gradient):
    return gradient.abs().max().item() if gradient.numel() else 0.0


shapes = {
    "batch": st.sampled_from([1, 2, 7]),
    "c_s": st.integers(1, 24),
    "c_t": st.integers(1, 24),
    "height": st.integers(1, 9),
    "width": st.integers(1, 9),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["spatial", "channel"]),
    relation=st.sampled_from(["cosine", "attention"]),
    route=st.sampled_from([None, "direct", "identity"]),
    temperature=st.sampled_from([0.1, 1.0, 4.0]),
    zeros=st.booleans(),
    projected=st.booleans(),
    resized=st.booleans(),
    **shapes,
)
def test_loss_and_gradient_equal_the_plain_definition(
    kind, relation, route, temperature, zeros, projected, resized, batch, c_s, c_t, height, width, seed
):
    projected = projected and kind == "channel"
    c_t = c_s if kind == "channel" and not projected else c_t
    student, teacher = pair(batch, c_s, c_t, height, width, seed=seed)
    if resized:
        teacher = draw(seed + 1, batch, c_t, height + 3, 2 * width)
    if zeros:  # a position and a channel without any activation, as after a ReLU
        student[:, :, 0, 0] = 0
        student[:, 0] = 0
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    weights = [draw(seed + 2, c_t, c_s).requires_grad_() if projected else None for _ in range(2)]
    extra = {"projection": weights[0]} if projected else {}
    route = route if relation == "cosine" else None
    loss = DISTANCES[kind](ours, teacher, relation, temperature, route=route, **extra)
    expected = plain_distance(plain, teacher, kind, relation, temperature, weights[1])
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    loss.backward()
    expected.backward()
    if projected:
        torch.testing.assert_close(weights[0].grad, weights[1].grad, rtol=1e-7, atol=1e-10)
    got, wanted = ours.grad.flatten(2), plain.grad.flatten(2)
    if zeros and not projected and (relation == "cosine" or kind == "channel"):
        # The unit vector of a zero vector has no derivative; ours is 0 there.
        dead = student.flatten(2).norm(dim=1 if kind == "spatial" else 2) == 0
        dead = (dead[:, None, :] if kind == "spatial" else dead[:, :, None]).expand_as(got)
        assert not got[dead].any()
        got, wanted = got[~dead], wanted[~dead]
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["spatial", "channel", "projected channel"]),
    relation=st.sampled_from(["cosine", "attention"]),
    route=st.sampled_from([None, "direct", "identity"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    autocast=st.booleans(),
    allow_tf32=st.booleans(),
    content=st.sampled_from(["random", "positive", "zeros", "constant", "large"]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    **shapes,
)
def test_every_precision_agrees_with_the_definition_in_float64(
    kind, relation, route, dtype, autocast, allow_tf32, content, layout, batch, c_s, c_t, height, width, seed
):
    projected, kind = kind.startswith("projected"), kind.split()[-1]
    c_t = c_s if kind == "channel" and not projected else c_t
    student, teacher = pair(batch, c_s, c_t, height, width, seed=seed)
    if content == "positive":  # as after a ReLU: all cosines near 1
        student, teacher = student.abs() + 1, teacher.abs() + 1
    if content == "zeros":
        student[:, :, 0, 0] = teacher[:, :, 0, 0] = 0
    if content == "constant":
        student, teacher = student.mean((2, 3), True).expand_as(student), teacher.mean((2, 3), True).expand_as(teacher)
    if content == "large":  # Gram entries that float16 cannot hold
        student, teacher = 40 * student, 40 * teacher
    if relation == "attention" and kind == "spatial":  # logits of a size at which softmax has not become a maximum
        student, teacher = (x / x.abs().amax().clamp_min(1) for x in (student, teacher))
    student, teacher = (x.to(dtype).contiguous(memory_format=layout) for x in (student, teacher))
    ours, plain = student.clone().requires_grad_(), student.double().requires_grad_()
    weight = draw(seed + 2, c_t, c_s) if projected else None
    extra = {"projection": weight.float()} if projected else {}
    route = route if relation == "cosine" else None
    before = torch.get_float32_matmul_precision()
    try:
        if allow_tf32:
            torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = DISTANCES[kind](ours, teacher, relation, route=route, **extra)
    finally:
        torch.set_float32_matmul_precision(before)
    weight = weight if weight is None else weight.float().double()
    expected = plain_distance(plain, teacher.double(), kind, relation, 1.0, weight)
    assert loss.dtype == torch.float32
    assert loss.item() >= 0
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
    loss.backward()
    expected.backward()
    assert ours.grad.dtype == dtype
    got, wanted = ours.grad.double(), plain.grad
    if not projected and (relation == "cosine" or kind == "channel"):
        dead = student.flatten(2).double().norm(dim=1 if kind == "spatial" else 2) == 0
        dead = (dead[:, None, :] if kind == "spatial" else dead[:, :, None]).expand_as(student.flatten(2))
        wanted = wanted.masked_fill(dead.reshape(wanted.shape), 0)
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    steepness = 10.0  # of cosines in the features: rounding shows that much larger where the exact gradient is 0
    if projected:
        lengths = (weight @ student.double().flatten(2)).norm(dim=-1)
        steepness = max(steepness, (weight.norm(dim=-1) / lengths.clamp_min(1e-6)).max().item())
    floor = 1e-6 * steepness + (6e-8 if dtype == torch.float16 else 0)
    size = wanted.norm().item()
    assert (got - wanted).norm().item() <= (1e-5 + rounding) * size + floor * math.sqrt(got.numel())


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["spatial", "channel"]),
    route=st.sampled_from([None, "direct", "identity"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    **shapes,
)
def test_identical_features_have_zero_distance_and_no_gradient(
    kind, route, dtype, layout, batch, c_s, c_t, height, width, seed
):
    features = pair(batch, c_s, c_s, height, width, dtype, seed)[0].contiguous(memory_format=layout)
    student = features.clone().requires_grad_()
    loss = DISTANCES[kind](student, features.clone(), route=route)
    loss.backward()
    assert loss.item() == 0
    assert largest_entry(student.grad) == 0


@pytest.mark.parametrize("shape", [(1, 4, 20, 20), (1, 16, 2, 2), (1, 1, 1, 1), (1, 40, 50, 50)])
@pytest.mark.parametrize("relation", ["cosine", "attention"])
@pytest.mark.parametrize("kind", ["spatial", "channel"])
def test_identical_features_of_any_size_have_zero_distance(kind, relation, shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert DISTANCES[kind](features, features.clone(), relation).item() == 0


@pytest.mark.parametrize("route", ["direct", "identity"])
@pytest.mark.parametrize("kind", ["spatial", "channel"])
def test_a_teacher_nearly_equal_to_the_student_gives_no_negative_distance(kind, route):
    for seed in range(10):
        features = draw(seed, 1, 24, 40, 40).float()
        for noise in (1e-6, 1e-4, 1e-2):
            teacher = features + noise * draw(seed + 99, *features.shape).float()
            distance = DISTANCES[kind](features, teacher, route=route).item()
            expected = plain_distance(features.double(), teacher.double(), kind, "cosine").item()
            assert distance >= 0
            assert abs(distance - expected) < 1e-7


def test_widths_that_agree_lose_no_digits_when_the_student_comes_close():
    # ||A||^2 + ||B||^2 - 2 ||P||^2 alone would leave noise of 1e-8 here.
    features = draw(0, 1, 16, 32, 32).float()
    teacher = features + 1e-4 * draw(1, *features.shape).float()
    expected = plain_distance(features.double(), teacher.double(), "spatial", "cosine").item()
    assert expected < 1e-8
    distance = spatial_relation_distance(features, teacher, route="identity").item()
    assert distance == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("content", ["rotated", "repeated", "constant"])
def test_equal_relations_of_other_widths_are_zero_up_to_float32(content):
    # 9216 positions: the products are added up from several pieces.
    student = draw(3, 1, 16, 96, 96).abs()
    if content == "rotated":  # an orthogonal matrix changes the features, and no relation
        teacher = torch.linalg.qr(draw(4, 32, 16))[0] @ student.flatten(2)
        teacher = teacher.reshape(1, 32, 96, 96)
    if content == "repeated":
        teacher = student.repeat(1, 3, 1, 1)
    if content == "constant":
        student, teacher = student[:, :, :1, :1].expand_as(student), student[:, :1, :1, :1].expand(1, 48, 96, 96)
    distance = spatial_relation_distance(student.float(), teacher.float()).item()
    assert cosine_route(96 * 96, 16, 32) == "identity"
    assert 0 <= distance < 1e-7


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


@pytest.mark.parametrize("kind", ["spatial", "channel"])
@pytest.mark.parametrize("route", ["direct", "identity"])
@pytest.mark.parametrize("device", DEVICES)
def test_products_allowed_in_lower_precision_do_not_move_the_result(kind, route, device):
    # "medium" allows bfloat16 products on CPUs that have them and TF32 on GPUs.
    student, teacher = (x.to(device) for x in pair(1, 32, 32, 24, 24, torch.float32))

    def outcome():
        leaf = student.clone().requires_grad_()
        loss = DISTANCES[kind](leaf, teacher, route=route)
        loss.backward()
        return loss.detach(), leaf.grad

    expected = outcome()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        allowed = outcome()
        assert torch.get_float32_matmul_precision() == "medium", "the user's setting is restored"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(allowed, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["spatial", "channel"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_gpu_and_half_precision_give_the_same_numbers(kind, dtype, device):
    student, teacher = pair(2, 48, 48, 40, 40, dtype)
    leaf = student.to(device).requires_grad_()
    loss = DISTANCES[kind](leaf, teacher.to(device))
    expected = plain_distance(student.double(), teacher.double(), kind, "cosine")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert leaf.grad.dtype == dtype and torch.isfinite(leaf.grad).all()


def test_gradients_of_half_precision_features_are_scaled_before_they_are_narrowed():
    # The gradient of a mean over N^2 pairs is far below the smallest float16; loss scaling brings it back.
    student, teacher = pair(1, 8, 8, 32, 32, torch.float16)
    leaf, plain = student.clone().requires_grad_(), student.double().requires_grad_()
    (65536 * spatial_relation_distance(leaf, teacher)).backward()
    (65536 * plain_distance(plain, teacher.double(), "spatial", "cosine")).backward()
    torch.testing.assert_close(leaf.grad.double(), plain.grad, rtol=2e-3, atol=1e-5)


def test_teacher_is_resized_in_float32_under_autocast():
    # Antialiased interpolation has no bfloat16 form on CPU.
    student, teacher = pair(1, 4, 4, 8, 8, torch.bfloat16)
    expected = spatial_relation_distance(student, torch.nn.functional.interpolate(teacher.float(), (8, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(spatial_relation_distance(student, teacher), expected)
        assert torch.isfinite(spatial_relation_distance(student, teacher[:, :, :6, :5]))


@pytest.mark.parametrize("tiles", [0, 1, 3, 100])
@pytest.mark.parametrize("rows", [4, 35])
def test_spatial_attention_is_the_same_in_blocks_of_rows(monkeypatch, rows, tiles):
    student, teacher = pair(2, 3, 5, 5, 7)
    whole, blocks = student.clone().requires_grad_(), student.clone().requires_grad_()
    assert attention_route(35) == "whole"
    expected = spatial_relation_distance(whole, teacher, "attention")
    expected.backward()
    monkeypatch.setattr("drd_hf.relations.attention._FEW", 0)
    monkeypatch.setattr("drd_hf.relations.attention._CPU_BYTES", 8 * 35 * rows)
    monkeypatch.setattr("drd_hf.relations.attention._CPU_TILE_BYTES", 8 * rows**2 * tiles)
    assert attention_route(35) == "blocks"
    distance = spatial_relation_distance(blocks, teacher, "attention")
    distance.backward()
    torch.testing.assert_close(distance, expected)
    torch.testing.assert_close(blocks.grad, whole.grad)


@pytest.mark.parametrize(("batch", "c_t"), [(1, 6), (5, 6), (5, 4)])
def test_the_identity_is_the_same_in_pieces_of_columns_and_images(monkeypatch, batch, c_t):
    student, teacher = pair(batch, 4, c_t, 13, 21)
    whole, pieces = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = spatial_relation_distance(whole, teacher, route="identity")
    expected.backward()
    monkeypatch.setattr("drd_hf.relations.cosine._CPU_BYTES", 4 * 64 * (4 + c_t))
    monkeypatch.setattr("drd_hf.relations.cosine._MAX_COLUMNS", 50 if batch == 1 else 1000)
    distance = spatial_relation_distance(pieces, teacher, route="identity")
    distance.backward()
    torch.testing.assert_close(distance, expected)
    torch.testing.assert_close(pieces.grad, whole.grad)


def test_wide_features_take_the_triangular_products():
    student, teacher = pair(1, 300, 272, 25, 25)
    leaf, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    weight, plain_weight = (draw(7, 272, 300).requires_grad_() for _ in range(2))
    for route in ("direct", "identity"):
        leaf.grad = plain.grad = weight.grad = plain_weight.grad = None
        loss = spatial_relation_distance(leaf, teacher, route=route)
        loss = loss + channel_relation_distance(leaf, teacher, projection=weight, route=route)
        expected = plain_distance(plain, teacher, "spatial", "cosine")
        expected = expected + plain_distance(plain, teacher, "channel", "cosine", projection=plain_weight)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(leaf.grad, plain.grad)
        torch.testing.assert_close(weight.grad, plain_weight.grad)


def test_gradients_pass_gradcheck():
    student, teacher = pair(2, 2, 3, 4, 5)
    student.requires_grad_()
    weight = draw(5, 3, 2).requires_grad_()
    for route in ("direct", "identity"):
        assert torch.autograd.gradcheck(lambda s, r=route: spatial_relation_distance(s, teacher, route=r), student)
        assert torch.autograd.gradcheck(
            lambda s, w, r=route: channel_relation_distance(s, teacher, projection=w, route=r), (student, weight)
        )
    assert torch.autograd.gradcheck(lambda s: spatial_relation_distance(s, teacher, "attention", 0.7), student)
    assert torch.autograd.gradcheck(
        lambda s, w: channel_relation_distance(s, teacher, "attention", 0.7, projection=w), (student, weight)
    )


def test_teacher_gets_no_gradient_and_may_have_another_size():
    student = torch.randn(2, 4, 8, 8, requires_grad=True)
    teacher = torch.randn(2, 6, 5, 11, requires_grad=True)
    spatial_relation_distance(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


# Cost: counted, not timed.


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("shape", "route"),
    [
        ((1, 64, 96, 4, 4), "direct"),
        ((1, 64, 96, 8, 8), "direct"),
        ((1, 64, 96, 20, 20), "identity"),
        ((2, 16, 16, 32, 32), "identity"),
    ],
)
def test_the_cheaper_route_is_taken(shape, route):
    batch, c_s, c_t, height, width = shape
    student, teacher = pair(*shape, torch.float32)
    student.requires_grad_()
    counts = {
        name: flops(lambda n=name: spatial_relation_distance(student, teacher, route=n).backward())
        for name in (None, "direct", "identity")
    }
    assert cosine_route(height * width, c_s, c_t) == route
    assert counts[None] == counts[route] == min(counts.values())


def test_products_are_those_that_the_documentation_counts():
    n, k_s, k_t = 24 * 24, 32, 48
    student, teacher = pair(1, k_s, k_t, 24, 24, torch.float32)
    student.requires_grad_()

    def distance(**options):
        return spatial_relation_distance(student, teacher, route="identity", **options)

    forward = n * (k_s**2 + k_s * k_t)
    # The common direction from 512 of the positions; the shares of all in it, corrected once; products with p and q.
    split = (2 * 512 + 2 * n + 2 * n) * (k_s + k_t)
    split_backward = n * (k_s + k_t)
    whole = 2 * (2 * forward + n * k_t**2 + split + split_backward)
    assert flops(lambda: distance()) == whole
    without = 2 * (2 * forward + split + split_backward)
    assert flops(lambda: distance(teacher_term=False)) == without, "the teacher's own term costs nothing"
    loss = distance(teacher_term=False)
    assert flops(loss.backward) == 0, "the backward pass only scales"
    with torch.no_grad():
        count = flops(lambda: distance(teacher_term=False))
        assert count == 2 * (forward + split), "no gradient is formed where none is needed"


def test_channel_relations_never_project_the_features():
    n, c_s, c_t = 32 * 32, 8, 64
    student, teacher = pair(1, c_s, c_t, 32, 32, torch.float32)
    weight = torch.randn(c_t, c_s, requires_grad=True)
    student.requires_grad_()
    count = flops(lambda: channel_relation_distance(student, teacher, projection=weight).backward())
    folding = 2 * c_t * c_s**2 + 2 * c_t**2 * c_s + c_t * c_s**2
    products_with_vectors = (
        n * (2 * c_s + 3 * c_t) + 2 * n * (c_s + c_t) + c_s**2
    )  # what the rows have in common is split off
    assert 0 <= count - 2 * (n * (2 * c_s**2 + c_t**2) + folding) <= 2 * products_with_vectors


@pytest.mark.parametrize(("side", "route"), [(8, "whole"), (16, "whole"), (17, "blocks"), (96, "blocks")])
def test_attention_of_few_positions_is_computed_as_it_is_defined(side, route):
    assert attention_route(side * side) == route
    student, teacher = (
        pair(2, 4, 6, side, side, torch.float32) if side < 20 else pair(1, 1, 1, side, side, torch.float32)
    )
    with LargestTensor() as largest:
        spatial_relation_distance(student, teacher, "attention")
    assert (largest.entries >= side**4) == (side < 20)


class LargestTensor(TorchDispatchMode):
    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("relation", ["cosine", "attention"])
def test_no_tensor_of_the_size_of_a_relation_map_is_made(relation, batch, monkeypatch):
    monkeypatch.setattr("drd_hf.relations.attention._CPU_BYTES", 4 * 64 * 48 * 48)  # 64 rows
    student, teacher = pair(batch, 8, 12, 48, 48, torch.float32)
    student.requires_grad_()
    with LargestTensor() as largest:
        spatial_relation_distance(student, teacher, relation).backward()
    n = 48 * 48
    assert largest.entries <= max(batch * 12 * n, 64 * n) < n * n


# Use in training.


@pytest.mark.parametrize("route", ["direct", "identity"])
@pytest.mark.parametrize(("c_s", "c_t"), [(4, 7), (6, 6)])
def test_leaving_out_the_teachers_term_changes_the_value_by_a_constant_and_no_gradient(route, c_s, c_t):
    student, teacher = pair(2, c_s, c_t, 9, 11)
    with_term, without = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = spatial_relation_distance(with_term, teacher, route=route)
    partial = spatial_relation_distance(without, teacher, route=route, teacher_term=False)
    value.backward()
    partial.backward()
    assert torch.equal(with_term.grad, without.grad)
    needed = route == "direct" or c_s == c_t  # the maps, or the teacher's products, are there anyway
    constant = 0.0 if needed else plain_map(teacher, "spatial", "cosine").square().mean().item()
    torch.testing.assert_close(value - partial, torch.tensor(constant, dtype=torch.float64))


@pytest.mark.parametrize("relation", ["cosine", "attention"])
def test_several_uses_in_one_step_add_up(relation):
    student, teacher = pair(2, 4, 6, 7, 7)
    weight = draw(9, 6, 4)

    def loss(s, w):
        coarse = torch.nn.functional.avg_pool2d(s, 2)
        return (
            spatial_relation_distance(s, teacher, relation)
            + 2 * spatial_relation_distance(coarse, teacher, relation)
            + channel_relation_distance(s, teacher, relation, projection=w)
        )

    once, twice = student.clone().requires_grad_(), student.clone().requires_grad_()
    weight_once, weight_twice = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    (2 * loss(once, weight_once)).backward()
    loss(twice, weight_twice).backward()  # accumulated over two batches
    loss(twice, weight_twice).backward()
    torch.testing.assert_close(twice.grad, once.grad)
    torch.testing.assert_close(weight_twice.grad, weight_once.grad)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("relation", ["cosine", "attention"])
def test_gradient_checkpointing_recomputes_the_same_gradient(relation, reentrant):
    student, teacher = pair(1, 4, 6, 12, 12)
    plain, saved = student.clone().requires_grad_(), student.clone().requires_grad_()
    spatial_relation_distance(plain.exp(), teacher, relation).backward()
    checkpoint(
        lambda s: spatial_relation_distance(s.exp(), teacher, relation), saved, use_reentrant=reentrant
    ).backward()
    torch.testing.assert_close(saved.grad, plain.grad)


def test_a_second_derivative_is_refused_and_not_silently_zero():
    student, teacher = pair(1, 4, 6, 5, 5)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(spatial_relation_distance(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("relation", ["cosine", "attention"])
def test_torch_compile_keeps_loss_and_gradients(relation):
    torch._dynamo.reset()
    loss = DualRelationLoss([("s", "t")], relation=relation, student_widths={"s": 4}, teacher_widths={"t": 6})
    student, teacher = pair(2, 4, 6, 10, 10, torch.float32)

    def step(s, t):
        terms = loss({"s": s.relu() + 0.1}, {"t": t})
        return terms["spatial_relation"] + terms["channel_relation"]

    eager, compiled = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = step(eager, teacher)
    expected.backward()
    weights = [p.grad.clone() for p in loss.parameters()]
    loss.zero_grad()
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(compiled, teacher)
    got.backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled.grad, eager.grad)
    for p, wanted in zip(loss.parameters(), weights, strict=True):
        torch.testing.assert_close(p.grad, wanted)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, backend="aot_eager", fullgraph=True)(student, teacher), got)


def test_operators_for_torch_compile_keep_their_contract():
    student, teacher = pair(1, 3, 5, 6, 6, torch.float32)
    student.requires_grad_()
    weight = torch.randn(5, 3, requires_grad=True)
    for settings_of in (("cosine", 1.0, "identity", True, True), ("attention", 0.5, "", True, True)):
        library.opcheck(torch.ops.drd_hf.spatial_relation_distance.default, (student, teacher, *settings_of))
    for relation in ("cosine", "attention"):
        library.opcheck(
            torch.ops.drd_hf.channel_relation_distance.default, (student, teacher, weight, relation, 1.0, "", True)
        )


@pytest.mark.parametrize("route", ["direct", "identity"])
@pytest.mark.parametrize(("c_s", "c_t"), [(96, 160), (128, 128)])
def test_features_as_a_network_gives_them_agree_to_six_digits(route, c_s, c_t):
    student, teacher = (x.relu() for x in pair(1, c_s, c_t, 30, 34, torch.float32))
    weight = (draw(5, c_t, c_s) / 10).float().requires_grad_()
    plain_weight = weight.detach().double().requires_grad_()
    leaf, plain = student.clone().requires_grad_(), student.double().requires_grad_()
    loss = spatial_relation_distance(leaf, teacher, route=route)
    expected = plain_distance(plain, teacher.double(), "spatial", "cosine")
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (leaf.grad - plain.grad).norm() <= 1e-5 * plain.grad.norm()
    leaf.grad = plain.grad = None
    loss = channel_relation_distance(leaf, teacher, projection=weight, route=route)
    expected = plain_distance(plain, teacher.double(), "channel", "cosine", projection=plain_weight)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (leaf.grad - plain.grad).norm() <= 1e-5 * plain.grad.norm()
    assert (weight.grad - plain_weight.grad).norm() <= 1e-5 * plain_weight.grad.norm()


def relative_error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def much_in_common(content, channels, kind, seed, side=28):
    features = draw(seed, 1, channels, side, side)
    if content.startswith("mean"):  # mean cosines of about 0.9, 0.99 and 0.999
        mean = draw(seed + 50, 1, channels, 1, 1)
        # Channels whose means differ in sign are far apart, whatever the rest of them does.
        features = features + int(content[4:]) * (mean if kind == "spatial" else mean.abs() + 0.5)
    if content == "outlier channel":
        features[:, 3] += 60
    if content == "pattern":  # the same picture in all channels
        features = features + 10 * draw(7, 1, 1, side, side)
    return (features.relu() if content == "relu" else features).float()


@pytest.mark.parametrize("content", ["mean3", "mean10", "mean30", "outlier channel", "relu", "pattern"])
@pytest.mark.parametrize("route", ["direct", "identity"])
@pytest.mark.parametrize(("kind", "c_s", "c_t"), [("spatial", 96, 160), ("spatial", 96, 96), ("channel", 96, 96)])
def test_what_all_features_have_in_common_costs_no_digits(kind, c_s, c_t, route, content):
    # A large mean or an outlier channel, as in vision transformers, makes all cosines nearly 1. The difference of two such maps
    # was 5e-4 off at a mean cosine of 0.99, and its gradient 2e-3.
    student, teacher = (much_in_common(content, c, kind, seed) for seed, c in ((0, c_s), (1, c_t)))
    leaf, plain = student.clone().requires_grad_(), student.double().requires_grad_()
    loss = DISTANCES[kind](leaf, teacher, route=route)
    expected = plain_distance(plain, teacher.double(), kind, "cosine")
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(leaf.grad, plain.grad) <= 1e-5


@pytest.mark.parametrize("content", ["mean3", "mean10", "outlier channel", "relu", "pattern"])
@pytest.mark.parametrize("route", ["direct", "identity"])
def test_projected_channels_keep_their_digits_where_all_have_much_in_common(route, content):
    student, teacher = (much_in_common(content, c, "channel", seed, side=40) for seed, c in ((0, 24), (1, 48)))
    # With positive weights the projected channels share what the student's channels share.
    weight = (draw(2, 48, 24).abs() if content.startswith("mean") else draw(2, 48, 24)).float().requires_grad_()
    plain_weight = weight.detach().double().requires_grad_()
    leaf, plain = student.clone().requires_grad_(), student.double().requires_grad_()
    loss = channel_relation_distance(leaf, teacher, projection=weight, route=route)
    expected = plain_distance(plain, teacher.double(), "channel", "cosine", projection=plain_weight)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(leaf.grad, plain.grad) <= 1e-5
    assert relative_error(weight.grad, plain_weight.grad) <= 1e-5


@pytest.mark.parametrize("mean", [0, 3, 30])
def test_few_positions_keep_their_digits_whether_or_not_they_have_much_in_common(mean):
    # So few are compared without a common direction split off, unless they have one.
    student, teacher = (draw(seed, 2, c, 8, 8) + mean * draw(seed + 9, 2, c, 1, 1) for seed, c in ((0, 96), (1, 160)))
    leaf, plain = student.float().requires_grad_(), student.float().double().requires_grad_()
    loss = spatial_relation_distance(leaf, teacher.float())
    expected = plain_distance(plain, teacher.float().double(), "spatial", "cosine")
    loss.backward()
    expected.backward()
    assert cosine_route(64, 96, 160) == "direct"
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(leaf.grad, plain.grad) <= 1e-5


def test_sums_over_very_many_equal_positions_do_not_drift():
    # Every position is one of two vectors, so that float32 sums of equal terms are rounded to the same side again and again: added
    # up over all positions without a float64 sum between, the distance was 3e-5 off.
    generator = torch.Generator().manual_seed(2)
    few_s, few_t = (torch.randn(2, c, generator=generator).T.reshape(1, c, 1, 2) for c in (72, 80))
    expected = plain_distance(few_s.double(), few_t.double(), "spatial", "cosine").item()
    student, teacher = (x.repeat(1, 1, 512, 256) for x in (few_s, few_t))
    distance = spatial_relation_distance(student, teacher, route="identity").item()
    assert distance == pytest.approx(expected, rel=1e-5)


def test_a_projection_that_cancels_most_of_the_features_keeps_its_gradient():
    # The Gram matrix squares the cancellation: folded in float32, the gradient of the weight was 15 % off.
    student = 1 + 1e-3 * draw(0, 1, 32, 40, 40)
    teacher = draw(1, 1, 64, 40, 40).float()
    weight = draw(2, 64, 32)
    weight = (weight - weight.mean(dim=1, keepdim=True)).float().requires_grad_()
    plain_weight = weight.detach().double().requires_grad_()
    channel_relation_distance(student.float(), teacher, projection=weight, route="direct").backward()
    plain = plain_distance(student.float().double(), teacher.double(), "channel", "cosine", projection=plain_weight)
    plain.backward()
    assert (weight.grad - plain_weight.grad).norm() <= 1e-5 * plain_weight.grad.norm()


def test_lengths_beyond_float32_show_and_do_not_count_as_zero():
    huge = 1e20 * draw(0, 1, 4, 20, 20).float()
    for route in ("direct", "identity"):
        assert spatial_relation_distance(huge, torch.randn(1, 4, 20, 20), route=route).isnan()


def test_values_under_no_grad_are_the_same():
    student, teacher = pair(1, 4, 6, 12, 12)
    student.requires_grad_()
    for relation in ("cosine", "attention"):
        with torch.no_grad():
            alone = spatial_relation_distance(student, teacher, relation)
        assert not alone.requires_grad
        assert torch.equal(alone, spatial_relation_distance(student, teacher, relation).detach())


def test_what_is_not_finite_shows_in_the_distance():
    student, teacher = pair(1, 4, 4, 12, 12, torch.float32)
    student[0, 0, 3, 3] = float("nan")
    for kind, relation in [("spatial", "cosine"), ("spatial", "attention"), ("channel", "cosine")]:
        assert DISTANCES[kind](student, teacher, relation).isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: spatial_relation_distance(f, f, relation="euclid"), "choose one of cosine, attention"),
        (lambda f: spatial_relation_distance(f, f, temperature=0), "greater than 0"),
        (lambda f: spatial_relation_distance(f[0], f), r"\(B, C, H, W\)"),
        (lambda f: spatial_relation_distance(f, f[:1]), "batch size"),
        (lambda f: spatial_relation_distance(f, f, route="shortest"), "direct, identity"),
        (lambda f: spatial_relation_distance(f, f, "attention", route="identity"), "goes with relation='cosine'"),
        (lambda f: channel_relation_distance(f, f[:, :2]), "project the student's features"),
        (lambda f: channel_relation_distance(f, f[:, :2], projection=torch.ones(4, 2)), r"must be \(2, 4\)"),
        (lambda f: spatial_relation_map(f.long()), "floating point"),
        (lambda f: spatial_relation_distance(f[:0], f[:0]), "not empty"),
    ],
)
def test_wrong_input_is_refused_with_the_remedy(call, message):
    with pytest.raises(UserError, match=message):
        call(torch.randn(2, 4, 3, 3))
