"""What a forward pass costs: arithmetic counted by hand, time, and memory that the tensors account for."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drd_hf.errors import UserError
from drd_hf.profiling import count_flops, profile_model, profile_models

from .conftest import tiny_encoder, tiny_model

ROOT = Path(__file__).resolve().parents[1]


class Attention(nn.Module):
    """A convolution to 8 channels at half the size, then attention among its pixels."""

    def __init__(self, channels=3):
        super().__init__()
        self.config = SimpleNamespace(num_channels=channels)
        self.conv = nn.Conv2d(channels, 8, 3, stride=2, padding=1)

    def forward(self, pixel_values):
        tokens = self.conv(pixel_values).flatten(2).transpose(1, 2)[:, None]  # (B, 1, N, 8)
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


@pytest.mark.parametrize("channels", [3, 5])
def test_flops_are_those_of_a_count_by_hand(channels):
    # The fused attention of CPUs was unknown to the counter of older versions, and counted as nothing.
    pixels = 16 * 16
    convolution = 2 * pixels * 8 * channels * 9
    attention = 2 * (2 * pixels * pixels * 8)
    assert count_flops(Attention(channels), 32) == convolution + attention


def test_flops_are_counted_where_a_model_looks_at_values():
    class Looks(Attention):
        def forward(self, pixel_values):
            assert float(pixel_values.sum()) == 0  # impossible without data
            return super().forward(pixel_values)

    assert count_flops(Looks(), 32) == count_flops(Attention(), 32)


def test_counting_leaves_the_model_where_it_is():
    model = tiny_model("segformer")
    count_flops(model, 64)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_models_stand_side_by_side_for_every_size():
    models = {"student": tiny_model("segformer").eval(), "teacher": tiny_encoder("vit").eval()}
    rows = profile_models({"student": models["student"]}, [96, 64], batch_size=2, device="cpu", rounds=3, memory=False)
    assert [(row["model"], row["size"]) for row in rows] == [("student", 64), ("student", 96)]
    rows = profile_models(models, [64], batch_size=2, device="cpu", rounds=3, memory=False)
    assert [(row["model"], row["size"]) for row in rows] == [("student", 64), ("teacher", 64)]
    for row in rows:
        assert row["parameters"] == sum(p.numel() for p in models[row["model"]].parameters())
        assert row["images_per_second"] == pytest.approx(2000 / row["milliseconds"])
        assert row["device"] == "cpu" and row["threads"] == torch.get_num_threads() and row["memory_bytes"] is None
    json.dumps(rows)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory of a CPU is measured on Linux only")
def test_memory_holds_what_the_model_must_keep_and_not_the_libraries():
    small, large = profile_model(tiny_model("segformer"), [64, 1024], device="cpu", rounds=1)
    # The decoder joins 4 maps of 16 channels, float32, at a quarter of the size.
    joined = 4 * 16 * (1024 // 4) ** 2 * 4
    image = 3 * 1024**2 * 4
    assert joined + image < large["memory_bytes"] < 20 * (joined + image)
    assert small["memory_bytes"] < large["memory_bytes"] / 8
    assert large["model"] == "segformer"


@pytest.mark.parametrize(
    "options, message",
    [({"sizes": [64, 0]}, "--sizes 64 0"), ({"sizes": []}, "--sizes"), ({"batch_size": 0}, "--batch_size 0")],
)
def test_sizes_and_batches_below_one_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        profile_models({"student": tiny_model("segformer")}, **options)


def test_a_size_that_a_model_does_not_take_is_named():
    # The error of a convolution came as a traceback that names no size.
    with pytest.raises(UserError, match=r"SegformerFor\w+ does not run on tiles of 1x1 pixels \(") as refused:
        profile_models({"student": tiny_model("segformer")}, [64, 1], device="cpu", rounds=1, memory=False)
    assert "\n" not in str(refused.value)


def test_the_script_prints_ratios_and_writes_the_rows(tmp_path):
    for name, width in (("student", 1), ("teacher", 2)):
        tiny_model("mobilenet_v2", width).save_pretrained(tmp_path / name)
    words = ["--model", tmp_path / "student", "--teacher", tmp_path / "teacher", "--sizes", 64, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "profile_model.py", *map(str, words), "--output", tmp_path / "cost.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    student, teacher = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert (student["model"], teacher["model"]) == ("model", "teacher")
    ratios = next(line.split() for line in done.stdout.splitlines() if line.startswith("ratio"))
    assert float(ratios[2]) == pytest.approx(teacher["parameters"] / student["parameters"], abs=0.01)
    assert float(ratios[3]) == pytest.approx(teacher["flops"] / student["flops"], abs=0.01)
