"""Class maps of rasters of any size: rows of windows are read, predicted and written as they complete."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import torch
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from drd_hf import __version__
from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.data.rasters import DAMAGE
from drd_hf.data.transforms import normalization_of
from drd_hf.errors import UserError
from drd_hf.features import input_channels
from drd_hf.inference.maps import (
    PROBABILITY_SCALE,
    RUN_TAG,
    MapWriter,
    class_colors,
    close_part,
    describe,
    finish_map,
    join_parts,
    part_path,
    run_of,
)
from drd_hf.inference.polygons import FORMATS, check_polygons, run_of_polygons, write_polygons
from drd_hf.inference.windows import NotFinite, WindowGrid, blended_blocks, class_ids, window_grid
from drd_hf.models import bands_of, colors_of

# A cache of GDAL's default size, a twentieth of the machine, would be most of what a prediction takes; rasterio takes
# bytes. A damaged JPEG is an error, not grey.
GDAL_OPTIONS = {
    "GDAL_CACHEMAX": 2**26,
    "GDAL_PAM_ENABLED": True,
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,
}
PIECE_BYTES = 2**24
ROOM_BYTES = 112 * 2**20  # for what grows with the width of a raster, and GDAL's cache, which gets the rest
NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}  # settings that change no answer


@dataclass(frozen=True)
class SourceFacts:
    """Of a raster: height and width in pixels, and whether it says where on Earth it lies."""

    height: int
    width: int
    georeferenced: bool


@dataclass(frozen=True)
class _Job:
    """What is made from what. `fingerprint` is that of the model, the source and every option that changes pixels."""

    source: str
    destination: Path
    probabilities: Path | None
    vector: Path | None
    bands: tuple[int, ...] | None
    grid: WindowGrid
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    tags: dict[str, str]

    @property
    def folder(self) -> Path:
        """For everything unfinished; a killed run leaves it behind, and the next one clears it."""
        return self.destination.with_name(f".{self.destination.name}.tmp")

    @property
    def outputs(self) -> list[Path]:
        return [path for path in (self.destination, self.probabilities, self.vector) if path]


def predict_raster(
    model: PreTrainedModel,
    processor,
    source: str | Path,
    destination: str | Path,
    tile: int = 512,
    overlap: float = 0.25,
    batch_size: int = 4,
    bands: Sequence[int] | None = None,
    probabilities: str | Path | None = None,
    vector: str | Path | None = None,
    colors: Sequence[tuple[int, int, int]] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    fingerprint: str | None = None,
    state=None,
) -> bool:
    """The class map of a raster of any size, as `predict_image` would give it, in bounded memory.

    The map is uint8, class ids and 255 where the source has no data (no-data value, alpha or mask). It keeps the
    source's coordinate reference system, transform, ground control points and RPCs, and carries the colours and names of
    the classes. It is a cloud optimised GeoTIFF; names are also in `destination.aux.xml`, where GIS programs look for
    them. A destination that ends in .png becomes a palette PNG, which has no georeference.

    Whatever has one of the final names is complete: files are written in a folder beside the destination and moved
    when they are whole. A second call makes only what is missing.

    Args:
        model, processor, tile, overlap, batch_size: as in `predict_image`.
        source: whatever rasterio opens, with bands of 8 bits.
        destination: .tif, .tiff or .png.
        bands: numbers of the source's bands, from 1, in the order in which the model reads them. None: all of them, if
            they are as many as the model reads; alpha is left out where there is one more.
        probabilities: .tif for one more GeoTIFF with a band for each class: uint8, 250 times the probability (the scale,
            0.004, is in the file), 255 where there is no data.
        vector: .gpkg or .geojson for the polygons of equal class, with `class_id`, `class` and an area: `area_m2` on the
            ellipsoid, whatever the projection, or `area_px` without a reference system. A GeoPackage has the
            coordinates of the source (pixels, if it has none), GeoJSON has degrees of WGS 84. Needs the extra `vector`.
            Memory grows with the number of polygons, not of pixels.
        colors: K RGB colours, 0-255. None: those of the model (`class_colors` in its configuration); without, those of
            ISPRS or Cityscapes where the classes are theirs, else bright ones.
        overwrite: replace what was made by another model, from another source or with other options.
        progress: show a bar over the windows.
        fingerprint: `model_fingerprint(model, processor)`, to compute it once for many rasters.
        state: of `accelerate`, a PartialState or Accelerator. Each of its processes predicts a strip of the raster, the
            first one joins the strips. All have to call this function, with the same arguments.

    Returns:
        Whether anything had to be done.

    Raises:
        UserError: the source cannot be read or does not fit the model, the outputs cannot be written, or they exist and
            are not those that this call would make, or another process is making them; the model answers with NaN or
            infinity; the GPU has too little memory.
    """
    index, count = (state.process_index, state.num_processes) if state else (0, 1)
    fingerprint = fingerprint or model_fingerprint(model, processor)

    def plan() -> tuple[_Job, set[str]]:
        return _plan(
            model, processor, source, destination, tile, overlap, bands, probabilities, vector, colors, overwrite, fingerprint
        )  # fmt: skip

    job, todo = _together(state, source, plan)
    if not _first_of(state, todo):
        return False
    with contextlib.ExitStack() as held:
        _together(state, source, lambda: index == 0 and held.enter_context(_locked(job)))
        job, todo = _together(state, source, plan)  # the process that held the lock may have made all of it
        if not todo:
            return False
        count = min(count, len(job.grid.rows))
        if "map" in todo:
            _together(
                state,
                source,
                lambda: index < count and _predict_part(model, processor, job, index, count, batch_size, progress),
            )
        _together(state, source, lambda: index == 0 and _finish(job, count, todo))
    return True


def source_facts(source: str | Path) -> SourceFacts:
    """Size and georeference of a raster.

    Raises:
        UserError: it is missing, is no raster or has no pixels.
    """
    with _opened(source) as dataset:
        georeferenced = bool(dataset.crs or not dataset.transform.is_identity or dataset.gcps[0] or dataset.rpcs)
        return SourceFacts(dataset.height, dataset.width, georeferenced)


def model_fingerprint(model: PreTrainedModel, processor) -> str:
    """A hash of the weights, their type, the classes and the normalisation: equal for models that give equal maps."""
    content = hashlib.sha256()
    facts = [__version__, dict(model.config.id2label), bands_of(model.config), normalization_of(processor)]
    if isinstance(model, torch.nn.Module):
        settings = model.config.to_dict()
        facts += [str(model.dtype), {key: settings[key] for key in sorted(settings) if key not in NOT_OF_THE_MODEL}]
        for name, tensor in model.state_dict().items():
            content.update(name.encode())
            content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:  # an ONNX file
        content.update(model.path.read_bytes())
    content.update(json.dumps(facts, default=str).encode())
    return content.hexdigest()


def _together(state, source: str | Path, work: Callable[[], object]):
    """Do the same in all processes; what fails in one of them is raised in all, so that none waits for it forever."""
    result, error = None, None
    try:
        result = work()
    except UserError as failure:
        error = failure
    except torch.OutOfMemoryError as failure:
        error = UserError(
            f"{source}: out of memory, give a smaller batch_size or tile ({str(failure).splitlines()[0]})"
        )
    if state is not None and state.num_processes > 1:
        errors = [text for text in gather_object([error and str(error)]) if text]
        if errors:
            raise UserError(errors[0])
    elif error:
        raise error
    return result


def _first_of(state, value):
    """The value of the first process, in all of them."""
    return gather_object([value])[0] if state is not None and state.num_processes > 1 else value


@contextlib.contextmanager
def _locked(job: _Job) -> Iterator[None]:
    """The outputs and the folder of a job, for one process at a time; the folder is removed at the end."""
    with contextlib.ExitStack() as held:
        for path in sorted(job.outputs):
            held.enter_context(_lock(path))
        try:
            yield
        finally:
            shutil.rmtree(job.folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    file = path.with_name(f".{path.name}.tmp.lock")
    lock = FileLock(file)
    busy = UserError(f"{path}: is being made by another process; wait until it is done")
    with _writing(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise busy from None
    try:
        if not file.exists():  # of a process that has removed it since it was opened here
            raise busy
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
    finally:
        lock.release()


def _plan(
    model, processor, source, destination, tile, overlap, bands, probabilities, vector, colors, overwrite, fingerprint
) -> tuple[_Job, set[str]]:
    """The job, and what of it is still to do."""
    source, destination = str(source), Path(destination)
    probabilities, vector = probabilities and Path(probabilities), vector and Path(vector)
    names = tuple(str(model.config.id2label[i]) for i in range(model.config.num_labels))
    _check_outputs(source, destination, probabilities, vector)
    if len(names) > IGNORE_INDEX:
        raise UserError(f"the model has {len(names)} classes: a map of 8 bits holds at most {IGNORE_INDEX}")
    colors = (colors_of(model.config) or class_colors(names)) if colors is None else colors
    colors = tuple(tuple(map(int, color)) for color in colors)
    if len(colors) != len(names):
        raise UserError(f"{len(colors)} colours for {len(names)} classes: pass one colour per class")
    with _opened(source) as dataset:
        grid = window_grid(dataset.height, dataset.width, tile, overlap)
        chosen = _choose_bands(model, dataset, source, bands)
        if vector:
            check_polygons(vector, source, dataset.crs)
    file = Path(source)
    options = {
        "model": fingerprint,
        "source": [file.name, file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else [source],
        "bands": chosen,
        "tile": tile,
        "overlap": overlap,
        "colors": colors,
    }
    run = hashlib.sha256(json.dumps(options, default=str).encode()).hexdigest()[:32]
    tags = {
        RUN_TAG: run,
        "MODEL": Path(str(model.config.name_or_path)).name,
        "TILE": str(tile),
        "OVERLAP": str(overlap),
    }
    tags["SOFTWARE"] = f"drd_hf {__version__}"
    job = _Job(source, destination, probabilities, vector, chosen, grid, names, colors, tags)
    return job, {"map", *(["vector"] if vector else [])} if overwrite else _missing(job, run)


def _missing(job: _Job, run: str) -> set[str]:
    remedy = "give --overwrite (overwrite=True) to replace it, or another output"
    same = {}
    for path in filter(None, (job.destination, job.probabilities)):
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # a broken link counts as a file
            with _environment():
                same[path] = run_of(path) == run
    for path, ours in same.items():
        if not ours:
            raise UserError(f"{path}: was not made from this source by this model with these options: {remedy}")
    todo = set() if all(path in same for path in filter(None, (job.destination, job.probabilities))) else {"map"}
    if job.vector:
        exists = job.vector.exists()
        if exists and run_of_polygons(job.vector) != run:
            raise UserError(f"{job.vector}: was not made from the map that {job.destination} is or will be: {remedy}")
        if todo or not exists:
            todo.add("vector")
    return todo


def _check_outputs(source: str, destination: Path, probabilities: Path | None, vector: Path | None) -> None:
    wanted = {destination: {".tif", ".tiff", ".png"}, probabilities: {".tif", ".tiff"}, vector: set(FORMATS)}
    wanted.pop(None, None)
    if len(wanted) < 1 + bool(probabilities) + bool(vector):
        raise UserError(f"{destination}: is named for two outputs")
    for path, endings in wanted.items():
        if path.suffix.lower() not in endings:
            raise UserError(f"{path}: give it a name that ends in {' or '.join(sorted(endings))}")
        if not path.resolve().parent.is_dir():
            raise UserError(f"{path}: its folder does not exist")
        if path.is_dir():
            raise UserError(f"{path}: is a folder")
        if path.exists() and os.path.exists(source) and path.samefile(source):
            raise UserError(f"{path}: is the source itself: choose another output")


def _choose_bands(model, dataset, source: str, bands: Sequence[int] | None) -> tuple[int, ...] | None:
    """Band numbers, or None for the three colours of a palette."""
    number, names = input_channels(model), bands_of(model.config)
    reads = f"the model reads {number}" + (f" ({', '.join(names)})" if names else "")
    alpha = dataset.count > 1 and dataset.colorinterp[-1] == ColorInterp.alpha
    if bands is None:
        if dataset.colorinterp[0] == ColorInterp.palette and dataset.count == 1 and number == 3:
            return None
        if number not in (dataset.count, dataset.count - alpha):
            bands = f"{dataset.count} band{'s' * (dataset.count > 1)}"
            raise UserError(f"{source}: has {bands}, {reads}: choose them with --bands (bands=)")
        bands = range(1, number + 1)
    bands = tuple(int(band) for band in bands)
    if len(bands) != number:
        raise UserError(f"{source}: {len(bands)} bands are chosen, {reads}")
    if wrong := [band for band in bands if not 1 <= band <= dataset.count]:
        raise UserError(f"{source}: has no band {wrong[0]}, it has {dataset.count}")
    if types := sorted({dataset.dtypes[band - 1] for band in bands} - {"uint8"}):
        raise UserError(
            f"{source}: has {', '.join(types)} values, the model reads 8 bits: convert it, as for training"
        )
    bits = {dataset.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", "8") for band in bands} - {"8"}
    if bits and dataset.colorinterp[0] != ColorInterp.palette:
        raise UserError(f"{source}: has {min(bits)} bits a band, the model reads 8: convert it, as for training")
    return bands


def _predict_part(model, processor, job: _Job, index: int, count: int, batch_size: int, progress: bool) -> None:
    """Write the rows of one of `count` equal ranges of window rows."""
    grid = job.grid
    first, last = (len(grid.rows) * i // count for i in (index, index + 1))
    top, bottom = grid.rows[first], grid.row_ends[last - 1]
    number = model.config.num_labels
    with _writing(job.destination):
        job.folder.mkdir(exist_ok=True)
    total = (last - grid.first_touching(top)) * len(grid.columns)
    bar = tqdm(total=total, desc=Path(job.source).name, unit="window", disable=not progress or index > 0, leave=False)
    bands = {"map": 1} | ({"probabilities": number} if job.probabilities else {})
    with _opened(job.source) as dataset, bar, contextlib.ExitStack() as open_files:
        open_files.enter_context(rasterio.Env(GDAL_CACHEMAX=_cache_bytes(model, dataset, grid)))
        writers = {}
        for kind in bands:
            path = part_path(job.folder, kind, index)
            path.with_suffix(".json").unlink(missing_ok=True)
            with _writing(job.destination):
                writers[kind] = MapWriter(path, bottom - top, grid.width, bands[kind])
                if count == 1:  # the part becomes the whole
                    _describe(job, writers[kind], kind, dataset)
            open_files.enter_context(writers[kind].dataset)
        blocks = blended_blocks(
            model, processor, _reader(dataset, job), grid, batch_size, first, last, progress=bar.update
        )
        # One window row is gathered on the model's device, and leaves it at once: no wait for each window.
        for window_row in range(first, last):
            height = grid.row_ends[window_row] - grid.rows[window_row]
            ids = torch.empty(height, grid.width, dtype=torch.uint8, device=model.device)
            shares = (
                torch.empty(number, *ids.shape, dtype=torch.uint8, device=model.device) if job.probabilities else None
            )
            valid = None
            for _ in grid.columns:
                try:
                    _, column, block, block_valid = next(blocks)
                except NotFinite as error:
                    raise UserError(f"{job.source}: {error}") from None
                columns = slice(column, column + block.shape[2])
                ids[:, columns] = class_ids(block)
                if shares is not None:
                    shares[:, :, columns] = (block / PROBABILITY_SCALE).round_().to(torch.uint8)
                if block_valid is not None:
                    valid = np.ones(ids.shape, bool) if valid is None else valid
                    valid[:, columns] = block_valid
            for kind, rows in (("map", ids[None]), ("probabilities", shares)):
                if kind in writers:
                    rows = rows.cpu().numpy()
                    if valid is not None:
                        rows[:, ~valid] = IGNORE_INDEX
                    with _writing(job.destination):
                        writers[kind].write(rows)
        for writer in writers.values():
            with _writing(job.destination):
                close_part(writer)


def _describe(job: _Job, writer: MapWriter, kind: str, source) -> None:
    reference = None if kind == "map" and job.destination.suffix.lower() == ".png" else source
    describe(writer.dataset, kind, reference, job.names, job.colors, job.tags)


def _cache_bytes(model, dataset, grid: WindowGrid) -> int:
    """Room for GDAL's cache: what the window rows leave, but enough that no block is decoded twice (up to 64 MiB)."""
    height, width = grid.window[0], grid.columns[-1] + grid.window[1]
    shared = max(top + height - end for top, end in zip(grid.rows, grid.row_ends, strict=True))
    taken = width * height * input_channels(model)  # the pixels
    if model.device.type == "cpu":
        taken += 4 * width * shared * model.config.num_labels  # the sums of what two window rows share
    taken += taken // 2  # a process was seen to grow so much faster
    blocks = dataset.block_shapes[0][0] * width * dataset.count
    return max(ROOM_BYTES - taken, min(3 * blocks // 2, GDAL_OPTIONS["GDAL_CACHEMAX"]))


def _reader(dataset, job: _Job) -> Callable[[int, np.ndarray], np.ndarray | None]:
    """`read` of `blended_blocks`: rows of the chosen bands, and where they have data."""
    flags = {flag for band in dataset.mask_flag_enums for flag in band}
    data_is_alpha = job.bands and dataset.colorinterp[-1] == ColorInterp.alpha and dataset.count in job.bands
    masked = flags != {MaskFlags.all_valid} and not data_is_alpha
    colors = np.zeros((256, 4), np.uint8)
    if job.bands is None:
        for index, color in dataset.colormap(1).items():
            colors[index] = color

    def read(row: int, pixels: np.ndarray) -> np.ndarray | None:
        valid = np.ones(pixels.shape[:2], bool) if masked or job.bands is None else None
        try:
            for window in _pieces(dataset, row, len(pixels)):
                place = (slice(window.row_off - row, window.row_off - row + window.height),
                         slice(window.col_off, window.col_off + window.width))  # fmt: skip
                if job.bands is None:
                    drawn = colors[dataset.read(1, window=window)]
                    pixels[place], valid[place] = drawn[..., :3], drawn[..., 3] > 0
                    continue
                dataset.read(job.bands, window=window, out=pixels[place].transpose(2, 0, 1))
                if masked:
                    valid[place] = dataset.dataset_mask(window=window) > 0
        except DAMAGE as error:
            raise UserError(f"{job.source}: is damaged or cut short ({_reason(error)}); get it again") from error
        return valid

    return read


def _pieces(dataset, row: int, count: int) -> Iterator[Window]:
    """Rows in pieces that stay in GDAL's cache until all of their bands are read: nothing is decoded once per band."""
    block_width = dataset.block_shapes[0][1]
    pixels = PIECE_BYTES // dataset.count
    if block_width < dataset.width:
        width = max(pixels // count // block_width, 1) * block_width
        for column in range(0, dataset.width, width):
            yield Window(column, row, min(width, dataset.width - column), count)
    else:
        height = max(pixels // dataset.width, 1)
        for top in range(row, row + count, height):
            yield Window(0, top, dataset.width, min(height, row + count - top))


def _finish(job: _Job, count: int, todo: set[str]) -> None:
    """Join the parts and move everything into place: the probabilities, then the map, then its polygons."""
    with _writing(job.destination):
        job.folder.mkdir(exist_ok=True)
    if "map" in todo:
        made = {}
        with _opened(job.source) as dataset:
            for kind, path in (("probabilities", job.probabilities), ("map", job.destination)):
                if path:
                    final = job.folder / f"final-{kind}{path.suffix.lower()}"
                    made[path] = final
                    # Nothing of what is written depends on a file beside it, but for the names of the classes.
                    with _writing(path), rasterio.Env(GDAL_PAM_ENABLED=False):
                        joined, written = join_parts(
                            job.folder, kind, count, lambda writer, kind=kind: _describe(job, writer, kind, dataset)
                        )
                        if not written.has_data:
                            raise UserError(f"{job.source}: has no pixel with data")
                        finish_map(joined, written, final, job.names)
        if job.vector:
            job.vector.unlink(missing_ok=True)
        for path, final in made.items():
            with _writing(path):
                beside, beside_final = path.with_name(f"{path.name}.aux.xml"), final.with_name(f"{final.name}.aux.xml")
                beside.unlink(missing_ok=True)
                if beside_final.exists():
                    os.replace(beside_final, beside)
                os.replace(final, path)
    if "vector" in todo:
        temporary = job.folder / f"polygons{job.vector.suffix.lower()}"
        with _writing(job.vector), _environment():
            write_polygons(job.destination, temporary, job.names, job.tags[RUN_TAG])
            os.replace(temporary, job.vector)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    with rasterio.Env(**GDAL_OPTIONS), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


@contextlib.contextmanager
def _opened(source: str | Path):
    """A raster for reading; what GDAL cannot open is one line that names it."""
    source = str(source)
    remote = "://" in source or source.startswith("/vsi")
    if not remote and not os.path.exists(source):
        raise UserError(f"{source}: no such file")
    if not remote and os.path.isfile(source) and not os.path.getsize(source):
        raise UserError(f"{source}: is empty")
    with _environment():
        try:
            with _unknown_codes() as unknown:
                dataset = rasterio.open(source)
        except DAMAGE as error:
            raise UserError(f"{source}: cannot be read as an image ({_reason(error, source)})") from error
        with dataset:
            if unknown and not (dataset.crs and (dataset.crs.is_geographic or dataset.crs.is_projected)):
                raise UserError(
                    f"{source}: has the reference system {unknown[0]}, which PROJ does not know: give it the right one"
                )
            if not (dataset.count and dataset.width and dataset.height):
                raise UserError(f"{source}: has no bands of pixels of its own")
            yield dataset


@contextlib.contextmanager
def _unknown_codes() -> Iterator[list[str]]:
    """Codes of reference systems that PROJ does not know: rasterio logs them, and goes on with a local system."""
    codes = []
    handler, logger = logging.Handler(logging.WARNING), logging.getLogger("rasterio")
    handler.emit = lambda record: codes.extend(re.findall(r"crs not found: (\S+)", record.getMessage()))
    logger.addHandler(handler)
    try:
        yield codes
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"{path}: cannot be written, is the disk full? ({_reason(error)})") from error


def _reason(error: BaseException, source: str = "") -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).replace(f"'{source}'", "").split()) or type(error).__name__
