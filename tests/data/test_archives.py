import io
import multiprocessing
import os
import pickle
import stat
import struct
import zipfile
import zlib

import pytest

from drd_hf.data.archives import list_files, local_file
from drd_hf.errors import UserError

DEFLATED, STORED = zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED
CONTENT = {"top/a.tif": bytes(range(256)) * 40, "top/b.tif": b"b" * 5000, "c.txt": b"c"}


def make_zip(path, content, compression=DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def zip_bytes(content, compression=DEFLATED):
    return make_zip(io.BytesIO(), content, compression).getvalue()


def write_tree(folder, content):
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def found(source):
    return {file.path: file.read_bytes() for file in list_files(source)}


def prefixed(prefix, content=CONTENT):
    return {f"{prefix}/{name}": data for name, data in content.items()}


def make_source(kind, tmp_path):
    """A source of some kind, and its files by the paths they must have."""
    if kind == "folder":
        return write_tree(tmp_path / "folder", CONTENT), dict(CONTENT)
    if kind.startswith("zip of zips"):
        compression = STORED if "stored" in kind else DEFLATED
        outer = {"Potsdam/2.zip": zip_bytes(CONTENT, compression), "Potsdam/readme.txt": b"hello"}
        path = make_zip(tmp_path / "Potsdam.zip", outer, STORED)
        return path, {**prefixed("Potsdam.zip/Potsdam/2.zip"), "Potsdam.zip/Potsdam/readme.txt": b"hello"}
    if kind == "zip":
        return make_zip(tmp_path / "a.zip", CONTENT), prefixed("a.zip")
    folder = write_tree(tmp_path / "mixed", CONTENT)
    make_zip(folder / "top" / "D.ZIP", CONTENT, STORED)
    return folder, {**CONTENT, **prefixed("top/D.ZIP")}


KINDS = ("folder", "zip", "folder with zips", "zip of zips", "zip of zips, stored")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_lists_and_reads_the_same_files(tmp_path, kind):
    source, expected = make_source(kind, tmp_path)
    assert found(source) == expected
    for file in list_files(str(source)):
        assert file.size == len(expected[file.path])
        assert (file.local_path is None) == (".zip" in file.path.lower())
        with file.open() as opened:
            assert opened.read() == expected[file.path]


@pytest.mark.parametrize("kind", KINDS)
def test_open_files_can_be_read_from_anywhere(tmp_path, kind):
    source, expected = make_source(kind, tmp_path)
    file = next(file for file in list_files(source) if file.name == "a.tif")
    data = expected[file.path]
    with file.open() as first, file.open() as second:
        for position, length in ((9000, 100), (0, 10), (5000, 5000), (10_000, 999), (10_240, 5), (20_000, 5)):
            first.seek(position)
            second.seek(1)
            assert first.read(length) == data[position : position + length]
            assert second.read(3) == data[1:4]
        assert first.seek(-10, os.SEEK_END) == len(data) - 10
        assert first.read() == data[-10:]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])  # imports torch anew
@pytest.mark.parametrize("nested", [False, True])
def test_records_are_read_by_other_processes_at_the_same_time(tmp_path, method, nested):
    """Forked processes that share an open file move its position under each other's hands."""
    expected = {name: os.urandom(1_000_000) for name in ("a", "b", "c")}
    source = make_zip(tmp_path / "a.zip", expected, STORED)
    if nested:
        source = make_zip(tmp_path / "outer.zip", {"a.zip": source.read_bytes()}, STORED)
    files = list_files(source)
    assert pickle.loads(pickle.dumps(files)) == files
    assert {file.name: file.read_bytes() for file in files} == expected  # the zips are open in this process now
    with multiprocessing.get_context(method).Pool(2) as pool:
        read = pool.map(_read, files * 20, chunksize=1)
    assert read == list(expected.values()) * 20


def _read(file):
    return file.read_bytes()


def test_hidden_files_and_those_of_macos_are_left_out(tmp_path):
    hidden = {".DS_Store": b"x", "__MACOSX/top/._a.tif": b"x", "top/._a.tif": b"x", ".git/config": b"x"}
    assert found(write_tree(tmp_path / "folder", CONTENT | hidden)) == CONTENT
    assert found(make_zip(tmp_path / "a.zip", CONTENT | hidden)) == prefixed("a.zip")


