"""Every model family as student and as teacher: tiny random models, default feature layers, two steps each."""

import math

import pytest
import torch
from torch import nn
from transformers import SegformerImageProcessor

from drd_hf.features import FeatureHooks
from drd_hf.models import default_feature_layer, load_teacher
from drd_hf.trainer import DistillationConfig, DistillationTrainer

from .conftest import (
    ENCODERS,
    SEGMENTERS,
    UNIVERSAL,
    RandomTiles,
    known,
    tiny_encoder,
    tiny_model,
    tiny_universal,
)


def families(table):
    """Parameters of a test; what the installed transformers lacks is skipped and says so."""
    lacking = pytest.mark.skip(reason="not in this version of transformers")
    return [pytest.param(name, marks=() if known(name) else lacking) for name in table]


class UnlabelledTiles(RandomTiles):
    def __getitem__(self, index):
        return {"image": self.images[index], "labels": torch.full_like(self.labels[index], 255)}


def trained(tmp_path, student, teacher, data=None, **changes):
    settings = {
        "output_dir": str(tmp_path / "run"),
        "method": ["drd", "drd_aligned"],  # the second reads the stages of the encoders too
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
    trainer = DistillationTrainer(
        student,
        teacher,
        DistillationConfig(**(settings | changes)),
        train_dataset=data or RandomTiles(),
        processing_class=SegformerImageProcessor(do_resize=False),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_sound(logs):
    assert len(logs) == 2
    for entry in logs:
        assert all(math.isfinite(value) for value in entry.values())
        assert entry["task_loss"] > 0 and entry["spatial_relation"] > 0 and entry["channel_relation"] > 0
        assert 0 < entry["spatial_alignment"] <= 1 + 1e-6 and 0 < entry["channel_alignment"] < 2


@pytest.mark.parametrize("family", families(SEGMENTERS))
def test_default_layer_is_the_norm_whose_map_the_main_classifier_reads(family):
    model = tiny_model(family).eval()
    layer = model.get_submodule(default_feature_layer(model))
    assert "Norm" in type(layer).__name__ or family == "tipsv2_dpt"  # which has no norm there
    read, later = {}, []
    layer.register_forward_hook(lambda module, args, output: read.update(map=output))
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module is not layer:
            module.register_forward_hook(
                lambda module, args, output, name=name: later.append((name, args[0])) if read else None
            )
    with torch.no_grad():
        logits = model(pixel_values=torch.rand(1, 3, 64, 64)).logits
        # The first weights after the layer are the classifier's, and it sees the layer's map after an activation.
        name, seen = later[0]
        assert "auxiliary" not in name
        classifier = model.get_submodule(name)
        again = classifier(seen)
    if isinstance(classifier, nn.Linear):  # TIPSv2 classifies channels that come last
        seen, again = seen.permute(0, 3, 1, 2), again.permute(0, 3, 1, 2)
    torch.testing.assert_close(
        nn.functional.interpolate(again, logits.shape[2:], mode="bilinear", align_corners=family == "dpt"), logits
    )
    activations = [lambda x: x, nn.functional.relu, nn.functional.relu6, nn.functional.silu]
    assert any(torch.allclose(f(read["map"]), seen, atol=1e-6) for f in activations)


@pytest.mark.parametrize("family", families(SEGMENTERS))
def test_every_family_learns_from_a_teacher(tmp_path, family):
    teacher = tiny_model("upernet", width=2, seed=2)
    assert_sound(trained(tmp_path, tiny_model(family, seed=1), teacher))

    # Without labels only the distillation terms have a gradient: it reaches the first layer and not the classifier.
    student = tiny_model(family, seed=1)
    convolutions = {n: m.weight for n, m in student.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    first = next(iter(convolutions.values()))
    last = [w for n, w in convolutions.items() if w.shape[0] == 3 and "auxiliary" not in n][-1]
    before = first.detach().clone(), last.detach().clone()
    trained(tmp_path, student, teacher, UnlabelledTiles(), optim="sgd", learning_rate=1.0, max_grad_norm=0.0)
    assert torch.isfinite(first).all() and not torch.equal(first, before[0])
    assert torch.equal(last, before[1])


@pytest.mark.parametrize("family", families(SEGMENTERS))
def test_every_family_teaches(tmp_path, family):
    assert_sound(trained(tmp_path, tiny_model("segformer", seed=1), tiny_model(family, seed=2)))


def saved(model, folder):
    with torch.no_grad():  # tiny random models have features near 0
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", families(ENCODERS))
def test_every_encoder_teaches(tmp_path, family):
    teacher = load_teacher(saved(tiny_encoder(family, seed=2), tmp_path / "teacher"))
    assert_sound(trained(tmp_path, tiny_model("segformer", seed=1), teacher))


@pytest.mark.parametrize("family", families(UNIVERSAL))
def test_every_universal_segmenter_teaches(tmp_path, family):
    teacher = load_teacher(saved(tiny_universal(family, seed=2), tmp_path / "teacher"))
    with FeatureHooks(teacher, [default_feature_layer(teacher)]) as hooks:
        teacher(pixel_values=torch.rand(1, 3, 64, 64))
        (mask_features,) = hooks.pop().values()
    stride = 8 if "eomt" in family else 4  # of the tiny models: EoMT doubles a grid of patches once
    assert mask_features.shape[-2:] == (64 // stride, 64 // stride)
    assert_sound(trained(tmp_path, tiny_model("segformer", seed=1), teacher))


WITH_TOKENS = [name for name in ENCODERS if "conv" not in name and name != "resnet"]


@pytest.mark.parametrize("proportions", [(1, 2), (2, 1)])
@pytest.mark.parametrize("family", families(WITH_TOKENS))
def test_tokens_lie_where_their_patch_lies_in_the_image(tmp_path, family, proportions):
    """A changed patch changes the map most at its own place, in images that are not square too."""
    teacher = load_teacher(saved(tiny_encoder(family), tmp_path))
    layer = default_feature_layer(teacher)
    height, width = (side * (112 if "dinov2" in family else 128) for side in proportions)
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    with FeatureHooks(teacher, [layer]) as hooks:

        def features(pixel_values):
            teacher(pixel_values=pixel_values)
            return hooks.pop()[layer]

        plain = features(image)
        rows, columns = plain.shape[-2:]
        size = height // rows
        assert (rows * size, columns * size) == (height, width)
        for row, column in ((0, columns - 1), (rows - 1, 0), (rows // 2, columns // 3)):
            changed = image.clone()
            changed[..., row * size : (row + 1) * size, column * size : (column + 1) * size] += 3
            distance = (features(changed) - plain).square().sum(1)[0]
            assert divmod(int(distance.argmax()), columns) == (row, column)
