import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BertConfig,
    BertModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    HGNetV2Config,
    MobileViTImageProcessor,
    SegformerForImageClassification,
    SegformerImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from drd_hf.data.splits import SegmentationInfo
from drd_hf.errors import UserError
from drd_hf.features import FeatureHooks, feature_widths
from drd_hf.models import (
    bands_of,
    default_feature_layer,
    find_channels,
    load_image_processor,
    load_student,
    load_teacher,
    select_bands,
)

from .conftest import ENCODERS, LABELS, SEGMENTERS, VIT, known, tiny_config, tiny_encoder, tiny_model, tiny_universal

FIVE = ("red", "green", "blue", "near_infrared", "height")
IRRG = ("near_infrared", "red", "green")


@pytest.fixture
def architecture(tmp_path):
    path = tmp_path / "segformer.json"
    config = tiny_config("segformer").to_dict()
    kept = ("model_type", "depths", "hidden_sizes", "num_attention_heads", "decoder_hidden_size")
    path.write_text(json.dumps({name: config[name] for name in kept}))
    return str(path)


def test_an_architecture_file_gives_a_model_with_the_labels_of_the_task(architecture):
    model = load_student(architecture, {0: "sea", 1: "ice"})
    assert model.config.id2label == {0: "sea", 1: "ice"} and model.config.label2id == {"sea": 0, "ice": 1}
    assert model(pixel_values=torch.zeros(1, 3, 32, 32)).logits.shape[1] == 2
    assert model.config.semantic_loss_ignore_index == 255


def test_a_checkpoint_with_other_labels_gets_a_new_head_and_keeps_its_body(tmp_path):
    trained = tiny_model("segformer", seed=3)
    trained.save_pretrained(tmp_path)
    student = load_student(str(tmp_path), {i: f"class {i}" for i in range(5)})
    assert student.decode_head.classifier.weight.shape[0] == 5
    torch.testing.assert_close(student.decode_head.linear_fuse.weight, trained.decode_head.linear_fuse.weight)


def test_a_teacher_is_frozen_and_in_eval_mode(tmp_path):
    tiny_model("upernet").save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_pretrained_weights_of_a_checkpoint_start_an_architecture(tmp_path, architecture):
    trained = tiny_model("segformer", seed=3)
    trained.save_pretrained(tmp_path / "checkpoint")
    student = load_student(architecture, LABELS, str(tmp_path / "checkpoint"))
    torch.testing.assert_close(student.decode_head.linear_fuse.weight, trained.decode_head.linear_fuse.weight)


def test_backbone_weights_from_a_safetensors_file(tmp_path):
    path, weights = tmp_path / "upernet.json", tmp_path / "backbone.safetensors"
    config = tiny_config("upernet").to_dict()
    path.write_text(
        json.dumps(
            {name: config[name] for name in ("model_type", "backbone_config", "hidden_size", "use_auxiliary_head")}
        )
    )
    trained = tiny_model("upernet", seed=5)
    state = {k: v.contiguous() for k, v in trained.backbone.state_dict().items()}
    save_file({**state, "classifier.weight": torch.zeros(2)}, weights)  # an image classifier has more than a backbone
    student = load_student(str(path), LABELS, str(weights))
    for name, value in student.backbone.state_dict().items():
        torch.testing.assert_close(value, state[name])

    first = next(iter(state))
    save_file({k: v for k, v in state.items() if k != first}, weights)
    with pytest.raises(UserError, match=f"lacks: {first}"):
        load_student(str(path), LABELS, str(weights))


def test_real_efficientnet_weights_fill_the_timm_backbone(real_data):
    pytest.importorskip("timm")
    student = load_student(
        "scripts/configs/models/upernet_efficientnet_lite2.json",
        LABELS,
        str(real_data / "weights/tf_efficientnet_lite2/model.safetensors"),
    )
    assert student.eval()(pixel_values=torch.zeros(1, 3, 64, 64)).logits.shape == (1, 3, 64, 64)


