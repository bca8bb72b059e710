"""Many rasters in one run: which files, under which names, in which process."""

import glob
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from drd_hf.errors import UserError

ENDINGS = {".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".vrt", ".img", ".webp", ".bmp"}


def find_images(inputs: Iterable[str], recursive: bool = False, leave_out: Path | None = None) -> list[str]:
    """The images that files, folders and globs (`**` for any folders) mean, each once, in the order given.

    In folders, and in their subfolders where `recursive`, only files with the ending of an image count; hidden ones and
    those below `leave_out` do not. An input that means no image is given back as it is: opening it says what is wrong.
    """
    found = {}
    for text in map(str, inputs):
        path = Path(text)
        if path.is_dir():
            files = sorted(path.rglob("*") if recursive else path.iterdir())
            matches = [
                str(file) for file in files if file.suffix.lower() in ENDINGS and _counts(file, path, leave_out)
            ]
        else:
            is_pattern = not path.exists() and glob.has_magic(text)
            matches = (
                [file for file in sorted(glob.glob(text, recursive=True)) if os.path.isfile(file)]
                if is_pattern
                else []
            )
        for match in matches or [text]:
            found.setdefault(os.path.realpath(match), match)
    return list(found.values())


def _counts(file: Path, folder: Path, leave_out: Path | None) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and not hidden and not (leave_out and leave_out.resolve() in file.resolve().parents)


def name_outputs(sources: Sequence[str]) -> dict[str, Path]:
    """A name without ending for the output of each source: its own, below what tells those of the same name apart.

    >>> {source: str(name) for source, name in name_outputs(["a/x.tif", "b/x.tif", "b/y.tif"]).items()}
    {'a/x.tif': 'a/x', 'b/x.tif': 'b/x', 'b/y.tif': 'y'}
    """
    groups = defaultdict(list)
    for source in sources:
        groups[Path(source).stem.lower()].append(source)
    names = {}
    for group in groups.values():
        folders = [os.path.dirname(os.path.abspath(source)) for source in group]
        common = os.path.commonpath(folders)
        for source, folder in zip(group, folders, strict=True):
            path = Path(os.path.relpath(folder, common)) / Path(source).stem
            beside = [other for other, of in zip(group, folders, strict=True) if of == folder]
            names[source] = path if len(beside) == 1 else path.with_name(Path(source).name)
    return {source: names[source] for source in sources}


def check_outputs(outputs: Mapping[str, Sequence[Path]]) -> None:
    """Refuse a file that is written for two sources, or that is itself another source.

    `x.tif` with probabilities and a source `x-probabilities.tif` mean one file. File systems may ignore case.

    Args:
        outputs: for each source the files that are written for it.

    Raises:
        UserError: names both sources and the file.
    """
    owners = {os.path.realpath(source).lower(): source for source in outputs}
    for source, paths in outputs.items():
        for path in paths:
            owner = owners.setdefault(os.path.realpath(path).lower(), source)
            if owner != source:
                raise UserError(
                    f"{path}: would be written for {source} and is or is made of {owner} too: give them different --output"
                )


def share_out(pixels: Sequence[int], processes: int) -> tuple[list[int], list[list[int]]]:
    """Numbers of the rasters that all processes work on together, and for each process of those that it does alone.

    A raster that is more than one process's part of all pixels is for all of them; the others go, large ones first, to
    the process with the least to do.
    """
    if processes == 1:
        return [], [list(range(len(pixels)))]
    together = [i for i, number in enumerate(pixels) if number * processes > sum(pixels)]
    shares, load = [[] for _ in range(processes)], [0] * processes
    for i in sorted(set(range(len(pixels))) - set(together), key=lambda i: (-pixels[i], i)):
        process = load.index(min(load))
        shares[process].append(i)
        load[process] += pixels[i]
    return together, shares