def test_identity_changes_with_the_content(tmp_path):
    folder = write_tree(tmp_path / "folder", {"a": b"1"})
    before = list_files(folder)[0].identity()
    os.utime(folder / "a", ns=(1, 1))
    assert list_files(folder)[0].identity() != before
    members = [
        list_files(make_zip(tmp_path / f"{i}.zip", {"a": data}))[0] for i, data in enumerate((b"1", b"2", b"1"))
    ]
    identities = [member.identity() for member in members]
    assert identities[0] == identities[2] != identities[1]


def test_a_file_beside_another_is_found(tmp_path):
    content = {"x/a.tif": b"1", "x/a.tfw": b"2", "x/b.tif": b"3", "x/b.TFW": b"4", "x/c.tif": b"5", "c.tfw": b"6"}
    outer = make_zip(tmp_path / "outer.zip", {"inner.zip": zip_bytes(content)}, STORED)
    for source in (write_tree(tmp_path / "folder", content), make_zip(tmp_path / "a.zip", content), outer):
        files = {file.name: file for file in list_files(source)}
        assert files["a.tif"].beside(".tfw").read_bytes() == b"2"
        assert files["b.tif"].beside(".tfw").read_bytes() == b"4"
        assert files["b.tif"].beside(".tfw").path == files["b.tif"].path.replace("b.tif", "b.TFW")
        assert files["c.tif"].beside(".tfw") is None


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a.tif", "top/../../a.tif", "top\\a.tif", "C:/a.tif", "c:a.tif", ".."]
)
def test_members_that_are_no_path_inside_the_zip_are_refused(tmp_path, name):
    data = zip_bytes(CONTENT | {name: b"x"})
    (tmp_path / "a.zip").write_bytes(data)
    make_zip(tmp_path / "outer.zip", {"inner.zip": data}, STORED)
    for source in ("a.zip", "outer.zip"):
        with pytest.raises(UserError, match="is no path inside the zip") as caught:
            list_files(tmp_path / source)
        assert repr(name)[1:-1] in str(caught.value) and "\n" not in str(caught.value)


def test_links_in_a_zip_are_refused(tmp_path):
    link = zipfile.ZipInfo("top/link.tif")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(UserError, match=r"top/link\.tif: is a link"):
        list_files(make_zip(tmp_path / "a.zip", CONTENT | {link: b"/etc/passwd"}))


def test_links_out_of_a_folder_are_refused_and_links_inside_are_followed(tmp_path):
    folder = write_tree(tmp_path / "folder", CONTENT)
    (folder / "same.tif").symlink_to(folder / "top" / "a.tif")
    assert found(folder) == {**CONTENT, "same.tif": CONTENT["top/a.tif"]}
    (tmp_path / "link").symlink_to(folder)
    assert found(tmp_path / "link").keys() == found(folder).keys()
    write_tree(tmp_path / "other", CONTENT)
    for target in (tmp_path / "other", tmp_path / "other" / "c.txt"):
        (folder / "out").unlink(missing_ok=True)
        (folder / "out").symlink_to(target)
        with pytest.raises(UserError, match="out: is a link out of"):
            list_files(folder)


@pytest.mark.parametrize("cut", [0, 10, 0.5, -60, -10, -1])
def test_a_zip_that_is_cut_short_is_named(tmp_path, cut):
    data = zip_bytes(CONTENT)
    folder = write_tree(tmp_path, {"data/2.zip": data[: int(cut * len(data)) if isinstance(cut, float) else cut]})
    with pytest.raises(UserError, match=r"data/2\.zip: is damaged or cut short \(.*\); get it again$"):
        list_files(folder)


def test_an_inner_zip_that_is_cut_short_is_named(tmp_path):
    source = make_zip(tmp_path / "outer.zip", {"in/2.zip": zip_bytes(CONTENT)[:-30]}, STORED)
    with pytest.raises(UserError, match=r"outer\.zip/in/2\.zip: is damaged or cut short"):
        list_files(source)


