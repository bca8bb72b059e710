"""Trainers: everything that touches `transformers.Trainer`."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.data.transforms import SegmentationCollator
from drd_hf.errors import UserError
from drd_hf.features import FeatureHooks, feature_widths
from drd_hf.losses import DistillationLoss, DualRelationLoss, PixelLogitLoss
from drd_hf.metrics import SegmentationMetrics
from drd_hf.models import default_feature_layer

PROJECTORS_NAME = "projectors.safetensors"


@dataclass
class SegmentationConfig(TrainingArguments):
    """`TrainingArguments` with the defaults that segmentation needs."""

    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Stays off: the transform needs the image column, which the model does not."}
    )
    batch_eval_metrics: bool = field(
        default=True, metadata={"help": "Stays on: metrics are reduced batch by batch, logits are never collected."}
    )

    dataloader_drop_last: bool = field(
        default=True,
        metadata={"help": "Leave out an incomplete last batch: batch norm of a pooled map fails on a single tile."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.label_smoothing_factor:
            raise UserError("label_smoothing_factor has no effect here, models compute their own loss: leave it at 0")
        if self.remove_unused_columns:
            raise UserError("remove_unused_columns=True would delete the image column: leave it off")
        if not self.batch_eval_metrics:
            raise UserError("batch_eval_metrics=False would keep every prediction in memory: leave it on")


@dataclass
class DistillationConfig(SegmentationConfig):
    """What is distilled, and how strongly, beside all the arguments of `transformers.TrainingArguments`."""

    spatial_relation_weight: float = field(
        default=3.0, metadata={"help": "Weight of the distance between spatial relation maps; 0 leaves it out."}
    )
    channel_relation_weight: float = field(
        default=3.0, metadata={"help": "Weight of the distance between channel relation maps; 0 leaves it out."}
    )
    logit_weight: float = field(
        default=0.0, metadata={"help": "Weight of pixel-wise logit distillation; needs equal labels; 0 leaves it out."}
    )
    relation: str = field(
        default="cosine",
        metadata={
            "help": "Relation maps: 'cosine' or 'attention'. Rows of attention maps add up to 1, so that their distances "
            "are smaller by orders of magnitude and want larger weights."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the attention relation, > 0."})
    logit_temperature: float = field(default=1.0, metadata={"help": "Temperature of logit distillation, > 0."})
    feature_layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers whose relations are compared, one or more STUDENT_LAYER=TEACHER_LAYER (a single name "
            "means the same layer in both). Default: the layer before the classifier of each model."
        },
    )
    resize_relations_to: int | None = field(
        default=None, metadata={"help": "Side of the grid on which relations are compared. Default: student's grid."}
    )
    distillation_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of all steps over which distillation weights grow from 0 to full."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("spatial_relation_weight", "channel_relation_weight", "logit_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")
        if self.resize_relations_to is not None and self.resize_relations_to < 1:
            raise UserError(f"resize_relations_to={self.resize_relations_to} must be at least 1")
        if not 0 <= self.distillation_warmup_ratio <= 1:
            raise UserError(f"distillation_warmup_ratio={self.distillation_warmup_ratio} must be between 0 and 1")


class SegmentationTrainer(Trainer):
    """`transformers.Trainer` for semantic segmentation: plain supervised training.

    What it adds: the loss of a batch is a mean over the batch and is divided by the accumulation steps exactly once;
    a batch without a labelled pixel has loss 0 instead of NaN; metrics come from class maps, batch by batch; a
    saved model is a plain `transformers` folder without any pickle.

    Args:
        model, args, train_dataset, eval_dataset, callbacks, ...: as in `transformers.Trainer`. Datasets give items
            with `image` (uint8, 3 x H x W) and `labels` (H x W, 255 is ignored), see `drd_hf.data.transforms`.
        processing_class: the model's image processor. It normalises the images and is saved with the model.
        data_collator: default `SegmentationCollator(processing_class)`.
        compute_metrics: default `SegmentationMetrics(model.config.id2label)`.
    """

    config_class = SegmentationConfig

    def __init__(
        self, model=None, args=None, *, processing_class=None, data_collator=None, compute_metrics=None, **kwargs
    ):
        if model is None:
            raise UserError("give the model to train")
        args = self._checked(args)
        if "compute_loss_func" in kwargs:
            raise UserError("compute_loss_func has no effect here: write a DistillationLoss and pass it as losses=")
        if data_collator is None:
            if processing_class is None:
                raise UserError("give processing_class (the model's image processor) or a data_collator")
            data_collator = self._default_collator(model, processing_class)
        if compute_metrics is None:
            compute_metrics = SegmentationMetrics(model.config.id2label)
        kwargs.setdefault("preprocess_logits_for_metrics", _class_maps)
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        if self.args.n_gpu > 1:
            raise UserError(
                f"{self.args.n_gpu} GPUs are visible to one process: start with `accelerate launch "
                f"--num_processes {self.args.n_gpu} ...`, or choose one with CUDA_VISIBLE_DEVICES"
            )
        length = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        if (
            length is not None
            and self.args.dataloader_drop_last
            and length < self.args.train_batch_size * self.args.world_size
        ):
            raise UserError(
                f"{length} training tiles do not fill one batch of {self.args.train_batch_size} on each of "
                f"{self.args.world_size} processes: give a smaller per_device_train_batch_size"
            )
        # forward() takes **kwargs, from which Trainer concludes that the model normalises its loss over all
        # accumulated batches. No segmentation model does; the loss would grow with accumulation steps and ranks.
        self.model_accepts_loss_kwargs = False
        self.label_names = ["labels"]

    def _checked(self, args):
        if args is None:
            return self.config_class(output_dir="trainer_output")
        if not isinstance(args, self.config_class):
            raise UserError(f"args must be a {self.config_class.__name__}, got {type(args).__name__}")
        return args

    def _default_collator(self, model, processing_class):
        return SegmentationCollator(processing_class, num_labels=model.config.num_labels)

    # Trainer's switch for incomplete batches holds for evaluation too, where it would leave tiles out of the scores.

    def get_eval_dataloader(self, eval_dataset=None):
        with self._every_batch():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._every_batch():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _every_batch(self):
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def train(self, *args, **kwargs):
        if self.args.world_size > 1:  # else all ranks would draw the same crops and flips
            torch.manual_seed(self.args.seed + self.args.process_index)
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, loss = _supervised(model, inputs["pixel_values"], inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def compute_loss_context_manager(self):
        # Evaluation runs the bare model, teachers are never prepared: autocast is entered here for all of them.
        stack = contextlib.ExitStack()
        stack.enter_context(self.accelerator.autocast())
        return stack

    def _load_weights(self, checkpoint: str) -> None:
        # Trainer feeds the keys of the file to load_state_dict and goes on with a warning where they do not fit.
        # from_pretrained knows that files keep older names than modules (SegFormer since transformers 5.23).
        try:
            saved, report = type(self.model).from_pretrained(
                checkpoint, config=self.model.config, use_safetensors=True, output_loading_info=True
            )
            lacking = [*report["missing_keys"], *report["mismatched_keys"]]
            if lacking:
                raise ValueError(f"{len(lacking)} tensors are missing, the first is {lacking[0]}")
            self.model.load_state_dict(saved.state_dict())
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{checkpoint}: this checkpoint does not fit the model ({reason})") from error

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._load_weights(resume_from_checkpoint)

    def _load_best_model(self):
        self._load_weights(self.state.best_model_checkpoint)

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        self.model.save_pretrained(output_dir, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)


class DistillationTrainer(SegmentationTrainer):
    """Trains a student under a frozen teacher.

    The total loss of a batch is ``task loss + s * sum(weight * term)`` over the terms of all losses, s growing from 0 to
    1 over the warm-up. Every term is logged raw (``spatial_relation``) and weighted (``spatial_relation_weighted``),
    the task loss as ``task_loss``.

    Args:
        model: the student, any `AutoModelForSemanticSegmentation`.
        teacher_model: the teacher; it is put in eval mode, frozen and never saved.
        losses: `DistillationLoss` objects; None builds them from `args`: `DualRelationLoss` with the configured
            weights, and `PixelLogitLoss` where `logit_weight` is not 0.
        teacher_processor: the teacher's image processor, if it normalises images differently from the student's.

    Raises:
        UserError: a feature layer does not exist, or a loss compares class scores of models with different labels.
    """

    config_class = DistillationConfig

    def __init__(
        self,
        model: PreTrainedModel = None,
        teacher_model: PreTrainedModel = None,
        args: DistillationConfig = None,
        *,
        losses: list[DistillationLoss] | DistillationLoss | None = None,
        teacher_processor=None,
        **kwargs,
    ):
        if model is None or teacher_model is None:
            raise UserError("DistillationTrainer needs both a student (model) and a teacher (teacher_model)")
        if model is teacher_model:
            raise UserError("student and teacher are the same object: load the teacher a second time")
        if teacher_processor is not None and kwargs.get("data_collator") is not None:
            raise UserError(
                "teacher_processor has no effect beside a data_collator: let that give teacher_pixel_values"
            )
        args = self._checked(args)
        self.teacher_processor = teacher_processor
        if losses is None:
            losses = losses_from_config(args, model, teacher_model)
        losses = [losses] if isinstance(losses, DistillationLoss) else list(losses)
        _check_losses(losses, model, teacher_model)
        super().__init__(model, args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError("DistillationTrainer runs on one device or with DDP; FSDP and DeepSpeed are not supported")

        self.teacher_model = teacher_model.eval().requires_grad_(False).to(self.args.device)
        student_layers = [layer for loss in losses for layer in loss.student_layers]
        teacher_layers = [layer for loss in losses for layer in loss.teacher_layers]
        student_widths = feature_widths(model, student_layers) if student_layers else {}
        teacher_widths = feature_widths(self.teacher_model, teacher_layers) if teacher_layers else {}
        # A fork of the random state: the student sees the same batches and dropout with and without projectors.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed)
            for loss in losses:
                loss.prepare(student_widths, teacher_widths)
        self._teacher_hooks = FeatureHooks(self.teacher_model, teacher_layers)
        self._step = _DistillationStep(model, losses, FeatureHooks(model, student_layers)).to(self.args.device)
        self._term_sums: dict[str, torch.Tensor] = {}
        self._term_batches = 0

    @property
    def losses(self) -> list[DistillationLoss]:
        return list(self._step.losses)

    def _default_collator(self, model, processing_class):
        return SegmentationCollator(processing_class, self.teacher_processor, num_labels=model.config.num_labels)

    # Student and projectors are prepared as one module, so that every trainable tensor is synchronised between
    # ranks and reaches the optimizer; `self.model` stays the plain student, which is what gets evaluated and saved.

    def create_optimizer(self, *args, **kwargs):
        student, self.model = self.model, self._step
        try:
            return super().create_optimizer()
        finally:
            self.model = student

    def _wrap_model(self, model, training=True, dataloader=None):
        if not training:
            return model
        if self.accelerator.unwrap_model(model, keep_torch_compile=False) is self._step:
            return model
        return self.accelerator.prepare_model(super()._wrap_model(self._step))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.accelerator.unwrap_model(model, keep_torch_compile=False) is not self._step:
            loss_and_outputs = super().compute_loss(model, inputs, return_outputs)
            self._step.hooks.clear()
            return loss_and_outputs
        with torch.no_grad():
            pixel_values = inputs.get("teacher_pixel_values", inputs["pixel_values"])
            teacher_logits = self.teacher_model(pixel_values=pixel_values).logits
        terms = model(inputs["pixel_values"], inputs["labels"], self._teacher_hooks.pop(), teacher_logits)
        scale = self._distillation_scale()
        weights = {name: weight for loss in self._step.losses for name, weight in loss.weights.items()}
        total = terms["task_loss"]
        self._add_up("task_loss", total)
        for name, weight in weights.items():
            weighted = scale * weight * terms[name]
            self._add_up(name, terms[name])
            self._add_up(f"{name}_weighted", weighted)
            total = total + weighted
        self._term_batches += 1
        return total

    def _distillation_scale(self) -> float:
        warmup = self.args.distillation_warmup_ratio * self.state.max_steps
        return min(1.0, (self.state.global_step + 1) / warmup) if warmup > 0 else 1.0

    def _add_up(self, name: str, value: torch.Tensor) -> None:
        self._term_sums[name] = self._term_sums.get(name, 0) + value.detach()

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self._term_batches:
            # One reduction per logging step, of sums kept on the device.
            sums = torch.stack([value.float() for value in self._term_sums.values()]) / self._term_batches
            means = self.accelerator.reduce(sums, reduction="mean").tolist()
            logs.update({name: float(f"{mean:.6g}") for name, mean in zip(self._term_sums, means, strict=True)})
            self._term_sums, self._term_batches = {}, 0
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        projectors = self._step.losses.state_dict()
        # Into checkpoints only: a push to the Hub is an internal call too, without a folder.
        if _internal_call and output_dir is not None and projectors and self.args.should_save:
            save_file({name: t.contiguous() for name, t in projectors.items()}, Path(output_dir) / PROJECTORS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path, wanted = Path(resume_from_checkpoint) / PROJECTORS_NAME, self._step.losses.state_dict()
        if not path.is_file():
            if wanted:
                raise UserError(f"{path} is missing, the checkpoint cannot be resumed: choose another checkpoint")
            return
        try:
            self._step.losses.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise UserError(f"{path} does not fit the configured losses: resume with the same options") from error


class _DistillationStep(nn.Module):
    """Student and losses (with their projectors) as one trainable module; its forward gives the raw loss terms."""

    def __init__(self, student: PreTrainedModel, losses: list[DistillationLoss], hooks: FeatureHooks):
        super().__init__()
        self.student = student
        self.losses = nn.ModuleList(losses)
        self.hooks = hooks

    def forward(self, pixel_values, labels, teacher_features, teacher_logits) -> dict[str, torch.Tensor]:
        outputs, task_loss = _supervised(self.student, pixel_values, labels)
        student_features = self.hooks.pop()
        if torch.is_grad_enabled() and not all(f.requires_grad for f in student_features.values()):
            raise UserError(
                "a student feature layer carries no gradient: set use_reentrant to false in "
                "gradient_checkpointing_kwargs, or choose a layer outside the checkpointed blocks"
            )
        terms = {"task_loss": task_loss}
        for loss in self.losses:
            terms.update(loss(student_features, teacher_features, outputs.logits, teacher_logits, labels))
        return terms


def losses_from_config(
    args: DistillationConfig, student: PreTrainedModel, teacher: PreTrainedModel
) -> list[DistillationLoss]:
    """The losses that a `DistillationConfig` asks for."""
    losses: list[DistillationLoss] = []
    if args.spatial_relation_weight or args.channel_relation_weight:
        if args.feature_layers:
            pairs = [_layer_pair(text) for text in args.feature_layers]
        else:
            pairs = [(default_feature_layer(student), default_feature_layer(teacher))]
        losses.append(
            DualRelationLoss(
                pairs,
                spatial_weight=args.spatial_relation_weight,
                channel_weight=args.channel_relation_weight,
                relation=args.relation,
                temperature=args.temperature,
                resize_relations_to=args.resize_relations_to,
            )
        )
    if args.logit_weight:
        losses.append(PixelLogitLoss(args.logit_weight, args.logit_temperature))
    return losses


def _layer_pair(text: str) -> tuple[str, str]:
    student, _, teacher = text.partition("=")
    return student.strip(), (teacher or student).strip()


def _check_losses(losses, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    if not losses:
        raise UserError(
            "nothing to distil: give a relation or logit weight above 0 (train a student alone with train_teacher.py)"
        )
    names = [name for loss in losses for name in loss.weights]
    reserved = [name for name in names if name in ("loss", "task_loss") or name.endswith("_weighted")]
    if reserved:
        raise UserError(f"a loss term must not be called {reserved[0]!r}, the log has that name already")
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise UserError(f"two losses have a term named {sorted(doubled)[0]!r}: terms need different names")
    if any(loss.needs_logits for loss in losses):
        ours, theirs = ({int(i): n for i, n in m.config.id2label.items()} for m in (student, teacher))
        if ours != theirs:
            raise UserError(
                "logit distillation compares class scores and needs equal labels, but the student has "
                f"{list(ours.values())} and the teacher {list(theirs.values())}: use relation weights only"
            )


def _supervised(model, pixel_values, labels):
    """(outputs, loss); a batch without any labelled pixel gives loss 0 with zero gradients, not NaN."""
    any_label = (labels != IGNORE_INDEX).any()
    outputs = model(pixel_values=pixel_values, labels=torch.where(any_label, labels, torch.zeros_like(labels)))
    return outputs, outputs.loss * any_label


def _class_maps(logits, labels) -> torch.Tensor:
    """(B, K, h, w) logits -> (B, H, W) class ids at the size of the labels, so that only ids leave the device."""
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return logits.argmax(dim=1)