def test_batch_norm_of_mobilenet_v2_does_not_follow_only_the_last_batch():
    # transformers passes TensorFlow's decay 0.997 as PyTorch's momentum, which means the opposite.
    raw = AutoModelForSemanticSegmentation.from_config(tiny_config("mobilenet_v2"))
    assert any(m.momentum > 0.5 for m in raw.modules() if isinstance(m, nn.BatchNorm2d)), "fixed upstream: drop ours"


def test_loaded_students_have_slow_batch_norm(tmp_path, caplog):
    tiny_model("mobilenet_v2").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="drd_hf.models"):
        student = load_student(str(tmp_path))
    assert {m.momentum for m in student.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    assert "momentum" in caplog.text


def test_image_processor_leaves_size_and_labels_alone(tmp_path, architecture):
    processor = load_image_processor(architecture, [0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
    assert (processor.image_mean, processor.image_std) == ([0.5] * 3, [0.25] * 3)
    processor.do_resize = processor.do_reduce_labels = True
    processor.save_pretrained(tmp_path / "model")
    again = load_image_processor(str(tmp_path / "model"))
    assert not again.do_resize and not again.do_reduce_labels
    assert again(torch.zeros(3, 40, 52, dtype=torch.uint8), return_tensors="pt")["pixel_values"].shape == (
        1,
        3,
        40,
        52,
    )


def test_an_architecture_takes_the_normalisation_of_the_weights_it_starts_from(tmp_path, architecture):
    SegformerImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path / "checkpoint")
    processor = load_image_processor(architecture, pretrained_weights=str(tmp_path / "checkpoint"))
    assert list(processor.image_mean) == [0.5] * 3
    of_a_backbone = load_image_processor(architecture, pretrained_weights="backbone.safetensors")
    assert list(of_a_backbone.image_mean) == [0.485, 0.456, 0.406]


def test_damaged_and_missing_models_are_named(tmp_path, architecture):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text('{"model_type": "segformer", ')
    (tmp_path / "unknown.json").write_text('{"model_type": "no_such_family"}')
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00")
    cases = [
        (lambda: load_student(str(tmp_path / "nowhere")), "nowhere: no such model folder"),
        (lambda: load_student(str(tmp_path / "empty")), "no config.json"),
        (lambda: load_student(str(tmp_path / "none.json")), "no such architecture file"),
        (lambda: load_student(str(tmp_path / "broken.json")), "broken.json: not an architecture"),
        (lambda: load_student(str(tmp_path / "unknown.json")), "unknown.json: not an architecture"),
        (lambda: load_student(architecture, {1: "a", 2: "b"}), "number the classes 0..1"),
        (lambda: load_student(architecture, LABELS, str(tmp_path / "cut.safetensors")), "not a readable safetensors"),
        (lambda: load_student(architecture, LABELS, str(tmp_path / "no.safetensors")), "no such weights file"),
        (lambda: load_teacher(architecture), "a teacher needs trained weights"),
        (lambda: load_image_processor(str(tmp_path / "empty")), "preprocessor_config.json"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_teacher_whose_head_was_never_trained_is_refused(tmp_path):
    # from_pretrained fills a missing head with random values and only prints a report.
    model = tiny_model("segformer")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "classifier" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="2 tensors have no trained values.*classifier"):
        load_teacher(str(tmp_path))
    assert load_student(str(tmp_path)).config.model_type == "segformer"


def test_weights_of_another_architecture_are_refused(tmp_path, architecture):
    tiny_model("upernet").save_pretrained(tmp_path / "upernet")
    with pytest.raises(UserError, match="tensors of the body of SegformerFor"):
        load_student(architecture, LABELS, str(tmp_path / "upernet"))


def test_weights_of_a_shallower_model_are_refused(tmp_path, architecture):
    # Most of a deeper encoder stayed random, and only a report on the console said so.
    tiny_model("segformer").save_pretrained(tmp_path / "shallow")
    deeper = json.loads(Path(architecture).read_text()) | {"depths": [3, 3, 3, 3]}
    (tmp_path / "deeper.json").write_text(json.dumps(deeper))
    with pytest.raises(UserError, match="do not fit"):
        load_student(str(tmp_path / "deeper.json"), LABELS, str(tmp_path / "shallow"))


def test_an_image_classifier_is_a_start_for_segmentation(tmp_path):
    classifier = SegformerForImageClassification(tiny_config("segformer"))
    classifier.save_pretrained(tmp_path)
    student = load_student(str(tmp_path), {0: "sea", 1: "ice"})
    saved = dict(classifier.segformer.named_parameters())
    assert all(torch.equal(p, saved[name]) for name, p in student.segformer.named_parameters())


def test_half_precision_checkpoints_are_loaded_in_float32(tmp_path):
    tiny_model("segformer").bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load_teacher(str(tmp_path)).parameters()} == {torch.float32}


def test_a_student_checkpoint_ignores_255_whatever_it_ignored_before(tmp_path):
    model = tiny_model("segformer")
    model.config.semantic_loss_ignore_index = 0
    model.save_pretrained(tmp_path)
    assert load_student(str(tmp_path)).config.semantic_loss_ignore_index == 255


def test_a_model_trained_without_normalisation_stays_so(tmp_path):
    SegformerImageProcessor(do_normalize=False).save_pretrained(tmp_path)
    assert not load_image_processor(str(tmp_path)).do_normalize
    with pytest.raises(UserError, match="give 3 values"):
        load_image_processor(str(tmp_path), image_mean=[0.5])


def test_a_damaged_weights_file_is_named(tmp_path):
    tiny_model("segformer").save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_an_encoder_without_a_segmentation_head_is_a_teacher(tmp_path, kind):
    config = Dinov2Config(**ENCODERS["dinov2"])
    model = tiny_encoder("dinov2") if kind == "encoder" else Dinov2ForImageClassification(config)
    model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert type(teacher).__name__ == "Dinov2Model"
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    saved = (model if kind == "encoder" else model.dinov2).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in teacher.state_dict().items())


def test_a_classifier_that_has_no_pooler_is_a_teacher(tmp_path):
    # The bare encoder has a pooler, which classifiers are saved without; no feature map depends on it.
    ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(tmp_path)
    assert type(load_teacher(str(tmp_path))).__name__ == "ViTModel"


def test_an_encoder_with_missing_weights_is_refused(tmp_path):
    tiny_encoder("vit").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layernorm.weight" not in k},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="no trained values.*layernorm"):
        load_teacher(str(tmp_path))


def test_what_a_model_computes_for_itself_may_lack_in_a_checkpoint(tmp_path):
    # Swin of transformers 5.0 has its position index in the checkpoint, later versions leave it out.
    model = tiny_encoder("swin")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "relative_position_index" not in k},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    computed = dict(model.named_buffers())
    assert all(torch.equal(value, computed[name]) for name, value in load_teacher(str(tmp_path)).named_buffers())


