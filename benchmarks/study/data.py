"""The prepared folders of a study: one for each fold, and copies in which a share of the training images has labels."""

import math
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from huggingface_hub import DatasetCard

from benchmarks.study.lines import ROOT, locked
from benchmarks.study.plan import Data, Study
from drd_hf.data.splits import read_info
from drd_hf.errors import UserError


def ensure_data(study: Study, data: Data, locks: Path) -> None:
    """Make the folder if it is not there; another runner that is at it is waited for.

    Raises:
        UserError: it is missing and the study does not say how it is prepared.
    """
    with locked(locks, f"data {data.folder}"):
        if not (ROOT / data.fold.folder / "README.md").is_file():
            _prepare(study, data)
        if data.labelled < 1 and not (ROOT / data.folder / "README.md").is_file():
            keep_labels(ROOT / data.fold.folder, ROOT / data.folder, data.labelled, data.only_labelled)


def _prepare(study: Study, data: Data) -> None:
    fold, options = data.fold, data.fold.prepare or study.prepare
    if options is None:
        raise UserError(
            f"{fold.folder}: no prepared dataset; make it with prepare_dataset.py, or give `prepare` in the study"
        )
    words = ["scripts/prepare_dataset.py", *shlex.split(options), "--output", fold.folder]
    if study.layout is not None:
        layout = ROOT / study.layout
        if fold.splits is not None:
            content = yaml.safe_load(layout.read_text()) | {"splits": fold.splits}
            layout = ROOT / f"{fold.folder}_layout.yaml"
            layout.parent.mkdir(parents=True, exist_ok=True)
            layout.write_text(yaml.safe_dump(content, sort_keys=False))
        words += ["--layout", os.path.relpath(layout, ROOT)]
    print("$", shlex.join(("python", *words)), flush=True)
    if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        raise UserError(f"{fold.folder}: could not be prepared, see above")


def labelled_sources(sources: list[str], share: float) -> set[str]:
    """The images that keep their labels: the same ones every time, and those of a smaller share among them."""
    drawn = sorted(set(sources))
    random.Random(0).shuffle(drawn)
    return set(drawn[: max(1, math.ceil(share * len(drawn) - 1e-9))])


def keep_labels(source: Path, destination: Path, share: float, only_labelled: bool) -> None:
    """Copy a prepared dataset, with labels for a share of the training images.

    The tiles of the others stay, their labels null, or are left out with `only_labelled`. What the card says about
    pixels of the training split stays that of the whole.
    """
    info = read_info(source)
    train = sorted((source / "data").glob("train-*.parquet"))
    kept = labelled_sources([s for path in train for s in _column(path, "source")], share)
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        (staging / "data").mkdir()
        tiles = 0
        for path in sorted((source / "data").glob("*.parquet")):
            if path not in train:
                shutil.copyfile(path, staging / "data" / path.name)
                continue
            table = pq.read_table(path)
            labelled = pa.array([s in kept for s in table["source"].to_pylist()])
            if only_labelled:
                table = table.filter(labelled)
            else:
                for name in [n for n in table.column_names if n.startswith("label")]:
                    column = table[name]
                    values = [v if k else None for v, k in zip(column.to_pylist(), labelled.to_pylist(), strict=True)]
                    table = table.set_column(
                        table.schema.get_field_index(name), table.field(name), pa.array(values, column.type)
                    )
            tiles += table.num_rows
            pq.write_table(table, staging / "data" / path.name, row_group_size=100)
        card = DatasetCard.load(source / "README.md", ignore_metadata_errors=True)
        facts = card.data["segmentation"]
        facts["splits"]["train"]["tiles"] = tiles
        for sizes_of_the_whole in ("splits", "download_size", "dataset_size"):  # `load_dataset` would check them
            card.data["dataset_info"].pop(sizes_of_the_whole, None)
        what = "the others left out" if only_labelled else "the others without"
        total = info.num_sources["train"]
        facts["notes"] = [*facts.get("notes", []), f"{len(kept)} of {total} training images with labels, {what}"]
        card.save(staging / "README.md")
        os.chmod(staging, 0o755)
        os.replace(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _column(path: Path, name: str) -> list:
    return pq.read_table(path, columns=[name])[name].to_pylist()
