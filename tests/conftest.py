"""Tiny models and scenes built in code; no test may reach the network."""

import os
import tempfile

# Before any Hugging Face library is imported: offline, and caches that are not the user's.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="drd-hf-tests-"))

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSemanticSegmentation,
    MobileNetV2Config,
    ResNetConfig,
    SegformerConfig,
    UperNetConfig,
)

torch.set_num_threads(1)  # tiny models gain nothing from threads, and lose much where cores are busy

LABELS = {0: "ground", 1: "building", 2: "tree"}


def tiny_config(family: str, width: int = 1):
    """A configuration of a few thousand parameters; `width` 2 makes features twice as wide."""
    labels = {"id2label": dict(LABELS), "label2id": {name: i for i, name in LABELS.items()}}
    if family == "segformer":
        return SegformerConfig(
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 8, 16, 16],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16 * width,
            **labels,
        )
    if family == "upernet":
        backbone = ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        return UperNetConfig(backbone_config=backbone, hidden_size=16 * width, use_auxiliary_head=False, **labels)
    if family == "mobilenet_v2":
        return MobileNetV2Config(depth_multiplier=0.25 * width, min_depth=4, output_stride=16, **labels)
    raise ValueError(family)


def tiny_model(family: str, width: int = 1, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForSemanticSegmentation.from_config(tiny_config(family, width))


class RandomTiles(torch.utils.data.Dataset):
    """Items as the transforms give them; classes are readable from the colour, so that there is something to learn."""

    def __init__(self, length: int = 8, size: int = 64, num_labels: int = 3):
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randint(num_labels, (length, size // 16, size // 16), generator=generator)
        self.labels = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2).to(torch.uint8)
        noise = torch.randint(60, (length, 3, size, size), generator=generator)
        self.images = (self.labels[:, None].long() * 80 + noise).clamp(0, 255).to(torch.uint8)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": self.images[index], "labels": self.labels[index]}


@pytest.fixture
def real_data() -> Path:
    """Real images and weights beside the project, if somebody put them there."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data" / "aerial_dubai").is_dir():
        pytest.skip("needs the aerial_dubai images in ../shared/data, which are not part of the project")
    return folder
