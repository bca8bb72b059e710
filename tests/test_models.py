import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoBackbone,
    AutoModelForSemanticSegmentation,
    BertConfig,
    BertModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    HGNetV2Config,
    SegformerForImageClassification,
    SegformerImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from drd_hf.errors import UserError
from drd_hf.features import FeatureHooks, feature_widths
from drd_hf.models import default_feature_layer, load_image_processor, load_student, load_teacher

from .conftest import ENCODERS, LABELS, VIT, tiny_config, tiny_encoder, tiny_model, tiny_universal


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
    with pytest.raises(UserError, match="three values"):
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
