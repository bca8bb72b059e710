"""The files of a folder, of a zip or of a folder with zips in it, read in place: nothing is unpacked to disk."""

import io
import os
import re
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from drd_hf.errors import UserError

MAX_MEMBER_BYTES = 16 * 2**30
MAX_MEMBER_RATIO = 1100  # unpacked to packed size; deflate stays below 1032 even for a constant image
SMALL_MEMBER_BYTES = 2**20  # below this no ratio is a danger


@dataclass(frozen=True)
class SourceFile:
    """A file on disk or a member of a zip. Picklable; a process that gets one opens the zip for itself.

    Attributes:
        path: posix path relative to the source; names of zips are part of it, as if they were folders.
        size: in bytes, unpacked.
        disk_path: the file on disk that holds it: itself, or the (outer) zip.
        members: () for a file on disk, (member,) in a zip, (inner zip, member) in a zip inside a zip.
        stamp: modification time in ns of a file on disk, CRC-32 of a member.
    """

    path: str
    size: int
    disk_path: str
    members: tuple[str, ...]
    stamp: int

    def __str__(self) -> str:
        return "/".join((self.disk_path, *self.members))

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self.path).name

    @property
    def local_path(self) -> Path | None:
        """Where it lies on disk; None inside a zip."""
        return None if self.members else Path(self.disk_path)

    def identity(self) -> str:
        """Changes with the content: size and modification time of a file, size and CRC of a member."""
        return f"{self.size}-{self.stamp:08x}"

    def open(self) -> BinaryIO:
        """A seekable file object. The CRC of a member is not checked, see `read_bytes`.

        Raises:
            UserError: the file or its zip is gone, damaged or was replaced.
        """
        with _named(self):
            if not self.members:
                return open(self.disk_path, "rb")
            archive, info = self._member()
            if info.compress_type == zipfile.ZIP_STORED:
                start, window = _stored_window(self.disk_path, self.members)
                return io.BufferedReader(_Window(window, start, info.file_size))
            return io.BufferedReader(_Window(archive.open(info), 0, info.file_size))

    def read_bytes(self) -> bytes:
        """All its bytes; the CRC of a member is checked.

        Raises:
            UserError: the file or its zip is gone, damaged, cut short or was replaced.
        """
        with _named(self):
            if not self.members:
                return Path(self.disk_path).read_bytes()
            archive, info = self._member()
            return archive.read(info)

    def checksum(self) -> int:
        """The CRC-32 of its bytes, which a zip knows without reading them.

        Raises:
            UserError: the file is gone.
        """
        if self.members:
            return self.stamp
        checksum = 0
        with _named(self), open(self.disk_path, "rb") as file:
            while data := file.read(2**20):
                checksum = zlib.crc32(data, checksum)
        return checksum

    def beside(self, ending: str) -> "SourceFile | None":
        """The file beside it that differs only in its ending, such as ".tfw" (in lower or upper case); None without."""
        for found in (ending, ending.upper()):
            path = str(PurePosixPath(self.path).with_suffix(found))
            if not self.members:
                other = Path(self.disk_path).with_suffix(found)
                if other.is_file():
                    return local_file(other, path)
                continue
            member = self.members[-1].removesuffix(PurePosixPath(self.members[-1]).suffix) + found
            with _named(self):
                info = _archive(self.disk_path, self.members[:-1]).NameToInfo.get(member)
            if info is not None:
                return SourceFile(path, info.file_size, self.disk_path, (*self.members[:-1], member), info.CRC)
        return None

    def _member(self) -> tuple[zipfile.ZipFile, zipfile.ZipInfo]:
        archive = _archive(self.disk_path, self.members[:-1])
        info = archive.getinfo(self.members[-1])
        if (info.CRC, info.file_size) != (self.stamp, self.size):
            raise UserError(f"{self}: was replaced while it was in use; start again")
        return archive, info