def test_a_zip_with_bytes_missing_in_the_middle_is_an_error(tmp_path):
    path = make_zip(tmp_path / "a.zip", CONTENT, STORED)
    data = path.read_bytes()
    path.write_bytes(data[:2000] + data[3000:])
    with pytest.raises(UserError, match=r"a\.zip/top/a\.tif: .*get it again"):
        found(path)


@pytest.mark.parametrize("compression", [STORED, DEFLATED])
def test_a_member_with_a_wrong_byte_is_an_error(tmp_path, compression):
    path = make_zip(tmp_path / "a.zip", {"top/a.tif": os.urandom(4000)}, compression)
    data = bytearray(path.read_bytes())
    data[2000] ^= 255
    path.write_bytes(data)
    (file,) = list_files(path)
    with pytest.raises(UserError, match=r"a\.zip/top/a\.tif: is damaged"):
        file.read_bytes()


def test_a_compressed_zip_inside_a_zip_is_refused_with_the_remedy(tmp_path):
    source = make_zip(tmp_path / "outer.zip", {"inner.zip": zip_bytes(CONTENT)}, DEFLATED)
    with pytest.raises(UserError, match=r"inner\.zip: is a compressed zip inside a zip; unpack .*outer\.zip"):
        list_files(source)


def change_directory(data, offset, fmt, value):
    """The zip with one field changed in the central directory entry of its first member."""
    at = data.index(b"PK\x01\x02") + offset
    return data[:at] + struct.pack(fmt, value) + data[at + struct.calcsize(fmt) :]


def test_encrypted_members_are_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(change_directory(zip_bytes(CONTENT), 8, "<H", 1))
    with pytest.raises(UserError, match=r"top/a\.tif: is encrypted"):
        list_files(tmp_path / "a.zip")


def test_a_compression_that_python_lacks_is_named_with_the_remedy(tmp_path):
    """Windows packs files above 2 GiB with Deflate64."""
    data = change_directory(zip_bytes({"a.tif": CONTENT["top/a.tif"]}), 10, "<H", 9)
    (tmp_path / "a.zip").write_bytes(data)
    (file,) = list_files(tmp_path / "a.zip")
    with pytest.raises(UserError, match=r"a\.tif: cannot be read in place .*unpack the zip"):
        file.read_bytes()


@pytest.mark.parametrize("claim", [2**32 - 2, 2_000_000])
def test_members_that_claim_absurd_sizes_are_refused(tmp_path, claim):
    data = change_directory(zip_bytes({"a.tif": b"x" * 1000}), 24, "<I", claim)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.tif: claims {claim} bytes packed into"):
        list_files(tmp_path / "a.zip")


def test_a_real_bomb_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.tif: claims 8000000 bytes"):
        list_files(make_zip(tmp_path / "a.zip", {"a.tif": bytes(8_000_000)}, zipfile.ZIP_LZMA))


def test_a_constant_image_is_no_bomb(tmp_path):
    """108 MB of one class deflate to a ratio of 1029, and the limit was 1000."""
    assert found(make_zip(tmp_path / "a.zip", {"a.tif": bytes(8_000_000)})) == {"a.zip/a.tif": bytes(8_000_000)}


def test_paths_with_a_dot_in_them_are_listed_as_what_they_mean(tmp_path):
    """`a/./b.tif` was taken for a hidden file, and files beside `./a.tif` were not found."""
    content = {"./x/a.tif": b"1", "./x/a.tfw": b"2", "x/./b.tif": b"3", "./x/.hidden": b"4"}
    source = make_zip(tmp_path / "a.zip", content)
    assert found(source) == {"a.zip/x/a.tif": b"1", "a.zip/x/a.tfw": b"2", "a.zip/x/b.tif": b"3"}
    image = next(file for file in list_files(source) if file.name == "a.tif")
    assert image.beside(".tfw").read_bytes() == b"2" and image.beside(".tfw").path == "a.zip/x/a.tfw"
    for other in ("./x/b.tif", "x//b.tif"):
        with pytest.raises(UserError, match=r"b\.tif: is in the zip twice"):
            list_files(make_zip(tmp_path / "b.zip", {"x/b.tif": b"1", other: b"2"}))


