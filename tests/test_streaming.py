"""Training and evaluation from streams: every tile once in an epoch, alike on one rank and on two, resumed as if never stopped."""

import collections
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Features, Image, List, Value, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from torch.utils.data import DataLoader
from transformers import SegformerImageProcessor

from drd_hf.data.facts import DatasetFacts, SegmentationClass
from drd_hf.data.prepare import prepare_dataset
from drd_hf.data.source import SourceHeader, SourceImage
from drd_hf.data.splits import load_splits
from drd_hf.data.streaming import StreamedTiles, runs, shuffled, span_of_worker, tiles_of_files
from drd_hf.data.transforms import EvalTransform, SegmentationCollator, TrainTransform
from drd_hf.errors import UserError
from drd_hf.evaluation import evaluate_model
from drd_hf.runs import DataArguments, train_and_validation
from drd_hf.trainer import DistillationTrainer, SegmentationConfig, SegmentationTrainer

from .conftest import LABELS, tiny_model
from .test_trainer import config
from .test_trainer_scaling import tiny_student

PROCESSOR = SegformerImageProcessor(do_resize=False)
ROOT = Path(__file__).resolve().parents[1]


def png(pixels) -> dict:
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def write_tiles(folder: Path, files=(5, 3, 7, 4), size=32, bands=3) -> Path:
    """Parquet files as the converter writes them; tile n has the colour n, and every third tile has no labels."""
    features = Features({"image": Image(), "label": Image(), "source": Value("string"), "row": Value("int32")})
    features["column"] = Value("int32")
    if bands > 3:
        features["extra_bands"] = List(Image())
    (folder / "data").mkdir(parents=True)
    number = 0
    for index, tiles in enumerate(files):
        rows = []
        for _ in range(tiles):
            label = np.random.default_rng(number).integers(0, 3, (size, size)).astype(np.uint8)
            row = {
                "image": png(np.full((size, size, 3), number, np.uint8)),
                "source": f"source {index}",
                "row": number,
            }
            row |= {"label": None if number % 3 == 2 else png(label), "column": 0}
            if bands > 3:
                row["extra_bands"] = [png(np.full((size, size), 100 + number, np.uint8)) for _ in range(bands - 3)]
            rows.append(row)
            number += 1
        table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
        pq.write_table(table, folder / "data" / f"train-{index:05d}-of-{len(files):05d}.parquet", row_group_size=2)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiles(tmp_path_factory.mktemp("tiles") / "tiles")


def stream_of(folder):
    return load_dataset(str(folder), split="train", streaming=True)


def streamed(folder, transform=None, shuffle_buffer=0):
    return StreamedTiles(
        stream_of(folder), tiles_of_files(folder, "train"), transform or EvalTransform(), shuffle_buffer
    )


def numbers(items) -> list[int]:
    return [int(item["image"][0, 0, 0]) for item in items]


def test_stream_gives_the_tiles_of_its_files_in_order(folder):
    assert tiles_of_files(folder, "train") == [5, 3, 7, 4]
    tiles = streamed(folder)
    assert len(tiles) == 19
    items = list(tiles)
    assert numbers(items) == list(range(19))
    assert [bool((item["labels"] == 255).all()) for item in items] == [n % 3 == 2 for n in range(19)]


def test_wrong_numbers_of_files_or_tiles_are_refused(folder):
    with pytest.raises(UserError, match="reads 4 files, but tiles are given for 2"):
        StreamedTiles(stream_of(folder), [5, 3], EvalTransform())
    with pytest.raises(UserError, match="file 1 of the streamed split ends after 3"):
        list(StreamedTiles(stream_of(folder), [5, 4, 7, 4], EvalTransform()))
    with pytest.raises(UserError, match="shuffle_buffer is -1"):
        StreamedTiles(stream_of(folder), [5, 3, 7, 4], EvalTransform(), -1)


def epoch_of(folder, ranks, workers, batch_size, drop_last, shuffle_buffer, epoch=0):
    """Per rank the batches of an epoch, as lists of tile numbers, -1 where nothing of a tile is labelled."""
    tiles = streamed(folder, shuffle_buffer=shuffle_buffer)
    tiles.set_epoch(epoch)
    per_rank = []
    for rank in range(ranks):
        share = tiles.share(rank, ranks, batch_size, drop_last)
        loader = DataLoader(share, batch_size, collate_fn=list, num_workers=workers)
        batches = list(loader)
        assert len(batches) == len(loader)
        per_rank.append(batches)
    return per_rank


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("shuffle_buffer", [0, 6])
def test_no_tile_is_lost_or_repeated_in_an_epoch_of_ranks_and_workers(folder, workers, shuffle_buffer):
    # Workers that iterate a stream of `datasets` each take a part of what the rank has; ranks that share out whole files
    # have unequally many steps.
    for ranks in (1, 2, 3):
        per_rank = epoch_of(folder, ranks, workers, 2, False, shuffle_buffer)
        assert len({len(batches) for batches in per_rank}) == 1, "a rank with fewer steps hangs the others"
        items = [item for batches in per_rank for batch in batches for item in batch]
        counted = collections.Counter(numbers(items))
        assert set(counted) == set(range(19))
        labelled = collections.Counter(
            n for n, item in zip(numbers(items), items, strict=True) if (item["labels"] != 255).any()
        )
        assert labelled == collections.Counter(n for n in range(19) if n % 3 != 2), "what is repeated has no labels"
        assert len(items) - 19 < ranks


