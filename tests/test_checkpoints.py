"""Interrupted training ends with the weights of uninterrupted training; checkpoints are whole or absent."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    EarlyStoppingCallback,
    SegformerImageProcessor,
    TrainerCallback,
)

from drd_hf.checkpoints import (
    SeededDraws,
    SeededSampler,
    checkpoint_folders,
    checkpoint_problem,
    newest_complete_checkpoint,
)
from drd_hf.errors import UserError
from drd_hf.losses import PixelLogitLoss
from drd_hf.runs import check_output_dir, train_run
from drd_hf.trainer import DistillationConfig, DistillationTrainer, SegmentationConfig

from .conftest import LABELS, RandomTiles, tiny_model

ROOT = Path(__file__).resolve().parents[1]


class RandomCrops(RandomTiles):
    """Items that draw from all three global generators, as transforms do."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        top, left = torch.randint(32, (2,)).tolist()
        cut = {name: value[..., top : top + 32, left : left + 32] for name, value in item.items()}
        if random.random() < 0.5:
            cut = {name: value.flip(-1) for name, value in cut.items()}
        noise = torch.from_numpy(np.random.randint(0, 20, (1, 32, 32), dtype=np.uint8))
        return {"image": cut["image"] // 2 + noise, "labels": cut["labels"]}


def distiller(run_dir, losses=None, **changes):
    """SegFormer has dropout and stochastic depth; the teacher's features are wider, so there is a projector."""
    settings = {
        "output_dir": str(run_dir), "max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine", "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return DistillationTrainer(
        tiny_model("segformer", seed=1),
        tiny_model("upernet", width=2, seed=2),
        DistillationConfig(**(settings | changes)),
        losses=losses,
        train_dataset=RandomCrops(7),
        eval_dataset=RandomTiles(2),
        processing_class=SegformerImageProcessor(do_resize=False),
    )


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer._step.state_dict().items()}


def differing(first, second):
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