def test_a_backbone_without_a_model_of_its_own_is_a_teacher(tmp_path):
    sizes = {f"stage_{what}_channels": [8, 8, 16, 16] for what in ("mid", "out")}
    sizes |= {"stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 8, 16], "hidden_sizes": [8, 8, 16, 16]}
    config = HGNetV2Config(embedding_size=8, depths=[1] * 4, stage_num_blocks=[1] * 4, **sizes)
    AutoBackbone.from_config(config).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    layer = default_feature_layer(teacher)
    assert (layer, feature_widths(teacher, [layer])) == ("encoder.stages.3", {"encoder.stages.3": 16})


def test_a_student_that_cannot_compute_its_loss_is_refused(tmp_path):
    config = tiny_config("dpt")
    config.use_auxiliary_head = False
    model = AutoModelForSemanticSegmentation.from_config(config)
    with pytest.raises(UnboundLocalError):  # fixed upstream: drop ours
        model(pixel_values=torch.zeros(1, 3, 64, 64), labels=torch.zeros(1, 64, 64, dtype=torch.long))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="use_auxiliary_head"):
        load_student(str(tmp_path))


def test_the_image_tower_of_a_model_of_images_and_texts_is_a_teacher(tmp_path):
    text = VIT | {"vocab_size": 32}
    model = CLIPModel(CLIPConfig(vision_config=VIT, text_config=text, projection_dim=16))
    model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path)).eval()
    pixel_values = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(
        teacher(pixel_values=pixel_values).last_hidden_state,
        model.eval().vision_model(pixel_values=pixel_values).last_hidden_state,
    )


