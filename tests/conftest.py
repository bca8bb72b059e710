"""Tiny models and scenes built in code; no test may reach the network."""

import os
import shutil
import tempfile

# Before any Hugging Face library is imported: offline, and caches that are not the user's.
os.environ["HF_HUB_OFFLINE"] = "1"
# Workers do not share a cache; the processes that a test starts have that of their worker.
if "HF_HOME" not in os.environ or os.environ.get("CACHE_OF_WORKER", "") != os.environ.get("PYTEST_XDIST_WORKER", ""):
    os.environ["HF_HOME"] = OWN_CACHE = tempfile.mkdtemp(prefix="drd-hf-tests-")
    os.environ["CACHE_OF_WORKER"] = os.environ.get("PYTEST_XDIST_WORKER", "")
else:
    OWN_CACHE = None

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation

torch.set_num_threads(1)  # tiny models gain nothing from threads, and lose much where cores are busy


def pytest_unconfigure(config):
    if OWN_CACHE is not None:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


LABELS = {0: "ground", 1: "building", 2: "tree"}

STAGES = ["stage1", "stage2", "stage3", "stage4"]
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 64,
    "patch_size": 16,
}
DEEPER_VIT = VIT | {"num_hidden_layers": 4}
MLP_RATIO = {name: value for name, value in VIT.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
SWIN = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 2, "image_size": 64}
CONVNEXT = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "layer_type": "basic"}
BEIT_HEAD = {"out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "use_relative_position_bias": True}
TRANSFORMER_DECODER = {
    "hidden_dim": 32,
    "encoder_feedforward_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "dim_feedforward": 16,
    "num_queries": 4,
}
EOMT = MLP_RATIO | {"num_blocks": 1, "num_queries": 4, "num_upscale_blocks": 1}


def _detr() -> dict:
    names = ("encoder_layers", "decoder_layers"), ("encoder_ffn_dim", "decoder_ffn_dim")
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    values = dict.fromkeys(names[0], 1) | dict.fromkeys(names[1], 16) | heads
    return {"model_type": "detr", "d_model": 32, "num_queries": 4} | values


# Values of each family's configuration beside `model_type`. A name is a model type, or a model type and a backbone.
SEGMENTERS = {
    "beit": DEEPER_VIT | BEIT_HEAD | {"auxiliary_channels": 8},
    "data2vec-vision": DEEPER_VIT | BEIT_HEAD | {"auxiliary_channels": 8},
    "dpt": DEEPER_VIT
    | {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16},
    "mobilenet_v2": {"min_depth": 4, "output_stride": 16},
    "mobilevit": {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
        "num_attention_heads": 2,
        "aspp_out_channels": 16,
        "expand_ratio": 1.0,
        "output_stride": 16,
        "image_size": 64,
    },
    "mobilevitv2": {
        "width_multiplier": 0.25,
        "aspp_out_channels": 16,
        "output_stride": 16,
        "n_attn_blocks": [1, 1, 1],
        "base_attn_unit_dims": [16, 16, 16],
        "expand_ratio": 1.0,
        "image_size": 64,
    },
    "sapiens2": VIT
    | {
        "num_first_full_attention_layers": 1,
        "num_last_full_attention_layers": 1,
        "num_key_value_attention_heads": 2,
        "num_register_tokens": 2,
        "head_config": {"upsample_out_channels": [16, 8], "conv_out_channels": [8]},
    },
    "segformer": {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]},
    "tipsv2_dpt": {
        "backbone_config": DEEPER_VIT
        | {"model_type": "tipsv2_vision_model", "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False},
        "neck_hidden_sizes": [8, 8, 16, 16],
        "fusion_hidden_size": 16,
    },
    "upernet": {
        "backbone_config": RESNET | {"model_type": "resnet", "out_features": STAGES},
        "use_auxiliary_head": False,
    },
    "upernet on resnet": {
        "backbone_config": RESNET | {"model_type": "resnet", "out_features": STAGES},
        "auxiliary_channels": 8,
    },
    "upernet on convnext": {
        "backbone_config": CONVNEXT | {"model_type": "convnext", "out_features": STAGES},
        "auxiliary_channels": 8,
    },
    "upernet on swin": {
        "backbone_config": SWIN | {"model_type": "swin", "out_features": STAGES},
        "auxiliary_channels": 8,
    },
    "upernet on timm": {
        "backbone_config": {
            "model_type": "timm_backbone",
            "backbone": "mobilenetv3_small_050",
            "use_pretrained_backbone": False,
            "features_only": True,
            "out_indices": [1, 2, 3, 4],
        },
        "auxiliary_channels": 8,
    },
}
ENCODERS = {
    "beit": VIT | {"use_relative_position_bias": True},
    "clip_vision_model": VIT,
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "deit": VIT,
    "dinov2": MLP_RATIO | {"image_size": 56, "patch_size": 14},
    "dinov2_with_registers": MLP_RATIO | {"image_size": 56, "patch_size": 14, "num_register_tokens": 4},
    "dinov3_convnext": CONVNEXT,
    "dinov3_vit": VIT | {"num_register_tokens": 4},
    "hiera": {"embed_dim": 8, "image_size": [64, 64], "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "mlp_ratio": 2.0},
    "resnet": RESNET,
    "siglip_vision_model": VIT,
    "swin": SWIN,
    "swinv2": SWIN,
    "vit": VIT,
    "vitdet": MLP_RATIO | {"pretrain_image_size": 64},
}
UNIVERSAL = {
    "eomt": EOMT,
    "eomt_dinov3": EOMT,
    "mask2former": TRANSFORMER_DECODER
    | {
        "backbone_config": SWIN | {"model_type": "swin", "out_features": STAGES},
        "feature_size": 32,
        "mask_feature_size": 32,
    },
    "maskformer": {
        "backbone_config": SWIN | {"model_type": "swin", "out_features": STAGES},
        "decoder_config": _detr(),
        "fpn_feature_size": 32,
        "mask_feature_size": 32,
    },
    "oneformer": TRANSFORMER_DECODER
    | {
        "backbone_config": SWIN | {"model_type": "swin", "out_features": STAGES},
        "conv_dim": 32,
        "mask_dim": 32,
        "text_encoder_width": 16,
        "text_encoder_num_layers": 1,
        "text_encoder_vocab_size": 32,
        "text_encoder_context_length": 8,
        "task_seq_len": 8,
        "query_dec_layers": 1,
    },
}


def known(family: str) -> bool:
    """Whether the installed transformers has a family."""
    return family.split(" on ")[0] in transformers.CONFIG_MAPPING


def tiny_config(family: str, width: int = 1):
    """A segmenter's configuration of a few thousand parameters; `width` 2 makes features twice as wide."""
    if family not in SEGMENTERS:
        raise ValueError(family)
    values = SEGMENTERS[family] | {"id2label": dict(LABELS), "label2id": {name: i for i, name in LABELS.items()}}
    model_type = family.split(" on ")[0]
    if model_type == "segformer":
        values["decoder_hidden_size"] = 16 * width
    if model_type == "upernet":
        values["hidden_size"] = 16 * width
    if model_type == "mobilenet_v2":
        values["depth_multiplier"] = 0.25 * width
    return _config(model_type, values)


def _config(model_type: str, values: dict):
    # A backbone is given as its configuration: older versions fill its values into the class only then.
    nested = {
        name: _config(value["model_type"], {k: v for k, v in value.items() if k != "model_type"})
        if isinstance(value, dict) and "model_type" in value
        else value
        for name, value in values.items()
    }
    return AutoConfig.for_model(model_type, **nested)


def tiny_model(family: str, width: int = 1, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForSemanticSegmentation.from_config(tiny_config(family, width))


def tiny_encoder(family: str, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModel.from_config(_config(family, ENCODERS[family]))


def tiny_universal(family: str, seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForUniversalSegmentation.from_config(_config(family, UNIVERSAL[family]))
    if hasattr(model, "attn_mask_probs"):
        model.attn_mask_probs.zero_()  # as in every EoMT that was trained to the end
    return model


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