# 7 tiles in batches of 2 without the incomplete one are 3 batches an epoch.
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_steps": 4},
        {"dataloader_num_workers": 2, "max_steps": 6, "save_steps": 2},
        {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    ],
    ids=["steps", "accumulation", "workers", "epochs"],
)
def test_training_resumed_from_any_checkpoint_equals_uninterrupted_training(tmp_path, changes):
    # Trainer fetched the first batch before it restored the random state, and a loader fetches ahead of the step that
    # is saved: the first batches after a resume were other crops.
    whole = distiller(tmp_path / "run", **changes)
    whole.train()
    expected, checkpoints = weights_of(whole), checkpoint_folders(tmp_path / "run")
    assert len(checkpoints) >= 2
    for checkpoint in checkpoints:
        resumed = distiller(tmp_path / "other", **changes | {"save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert differing(expected, weights_of(resumed)) == [], checkpoint.name
        assert resumed.state.global_step == whole.state.global_step
    assert differing(expected, weights_of(distiller(tmp_path / "other"))), "nothing was trained"


def test_optimizer_scheduler_and_random_state_are_those_of_uninterrupted_training(tmp_path):
    distiller(tmp_path / "whole").train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    distiller(tmp_path / "cut").train(resume_from_checkpoint=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        first, second = (
            torch.load(tmp_path / run / "checkpoint-5" / name, weights_only=False) for run in ("whole", "cut")
        )
        assert flat(first) == flat(second), name


def flat(value):
    """Nested states as something that `==` compares exactly."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_resuming_a_finished_training_trains_no_further(tmp_path):
    # With the last step amid an epoch, Trainer trained one step more.
    whole = distiller(tmp_path / "run", max_steps=4)
    whole.train()
    again = distiller(tmp_path / "run", max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and differing(weights_of(whole), weights_of(again)) == []


def test_crops_do_not_depend_on_workers_or_batch_size(tmp_path):
    seen = []
    for changes in ({}, {"dataloader_num_workers": 2}, {"per_device_train_batch_size": 6}):
        loader = distiller(tmp_path, **changes).get_train_dataloader()
        seen.append(torch.cat([batch["pixel_values"] for batch in loader]))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_every_epoch_and_every_seed_has_its_own_order_and_crops():
    draws = {
        (seed, epoch): list(SeededSampler(torch.utils.data.RandomSampler(range(50)), seed, lambda epoch=epoch: epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    orders = {tuple(index for index, _ in value) for value in draws.values()}
    assert len(orders) == 9 and all(sorted(order) == list(range(50)) for order in orders)
    seeds = [seed for value in draws.values() for _, seed in value]
    assert len(set(seeds)) == 9 * 50


def test_drawing_an_item_leaves_the_random_states_alone():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    draws = SeededDraws(RandomCrops(3))
    first, again, other = draws[1, 5], draws[1, 5], draws[1, 6]
    assert torch.equal(first["image"], again["image"]) and not torch.equal(first["image"], other["image"])
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_every_checkpoint_is_a_student_folder(tmp_path):
    distiller(tmp_path, max_steps=3).train()
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for folder in checkpoint_folders(tmp_path):
        model, report = AutoModelForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and model.config.id2label == LABELS
        assert AutoImageProcessor.from_pretrained(folder).do_resize is False
        assert load_file(folder / "projectors.safetensors") and not (folder / "training_args.bin").exists()


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    trainer, seen = distiller(tmp_path, max_steps=1), []
    for method in ("_save_rng_state", "_save_optimizer_and_scheduler"):
        saved = getattr(trainer, method)

        def look(*args, saved=saved):
            saved(*args)
            seen.append([path.name for path in tmp_path.iterdir()])

        monkeypatch.setattr(trainer, method, look)
    trainer.train()
    assert seen == [[".saving-checkpoint-1"]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_old_checkpoints_go_and_the_best_and_the_newest_stay(tmp_path):
    trainer = distiller(
        tmp_path, max_steps=5, save_total_limit=2, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_mean_iou",
    )  # fmt: skip
    scores, evaluate = iter([0.1, 0.9, 0.2, 0.3, 0.4]), trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_mean_iou": next(scores)}
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-5"}
    states = [json.loads((tmp_path / f"checkpoint-{n}" / "trainer_state.json").read_text()) for n in (2, 5)]
    assert [state["best_model_checkpoint"] for state in states] == [str(tmp_path / "checkpoint-2")] * 2
    best = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert differing(best, trainer.model.state_dict()) == []


def early_stopper(run_dir):
    """Scores fall after the second step, so that a patience of 3 ends the training after the fifth."""
    trainer = distiller(
        run_dir, max_steps=9, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_mean_iou",
    )  # fmt: skip
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
    compute = trainer.compute_metrics

    def falling(batch, compute_result):
        scores = compute(batch, compute_result)
        if compute_result:
            scores["mean_iou"] = 1 - abs(trainer.state.global_step - 2) / 10
        return scores

    trainer.compute_metrics = falling
    return trainer


def test_early_stopping_goes_on_counting(tmp_path):
    # The count of evaluations without progress began anew: a resumed training ran on where the other had stopped.
    whole = early_stopper(tmp_path / "run")
    whole.train()
    assert whole.state.global_step == 5
    resumed = early_stopper(tmp_path / "other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 5


def test_a_training_that_stopped_early_is_finished(tmp_path):
    # Resumed from its last checkpoint it trained on, since only the number of steps was asked.
    early_stopper(tmp_path / "run").train()
    resumed = early_stopper(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")][-1] == "checkpoint-5"


def test_a_run_with_a_best_checkpoint_resumes_after_its_folder_was_moved(tmp_path):
    early_stopper(tmp_path / "run").train()
    os.rename(tmp_path / "run", tmp_path / "moved")
    resumed = early_stopper(tmp_path / "moved")
    resumed.train(resume_from_checkpoint=True)
    assert Path(resumed.state.best_model_checkpoint) == tmp_path / "moved" / "checkpoint-2"
    saved = load_file(tmp_path / "moved" / "checkpoint-2" / "model.safetensors")
    fresh = type(resumed.model).from_pretrained(tmp_path / "moved" / "checkpoint-2").state_dict()
    assert saved and all(torch.equal(value, fresh[name]) for name, value in resumed.model.state_dict().items())


@pytest.mark.parametrize("change", [{"seed": 3}, {"spatial_relation_weight": 7.0}, {"optim": "sgd"}])
def test_resuming_with_other_options_is_refused(tmp_path, change):
    # Nothing was trained, or trained half so and half so, and the card named the new options for all of it.
    drd = {"method": ["drd"]}
    distiller(tmp_path, max_steps=2, **drd).train()
    with pytest.raises(UserError, match=f"trained with {next(iter(change))}="):
        distiller(tmp_path, max_steps=4, **drd, **change).train(resume_from_checkpoint=True)
    with pytest.raises(
        UserError, match="trained with method=.'drd'. and this run has .'drd_channels', 'drd_classes'."
    ):
        distiller(tmp_path, max_steps=4).train(resume_from_checkpoint=True)
    distiller(tmp_path, max_steps=4, **drd).train(resume_from_checkpoint=True)  # more steps are no other options


def test_a_run_with_losses_instead_of_names_is_resumed(tmp_path):
    distiller(tmp_path, max_steps=1, losses=PixelLogitLoss()).train()
    file = tmp_path / "checkpoint-1" / "run_settings.json"
    kept = json.loads(file.read_text())
    assert kept["method"] is None
    for method in (None, ["drd"]):  # the default of its time, in older checkpoints
        file.write_text(json.dumps(kept | {"method": method}))
        trainer = distiller(tmp_path, max_steps=2, losses=PixelLogitLoss())
        trainer.train(resume_from_checkpoint=str(file.parent))
        assert trainer.state.global_step == 2


@pytest.mark.parametrize(("method", "accepted"), [(["kd"], True), (["drd"], True), (["drd_aligned"], False)])
def test_older_checkpoints_name_the_relation_weights_that_are_defaults_now(tmp_path, method, accepted):
    distiller(tmp_path, max_steps=1, method=method).train()
    file = tmp_path / "checkpoint-1" / "run_settings.json"
    kept = json.loads(file.read_text()) | {"spatial_relation_weight": 3.0, "channel_relation_weight": 3.0}
    file.write_text(json.dumps(kept))
    trainer = distiller(tmp_path, max_steps=2, method=method)
    if accepted:
        trainer.require_same_settings(file.parent)
    else:
        with pytest.raises(UserError, match="trained with spatial_relation_weight=3.0"):
            trainer.require_same_settings(file.parent)


def test_checkpoints_after_the_one_that_is_resumed_do_not_count_as_newest(tmp_path, caplog):
    distiller(tmp_path, max_steps=4).train()
    with caplog.at_level(logging.WARNING):
        distiller(tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert sum("is removed: training goes on from checkpoint-2" in message for message in caplog.messages) == 2


def test_weights_that_the_last_step_made_not_finite_are_not_a_result(tmp_path):
    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))

    trainer = distiller(tmp_path, max_steps=1, save_strategy="no", max_grad_norm=0.0)
    trainer.add_callback(Spoil())
    with pytest.raises(UserError, match="weights are not finite after step 1, they are not to be used"):
        trainer.train()


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    distiller(folder, max_steps=2).train()
    return folder


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def change(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for i in range(middle, middle + 256):  # more than the padding between two tensors
        content[i] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated weights": ("model.safetensors", truncate),
    "weights cut in the header": ("model.safetensors", lambda path: truncate(path, 0.01)),
    "truncated projector": ("projectors.safetensors", truncate),
    "no weights": ("model.safetensors", Path.unlink),
    "no configuration": ("config.json", Path.unlink),
    "no optimizer": ("optimizer.pt", Path.unlink),
    "truncated optimizer": ("optimizer.pt", truncate),
    "changed optimizer": ("optimizer.pt", change),
    "empty scheduler": ("scheduler.pt", lambda path: path.write_bytes(b"")),
    "no random state": ("rng_state.pth", Path.unlink),
    "truncated random state": ("rng_state.pth", truncate),
    "empty trainer state": ("trainer_state.json", lambda path: path.write_text("")),
    "half a trainer state": ("trainer_state.json", truncate),
    "trainer state of nothing": ("trainer_state.json", lambda path: path.write_text("{}")),
    "half an image processor": ("preprocessor_config.json", truncate),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(saved_run, tmp_path, caplog, damage):
    run = tmp_path / "run"
    shutil.copytree(saved_run, run)
    assert newest_complete_checkpoint(run) == run / "checkpoint-2" and not caplog.records
    name, spoil = DAMAGES[damage]
    spoil(run / "checkpoint-2" / name)
    with caplog.at_level(logging.WARNING):
        assert newest_complete_checkpoint(run) == run / "checkpoint-1"
    (record,) = caplog.records
    message = record.getMessage()
    assert str(run / "checkpoint-2") in message and name in message and "\n" not in message


def test_checkpoints_are_ordered_by_step_and_other_folders_are_none(saved_run, tmp_path):
    assert newest_complete_checkpoint(tmp_path) is None and newest_complete_checkpoint(tmp_path / "none") is None
    for name in ("checkpoint-9", "checkpoint-10", ".saving-checkpoint-11/checkpoint-11", "checkpoint-best"):
        shutil.copytree(saved_run / "checkpoint-1", tmp_path / name)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_broken_checkpoint_on_the_way_is_replaced(saved_run, tmp_path):
    shutil.copytree(saved_run, tmp_path / "run")
    truncate(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    (tmp_path / "run" / ".saving-checkpoint-2" / "checkpoint-2").mkdir(parents=True)
    trainer = distiller(tmp_path / "run", max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    names = [path.name for path in sorted((tmp_path / "run").iterdir())]
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert [checkpoint_problem(tmp_path / "run" / name) for name in names] == [None] * 3


def test_without_a_checkpoint_training_starts_at_the_beginning_and_says_so(tmp_path, caplog):
    trainer = distiller(tmp_path / "run", max_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "has no checkpoint yet: training starts at the beginning" in caplog.text
    assert trainer.state.global_step == 1


def test_broken_checkpoints_alone_are_refused_in_one_line(saved_run, tmp_path):
    shutil.copytree(saved_run, tmp_path / "run")
    for folder in checkpoint_folders(tmp_path / "run"):
        truncate(folder / "model.safetensors")
    with pytest.raises(UserError, match="2 checkpoints and none is complete, the last: model.safetensors is damaged"):
        distiller(tmp_path / "run").train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="checkpoint-1 is not a complete checkpoint: model.safetensors is damaged"):
        distiller(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert len(checkpoint_folders(tmp_path / "run")) == 2


# What the scripts make of --resume_from_checkpoint.


def options(run_dir, resume="true"):
    return SegmentationConfig(output_dir=str(run_dir), resume_from_checkpoint=resume, use_cpu=True)


def test_a_script_resumes_the_newest_complete_checkpoint(saved_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved_run, run)
    assert check_output_dir(options(run), overwrite=False) == str(run / "checkpoint-2")
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    assert check_output_dir(options(run), overwrite=False) == str(run / "checkpoint-1")
    with pytest.raises(UserError, match=r"checkpoint-2: not a complete checkpoint folder, optimizer\.pt is missing"):
        check_output_dir(options(run, str(run / "checkpoint-2")), overwrite=False)


def test_a_script_without_a_checkpoint_starts_anew_but_not_over_something_else(tmp_path, caplog):
    (tmp_path / "early" / ".saving-checkpoint-1").mkdir(parents=True)
    for name in ("none", "early"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert check_output_dir(options(tmp_path / name), overwrite=False) is None
        assert "no checkpoint yet: training starts at the beginning" in caplog.text
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="finished has no checkpoint to resume from: give --overwrite true"):
        check_output_dir(options(tmp_path / "finished"), overwrite=False)


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys):
    trainer = distiller(tmp_path)
    step = trainer.training_step

    def interrupt(*args, **kwargs):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    trainer.training_step = interrupt
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored in what a shell starts in the background
    try:
        with pytest.raises(SystemExit) as stopped:
            train_run(trainer, None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "checkpoint-2") in line and "--resume_from_checkpoint true" in line


# Processes that are killed.

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import save_file
from tests.test_checkpoints import distiller, weights_of
torch.set_num_threads(1)
trainer = distiller(sys.argv[2], max_steps=12, save_total_limit=3)
print("ready", flush=True)
trainer.train(resume_from_checkpoint=True)
save_file(weights_of(trainer), sys.argv[3])
"""


def start(run_dir, result):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(ROOT), str(run_dir), str(result)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n", process.communicate()[1][-2000:]
    return process


def finish(run_dir, result):
    process = start(run_dir, result)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return load_file(result)


def kill(process, run_dir, saved, seconds):
    """SIGKILL that long after the checkpoint of a step was saved; tells what the process left."""
    while process.poll() is None and not any(int(f.name[11:]) >= saved for f in checkpoint_folders(run_dir)):
        if saved == 0:
            break
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had ended before it was killed"
    for folder in checkpoint_folders(run_dir):
        assert checkpoint_problem(folder) is None, "a checkpoint stood under its name before it was whole"
    return sorted(path.name for path in run_dir.iterdir()) if run_dir.exists() else []


def test_a_killed_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    whole = distiller(tmp_path / "whole", max_steps=12, save_strategy="no")
    whole.train()
    expected = weights_of(whole)
    process = start(tmp_path / "run", tmp_path / "run.safetensors")
    kill(process, tmp_path / "run", saved=4, seconds=0)
    assert not (tmp_path / "run.safetensors").exists()
    weights = finish(tmp_path / "run", tmp_path / "run.safetensors")
    assert differing(expected, weights) == []
    assert not list((tmp_path / "run").glob(".saving-*"))


@pytest.mark.slow
def test_killed_at_30_random_moments_it_always_ends_with_the_same_weights(tmp_path):
    expected = finish(tmp_path / "whole", tmp_path / "whole.safetensors")
    draw, same = random.Random(0), []
    for trial in range(30):
        run_dir, result = tmp_path / f"run{trial}", tmp_path / f"{trial}.safetensors"
        saved, seconds = draw.randrange(10), draw.uniform(0, 0.3)  # a step takes about 0.2 s
        left = kill(start(run_dir, result), run_dir, saved, seconds)
        same.append(not differing(expected, finish(run_dir, result)))
        print(f"kill {trial}: {seconds:.3f} s after step {saved}, left {left}, same weights: {same[-1]}")
        shutil.rmtree(run_dir)
    assert sum(same) == 30


RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import save_file
from drd_hf.errors import leave_process_group
from tests.test_checkpoints import distiller, weights_of
trainer = distiller(sys.argv[2], max_steps=4, per_device_train_batch_size=1, ddp_backend="gloo")
trainer.train(resume_from_checkpoint=sys.argv[4] or None)
save_file(weights_of(trainer), f"{sys.argv[3]}{trainer.args.process_index}.safetensors")
leave_process_group()
"""


@pytest.mark.slow
def test_two_ranks_resume_with_the_weights_of_an_uninterrupted_training(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    for result, checkpoint in (("whole", ""), ("resumed", str(tmp_path / "run" / "checkpoint-2"))):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        command += [str(ROOT), str(tmp_path / "run"), str(tmp_path / result), checkpoint]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    for checkpoint in checkpoint_folders(tmp_path / "run"):
        assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    for rank in range(2):
        files = [tmp_path / f"{result}{rank}.safetensors" for result in ("whole", "resumed")]
        assert differing(*map(load_file, files)) == []