def test_models_that_see_no_whole_images_are_no_teachers(tmp_path):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=32, **text)).save_pretrained(tmp_path / "text")
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    ViTMAEForPreTraining(ViTMAEConfig(**VIT, **decoder)).save_pretrained(tmp_path / "masked")
    for folder, message in (("text", "'bert' does not"), ("masked", "hides random patches")):
        with pytest.raises(UserError, match=message) as caught:
            load_teacher(str(tmp_path / folder))
        assert "\n" not in str(caught.value)


def test_teachers_with_learnt_positions_take_images_of_other_sizes(tmp_path):
    model = tiny_encoder("vit").eval()
    model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    large, native = torch.rand(1, 3, 96, 128), torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="size"):
        model(pixel_values=large)
    assert teacher(pixel_values=large).last_hidden_state.shape[1] == 1 + 6 * 8
    torch.testing.assert_close(
        teacher(pixel_values=native).last_hidden_state, model(pixel_values=native).last_hidden_state, rtol=0, atol=0
    )


def test_the_mask_features_of_oneformer_do_not_depend_on_its_task(tmp_path):
    model = tiny_universal("oneformer").eval()
    model.save_pretrained(tmp_path)
    teacher, pixel_values = load_teacher(str(tmp_path)), torch.rand(1, 3, 64, 64)
    layer = default_feature_layer(teacher)
    with FeatureHooks(teacher, [layer]) as hooks, torch.no_grad():
        teacher(pixel_values=pixel_values)
        alone = hooks.pop()[layer]
        teacher(pixel_values=pixel_values, task_inputs=torch.rand(1, 8))
        torch.testing.assert_close(hooks.pop()[layer], alone)


def test_an_eomt_that_is_still_annealed_is_refused_by_its_layer(tmp_path):
    # While its masks are annealed, EoMT forms mask features in every block: which map is meant is not known.
    model = tiny_universal("eomt")
    model.attn_mask_probs.fill_(1.0)
    model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    with pytest.raises(UserError, match="'upscale_block' ran 2 times"):
        feature_widths(teacher, [default_feature_layer(teacher)])


def test_the_processor_of_an_encoder_keeps_its_normalisation_and_leaves_the_size_alone(tmp_path):
    BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, image_mean=[0.4] * 3
    ).save_pretrained(tmp_path)
    processor = load_image_processor(str(tmp_path))
    pixel_values = processor(torch.zeros(3, 40, 52, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 40, 52) and list(processor.image_mean) == [0.4] * 3


def test_models_of_one_image_size_name_it(tmp_path):
    tiny_universal("eomt").save_pretrained(tmp_path / "eomt")
    tiny_model("beit").save_pretrained(tmp_path / "beit")
    for model in (load_teacher(str(tmp_path / "eomt")), load_student(str(tmp_path / "beit")).eval()):
        model(pixel_values=torch.zeros(1, 3, 64, 64))
        with pytest.raises(UserError, match="images of 64x64 pixels only, not of 96x128"):
            model(pixel_values=torch.zeros(1, 3, 96, 128))


def info_of(bands, **values):
    """What a dataset's card says of its bands; the rest does not matter here."""
    rest = dict.fromkeys(("num_tiles", "num_sources", "pixel_shares", "ignored_shares"), {})
    return SegmentationInfo("x", dict(LABELS), ((0, 0, 0),) * 3, 255, 64, 64, 1.0, **rest, bands=bands, **values)


def side_of(model) -> int:
    return model.config.image_size if isinstance(getattr(model.config, "image_size", None), int) else 64


def first_kernels(model):
    return next(p for p in model.parameters() if p.ndim == 4)


@pytest.mark.parametrize("family", [name for name in SEGMENTERS if known(name)])
def test_every_family_reads_five_bands_and_is_loaded_again_by_plain_transformers(family, tmp_path):
    tiny_model(family, seed=3).save_pretrained(tmp_path / "three")
    student = load_student(str(tmp_path / "three"), LABELS, bands=FIVE).eval()
    images = torch.rand(1, 5, side_of(student), side_of(student))
    student.save_pretrained(tmp_path / "five")
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "five").eval()
    assert again.config.bands == list(FIVE)
    with torch.no_grad():
        torch.testing.assert_close(again(pixel_values=images).logits, student(pixel_values=images).logits)