def test_training_leaves_out_less_than_a_batch_of_each_rank_and_no_tile_comes_twice(folder):
    for ranks, workers in ((1, 0), (2, 2)):
        left_out = []
        for epoch in (0, 1, 2):
            per_rank = epoch_of(folder, ranks, workers, 2, True, 6, epoch)
            assert {len(batch) for batches in per_rank for batch in batches} == {2}
            assert {len(batches) for batches in per_rank} == {19 // (2 * ranks)}
            seen = numbers(item for batches in per_rank for batch in batches for item in batch)
            assert len(set(seen)) == len(seen)
            left_out.append(set(range(19)) - set(seen))
        assert len({frozenset(x) for x in left_out}) > 1, "other tiles are left out in other epochs"


def test_every_epoch_and_seed_has_an_order_of_its_own(folder):
    def order(epoch, seed):
        tiles = streamed(folder, shuffle_buffer=6)
        share = tiles.share(0, 1, 2, False, seed)
        share.set_epoch(epoch)
        return numbers(share)

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(epoch, seed)) for epoch in range(3) for seed in range(2)}) == 6
    assert order(0, 0) != sorted(order(0, 0))


def test_workers_that_outlive_an_epoch_see_the_next_one(folder):
    tiles = streamed(folder, shuffle_buffer=6)
    loader = DataLoader(tiles.share(0, 1, 2, False), 2, collate_fn=numbers, num_workers=1, persistent_workers=True)
    first = list(loader)
    tiles.set_epoch(1)
    assert list(loader) != first
    tiles.set_epoch(0)
    assert list(loader) == first


def test_crop_of_a_tile_does_not_depend_on_ranks_workers_and_place(folder):
    def crops(ranks, workers):
        tiles = streamed(folder, TrainTransform(8, photometric=False), shuffle_buffer=6)
        items = [
            item
            for rank in range(ranks)
            for batch in DataLoader(tiles.share(rank, ranks, 1, True, 7), 1, collate_fn=list, num_workers=workers)
            for item in batch
        ]
        return {item["row"]: item["labels"] for item in items}

    torch.manual_seed(0)
    one = crops(1, 0)
    torch.manual_seed(1)
    two = crops(2, 2)
    assert len(one) == 19 and len(two) == 18
    assert all(torch.equal(one[row], two[row]) for row in two)


@given(
    files=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    ranks=st.integers(1, 5),
    workers=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    drop_last=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_spans_cover_every_place_once(files, ranks, workers, batch_size, drop_last):
    total = sum(files)
    length = total // (ranks * batch_size) * batch_size if drop_last else -(-total // ranks)
    found = collections.Counter()
    for rank in range(ranks):
        counts = []
        for worker in range(workers):
            first, count = span_of_worker(length, batch_size, worker, workers)
            counts.append(count)
            for file, start, number, counts_here in runs(files, range(len(files)), rank * length + first, count):
                assert start >= 0 < number and start + number <= files[file]
                found.update((file, place) for place in range(start, start + number) if counts_here)
        assert sum(counts) == length
        batches = [c // batch_size for c in counts]
        assert sum(c % batch_size > 0 for c in counts) <= 1
        assert batches == sorted(batches, reverse=True) and batches[0] - batches[-1] <= 1 + (length % batch_size > 0)
    assert set(found.values()) <= {1}
    assert len(found) == (ranks * length if drop_last else total)


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 5))
def test_shuffling_keeps_every_item(length, size, seed):
    assert sorted(shuffled(iter(range(length)), size, np.random.default_rng(seed))) == list(range(length))


def test_extra_bands_are_streamed_behind_the_image(tmp_path):
    items = list(streamed(write_tiles(tmp_path / "tiles", files=(2, 1), bands=5)))
    assert [item["image"].shape for item in items] == [(5, 32, 32)] * 3
    assert [item["image"][:, 0, 0].tolist() for item in items] == [[n] * 3 + [100 + n] * 2 for n in range(3)]