def test_damaged_zips_are_left_out_and_named_on_request(tmp_path):
    """One zip that was cut short stopped everything, even one of which nothing was needed."""
    whole = zip_bytes(CONTENT)
    outer = zip_bytes({"in/cut.zip": whole[:-30], "in/whole.zip": whole}, STORED)
    write_tree(tmp_path, {"data/cut.zip": whole[:-30], "data/outer.zip": outer, "bad.zip": zip_bytes({"../a": b"x"})})
    broken = {}
    paths = [file.path for file in list_files(tmp_path, broken)]
    assert sorted(paths) == sorted(f"data/outer.zip/in/whole.zip/{name}" for name in CONTENT)
    assert broken.keys() == {"data/cut.zip", "data/outer.zip/in/cut.zip", "bad.zip"}
    for path in ("data/cut.zip", "data/outer.zip/in/cut.zip"):
        assert broken[path].startswith("is damaged or cut short")
    assert "is no path inside the zip" in broken["bad.zip"]
    assert not any(str(tmp_path) in why for why in broken.values())  # they go into public cards


def test_a_source_that_is_a_damaged_zip_itself_is_an_error_all_the_same(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_bytes(CONTENT)[:-30])
    with pytest.raises(UserError, match=r"a\.zip: is damaged or cut short"):
        list_files(tmp_path / "a.zip", {})


@pytest.mark.parametrize("compression", [STORED, DEFLATED])
@pytest.mark.parametrize("nested", [False, True])
def test_a_zip_that_was_replaced_is_listed_anew(tmp_path, compression, nested):
    """The open zip was kept by its path: a process went on to see the old members, and read wrong bytes for them."""

    def write(content):
        data = zip_bytes(content, compression)
        (tmp_path / "new").write_bytes(zip_bytes({"in.zip": data}, STORED) if nested else data)
        os.replace(tmp_path / "new", tmp_path / "a.zip")

    inner = "a.zip/in.zip" if nested else "a.zip"
    write({"a.tif": b"first"})
    assert found(tmp_path / "a.zip") == {f"{inner}/a.tif": b"first"}
    (old,) = list_files(tmp_path / "a.zip")
    write({"a.tif": b"again", "b.tif": b"more"})
    assert found(tmp_path / "a.zip") == {f"{inner}/a.tif": b"again", f"{inner}/b.tif": b"more"}
    for use in (old.read_bytes, old.open):
        with pytest.raises(UserError, match="was replaced while it was in use"):
            use()


def test_checksums_are_the_same_on_disk_and_in_a_zip(tmp_path):
    write_tree(tmp_path / "folder", CONTENT)
    make_zip(tmp_path / "a.zip", CONTENT)
    on_disk, in_zip = (
        {file.name: file.checksum() for file in list_files(tmp_path / name)} for name in ("folder", "a.zip")
    )
    assert on_disk == in_zip == {name.split("/")[-1]: zlib.crc32(data) for name, data in CONTENT.items()}


def test_a_member_twice_in_a_zip_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.tif", b"1")
        archive.writestr("a.tif", b"2")
    with pytest.raises(UserError, match=r"a\.tif: is in the zip twice"):
        list_files(tmp_path / "a.zip")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: does not exist"):
        list_files(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: cannot be read"):
        local_file(tmp_path / "nowhere")


def test_files_that_vanish_or_change_while_in_use_are_named(tmp_path):
    folder = write_tree(tmp_path / "folder", CONTENT)
    (file, *_) = list_files(folder)
    (folder / file.path).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        file.read_bytes()
    make_zip(tmp_path / "a.zip", {"a": b"1"})
    (member,) = list_files(tmp_path / "a.zip")
    make_zip(tmp_path / "b.zip", {"a": b"2"})
    changed = type(member)(member.path, member.size, str(tmp_path / "b.zip"), member.members, member.stamp)
    with pytest.raises(UserError, match="was replaced"):
        changed.read_bytes()