@pytest.mark.parametrize("family", ["segformer", "upernet on timm", "mobilenet_v2", "beit"])
def test_grey_images_look_the_same_to_a_model_of_three_and_of_five_bands(family, tmp_path):
    # With the same value in all bands, the sum over the kernels is what counts, and the widening keeps it.
    tiny_model(family, seed=3).save_pretrained(tmp_path)
    before = load_student(str(tmp_path)).eval()
    after = load_student(str(tmp_path), num_channels=5).eval()
    grey = torch.rand(1, 1, side_of(before), side_of(before))
    with torch.no_grad():
        expected = before(pixel_values=grey.expand(-1, 3, -1, -1)).logits
        torch.testing.assert_close(after(pixel_values=grey.expand(-1, 5, -1, -1)).logits, expected)


def test_first_three_bands_keep_their_kernels_and_further_ones_get_the_mean(tmp_path):
    trained = tiny_model("segformer", seed=3)
    trained.save_pretrained(tmp_path)
    student = load_student(str(tmp_path), num_channels=5)
    old, new = first_kernels(trained), first_kernels(student)
    torch.testing.assert_close(new[:, :3], old * 3 / 5)
    for band in (3, 4):
        torch.testing.assert_close(new[:, band], (old[:, 0] + old[:, 1] + old[:, 2]) / 5)
    same = {n: p for n, p in trained.named_parameters() if p is not old}
    assert len(same) > 50 and all(torch.equal(student.get_parameter(n), p) for n, p in same.items())


def test_weights_for_an_architecture_file_are_widened_too(tmp_path, architecture):
    trained = tiny_model("segformer", seed=3)
    trained.save_pretrained(tmp_path / "checkpoint")
    student = load_student(architecture, LABELS, str(tmp_path / "checkpoint"), bands=FIVE)
    torch.testing.assert_close(first_kernels(student)[:, :3], first_kernels(trained) * 3 / 5)


def test_backbone_weights_are_widened_too(tmp_path):
    config, trained = tiny_config("upernet").to_dict(), tiny_model("upernet", seed=5)
    kept = ("model_type", "backbone_config", "hidden_size", "use_auxiliary_head")
    (tmp_path / "upernet.json").write_text(json.dumps({name: config[name] for name in kept}))
    save_file({k: v.contiguous() for k, v in trained.backbone.state_dict().items()}, tmp_path / "b.safetensors")
    student = load_student(str(tmp_path / "upernet.json"), LABELS, str(tmp_path / "b.safetensors"), bands=FIVE)
    torch.testing.assert_close(first_kernels(student)[:, :3], first_kernels(trained) * 3 / 5)


def test_a_checkpoint_of_five_bands_is_loaded_as_it_is(tmp_path, architecture):
    trained = load_student(architecture, LABELS, bands=FIVE)
    trained.save_pretrained(tmp_path / "five")
    for student in (
        load_student(str(tmp_path / "five"), bands=FIVE),
        load_student(str(tmp_path / "five")),
        load_student(str(tmp_path / "five"), num_channels=5),
        load_student(architecture, LABELS, str(tmp_path / "five"), bands=FIVE),
    ):
        assert bands_of(student.config) == list(FIVE)
        assert torch.equal(first_kernels(student), first_kernels(trained))