def stream_trainer(tmp_path, folder, workers=0, model=None, **changes):
    args = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "dataloader_num_workers": workers}
    args |= {"learning_rate": 1e-2, "logging_steps": 1, "dataloader_pin_memory": False}
    return SegmentationTrainer(
        model or tiny_model("segformer"),
        SegmentationConfig(**args | changes),
        train_dataset=streamed(folder, TrainTransform(32), shuffle_buffer=6),
        eval_dataset=streamed(folder),
        processing_class=PROCESSOR,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, folder, workers):
    options = {"workers": workers, "max_steps": 13, "save_strategy": "steps", "save_steps": 5, "seed": 3}
    whole = stream_trainer(tmp_path / "whole", folder, **options)
    whole.train()
    expected = whole.model.state_dict()
    for step in (5, 10):  # amid the first epoch of nine steps, and amid the second one
        again = stream_trainer(tmp_path / f"from {step}", folder, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert again.state.global_step == 13
        assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())


def test_length_of_an_epoch_is_known_without_max_steps(tmp_path, folder):
    trainer = stream_trainer(tmp_path, folder, num_train_epochs=2, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 2 * (19 // 2) and trainer.state.epoch == 2


def test_other_workers_are_refused_when_a_stream_is_resumed(tmp_path, folder):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    stream_trainer(tmp_path, folder, **options).train()
    with pytest.raises(UserError, match="dataloader_num_workers=0 and this run has 1"):
        stream_trainer(tmp_path, folder, workers=1, **options).train(str(tmp_path / "checkpoint-1"))


def test_other_tiles_are_refused_when_a_run_is_resumed(tmp_path, folder):
    # Only options of the trainer were compared: a run went on with another dataset, other bands or other crops, and the
    # card named the last ones for all of it.
    def trainer(data=None, bands=("red", "green", "blue"), mean=0.5):
        made = stream_trainer(tmp_path, folder, max_steps=1, save_strategy="steps", save_steps=1)
        made.train_dataset = data or streamed(folder, TrainTransform(32), shuffle_buffer=6)
        made.data_collator = SegmentationCollator(SegformerImageProcessor(image_mean=[mean] * 3))
        made.model.config.bands = list(bands)
        return made

    trainer().train()
    checkpoint = tmp_path / "checkpoint-1"
    trainer().require_same_settings(checkpoint)
    fewer = write_tiles(tmp_path / "fewer", files=(5, 3, 7))
    stored = load_dataset(str(folder), split="train").with_transform(TrainTransform(32))
    for name, other in {
        "shuffle_buffer": {"data": streamed(folder, TrainTransform(32), shuffle_buffer=4)},
        "crop_size": {"data": streamed(folder, TrainTransform(16), shuffle_buffer=6)},
        "scale": {"data": streamed(folder, TrainTransform(32, scale=(1, 2)), shuffle_buffer=6)},
        "photometric": {"data": streamed(folder, TrainTransform(32, photometric=False), shuffle_buffer=6)},
        "number of tiles": {"data": streamed(fewer, TrainTransform(32), shuffle_buffer=6)},
        "streaming": {"data": stored},
        "bands": {"bands": ("near_infrared", "red", "green")},
        "normalization": {"mean": 0.4},
    }.items():
        with pytest.raises(UserError, match=f"trained with {name}="):
            trainer(**other).require_same_settings(checkpoint)
    assert trainer(stored)._settings().items() >= TrainTransform(32).settings.items()
    (checkpoint / "run_settings.json").unlink()  # as older checkpoints have none
    with pytest.raises(UserError, match="it reads the bands red, green, blue, the model near_infrared, red, green"):
        trainer(bands=("near_infrared", "red", "green")).train(str(checkpoint))


RANKS = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.test_streaming import stream_trainer, tiny_student
out, folder = Path(sys.argv[1]), Path(sys.argv[3])
trainer = stream_trainer(out, folder, workers=1, model=tiny_student("segformer"), num_train_epochs=2,
                         save_strategy="no", eval_strategy="epoch", gradient_accumulation_steps=3, ddp_find_unused_parameters=False)
seen = []
collate = trainer.data_collator
def note(items):
    return collate(items) | {"rows": torch.tensor([item.get("row", -1) for item in items])}
trainer.data_collator = note
for batch in trainer.get_train_dataloader():
    seen += batch["rows"].tolist()
trainer.data_collator = collate
trainer.train()
scores = trainer.evaluate()
torch.save({"seen": seen, "weights": trainer.model.state_dict(), "steps": trainer.state.global_step,
            "scores": {k: v for k, v in scores.items() if "iou" in k or "accuracy" in k}},
           f"{out}/rank{trainer.args.process_index}.pt")
"""


def test_two_ranks_train_and_evaluate_from_streams(tmp_path, folder):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0", str(script), str(tmp_path), str(ROOT), str(folder)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first["seen"]) == len(second["seen"]) == 8, "19 tiles are 4 batches of 2 on each rank"
    assert len(set(first["seen"] + second["seen"])) == 16
    assert first["steps"] == second["steps"] == 4
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    # The same weights evaluated by one process.
    alone = stream_trainer(tmp_path / "alone", folder, model=tiny_student("segformer"), save_strategy="no")
    alone.model.load_state_dict(first["weights"])
    scores = alone.evaluate()
    for name, value in first["scores"].items():
        assert second["scores"][name] == value == pytest.approx(scores[name], abs=1e-6), name


class TileReader:
    """Sources of 40 x 40 pixels whose classes are readable from the colours; the last one has no labels."""

    bands = ("red", "green", "blue", "near_infrared")

    def header(self, record):
        return SourceHeader(record.name, 40, 40, identity="", labelled=record.name != "source 3")

    def read(self, record):
        rng = np.random.default_rng(int(record.name[-1]))
        label = np.kron(rng.integers(0, 3, (5, 5)), np.ones((8, 8), int)).astype(np.uint8)
        image = (80 * label[..., None] + rng.integers(0, 60, (40, 40, 4))).astype(np.uint8)
        return SourceImage(record.name, image, None if record.name == "source 3" else label)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "tiles"
    facts = DatasetFacts("squares", tuple(SegmentationClass(n, (i, i, i)) for i, n in enumerate(LABELS.values())))
    records = [SimpleNamespace(name=f"source {number}") for number in range(4)]
    prepare_dataset({"train": records, "validation": records[:2]}, TileReader(), facts, folder, 32, stride=16)
    return folder


def options_of(folder, **changes):
    return DataArguments(dataset=str(folder), crop_size=32, evaluate_on=["validation"], **changes)


def test_streamed_and_stored_splits_are_scored_alike(tmp_path, prepared):
    stored, streamed_ = load_splits(prepared), load_splits(prepared, streaming=True)
    model = tiny_model("segformer")
    arguments = {"batch_size": 3, "device": "cpu", "channels": [0, 1, 2]}
    expected = evaluate_model(model, PROCESSOR, stored["validation"], **arguments)
    found = evaluate_model(model, PROCESSOR, streamed_["validation"], **arguments, info=streamed_.info)
    assert expected.matrix.sum() == 2 * 40 * 40 and (found.matrix == expected.matrix).all()
    with pytest.raises(UserError, match="give info=splits.info"):
        evaluate_model(model, PROCESSOR, streamed_["validation"], **arguments)

    trainers = []
    for splits, streaming in ((stored, False), (streamed_, True)):
        datasets = train_and_validation(splits, options_of(prepared, streaming=streaming))
        args = SegmentationConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, student_channels=[0, 1, 2],
            per_device_eval_batch_size=3,
        )  # fmt: skip
        trainers.append(SegmentationTrainer(model, args, processing_class=PROCESSOR, **datasets))
    scores = [trainer.evaluate() for trainer in trainers]
    assert scores[0]["eval_mean_iou"] == scores[1]["eval_mean_iou"]
    assert len(trainers[0].train_dataset) == len(trainers[1].train_dataset) == 16


def test_a_split_without_labels_is_refused_before_the_training(prepared):
    # The test split of Cityscapes has no labels: after all steps its scores were NaN.
    splits = load_splits(prepared)
    shares = splits.info.pixel_shares | {"validation": dict.fromkeys(LABELS.values(), 0.0)}
    splits.info = replace(splits.info, pixel_shares=shares)
    with pytest.raises(UserError, match="validation has no labels to be scored on, leave it out of --evaluate_on"):
        train_and_validation(splits, options_of(prepared))


def test_student_is_distilled_from_a_stream_with_unlabelled_tiles(tmp_path, prepared):
    splits = load_splits(prepared, streaming=True)
    datasets = train_and_validation(splits, options_of(prepared, streaming=True, shuffle_buffer=4))
    args = config(
        tmp_path, max_steps=10, learning_rate=1e-2, per_device_train_batch_size=2, student_channels=[0, 1, 2]
    )
    trainer = DistillationTrainer(
        tiny_model("segformer"), tiny_model("upernet", width=2), args, processing_class=PROCESSOR, **datasets
    )
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "spatial_relation" in entry]
    assert len(losses) == 10 and all(np.isfinite(entry["loss"]) for entry in losses)
    unlabelled = [item for item in trainer.train_dataset if item["source"] == "source 3"]
    assert len(unlabelled) == 4 and all((item["labels"] == 255).all() for item in unlabelled)
