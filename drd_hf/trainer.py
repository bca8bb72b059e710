"""Trainers: everything that touches `transformers.Trainer`."""

import contextlib
import copy
import json
import logging
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy, TrainOutput, number_of_arguments
from transformers.training_args import ParallelMode

from drd_hf.cards import RUN_NAME
from drd_hf.checkpoints import (
    SeededDraws,
    SeededSampler,
    checkpoint_problem,
    checkpoint_to_resume,
    publish,
    remove_leftovers,
    remove_newer,
    rotate,
    staging_folder,
)
from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.data.streaming import StreamedTiles
from drd_hf.data.transforms import SegmentationCollator
from drd_hf.errors import UserError
from drd_hf.features import FeatureHooks, feature_widths
from drd_hf.hub import check_model_push, push_model
from drd_hf.losses import DistillationLoss
from drd_hf.losses.methods import (
    DEFAULT_METHODS,
    DEFAULT_OF_FEATURES,
    METHODS,
    OF_RELATION_WEIGHTS,
    losses_from_config,
    methods_of,
    parse_methods,
    unlike_scores,
)
from drd_hf.metrics import SegmentationMetrics
from drd_hf.models import bands_of

logger = logging.getLogger(__name__)

PROJECTORS_NAME = "projectors.safetensors"
SETTINGS_NAME = "run_settings.json"
NO_SHARDING = "DistillationTrainer runs on one device or with DDP; FSDP and DeepSpeed are not supported"
TEACHER_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(repr=False)  # that of TrainingArguments hides the token
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
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Stays off: it hides a loss that is not finite, which stops the run here, and waits each step."
        },
    )
    student_channels: list[int] | None = field(
        default=None, metadata={"help": "Channels of the tiles that the trained model reads, in order. Default: all."}
    )
    channels_last: bool = field(
        default=False,
        metadata={
            "help": "Keep the channels of a pixel together in memory: faster for convolutional models, not for a SegFormer; "
            "the same model up to rounding."
        },
    )
    hub_strategy: HubStrategy | str = field(
        default="end", metadata={"help": "Stays at end: one push of the finished model, nothing before it."}
    )

    # What a resumed run must share with the one that was interrupted, for its weights to be those of one run.
    kept_on_resume = (
        *("seed", "data_seed", "learning_rate", "weight_decay", "optim", "lr_scheduler_type"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "student_channels", "channels_last"),
    )

    def __post_init__(self):
        if self.accelerator_config is None:
            # Every rank makes its own batches: those of a stream would travel between ranks as tensors, names do not.
            # The next batch is copied while the last step still runs, which a blocking copy waits for.
            self.accelerator_config = {"dispatch_batches": False, "non_blocking": self.dataloader_pin_memory}
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # bf16 autocast works there too, but the base class refuses it unless that is said
        super().__post_init__()
        for name in ("seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**32:
                raise UserError(f"{name}={getattr(self, name)} must be between 0 and 2^32 - 1")
        if "length" in str(getattr(self, "train_sampling_strategy", "")) or getattr(self, "group_by_length", False):
            raise UserError("tiles have no lengths to group them by: leave train_sampling_strategy as it is")
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise UserError(
                f"hub_strategy={self.hub_strategy.value} would publish unfinished models: leave it at end, the finished one "
                "is pushed"
            )
        if self.push_to_hub and not self.hub_model_id:
            raise UserError("push_to_hub needs the repository: give hub_model_id as ORG/NAME")
        if self.hub_revision:
            raise UserError("hub_revision has no effect here, models are pushed to the main branch: leave it out")
        if self.logging_nan_inf_filter:
            raise UserError("logging_nan_inf_filter=True would hide a loss that is not finite: leave it off")
        if self.fp16 and self.device.type == "cpu":
            raise UserError("fp16 has no effect on the CPU: choose bf16, or leave it off")
        if self.label_smoothing_factor:
            raise UserError("label_smoothing_factor has no effect here, models compute their own loss: leave it at 0")
        if self.remove_unused_columns:
            raise UserError("remove_unused_columns=True would delete the image column: leave it off")
        if not self.batch_eval_metrics:
            raise UserError("batch_eval_metrics=False would keep every prediction in memory: leave it on")


@dataclass(repr=False)
class DistillationConfig(SegmentationConfig):
    """What is distilled, and how strongly, beside all the arguments of `transformers.TrainingArguments`."""

    method: list[str] | None = field(
        default=None,
        metadata={
            "help": f"What is distilled, one or more of {', '.join(METHODS)}, see drd_hf.losses. NAME=WEIGHT sets the weight of "
            "a method, of one with several terms (drd, drd_aligned, drd_classes, dsd, dist, afdcd) a factor on all their weights, as of drd_channels. "
            f"Default: {' '.join(DEFAULT_METHODS)}; {' '.join(DEFAULT_OF_FEATURES)} where the teacher has no scores of the "
            "student's classes, or a weight of relations is given."
        },
    )
    spatial_relation_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the distance between spatial relations; 0 leaves it out. Default: 3 of drd, 2 of drd_aligned."
        },
    )
    channel_relation_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the distance between channel relations; 0 leaves it out. Default: 3 of drd, 10 of drd_aligned."
        },
    )
    logit_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of pixel-wise logit distillation beside the methods; needs equal labels; 0 leaves it out."
        },
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
            "help": "Layers whose features are compared, one or more STUDENT_LAYER=TEACHER_LAYER (a single name "
            "means the same layer in both), with :WEIGHT behind it for another share in the mean than the 1 of the others. "
            "Default: the layer before the classifier of each model; drd_aligned reads the stages of the encoders too, dsd their end."
        },
    )
    resize_relations_to: int | None = field(
        default=56,
        metadata={
            "help": "Side of the square grid with as many positions as relations are compared on at most: larger feature maps "
            "are shrunk in proportion, smaller ones stay. 0: the student's own grid; cost grows with the positions. Of drd, drd_aligned, "
            "drd_channels, and cirkd, which pools the maps by a whole number."
        },
    )
    distillation_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of all steps over which distillation weights grow from 0 to full."}
    )
    distillation_stop_ratio: float = field(
        default=1.0,
        metadata={
            "help": "Share of all steps after which labels alone train the student and the teacher no longer runs."
        },
    )
    teacher_dtype: str = field(
        default="float32",
        metadata={"help": f"Number format of the teacher's weights and input: {', '.join(TEACHER_DTYPES)}."},
    )
    teacher_channels: list[int] | None = field(
        default=None,
        metadata={"help": "Channels of the tiles that the teacher reads, in order. Default: those of the student."},
    )

    kept_on_resume = (
        *SegmentationConfig.kept_on_resume,
        *("method", "spatial_relation_weight", "channel_relation_weight", "logit_weight", "relation", "temperature"),
        *("logit_temperature", "feature_layers", "resize_relations_to", "distillation_warmup_ratio"),
        *("distillation_stop_ratio", "teacher_dtype", "teacher_channels"),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.method is not None:
            self.method = [self.method] if isinstance(self.method, str) else list(self.method)
        methods = parse_methods(self.method or ())
        if "kd" in methods and self.logit_weight:
            raise UserError(
                f"logit_weight={self.logit_weight} and method kd are the same loss: leave one of them out, kd=WEIGHT sets its weight"
            )
        read = not methods.keys() & {"drd_channels", "drd_classes"} or methods.keys() & set(OF_RELATION_WEIGHTS)
        for name in ("spatial_relation_weight", "channel_relation_weight"):
            if getattr(self, name) is not None and not read:
                raise UserError(
                    f"{name} is of {' and '.join(OF_RELATION_WEIGHTS)}, which are not asked for: give drd_channels=FACTOR or "
                    "drd_classes=FACTOR instead"
                )
        for name in ("spatial_relation_weight", "channel_relation_weight", "logit_weight"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be a number, 0 or above")
        if self.resize_relations_to is not None and self.resize_relations_to < 0:
            raise UserError(f"resize_relations_to={self.resize_relations_to} must not be negative")
        if not 0 <= self.distillation_warmup_ratio <= 1:
            raise UserError(f"distillation_warmup_ratio={self.distillation_warmup_ratio} must be between 0 and 1")
        if (
            not self.distillation_warmup_ratio < self.distillation_stop_ratio <= 1
            and self.distillation_stop_ratio != 1
        ):
            raise UserError(
                f"distillation_stop_ratio={self.distillation_stop_ratio} must be above distillation_warmup_ratio="
                f"{self.distillation_warmup_ratio} and at most 1"
            )
        if self.teacher_dtype not in TEACHER_DTYPES:
            raise UserError(f"teacher_dtype={self.teacher_dtype!r} is not known, choose {', '.join(TEACHER_DTYPES)}")


class SegmentationTrainer(Trainer):
    """`transformers.Trainer` for semantic segmentation: plain supervised training.

    What it adds: the loss of a step is a mean over the labelled pixels of all its batches, accumulated and of all
    ranks, so that 1 x 8 and 8 x 1 train alike; a step without a labelled pixel has loss 0 instead of NaN; a loss that is
    not finite stops the run; metrics come from class maps, batch by batch; a saved model is a plain `transformers` folder
    without any pickle.

    Args:
        model, args, train_dataset, eval_dataset, callbacks, ...: as in `transformers.Trainer`. Datasets give items
            with `image` (uint8, C x H x W) and `labels` (H x W, 255 is ignored), see `drd_hf.data.transforms`.
        model_init: instead of `model`, a function that makes one, called anew by every `train` and search trial.
        processing_class: the model's image processor. It normalises the images and is saved with the model.
        data_collator: default `SegmentationCollator(processing_class)`.
        compute_metrics: default `SegmentationMetrics(model.config.id2label)`.
    """

    config_class = SegmentationConfig
    _staging: Path | None = None  # where a checkpoint is being written

    def __init__(
        self,
        model=None,
        args=None,
        *,
        model_init=None,
        processing_class=None,
        data_collator=None,
        compute_metrics=None,
        **kwargs,
    ):
        args = self._checked(args)
        model = _in_layout(_made(model, model_init), args)
        if "compute_loss_func" in kwargs:
            raise UserError("compute_loss_func has no effect here: write a DistillationLoss and pass it as losses=")
        if data_collator is None:
            if processing_class is None:
                raise UserError("give processing_class (the model's image processor) or a data_collator")
            data_collator = self._default_collator(model, processing_class, args)
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
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and self.args.parallel_mode != ParallelMode.DISTRIBUTED:
            raise UserError(
                f"{started} processes were started, but each would train alone: they found no GPU, give --use_cpu true to "
                "train on the CPU"
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
        self.model_init = model_init
        self.add_callback(_SeedOfTheRank())
        self._record = LossRecord()

    def call_model_init(self, trial=None):
        return _in_layout(super().call_model_init(trial), self.args)

    def _checked(self, args):
        if args is None:
            return self.config_class(output_dir="trainer_output")
        if not isinstance(args, self.config_class):
            raise UserError(f"args must be a {self.config_class.__name__}, got {type(args).__name__}")
        return args

    def _default_collator(self, model, processing_class, args):
        return SegmentationCollator(
            processing_class, num_labels=model.config.num_labels, channels=args.student_channels
        )

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

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As in `transformers.Trainer`, and what was interrupted ends with the weights of an uninterrupted training.

        Args:
            resume_from_checkpoint: a `checkpoint-N` folder, or True for the newest complete one in `output_dir`; broken
                ones are named and left out, and without any checkpoint training starts at the beginning.

        Raises:
            UserError: the checkpoint is broken or does not fit, or there are checkpoints and none is complete.
        """
        run_dir, quiet = self.args.output_dir, not self.is_world_process_zero()
        if not quiet:
            remove_leftovers(run_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoint_to_resume(run_dir, quiet)
        elif resume_from_checkpoint and (problem := checkpoint_problem(resume_from_checkpoint)):
            raise UserError(f"{resume_from_checkpoint} is not a complete checkpoint: {problem}")
        resume_from_checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if resume_from_checkpoint:
            self.require_same_settings(resume_from_checkpoint)
            if not quiet:  # else they, of the run that is left here, would count as the newest later on
                remove_newer(run_dir, resume_from_checkpoint)
            self.accelerator.wait_for_everyone()
        self._record = LossRecord()
        if resume_from_checkpoint and (done := self._finished_training(resume_from_checkpoint)):
            return done
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._require_finite("they are not to be used")
        return result

    def _finished_training(self, checkpoint: str) -> TrainOutput | None:
        # From the checkpoint of a last step that lies amid an epoch, Trainer would go on for one step more.
        max_steps = self.args.max_steps
        if max_steps <= 0:
            steps_per_epoch = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
            max_steps = math.ceil(self.args.num_train_epochs * max(steps_per_epoch, 1))
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state.global_step < max_steps and not _stopped_early(state):
            return None
        self.state = state
        self._find_best_checkpoint()
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, math.nan, {})  # the mean loss is not in a checkpoint

    def _find_best_checkpoint(self) -> None:
        """The folder of a run may have been moved, or is called from elsewhere: its checkpoints keep their names."""
        best = self.state.best_model_checkpoint
        if best is not None and not Path(best).is_dir():
            here = Path(self.args.output_dir) / Path(best).name
            self.state.best_model_checkpoint = str(here) if here.is_dir() else None
            if not here.is_dir():
                logger.warning(f"the best checkpoint {best} is gone: the best one is looked for anew")
                self.state.best_metric = None

    def require_same_settings(self, checkpoint: str | Path) -> None:
        """Refuse to go on from a checkpoint that was trained on other tiles or with other options.

        These are `args.kept_on_resume`, the number of tiles, how they are read, varied and normalised, and the bands.
        """
        file = Path(checkpoint) / SETTINGS_NAME
        if not file.is_file():
            return
        before, now = json.loads(file.read_text()), self._settings()
        for settings in (before, now):  # older checkpoints name the defaults of the plain form
            if not any(method.startswith("drd_aligned") for method in settings.get("method") or ()):
                for name in ("spatial_relation_weight", "channel_relation_weight"):
                    if settings.get(name, 0) is None:
                        settings[name] = 3.0
        for name in now:
            if name == "method" and now[name] is None:  # losses were given instead of names
                continue
            if name in before and before[name] != now[name]:
                raise UserError(
                    f"{checkpoint} was trained with {name}={before[name]} and this run has {now[name]}: resume with the same "
                    "options (a default that was another one then has to be given), or start a new run from this checkpoint as its student"
                )

    def _settings(self) -> dict:
        names, data = list(self.args.kept_on_resume), self.train_dataset
        streaming = isinstance(data, StreamedTiles)
        if streaming:  # which decide there what tiles a batch holds
            names += ["world_size", "dataloader_num_workers"]
        settings = {"streaming": streaming} | {name: getattr(self.args, name) for name in names}
        if streaming:
            settings["shuffle_buffer"] = data.shuffle_buffer
        if hasattr(data, "__len__"):
            settings["number of tiles"] = len(data)
        settings |= getattr(_transform_of(data), "settings", {})
        settings["bands"] = bands_of(self.model.config)
        for name in ("normalization", "teacher_normalization"):
            settings[name] = getattr(self.data_collator, name, None)
        return json.loads(json.dumps(settings, default=str))

    # A stream splits itself among ranks and loader workers. accelerate would have every rank read and transform all
    # tiles, or give ranks whole files, of which they have unequally many tiles, and leave the longest waiting for ever.

    def _get_dataloader(self, dataset, description, batch_size, *args, **kwargs):
        if not isinstance(dataset, StreamedTiles):
            return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        options = self.args
        share = dataset.share(
            options.process_index, options.world_size, batch_size, options.dataloader_drop_last, self._seed_of_data()
        )
        loader = DataLoader(
            share,
            batch_size,
            collate_fn=self.data_collator,
            num_workers=options.dataloader_num_workers,
            pin_memory=options.dataloader_pin_memory,
            persistent_workers=options.dataloader_persistent_workers,
            prefetch_factor=options.dataloader_prefetch_factor,
        )
        return prepare_data_loader(
            loader,
            options.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=options.dataloader_pin_memory,
        )

    # Random crops and flips depend on the seed, the epoch and the place in it: see drd_hf.checkpoints. Other datasets
    # without a length have no sampler and stay with the global random state.

    def get_train_dataloader(self):
        dataset = self.train_dataset
        if hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
            self.train_dataset = SeededDraws(dataset)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def _get_train_sampler(self, train_dataset=None):
        if not isinstance(train_dataset, SeededDraws):
            return super()._get_train_sampler(train_dataset)
        sampler = super()._get_train_sampler(train_dataset.dataset)
        return SeededSampler(sampler, self._seed_of_data(), epoch=lambda: int(self.state.epoch or 0))

    def _seed_of_data(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # Trainer writes a checkpoint file by file under its name. Here it writes into a staging folder, and the checkpoint
    # gets its name when it is whole.

    def _get_output_dir(self, trial):
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial):
        self._require_finite()
        run_dir, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        staging, place = staging_folder(run_dir, name), run_dir / name
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        best = self.state.best_model_checkpoint
        is_best = best is not None and Path(best) == staging / name
        if is_best:
            self.state.best_model_checkpoint = str(place)
        self.accelerator.wait_for_everyone()  # every rank has written its random state
        if self.args.should_save:
            (staging / name / SETTINGS_NAME).write_text(json.dumps(self._settings(), indent=1) + "\n")
            if is_best:
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            publish(staging / name, place)
            staging.rmdir()
            rotate(run_dir, self.args.save_total_limit, keep=[place, self.state.best_model_checkpoint or place])
        self.accelerator.wait_for_everyone()

    # Trainer makes the repository before the training, uploads the whole output folder (logs, optimizers, pickled
    # arguments) at every checkpoint and whenever a model is saved, and replaces the card; callbacks publish logs. Here the
    # repository and the token are only looked at before, and one commit brings the finished model, see push_model.

    def init_hf_repo(self, token=None, private=None):
        """Refuse before the training what `push_to_hub` would refuse after it. Nothing is made."""
        self.hub_model_id, options = self.args.hub_model_id, self._push_options(token, private)
        if self.is_world_process_zero():
            try:
                check_model_push(self.hub_model_id, **options)
            except UserError as error:
                if "--overwrite" not in str(error):
                    raise
                raise UserError(  # that of a training is about its folder
                    f"{error}; here: train without push_to_hub, and push afterwards with push_to_hub.py --overwrite"
                ) from None

    def push_to_hub(self, *, token=None, private=None, overwrite=False) -> str | None:
        """Push what `drd_hf.runs.finish_run` wrote into `output_dir` to `args.hub_model_id`, in one commit.

        What is pushed is what was scored: the model is not saved anew, so a run is to be finished before.

        Args:
            token, private: default `args.hub_token` and `args.hub_private_repo`.
            overwrite: replace another model that is in the repository.

        Returns:
            The address of the repository; None on other processes than the main one.

        Raises:
            UserError: see `drd_hf.hub.push_model`.
        """
        if not self.is_world_process_zero():
            return None
        folder, repo_id = self.args.output_dir, self.args.hub_model_id
        if not repo_id:
            raise UserError("push_to_hub needs the repository: give hub_model_id as ORG/NAME")
        if not (Path(folder) / RUN_NAME).is_file():
            raise UserError(
                f"{folder}: the run is not finished; call finish_run, which scores the model and writes its card"
            )
        try:
            return push_model(folder, repo_id, overwrite=overwrite, **self._push_options(token, private)).url
        except UserError as error:
            raise UserError(
                f"{error}; push_to_hub.py --model {folder} --repo_id {repo_id} pushes what is in the folder without "
                "training again"
            ) from None

    def _push_options(self, token, private) -> dict:
        return {
            "token": token or self.args.hub_token,
            "private": self.args.hub_private_repo if private is None else private,
        }

    def _push_from_checkpoint(self, checkpoint_folder):
        pass

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call=True)  # else it would push

    # A model's loss is a mean over the labelled pixels of one batch. Where batches have different numbers of them, the
    # mean of these means is not the mean over the step, so each is weighted by its share of the step's pixels.

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        labelled = sum((batch["labels"] != IGNORE_INDEX).sum() for batch in batches).to(device)
        return batches, self.accelerator.gather(labelled).sum()

    def _share_of_step(self, labels, labelled_in_step) -> torch.Tensor:
        # Trainer divides by the accumulation steps, and DDP by the ranks.
        equal_parts = self.current_gradient_accumulation_steps * self.args.world_size
        return (labels != IGNORE_INDEX).sum() * equal_parts / labelled_in_step.clamp_min(1)

    def _note(self, terms, weights, inputs) -> None:
        share = 1 / self.current_gradient_accumulation_steps
        self._record.add(terms, weights, share, self.state.global_step + 1, inputs.get("sources"))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, loss = _supervised(model, inputs["pixel_values"], inputs["labels"])
        if num_items_in_batch is not None:  # a training step
            loss = loss * self._share_of_step(inputs["labels"], num_items_in_batch)
            self._note({"task_loss": loss}, {}, inputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        self._record.read()
        super().log(logs, *args, **kwargs)

    def _require_finite(self, consequence: str = "no checkpoint of them is saved") -> None:
        """Before a checkpoint is saved, so that it is not the bad one that is resumed from, and after the last step."""
        self._record.read()
        # A finite loss can have infinite gradients; the next loss would tell, after the checkpoint.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not torch.stack([p.detach().isfinite().all() for p in parameters]).all():
            raise UserError(
                f"the weights are not finite after step {self.state.global_step}, {consequence}: "
                "give a lower learning_rate, and resume from the checkpoint before"
            )

    def compute_loss_context_manager(self):
        # Evaluation runs the bare model, teachers are never prepared: autocast is entered here for all of them.
        stack = contextlib.ExitStack()
        stack.enter_context(self.accelerator.autocast())
        return stack

    def _load_weights(self, checkpoint: str) -> None:
        # Trainer feeds the keys of the file to load_state_dict and goes on with a warning where they do not fit.
        # from_pretrained knows that files keep older names than modules (SegFormer since transformers 5.23).
        ours = bands_of(self.model.config)
        try:
            theirs = bands_of(type(self.model.config).from_pretrained(checkpoint))
            if ours and theirs and ours != theirs:
                raise ValueError(f"it reads the bands {', '.join(theirs)}, the model {', '.join(ours)}")
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

    def _load_callback_state(self):
        # Early stopping goes on counting. Trainer does so on request only, and then with the patience of the old command.
        super()._load_callback_state()
        self._find_best_checkpoint()
        left = {
            name: list(states) if isinstance(states, list) else [states]
            for name, states in self.state.stateful_callbacks.items()
        }
        for callback in self.callback_handler.callbacks:
            if states := left.get(type(callback).__name__):
                vars(callback).update(states.pop(0).get("attributes", {}))

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
    1 over the warm-up, and 0 from the stop ratio on. Every term is logged raw (``spatial_relation``), as the mean over
    the steps that computed it, and weighted (``spatial_relation_weighted``), the task loss as ``task_loss``.

    Args:
        model: the student, any `AutoModelForSemanticSegmentation`.
        teacher_model: the teacher; it is put in eval mode, frozen and never saved, moved and cast once. A quantised or
            compiled teacher stays where it is and as it is.
        losses: `DistillationLoss` objects; None builds them from `args`: those of its methods, and `PixelLogitLoss` where
            `logit_weight` is not 0.
        teacher_processor: the teacher's image processor, if it normalises images differently from the student's.

    Raises:
        UserError: a feature layer does not exist, or a loss that was given or named compares class scores of models with
            different labels or of a teacher that has none. The default methods do so where they can, see `method`.
    """

    config_class = DistillationConfig

    def __init__(
        self,
        model: PreTrainedModel = None,
        teacher_model: PreTrainedModel = None,
        args: DistillationConfig = None,
        *,
        model_init=None,
        losses: list[DistillationLoss] | DistillationLoss | None = None,
        teacher_processor=None,
        **kwargs,
    ):
        if (model is None and model_init is None) or teacher_model is None:
            raise UserError("DistillationTrainer needs both a student (model) and a teacher (teacher_model)")
        model = _made(model, model_init)
        if model is teacher_model:
            raise UserError("student and teacher are the same object: load the teacher a second time")
        if teacher_processor is not None and kwargs.get("data_collator") is not None:
            raise UserError(
                "teacher_processor has no effect beside a data_collator: let that give teacher_pixel_values"
            )
        args = self._checked(args)
        if args.fsdp or args.deepspeed:  # refused before Trainer sees it: without GPUs it would go on with plain DDP
            raise UserError(NO_SHARDING)
        self.teacher_processor = teacher_processor
        losses = [losses] if isinstance(losses, DistillationLoss) else losses
        # Kept as they were given: a student made anew needs projectors made anew.
        self._given_losses = copy.deepcopy(losses) if model_init is not None else None
        self.methods = self._methods(losses, args, model, teacher_model.eval())
        losses = _checked_losses(losses, args, model, teacher_model)
        super().__init__(model, args, **kwargs)
        self.model_init = model_init
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # asked for by accelerate's own configuration
            raise UserError(NO_SHARDING)
        self.teacher_model = _placed_teacher(teacher_model, args)
        self._pair(losses)

    @property
    def losses(self) -> list[DistillationLoss]:
        return list(self._step.losses)

    def _default_collator(self, model, processing_class, args):
        return SegmentationCollator(
            processing_class,
            self.teacher_processor,
            num_labels=model.config.num_labels,
            channels=args.student_channels,
            teacher_channels=args.teacher_channels,
        )

    def _pair(self, losses: list[DistillationLoss]) -> None:
        """Hook student and teacher, make projectors, and put what trains into one module."""
        student, teacher = self.model, self.teacher_model
        student_layers = [layer for loss in losses for layer in loss.student_layers]
        teacher_layers = [layer for loss in losses for layer in loss.teacher_layers]
        student_widths = feature_widths(student, student_layers) if student_layers else {}
        teacher_widths = feature_widths(teacher, teacher_layers) if teacher_layers else {}
        # A fork of the random state: the student sees the same batches and dropout with and without projectors.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed)
            for loss in losses:
                loss.prepare(student_widths, teacher_widths)
        self._teacher_hooks = FeatureHooks(teacher, teacher_layers)
        self._step = _DistillationStep(student, losses, FeatureHooks(student, student_layers)).to(self.args.device)

    @staticmethod
    def _methods(losses, args, student: PreTrainedModel, teacher: PreTrainedModel) -> list[str] | None:
        """The methods by name; None where losses were given. What replaces the default is logged."""
        if losses is not None:
            return None
        methods, reason = methods_of(args, student, teacher)
        if reason is not None and args.process_index == 0:
            logger.warning(f"no method was given, and {reason}: {' '.join(methods)} is distilled, from features alone")
        return methods

    def _settings(self) -> dict:
        return super()._settings() | {"method": self.methods}

    def _pair_again(self) -> None:
        """`model_init` made another student, and a search trial may have changed the weights of the losses."""
        if self._step.student is not self.model:
            self._teacher_hooks.remove()
            losses = copy.deepcopy(self._given_losses)
            self.methods = self._methods(losses, self.args, self.model, self.teacher_model)
            self._pair(_checked_losses(losses, self.args, self.model, self.teacher_model))

    # Student and projectors are prepared as one module, so that every trainable tensor is synchronised between
    # ranks and reaches the optimizer; `self.model` stays the plain student, which is what gets evaluated and saved.

    def create_optimizer(self, *args, **kwargs):
        self._pair_again()
        student, self.model = self.model, self._step
        try:
            optimizer = super().create_optimizer()
        finally:
            self.model = student
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not all(id(p) in known for p in self._step.losses.parameters() if p.requires_grad):
            raise UserError(
                "the optimizer that was given does not train the projectors: add them to it (trainer.losses), or pass "
                "optimizer_cls_and_kwargs instead"
            )
        return optimizer

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
        scale = self._distillation_scale()
        features, logits = self._teach(inputs) if scale else (None, None)
        terms = dict(model(inputs["pixel_values"], inputs["labels"], features, logits))
        if num_items_in_batch is not None:
            terms["task_loss"] = terms["task_loss"] * self._share_of_step(inputs["labels"], num_items_in_batch)
        weights = {
            name: scale * weight
            for loss in self._step.losses
            for name, weight in loss.weights.items()
            if name in terms
        }
        if num_items_in_batch is not None:
            self._note(terms, weights, inputs)
        total = terms["task_loss"]
        for name, weight in weights.items():
            total = total + weight * terms[name]
        return total

    @torch.no_grad()
    def _teach(self, inputs) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The teacher's feature maps and class scores, None where it has no scores."""
        pixel_values = inputs.get("teacher_pixel_values", inputs["pixel_values"])
        place, dtype = _place_and_dtype(self.teacher_model)
        # A teacher in half precision needs no autocast, and one in float16 does not run under that of bfloat16.
        with torch.autocast(place.type, enabled=False) if dtype != torch.float32 else contextlib.nullcontext():
            outputs = self.teacher_model(pixel_values=pixel_values.to(place, dtype))
        device, logits = self.args.device, getattr(outputs, "logits", None)
        try:
            features = {layer: feature.to(device) for layer, feature in self._teacher_hooks.pop().items()}
        except UserError as error:
            if not _is_compiled(self.teacher_model):
                raise
            raise UserError(f"{error}; or do not run the compiled teacher before, later hooks never fire") from error
        return features, logits if logits is None else logits.to(device)

    def _distillation_scale(self) -> float:
        step, steps = self.state.global_step, self.state.max_steps
        if self.args.distillation_stop_ratio < 1 and step >= max(1, round(self.args.distillation_stop_ratio * steps)):
            return 0.0
        warmup = self.args.distillation_warmup_ratio * steps
        return min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            means = self._record.pop_means()
            if means:  # one reduction per logging step
                values = torch.tensor(list(means.values()), device=self.args.device)
                values = self.accelerator.reduce(values, reduction="mean").tolist()
                logs.update({name: float(f"{mean:.6g}") for name, mean in zip(means, values, strict=True)})
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        projectors = self._step.losses.state_dict()
        # Into checkpoints only: a push to the Hub is an internal call too, without a folder.
        if _internal_call and output_dir is not None and projectors and self.args.should_save:
            save_file({name: t.contiguous() for name, t in projectors.items()}, Path(output_dir) / PROJECTORS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._pair_again()
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path, wanted = Path(resume_from_checkpoint) / PROJECTORS_NAME, self._step.losses.state_dict()
        if not path.is_file():
            if wanted:
                raise UserError(
                    f"{path} is missing, the checkpoint cannot be resumed: resume with the same options, or choose another one"
                )
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
        if teacher_features is None:  # distillation has ended; DDP still waits for a gradient of each projector
            self.hooks.clear()
            return {"task_loss": task_loss + 0.0 * sum(p.sum() for p in self.losses.parameters())}
        student_features = self.hooks.pop()
        if torch.is_grad_enabled() and not all(f.requires_grad for f in student_features.values()):
            raise UserError(
                "a student feature layer carries no gradient: with gradient checkpointing set use_reentrant to false in "
                "gradient_checkpointing_kwargs; where the weights before it are frozen, name other layers with feature_layers"
            )
        terms = {"task_loss": task_loss}
        for loss in self.losses:
            terms.update(loss(student_features, teacher_features, outputs.logits, teacher_logits, labels))
        return terms


class _SeedOfTheRank(TrainerCallback):
    """Ranks draw different dropout. Trainer seeds them alike where it makes the model; a checkpoint's state comes later."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            torch.manual_seed(args.seed + args.process_index)


def _stopped_early(state: TrainerState) -> bool:
    saved_states = state.stateful_callbacks.get("EarlyStoppingCallback", [])
    for saved in saved_states if isinstance(saved_states, list) else [saved_states]:
        counter = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
        if counter >= saved.get("args", {}).get("early_stopping_patience", math.inf):
            return True
    return False


class LossRecord:
    """Means of the loss terms of many batches, and a stop where one is not finite, without a wait for the device.

    Values of batches stay on their device until `read`; on the CPU, where that costs nothing, every batch is read.
    """

    BATCHES = 1000  # between two reads, however seldom they are asked for

    def __init__(self):
        self._unread = []
        self._sums: dict[str, float] = {}
        self._steps: dict[str, float] = {}

    def add(self, terms: dict[str, torch.Tensor], weights: dict[str, float], share: float, step: int, sources=None):
        """Note a batch.

        Args:
            terms: {name: scalar}.
            weights: {name: weight}, the terms that enter the total loss as `weight * term`.
            share: part of a step that this batch is, 1 / accumulation steps.
            step: the step it belongs to, counted from 1.
            sources: names of the tiles of the batch, if known.
        """
        values = torch.stack([term.detach().float() for term in terms.values()])
        self._unread.append((values, list(terms), weights, share, step, sources))
        if values.device.type == "cpu" or len(self._unread) >= self.BATCHES:
            self.read()

    def read(self) -> None:
        """Fetch what is still on the device.

        Raises:
            UserError: a term was not finite; names the first step, the terms and the tiles.
        """
        if not self._unread:
            return
        batches, self._unread = self._unread, []
        values = iter(torch.cat([batch[0] for batch in batches]).tolist())
        for _, names, weights, share, step, sources in batches:
            terms = {name: next(values) for name in names}
            broken = [
                f"{name} is {value}"
                for name, value in terms.items()
                if not math.isfinite(value * weights.get(name, 1))
            ]
            if broken:
                tiles = f"tiles {', '.join(sources)}" if sources else "tiles without a source"
                raise UserError(
                    f"step {step}: the loss is not finite ({', '.join(broken)}) on {tiles}; give a lower learning_rate "
                    "or look at these tiles; checkpoints from before are good to resume from"
                )
            for name, value in terms.items():
                self._sum(name, value, share)
                if name in weights:
                    self._sum(f"{name}_weighted", weights[name] * value, share)

    def _sum(self, name: str, value: float, share: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + share * value
        self._steps[name] = self._steps.get(name, 0.0) + share

    def pop_means(self) -> dict[str, float]:
        """{name: mean}, raw over the steps that had the term and weighted over all, so that these add up to the loss."""
        self.read()
        all_steps = max(self._steps.values(), default=0.0)
        means = {
            name: total / (all_steps if name.endswith("_weighted") else self._steps[name])
            for name, total in self._sums.items()
        }
        self._sums, self._steps = {}, {}
        return means


def _transform_of(dataset):
    """What makes training items of the tiles of a split; None where it cannot be known."""
    if isinstance(dataset, StreamedTiles):
        return dataset.transform
    layout = getattr(dataset, "format", None)
    return layout.get("format_kwargs", {}).get("transform") if isinstance(layout, dict) else None


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod")


def _placed_teacher(teacher: nn.Module, args: DistillationConfig) -> nn.Module:
    teacher = teacher.eval().requires_grad_(False)
    quantised = getattr(teacher, "is_quantized", False) or getattr(teacher, "is_loaded_in_8bit", False)
    if not quantised and not _is_compiled(teacher):
        return _in_layout(teacher.to(args.device, getattr(torch, args.teacher_dtype)), args)
    if args.teacher_dtype != "float32":
        raise UserError(
            f"teacher_dtype={args.teacher_dtype} has no effect on a quantised or compiled teacher: cast it before that"
        )
    return teacher


def _place_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a model wants its pixels, and as what: like its first weight that is not an integer."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return next(model.parameters()).device, torch.float32


def _in_layout(model: nn.Module, args: SegmentationConfig) -> nn.Module:
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def _made(model, model_init):
    if (model is None) == (model_init is None):
        raise UserError("give the model to train" if model is None else "give model or model_init, not both")
    return model if model_init is None else model_init(*[None] * number_of_arguments(model_init))


def _checked_losses(losses, args, student: PreTrainedModel, teacher: PreTrainedModel) -> list[DistillationLoss]:
    """The losses that were given, None for those of the config, if they fit the models."""
    losses = losses_from_config(args, student, teacher) if losses is None else list(losses)
    if not losses:
        raise UserError(
            "nothing to distil: give a method, or weights above 0 (train a student alone with train_teacher.py)"
        )
    names = [name for loss in losses for name in loss.weights]
    reserved = [name for name in names if name in ("loss", "task_loss") or name.endswith("_weighted")]
    if reserved:
        raise UserError(f"a loss term must not be called {reserved[0]!r}, the log has that name already")
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise UserError(f"two losses have a term named {sorted(doubled)[0]!r}: terms need different names")
    scores = [name for loss in losses if loss.needs_logits for name in loss.weights]
    if scores and (reason := unlike_scores(student, teacher)):
        raise UserError(
            f"the loss {scores[0]!r} compares class scores, and {reason}: use methods that read features only"
        )
    return losses


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