def local_file(path: str | Path, relative: str | None = None) -> SourceFile:
    """The record of a file on disk.

    Raises:
        UserError: there is no such file.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return SourceFile(relative or Path(path).name, found.st_size, str(path), (), found.st_mtime_ns)


def list_files(source: str | Path, broken: dict[str, str] | None = None) -> list[SourceFile]:
    """All files of a folder, of a zip, or of a folder with zips in it, sorted by path.

    A zip counts as a folder of its name, and so does a zip inside a zip when it is stored there without compression.
    A source that is a zip itself is the first part of the paths. Hidden files and `__MACOSX` are left out.

    Args:
        broken: if given, zips in the source that cannot be listed do not raise: they are left out, and put in here with
            the reason, by path.

    Raises:
        UserError: there is no such source; a zip is damaged, cut short or encrypted; a member has an absolute path, a
            parent path, a backslash or a drive letter, is a link, or claims an absurd size; a link leaves the folder.
    """
    source = Path(source)
    if source.is_dir():
        files = list(_folder_files(source, broken))
    elif source.is_file():
        files = list(_zip_files(str(source), source.name, (), broken))
    else:
        raise UserError(f"{source}: does not exist; give a folder, a zip file or a folder with zip files as --source")
    return sorted(files, key=lambda file: file.path)


def list_readable(source: str | Path, skip_broken: bool) -> tuple[list[SourceFile], list[str]]:
    """`list_files`, and a note on each zip that was left out, which are also told on stderr."""
    broken = {} if skip_broken else None
    files = list_files(source, broken)
    notes = [f"left out, cannot be read: {path} ({why})" for path, why in (broken or {}).items()]
    for note in notes:
        print(f"{source}: {note}", file=sys.stderr)
    return files, notes


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in relative.split("/"))


def _folder_files(source: Path, broken: dict[str, str] | None) -> Iterator[SourceFile]:
    root = source.resolve()

    def stop(error: OSError):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    for folder, names, files in os.walk(source, onerror=stop):
        names[:] = sorted(name for name in names if not _is_hidden(name))
        for name in sorted([*files, *(name for name in names if os.path.islink(os.path.join(folder, name)))]):
            path = Path(folder, name)
            if _is_hidden(name):
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise UserError(f"{path}: is a link out of {source}; copy what it points to, or give that as --source")
            if not path.is_file():
                continue  # links to folders of this tree, sockets, dangling links
            relative = path.relative_to(source).as_posix()
            if path.suffix.lower() == ".zip":
                yield from _zip_or_broken(str(path), relative, (), broken)
            else:
                yield local_file(path, relative)


def _zip_or_broken(
    disk_path: str, relative: str, members: tuple[str, ...], broken: dict[str, str] | None
) -> list[SourceFile]:
    try:
        return list(_zip_files(disk_path, relative, members, broken))
    except UserError as error:
        if broken is None:
            raise
        where = "/".join((disk_path, *members))
        broken[relative] = str(error).removeprefix(f"{where}: ").replace(disk_path, PurePosixPath(disk_path).name)
        return []


def _zip_files(
    disk_path: str, relative: str, members: tuple[str, ...], broken: dict[str, str] | None
) -> Iterator[SourceFile]:
    where = "/".join((disk_path, *members))
    with _named(where):
        archive = _archive(disk_path, members)
    seen = set()
    for info in archive.infolist():
        member = f"{where}/{info.orig_filename}"
        _check_member(info, member)
        name = str(PurePosixPath(info.filename))  # "./a" and "a/./b" are "a" and "a/b"
        if info.is_dir() or _is_hidden(name):
            continue
        if name in seen:
            raise UserError(f"{member}: is in the zip twice; unpack the zip and give the folder as --source")
        seen.add(name)
        path = f"{relative}/{name}"
        if info.filename.lower().endswith(".zip") and not members:
            if info.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{member}: is a compressed zip inside a zip; unpack {disk_path} and give the folder")
            yield from _zip_or_broken(disk_path, path, (info.filename,), broken)
        else:
            yield SourceFile(path, info.file_size, disk_path, (*members, info.filename), info.CRC)


def _check_member(info: zipfile.ZipInfo, member: str) -> None:
    name = info.orig_filename
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/") or re.match("[A-Za-z]:", name):
        raise UserError(f"{member!r}: is no path inside the zip; unpack the zip yourself and give the folder")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise UserError(f"{member}: is a link; unpack the zip yourself and give the folder")
    if info.flag_bits & 1:
        raise UserError(f"{member}: is encrypted; unpack the zip yourself and give the folder")
    packed = max(info.compress_size, 1)
    if info.file_size > MAX_MEMBER_BYTES or (
        info.file_size > SMALL_MEMBER_BYTES and info.file_size / packed > MAX_MEMBER_RATIO
    ):
        raise UserError(
            f"{member}: claims {info.file_size} bytes packed into {info.compress_size}; if you trust the zip, unpack "
            "it yourself and give the folder"
        )


def _archive(disk_path: str, members: tuple[str, ...]) -> zipfile.ZipFile:
    """The open zip, as it is now: one that was replaced is opened anew."""
    found = os.stat(disk_path)
    return _open_archive(os.getpid(), (found.st_mtime_ns, found.st_size, found.st_ino), disk_path, members)


@lru_cache(maxsize=16)
def _open_archive(pid: int, state: tuple[int, ...], disk_path: str, members: tuple[str, ...]) -> zipfile.ZipFile:
    """A forked process must not share a file position with its parent, hence `pid`."""
    if not members:
        return zipfile.ZipFile(disk_path)
    start, file = _stored_window(disk_path, members)
    size = _archive(disk_path, ()).getinfo(members[0]).file_size
    return zipfile.ZipFile(io.BufferedReader(_Window(file, start, size)))


def _stored_window(disk_path: str, members: tuple[str, ...]) -> tuple[int, BinaryIO]:
    """Where the bytes of a stored member start in the outer file, and a file object of its own for that file."""
    start = 0
    file = open(disk_path, "rb")  # noqa: SIM115 - handed on
    for depth, member in enumerate(members):
        info = _archive(disk_path, members[:depth]).getinfo(member)
        # The central directory does not tell how long the local header is.
        file.seek(start + info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile("bad local header")
        start += info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    return start, file


class _Window(io.RawIOBase):
    """`size` bytes of a file from `start` on. It moves in the file only when it reads, so a seek costs nothing."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("seek to a negative position")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        wanted = min(len(buffer), max(self._size - self._position, 0))
        if not wanted:
            return 0
        if self._file.tell() != self._start + self._position:
            self._file.seek(self._start + self._position)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def _named(file: "SourceFile | str"):
    """Failures of the file system and of zips as one line that names the file."""
    try:
        yield
    except KeyError:
        raise UserError(f"{file}: is no longer in its zip; start again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); check it or get it again") from None
    except NotImplementedError as error:
        raise UserError(f"{file}: cannot be read in place ({error}); unpack the zip and give the folder") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: is damaged or cut short ({reason}); get it again") from None
