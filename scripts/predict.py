"""Class maps of images and rasters of any size: cloud optimised GeoTIFF, or PNG for images without georeference.

python scripts/predict.py orthophoto.tif --model runs/student --output maps
python scripts/predict.py tiles/ "more/**/*.tif" --model runs/student --output maps --vector gpkg
python scripts/predict.py photo.jpg --model student.onnx --output maps --probabilities
accelerate launch --num_processes 4 scripts/predict.py mosaic.tif --model runs/student --output maps --dtype bf16

A second run makes only what is missing. Names of outputs are those of the inputs; where two inputs have one name, their
folders are kept.
"""

import argparse
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from drd_hf.data.splits import read_info
from drd_hf.errors import UserError, run_script
from drd_hf.evaluation.tiles import check_labels, usable_device
from drd_hf.export import load_segmenter
from drd_hf.features import input_channels
from drd_hf.inference import model_fingerprint, predict_raster, source_facts, window_grid
from drd_hf.inference.files import check_outputs, find_images, name_outputs, share_out

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="Images, folders of images and globs in quotes.")
    add("--model", required=True, help="Folder or Hub id of a checkpoint, or an .onnx file of export_onnx.py.")
    add("--output", required=True, type=Path, help="Folder for the maps.")
    add("--dataset", help="Prepared dataset: refuse a model of other classes, and draw in the colours of the dataset.")
    add("--recursive", action="store_true", help="Also the folders in a folder.")
    add("--tile", type=int, default=512, help="Side of the windows in pixels. Default: 512.")
    add("--overlap", type=float, default=0.25, help="Share of a window that the next one covers. Default: 0.25.")
    add("--batch_size", type=int, default=4, help="Windows per forward pass. Default: 4.")
    add("--bands", type=int, nargs="+", help="Numbers of the bands, from 1, in the order of the model. Default: all.")
    add("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")
    add("--dtype", choices=DTYPES, default="fp32", help="Numbers that the model computes in. Default: fp32.")
    add("--probabilities", action="store_true", help="Also NAME-probabilities.tif, a band for each class.")
    add("--vector", choices=["gpkg", "geojson"], help="Also the polygons of equal class (extra: vector).")
    add("--overwrite", action="store_true", help="Replace maps and polygons of other models, options or versions.")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse()
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: give at least 1")
    window_grid(1, 1, args.tile, args.overlap)  # refuses what would be wrong for every input
    cpu = args.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=30))  # the others may wait for one that has much to do
    model, processor = load(args, state.device)
    if args.bands and (len(args.bands) != input_channels(model) or min(args.bands) < 1):
        raise UserError(
            f"--bands {' '.join(map(str, args.bands))}: give {input_channels(model)} numbers from 1, which the model reads"
        )
    colors = None
    if args.dataset:
        info = read_info(args.dataset)
        check_labels(model, info.id2label, args.model)
        colors = info.colors
    fingerprint = model_fingerprint(model, processor)
    failures = []

    def attempt(function, source: str, *rest, report: bool = True):
        """The result, None if this input failed: the others go on."""
        try:
            return function(source, *rest)
        except UserError as error:
            if report:
                failures.append(source)
                tqdm.write(f"error: {error}", file=sys.stderr)

    def outputs_of(source: str) -> tuple[str, str | None, str | None]:
        """Map, probabilities and polygons."""
        name = args.output / names[source]
        return (
            f"{name}.tif" if facts[source].georeferenced else f"{name}.png",
            f"{name}-probabilities.tif" if args.probabilities else None,
            f"{name}.{args.vector}" if args.vector else None,
        )

    def predict(source: str, shared_state: PartialState | None) -> bool:
        name = args.output / names[source]
        destination, probabilities, vector = outputs_of(source)
        try:
            name.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{name.parent}: cannot be made a folder ({error.strerror})") from error
        return predict_raster(
            model,
            processor,
            source,
            destination,
            args.tile,
            args.overlap,
            args.batch_size,
            args.bands,
            probabilities,
            vector,
            colors,
            args.overwrite,
            progress=state.is_main_process,
            fingerprint=fingerprint,
            state=shared_state,
        )

    sources = find_images(args.inputs, args.recursive, leave_out=args.output)
    facts = {source: attempt(source_facts, source, report=state.is_main_process) for source in sources}
    readable = [source for source in sources if facts[source]]
    names = name_outputs(readable)
    check_outputs({source: [Path(path) for path in outputs_of(source) if path] for source in readable})
    shared, alone = share_out([facts[source].height * facts[source].width for source in readable], state.num_processes)
    jobs = [(readable[i], state) for i in shared] + [(readable[i], None) for i in alone[state.process_index]]
    made = []
    for source, shared_state in tqdm(jobs, desc="files", unit="file", disable=not state.is_main_process):
        mine = state.is_main_process or shared_state is None
        done = attempt(predict, source, shared_state, report=mine)
        made += [done] if mine else []
    failures, made = gather_object(failures), gather_object(made)
    if state.is_main_process:
        print(
            f"{made.count(True)} predicted, {made.count(False)} complete before, {len(failures)} failed: {args.output}"
        )
        if failures:
            raise UserError(f"{len(failures)} of {len(sources)} inputs failed, see above")


def load(args: argparse.Namespace, default_device: torch.device) -> tuple:
    device = usable_device(args.device or default_device)
    if not args.model.endswith(".onnx"):
        model, processor = load_segmenter(args.model)
        return model.to(device, DTYPES[args.dtype], memory_format=torch.channels_last), processor
    if args.dtype != "fp32":
        raise UserError(f"--dtype {args.dtype}: {args.model} computes in what it was exported with, leave it out")
    cuda = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    model, processor = load_segmenter(args.model, providers=cuda if device.type == "cuda" else None)
    return model.to(device), processor


if __name__ == "__main__":
    run_script(main)
