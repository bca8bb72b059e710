"""Accumulation, ranks, precision, and the company that a trainer keeps: callbacks, searches, loggers, compilers."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModelForSemanticSegmentation,
    ConvNextConfig,
    ConvNextModel,
    EarlyStoppingCallback,
    SegformerImageProcessor,
    TrainerCallback,
)
from transformers.trainer_utils import HPSearchBackend

from drd_hf.data.transforms import SegmentationCollator
from drd_hf.errors import UserError
from drd_hf.losses import DistillationLoss, PixelLogitLoss
from drd_hf.trainer import DistillationTrainer, LossRecord, SegmentationConfig, SegmentationTrainer

from .conftest import RandomTiles, tiny_config, tiny_model
from .test_trainer import config, distiller, train_logs

PROCESSOR = SegformerImageProcessor(do_resize=False)


def without_batch_dependence(model):
    """Batch norm and dropout make the gradient of a batch another than the mean of those of its parts."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, torch.nn.GroupNorm(1, module.num_features))
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


def tiny_student(kind):
    settings = tiny_config(kind.partition("-")[0])
    if kind == "upernet-auxiliary":
        settings.use_auxiliary_head, settings.auxiliary_in_channels, settings.auxiliary_channels = True, 16, 8
    torch.manual_seed(1)
    return without_batch_dependence(AutoModelForSemanticSegmentation.from_config(settings))


def partly_labelled_tiles():
    """From no labelled pixel at all to all of them."""
    data = RandomTiles()
    for index, rows in enumerate((64, 48, 40, 32, 24, 16, 8, 0)):
        data.labels[index, :rows] = 255
    return data


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            module = getattr(self.trainer, "_step", self.trainer.model)
            self.gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


class DoubleCollator(SegmentationCollator):
    """In double precision, sums of different order agree far below the differences that are looked for."""

    def __call__(self, items):
        return {k: v.double() if v.is_floating_point() else v for k, v in super().__call__(items).items()}


def double_trainer(tmp_path, student, **changes):
    trainer = DistillationTrainer(
        tiny_student(student),
        tiny_model("upernet", width=2, seed=2),
        config(tmp_path, max_grad_norm=0.0, logit_weight=1.0, **changes),
        train_dataset=partly_labelled_tiles(),
        processing_class=PROCESSOR,
        data_collator=DoubleCollator(PROCESSOR, num_labels=3),
        callbacks=[keep := KeepGradients()],
    )
    trainer._step.double()
    keep.trainer = trainer
    return trainer, keep


def first_step(tmp_path, student, batch, steps):
    """Gradients of student and projectors before the first optimizer step, and what is logged of it."""
    trainer, keep = double_trainer(
        tmp_path, student, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1
    )
    trainer.train()
    return keep.gradients, train_logs(trainer)[0]


def assert_same_gradients(left, right, relative=1e-5):
    assert left.keys() == right.keys()
    left, right = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (left, right))
    assert (left - right).norm() <= relative * right.norm(), (left - right).norm() / right.norm()


@pytest.mark.parametrize("student", ["segformer", "upernet-auxiliary"])
def test_batches_of_one_two_and_eight_accumulate_to_the_same_step(tmp_path, student):
    # A mean over batches of their mean losses weighs a pixel of a badly labelled tile more than others.
    expected, logged = first_step(tmp_path, student, batch=8, steps=1)
    assert any("projectors" in name for name in expected)
    for batch, steps in ((1, 8), (4, 2)):
        gradients, entry = first_step(tmp_path, student, batch, steps)
        assert_same_gradients(gradients, expected)
        for name in ("loss", "task_loss", "spatial_relation", "channel_relation", "logit", "logit_weighted"):
            assert entry[name] == pytest.approx(logged[name], rel=1e-5), name