def test_an_architecture_file_that_names_its_channels_gets_them(tmp_path, architecture):
    # The first convolution of a file with num_channels stayed random when it started from weights of three bands.
    trained = tiny_model("segformer", seed=3)
    trained.save_pretrained(tmp_path / "checkpoint")
    values = json.loads(Path(architecture).read_text()) | {"num_channels": 4}
    Path(architecture).write_text(json.dumps(values))
    student = load_student(architecture, LABELS, str(tmp_path / "checkpoint"))
    torch.testing.assert_close(first_kernels(student)[:, :3], first_kernels(trained) * 3 / 4)


def test_kernels_follow_the_names_of_the_bands(tmp_path, architecture):
    trained = load_student(architecture, LABELS, bands=FIVE)
    trained.save_pretrained(tmp_path / "five")
    student = load_student(str(tmp_path / "five"), bands=IRRG)
    torch.testing.assert_close(first_kernels(student), first_kernels(trained)[:, [3, 0, 1]] * 5 / 3)
    swapped = load_student(str(tmp_path / "five"), bands=FIVE[::-1])
    assert torch.equal(first_kernels(swapped), first_kernels(trained).flip(1))
    unnamed = load_student(str(tmp_path / "five"), num_channels=3)
    torch.testing.assert_close(first_kernels(unnamed), first_kernels(trained)[:, :3] * 5 / 3)
    assert bands_of(unnamed.config) is None


def test_photographs_weights_read_infrared_red_green_in_the_place_of_red_green_blue(tmp_path):
    trained = tiny_model("segformer", seed=3)
    trained.save_pretrained(tmp_path)
    student = load_student(str(tmp_path), bands=IRRG)
    assert torch.equal(first_kernels(student), first_kernels(trained)) and student.config.bands == list(IRRG)


def test_wrong_numbers_of_bands_are_refused(tmp_path, architecture):
    with pytest.raises(UserError, match="num_channels=3 with 5 names"):
        load_student(architecture, LABELS, num_channels=3, bands=FIVE)
    with pytest.raises(UserError, match="num_channels=0"):
        load_student(architecture, LABELS, num_channels=0)


def test_statistics_are_measured_ones_for_bands_that_the_model_was_not_made_for(tmp_path, architecture):
    info = info_of(FIVE, band_mean=(0.1, 0.2, 0.3, 0.4, 0.5), band_std=(0.2, 0.2, 0.2, 0.3, 0.0))
    processor = load_image_processor(architecture, bands=FIVE, info=info)
    assert processor.image_mean == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert processor.image_std == [0.2, 0.2, 0.2, 0.3, 1.0]  # a band of one value is not divided by its 0
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert (list(again.image_mean), list(again.image_std)) == (processor.image_mean, processor.image_std)
    some = load_image_processor(architecture, bands=IRRG, info=info)
    assert (some.image_mean, some.image_std) == ([0.4, 0.1, 0.2], [0.3, 0.2, 0.2])
    given = load_image_processor(architecture, [0.5] * 5, bands=FIVE, info=info)
    assert (given.image_mean, given.image_std) == ([0.5] * 5, processor.image_std)


