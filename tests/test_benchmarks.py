"""The commands that produce the figures run, and their plain definitions are the definitions."""

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drd_hf.relations import (
    channel_alignment_distance,
    channel_relation_distance,
    spatial_alignment_distance,
    spatial_relation_distance,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import data, peers  # noqa: E402


def run(script, *options):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def test_what_is_timed_against_each_other_is_the_same_loss():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, c, 9, 9, generator=generator, dtype=torch.float64) for c in (4, 6))
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    for relation in ("cosine", "attention"):
        plain = getattr(peers, f"plain_spatial_{relation}")(student, teacher)
        torch.testing.assert_close(spatial_relation_distance(student, teacher, relation), plain)
        plain = getattr(peers, f"plain_channel_{relation}")(student, teacher, projection=weight)
        torch.testing.assert_close(channel_relation_distance(student, teacher, relation, projection=weight), plain)
    torch.testing.assert_close(
        spatial_alignment_distance(student, teacher), peers.plain_spatial_aligned(student, teacher)
    )
    plain = peers.plain_channel_aligned(student, teacher, projection=weight)
    torch.testing.assert_close(channel_alignment_distance(student, teacher, projection=weight), plain)


@pytest.mark.parametrize(
    "name", ["skd_pairwise", "ifvd", "cirkd_minibatch", "ickd", "sp", "at", "fitnet", "cwd", "csd", "pixel_kd"]
)
def test_losses_of_others_are_zero_between_equals_and_positive_otherwise(name):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 6, 8, 8, generator=generator) for _ in range(2))
    labels = torch.randint(0, 6, (2, 32, 32), generator=generator)
    loss = getattr(peers, name)
    between_equals = loss(student, student, labels=labels).item()
    student.requires_grad_()
    value = loss(student, teacher, labels=labels)
    value.backward()
    assert value.item() > 0 and student.grad.abs().sum() > 0
    assert abs(between_equals) < 1e-4 * value.item()


def test_the_benchmark_of_relations_prints_a_table_and_writes_json(tmp_path):
    methods = ["spatial cosine", "spatial cosine, plain", "spatial aligned", "bare products, projection"]
    printed = run(
        "relations.py", "--sizes", "16", "--seconds", "0.05", "--output", tmp_path / "r.json", "--methods", *methods
    )
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["method"] for row in rows] == methods
    assert all(row["milliseconds"] > 0 and row["peak_megabytes"] >= 0 for row in rows)
    assert rows[1]["times_plain"] == 1
    assert "16x16" in printed


@pytest.mark.slow
def test_the_benchmark_of_a_step_prints_a_table_and_writes_json(tmp_path):
    printed = run("step.py", "--size", "64", "--rounds", "2", "--device", "cpu", "--output", tmp_path / "s.json")
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["share_of_teacher_and_student"]["DRD, plain form"] > 0
    assert "DistillationTrainer, whole step" in printed


def test_the_benchmark_of_layouts_prints_a_table_and_writes_json(tmp_path):
    options = ["--models", "segformer_b0", "--size", "64", "--batch_size", "2", "--rounds", "1", "--device", "cpu"]
    printed = run("layout.py", *options, "--output", tmp_path / "l.json")
    rows = json.loads((tmp_path / "l.json").read_text())["rows"]
    assert [(row["pass"], row["type"]) for row in rows] == [
        (done, kind) for kind in ("float32", "bfloat16") for done in ("forward", "forward and backward")
    ]
    for row in rows:
        assert row["ratio"] == row["milliseconds"]["usual"] / row["milliseconds"]["channels last"] > 0
    assert "segformer_b0" in printed


def test_the_peer_of_feeding_gives_what_the_package_gives():
    # A peer that does less would make the ratio a lie: same shapes, one pixel of image to each of the label.
    label = np.kron(np.random.default_rng(0).integers(0, 6, (8, 8)), np.ones((64, 64))).astype(np.uint8)
    row = {}
    for name, pixels in (("image", np.repeat(40 * label[..., None], 3, axis=-1).astype(np.uint8)), ("label", label)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        row[name] = {"bytes": file.getvalue(), "path": None}
    rng = random.Random(0)
    for _ in range(4):
        image, labels = data.peer(row, rng)
        assert image.shape == (3, 512, 512) and image.dtype == torch.float32
        assert labels.shape == (512, 512) and labels.dtype == torch.int64
        grey = image[0] * data.STD[0] + data.MEAN[0]
        means = [grey[labels == c].mean().item() for c in range(6) if (labels == c).any()]
        assert means == sorted(means), "classes stay in the order of their grey values under any jitter"
        assert grey[labels == 255].numel() == 0 or grey[labels == 255].median() < 0.01


@pytest.mark.slow
def test_the_benchmark_of_data_prints_tables_and_writes_json(tmp_path):
    printed = run("data.py", "--side", "700", "--rounds", "1", "--tiles", "2", "--output", tmp_path / "d.json")
    report = json.loads((tmp_path / "d.json").read_text())
    assert report["labels_byte_exact"] and report["peak_megabytes"] > report["idle_megabytes"] > 0
    assert set(report["conversion_seconds"]) == {"plain", "package", "floor"}
    assert "labels are byte-exact" in printed and "package over Pillow and NumPy" in printed