def test_loss_of_a_step_is_the_mean_over_its_labelled_pixels(tmp_path):
    student, data = tiny_student("segformer"), partly_labelled_tiles()
    args = {k: v for k, v in config(tmp_path).to_dict().items() if k in ("output_dir", "logging_steps", "use_cpu")}
    args |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1, "max_grad_norm": 0.0}
    args |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    trainer = SegmentationTrainer(
        student,
        SegmentationConfig(**args),
        train_dataset=data,
        processing_class=PROCESSOR,
        callbacks=[keep := KeepGradients()],
    )
    keep.trainer = trainer
    reference = tiny_student("segformer").train()
    pixels = PROCESSOR(list(data.images), return_tensors="pt")["pixel_values"]
    logits = F.interpolate(reference(pixel_values=pixels).logits, (64, 64), mode="bilinear", align_corners=False)
    every_pixel = F.cross_entropy(logits, data.labels.long(), ignore_index=255, reduction="sum")
    loss = every_pixel / (data.labels != 255).sum()
    loss.backward()
    trainer.train()
    assert train_logs(trainer)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(keep.gradients, {n: p.grad for n, p in reference.named_parameters() if p.grad is not None})


def test_an_incomplete_accumulation_counts_as_one_step_in_the_logged_means(tmp_path):
    # Five batches are steps of two, two and one; means over batches did not add up to the loss, which is one over steps.
    trainer = distiller(
        tmp_path, data=RandomTiles(10), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3,
        logging_steps=3, learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    (entry,) = train_logs(trainer)
    parts = ("task_loss", "spatial_relation_weighted", "channel_relation_weighted")
    assert entry["loss"] == pytest.approx(sum(entry[name] for name in parts), rel=1e-5)


RANKS = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.test_trainer_scaling import double_trainer
trainer, keep = double_trainer(
    Path(sys.argv[1]), "segformer", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=20,
    learning_rate=1e-2, distillation_stop_ratio=0.5, ddp_find_unused_parameters=False,
)
trainer.train()
torch.save({"gradients": keep.gradients, "weights": dict(trainer._step.named_parameters()),
            "loss": trainer.state.log_history[0]["loss"], "steps": trainer.state.global_step,
            "terms": sum("spatial_relation" in e for e in trainer.state.log_history), "ranks": trainer.args.world_size},
           f"{sys.argv[1]}/rank{trainer.args.process_index}.pt")
"""


def test_two_ranks_train_like_one_process_on_the_joined_batch(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--rdzv_backend", "c10d", "--main_process_port", "0"]  # any free port
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([*launch, str(script), str(tmp_path), root], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first["ranks"] == 2 and first["steps"] == 20
    assert first["terms"] == 10, "distillation ends after half of the steps"
    expected, logged = first_step(tmp_path, "segformer", batch=8, steps=1)
    assert any("projectors" in name for name in expected)
    assert_same_gradients(first["gradients"], expected)
    assert first["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name


def test_processes_that_would_train_alone_are_refused(tmp_path, monkeypatch):
    # Two processes without a GPU and without use_cpu each trained a model of their own, into the same folder.
    args = config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="each would train alone.*--use_cpu true"):
        SegmentationTrainer(tiny_model("segformer"), args, processing_class=PROCESSOR)


def test_half_precision_without_a_gpu_is_refused(tmp_path):
    # accelerate leaves autocast and scaler out on the CPU, so that fp16 trained in full precision and said nothing.
    with pytest.raises(UserError, match="fp16 has no effect on the CPU"):
        config(tmp_path, fp16=True)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")
def test_bf16_needs_no_word_about_the_cpu_where_there_is_nothing_else(tmp_path):
    arguments = SegmentationConfig(output_dir=tmp_path, bf16=True, report_to="none")  # TrainingArguments alone refuses
    assert arguments.use_cpu and arguments.device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_tf32_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tf32 requires"):
        config(tmp_path, tf32=True)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("precision", [{"fp16": True}, {"tf32": True}, {"bf16": True}], ids=lambda p: next(iter(p)))
def test_gpu_precisions_train(tmp_path, precision):
    trainer = distiller(tmp_path, use_cpu=False, max_steps=4, logit_weight=1.0, **precision)
    trainer.train()
    assert len(train_logs(trainer)) == 4
    assert all(p.isfinite().all() for p in trainer._step.parameters())
    assert trainer.evaluate()["eval_loss"] > 0


@needs_gpu
def test_steps_that_are_not_logged_do_not_wait_for_the_gpu(tmp_path):
    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if state.global_step == 2 else "default")

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("default")

    trainer = distiller(
        tmp_path, use_cpu=False, max_steps=4, logging_steps=4, data=RandomTiles(32), dataloader_pin_memory=True
    )
    trainer.add_callback(Watch())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_student_is_distilled_like_a_plain_one(tmp_path):
    logs = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = distiller(tmp_path, max_steps=2, **changes)
        trainer.train()
        logs.append(train_logs(trainer))
    compiled = trainer.model_wrapped
    assert compiled is not trainer._step and compiled._orig_mod is trainer._step
    for plain, entry in zip(*logs, strict=True):
        for name in ("task_loss", "spatial_relation", "channel_relation"):
            assert entry[name] == pytest.approx(plain[name], rel=1e-4) and entry[name] > 0
    assert 0 <= trainer.evaluate()["eval_mean_iou"] <= 1
    trainer.save_model(str(tmp_path / "model"))
    assert AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "model").config.num_labels == 3


def test_a_compiled_teacher_is_left_as_it_is(tmp_path):
    plain = distiller(tmp_path, max_steps=1)
    plain.train()
    teacher = torch.compile(tiny_model("upernet", width=2, seed=2), backend="eager")
    trainer = distiller(tmp_path, teacher=teacher, max_steps=1)
    trainer.train()
    assert trainer.teacher_model is teacher
    for name in ("spatial_relation", "channel_relation"):
        assert train_logs(trainer)[0][name] == pytest.approx(train_logs(plain)[0][name], rel=1e-4)
    with pytest.raises(UserError, match="teacher_dtype=bfloat16 has no effect"):
        distiller(tmp_path, teacher=teacher, teacher_dtype="bfloat16")


def test_a_quantised_teacher_is_neither_moved_nor_cast(tmp_path):
    # bitsandbytes models refuse .to().
    teacher = tiny_model("upernet", width=2, seed=2).to(torch.bfloat16)
    teacher.is_loaded_in_8bit = True

    def refuse(*args, **kwargs):
        raise ValueError("`.to` is not supported for 8-bit models")

    teacher.to = refuse
    trainer = distiller(tmp_path, teacher=teacher, max_steps=1)
    trainer.train()
    assert trainer.teacher_model is teacher and train_logs(trainer)[0]["spatial_relation"] > 0
    assert all(p.dtype == torch.bfloat16 for p in teacher.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_teacher_is_cast_once_and_its_features_are_compared_in_full_precision(tmp_path, dtype):
    full = distiller(tmp_path, max_steps=1, learning_rate=0.0, logit_weight=1.0)
    full.train()
    teacher, calls = tiny_model("upernet", width=2, seed=2), []
    move = teacher.to
    teacher.to = lambda *args: calls.append(args) or move(*args)
    trainer = distiller(
        tmp_path, teacher=teacher, max_steps=1, learning_rate=0.0, logit_weight=1.0, teacher_dtype=dtype
    )
    trainer.train()
    assert len(calls) == 1 and {p.dtype for p in teacher.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in trainer._step.parameters()} == {torch.float32}
    for name in ("spatial_relation", "channel_relation", "logit"):
        assert train_logs(trainer)[0][name] == pytest.approx(train_logs(full)[0][name], rel=0.05)
    with pytest.raises(UserError, match="teacher_dtype='int4' is not known, choose float32"):
        config(tmp_path, teacher_dtype="int4")


def test_teacher_is_frozen_unchanged_and_in_no_file(tmp_path):
    teacher = tiny_model("upernet", width=2, seed=2).train()  # batch norm in training mode would follow the images
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert any(name.endswith("running_mean") for name in before)
    trainer = distiller(
        tmp_path, teacher=teacher, max_steps=2, save_strategy="steps", save_steps=2, eval_strategy="steps"
    )
    trainer.train()
    for name, value in trainer.teacher_model.state_dict().items():
        assert value.numpy().tobytes() == before[name].numpy().tobytes(), name
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer._step.parameters()}
    assert not trained & {id(p) for p in teacher.parameters()}
    checkpoint = tmp_path / "run" / "checkpoint-2"
    tensors = sum(len(load_file(path)) for path in checkpoint.glob("*.safetensors"))
    assert tensors == len(trainer.model.state_dict()) + len(list(trainer.losses[0].parameters()))
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert len(state) <= len(trained)


def test_after_the_stop_labels_alone_train_and_the_teacher_rests(tmp_path):
    trainer = distiller(
        tmp_path, max_steps=8, logging_steps=4, learning_rate=0.0, distillation_warmup_ratio=0.125,
        distillation_stop_ratio=0.75,
    )  # fmt: skip
    calls = []
    trainer.teacher_model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 6
    first, second = train_logs(trainer)
    for entry in (first, second):
        parts = ("task_loss", "spatial_relation_weighted", "channel_relation_weighted")
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in parts), rel=1e-5)
    assert first["spatial_relation_weighted"] == pytest.approx(3 * first["spatial_relation"], rel=1e-5)
    # Two of the last four steps were distilled: raw terms are means over these two, weighted ones over all four.
    assert second["spatial_relation_weighted"] == pytest.approx(3 * second["spatial_relation"] / 2, rel=1e-5)


@pytest.mark.parametrize(("stop", "warmup"), [(0.0, 0.0), (1.5, 0.0), (0.3, 0.3)])
def test_a_stop_before_the_warm_up_ends_is_refused(tmp_path, stop, warmup):
    with pytest.raises(UserError, match="must be above distillation_warmup_ratio"):
        config(tmp_path, distillation_stop_ratio=stop, distillation_warmup_ratio=warmup)


def test_layer_pairs_have_weights_of_their_own(tmp_path):
    pairs = ("decode_head.linear_fuse=decode_head.fpn_bottleneck", "decode_head.classifier")
    values = []
    for layers in ([pairs[0]], [pairs[1]], [f"{pairs[0]}:3", f"{pairs[1]}:0.5"]):
        trainer = distiller(tmp_path, feature_layers=layers, max_steps=1, learning_rate=0.0)
        trainer.train()
        values.append(train_logs(trainer)[0]["spatial_relation"])
    assert values[2] == pytest.approx((3 * values[0] + 0.5 * values[1]) / 3.5, rel=1e-4)
    with pytest.raises(UserError, match="'much' is no number"):
        distiller(tmp_path, feature_layers=[f"{pairs[0]}:much"])


def test_an_encoder_without_class_scores_teaches_by_its_features(tmp_path):
    torch.manual_seed(0)
    teacher = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1]))
    layer = "decode_head.linear_fuse=encoder.stages.3"
    trainer = distiller(tmp_path, teacher=teacher, feature_layers=[layer], max_steps=1)
    trainer.train()
    assert train_logs(trainer)[0]["channel_relation"] > 0
    with pytest.raises(UserError, match="compares class scores, and the teacher has none"):
        distiller(tmp_path, teacher=teacher, losses=PixelLogitLoss())


class Marked(DistillationLoss):
    """Infinite on batches with the label 2 in the first pixel."""

    def __init__(self):
        super().__init__()
        self.weights = {"marked": 1.0}

    def forward(self, student_features, teacher_features, student_logits=None, teacher_logits=None, labels=None):
        return {"marked": student_logits.mean() * torch.where((labels[:, 0, 0] == 2).any(), math.inf, 1.0)}


class NamedTiles(RandomTiles):
    """Only tile 5 has the mark."""

    def __init__(self):
        super().__init__()
        self.labels[:, 0, 0] = 0
        self.labels[5, 0, 0] = 2

    def __getitem__(self, index):
        return super().__getitem__(index) | {"source": f"area{index}", "row": 64 * index, "column": 0}


def first_marked_step(trainer):
    """The place of tile 5 in the order of the first epoch, batches being single tiles."""
    order = [batch["sources"][0] for batch in trainer.get_train_dataloader()]
    return order.index("area5 (row 320, column 0)") + 1


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_term_and_tile(tmp_path):
    trainer = distiller(
        tmp_path, data=NamedTiles(), losses=Marked(), per_device_train_batch_size=1, max_steps=8, save_strategy="steps",
        save_steps=1, save_total_limit=1, logging_steps=8,
    )  # fmt: skip
    step = first_marked_step(trainer)
    with pytest.raises(UserError, match=rf"step {step}: .*marked is -?inf\) on tiles area5 \(row 320, column 0\);"):
        trainer.train()
    checkpoints = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints == ([f"checkpoint-{step - 1}"] if step > 1 else [])
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        model = AutoModelForSemanticSegmentation.from_pretrained(folder)
        assert all(p.isfinite().all() for p in model.parameters())


def test_supervised_training_stops_at_a_loss_that_is_not_finite(tmp_path):
    model = tiny_model("segformer")
    model.decode_head.classifier.bias.data[0] = math.nan
    trainer = SegmentationTrainer(model, config(tmp_path), train_dataset=NamedTiles(), processing_class=PROCESSOR)
    with pytest.raises(UserError, match="step 1: the loss is not finite .task_loss is nan. on tiles area"):
        trainer.train()


def test_the_first_bad_batch_is_found_when_values_are_read_later():
    """On a GPU values are read when they are logged, so several batches after the bad one."""
    record = LossRecord()
    waiting = record.read
    record.read = lambda: None
    weights = {"relation": 2.0}
    for step, value in enumerate((1.0, 3.0, math.nan, math.inf), start=1):
        terms = {"task_loss": torch.tensor(1.0), "relation": torch.tensor(value)}
        record.add(terms, weights, 1.0, step, [f"tile {step}", "other"])
        if step == 2:
            waiting()
            assert record.pop_means() == {"task_loss": 1.0, "relation": 2.0, "relation_weighted": 4.0}
    with pytest.raises(UserError, match=r"step 3: the loss is not finite \(relation is nan\) on tiles tile 3, other;"):
        waiting()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    # The loss of a step can be finite and its gradient not; the next loss tells, but a checkpoint may come before.
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                next(model.parameters()).grad.fill_(math.inf)

    trainer = distiller(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1, max_grad_norm=0.0
    )
    trainer.add_callback(Poison())
    with pytest.raises(UserError, match="weights are not finite after step 3, no checkpoint"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_filter_that_hides_bad_losses_is_refused(tmp_path):
    # It waits for the device at every step, too.
    assert not config(tmp_path).logging_nan_inf_filter
    with pytest.raises(UserError, match="logging_nan_inf_filter=True would hide"):
        config(tmp_path, logging_nan_inf_filter=True)


class SomeUnlabelled(RandomTiles):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item if index % 2 else {"image": item["image"]}


def test_tiles_without_labels_are_distilled_beside_labelled_ones(tmp_path):
    data = RandomTiles()
    data.labels[::2] = 255
    logs = []
    for tiles in (SomeUnlabelled(), data):
        trainer = distiller(tmp_path, data=tiles, max_steps=2)
        trainer.train()
        logs.append([(e["task_loss"], e["spatial_relation"]) for e in train_logs(trainer)])
    assert logs[0] == logs[1] and all(task > 0 and relation > 0 for task, relation in logs[0])


class FourChannels(RandomTiles):
    def __init__(self):
        super().__init__()
        self.images = torch.cat((self.images, 255 - self.images[:, :1]), dim=1)


def test_teacher_and_student_read_different_channels_of_a_tile(tmp_path):
    settings = tiny_config("upernet", width=2)
    settings.backbone_config.num_channels = 4
    torch.manual_seed(0)
    teacher = AutoModelForSemanticSegmentation.from_config(settings)
    seen = []
    teacher.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["pixel_values"]), with_kwargs=True)
    data = FourChannels()
    trainer = DistillationTrainer(
        tiny_model("segformer"),
        teacher,
        config(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=8,
            student_channels=[0, 1, 2],
            teacher_channels=[0, 1, 2, 3],
        ),  # fmt: skip
        train_dataset=data,
        processing_class=PROCESSOR,
        teacher_processor=SegformerImageProcessor(do_resize=False, image_mean=[0.5] * 4, image_std=[0.5] * 4),
    )
    trainer.train()
    expected = data.images.float() / 255 * 2 - 1
    assert seen[-1].shape == (8, 4, 64, 64)
    assert torch.allclose(seen[-1].sort(dim=0).values, expected.sort(dim=0).values, atol=1e-5)
    assert train_logs(trainer)[0]["spatial_relation"] > 0


def test_old_checkpoints_make_room_for_new_ones(tmp_path):
    trainer = distiller(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_early_stopping_ends_a_run_that_does_not_improve(tmp_path):
    trainer = distiller(
        tmp_path, max_steps=20, learning_rate=0.0, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_mean_iou", student="upernet",
    )  # fmt: skip
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 3


def made_from(tmp_path, **changes):
    return DistillationTrainer(
        model_init=lambda: tiny_student("segformer"),
        teacher_model=tiny_model("upernet", width=2, seed=2),
        args=config(tmp_path, **changes),
        train_dataset=RandomTiles(),
        processing_class=PROCESSOR,
    )


def test_a_student_made_anew_trains_with_projectors_made_anew(tmp_path):
    trainer = made_from(tmp_path)
    weights = []
    for _ in range(2):
        trainer.train()
        assert trainer._step.student is trainer.model
        weights.append({name: value.clone() for name, value in trainer._step.named_parameters()})
    assert any("projectors" in name for name in weights[0])
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    with pytest.raises(UserError, match="give model or model_init, not both"):
        SegmentationTrainer(
            tiny_model("segformer"), config(tmp_path), model_init=tiny_model, processing_class=PROCESSOR
        )


@pytest.mark.parametrize(("method", "terms"), [(["drd"], "relation"), (None, "alignment")])
def test_a_search_trial_sets_the_weights_of_the_losses(tmp_path, method, terms):
    # The steps of a search without its backend: a trial's values go into the arguments of a new training.
    trainer = made_from(tmp_path, max_steps=1, method=method)
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    trial = SimpleNamespace(params={"spatial_relation_weight": 7.0, "channel_relation_weight": 0.0}, number=0)
    trainer._hp_search_setup(trial)
    trainer.train()
    entry = train_logs(trainer)[0]
    assert entry[f"spatial_{terms}_weighted"] == pytest.approx(7 * entry[f"spatial_{terms}"], rel=1e-5)
    assert f"channel_{terms}" not in entry


def test_hyperparameter_search_with_optuna(tmp_path):
    pytest.importorskip("optuna")
    trainer = made_from(tmp_path, max_steps=1)
    trainer.eval_dataset = RandomTiles(4)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"spatial_relation_weight": trial.suggest_float("spatial_relation_weight", 1.0, 5.0)},
        compute_objective=lambda metrics: metrics["eval_mean_iou"],
        n_trials=2,
        direction="maximize",
        backend="optuna",
    )
    assert 1.0 <= best.hyperparameters["spatial_relation_weight"] <= 5.0


def test_terms_are_reported_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distiller(tmp_path, report_to="tensorboard").train()
    (file,) = (tmp_path / "run").rglob("events.*")
    events = EventAccumulator(str(file)).Reload()
    assert {"train/task_loss", "train/spatial_relation"} <= set(events.Tags()["scalars"])


def test_terms_are_reported_to_trackio(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    logged = []
    log = trackio.log
    monkeypatch.setattr(trackio, "log", lambda values, **kwargs: logged.append(values) or log(values, **kwargs))
    distiller(tmp_path, report_to="trackio", trackio_space_id=None).train()  # a local one
    assert any("train/spatial_relation" in values for values in logged)