def test_a_pretrained_normalisation_is_kept_for_the_bands_it_was_made_for(tmp_path, architecture):
    info = info_of(FIVE, band_mean=(0.1, 0.2, 0.3, 0.4, 0.5), band_std=(0.2,) * 5)
    SegformerImageProcessor(image_mean=[0.7] * 3).save_pretrained(tmp_path)
    tiny_model("segformer").save_pretrained(tmp_path)
    assert list(load_image_processor(str(tmp_path), bands=FIVE[:3], info=info).image_mean) == [0.7] * 3
    assert load_image_processor(str(tmp_path), bands=IRRG, info=info).image_mean == [0.4, 0.1, 0.2]
    load_student(architecture, LABELS, bands=IRRG).save_pretrained(tmp_path)  # now made for infrared, red, green
    assert list(load_image_processor(str(tmp_path), bands=IRRG, info=info).image_mean) == [0.7] * 3
    assert load_image_processor(str(tmp_path), bands=FIVE[:3], info=info).image_mean == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"image_std": [0.5, 0.0, 0.5]}, r"image_std \[0.5, 0.0, 0.5\]: give numbers above 0"),
        ({"image_std": [0.5, 0.5, -1]}, "image_std .*: give numbers above 0"),
        ({"image_std": [0.5, 0.5, float("nan")]}, "image_std .*: give numbers above 0"),
        ({"image_mean": [float("inf"), 0, 0]}, "image_mean .*: give finite numbers"),
    ],
)
def test_normalisation_that_gives_no_numbers_is_refused(architecture, statistics, message):
    # A deviation of 0 ended in a traceback of torchvision, a mean that is no number in a loss that is none.
    with pytest.raises(UserError, match=message):
        load_image_processor(str(architecture), **statistics)


def test_bands_without_statistics_are_refused(tmp_path, architecture):
    with pytest.raises(UserError, match="no band_mean of the bands .*height is known: give image_mean"):
        load_image_processor(architecture, bands=FIVE, info=info_of(FIVE))
    with pytest.raises(UserError, match=r"image_mean \[0.5, 0.5, 0.5\]: give 5 values"):
        load_image_processor(architecture, [0.5] * 3, [0.5] * 5, bands=FIVE)
    MobileViTImageProcessor().save_pretrained(tmp_path)
    tiny_model("mobilevit").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reverses the order of three bands"):
        load_image_processor(str(tmp_path), bands=FIVE, info=info_of(FIVE))


def test_a_model_finds_its_channels_by_the_names_of_the_bands(architecture):
    model = load_student(architecture, LABELS, bands=IRRG)
    assert find_channels(model, FIVE, "m") == [3, 0, 1]
    assert find_channels(model, IRRG, "m") is None
    assert find_channels(model, FIVE, "m", "channels", chosen=[2, 1, 0]) == [2, 1, 0]
    with pytest.raises(
        UserError, match=r"m reads the bands near_infrared, red, green, and there is no near_infrared.*--channels"
    ):
        find_channels(model, FIVE[:3], "m", "channels")
    with pytest.raises(UserError, match="m reads 3 bands, --channels names 2"):
        find_channels(model, FIVE, "m", "channels", chosen=[0, 1])
    with pytest.raises(UserError, match=r"--channels \[0, 1, 5\]: the dataset has the channels 0 \(red\)"):
        find_channels(model, FIVE, "m", "channels", chosen=[0, 1, 5])


def test_a_model_without_names_reads_all_bands_or_red_green_blue():
    model = tiny_model("segformer")
    assert find_channels(model, IRRG, "m") is None
    assert find_channels(model, FIVE[::-1], "m") == [4, 3, 2]
    assert find_channels(model, FIVE, "m", default=[3, 0, 1]) is None  # what a teacher's student reads
    assert find_channels(model, FIVE, "m", default=[3, 0]) == [0, 1, 2]
    with pytest.raises(UserError, match="m reads 3 bands, of which it does not give the names"):
        find_channels(model, (*IRRG, "height"), "m")


def test_a_teacher_that_reads_more_than_its_student_names_all_its_channels(architecture):
    # None means to the trainer: the channels of the student.
    teacher = load_student(architecture, LABELS, bands=FIVE)
    assert find_channels(teacher, FIVE, "m", default=[0, 1, 2]) == [0, 1, 2, 3, 4]


def test_chosen_channels_have_the_names_of_the_dataset():
    assert select_bands(FIVE, None) == list(FIVE) and select_bands(FIVE, [3, 0]) == ["near_infrared", "red"]
    with pytest.raises(UserError, match=r"--student_channels \[-1\]"):
        select_bands(FIVE, [-1])
