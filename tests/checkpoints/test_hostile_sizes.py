"""Files that say that they are larger than they are, or grow when they are unpacked: an error, and no memory."""

import gzip
import io
import json
import struct
import tracemalloc
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from f2d2_lightning.cli._points import Reading, load_points
from f2d2_lightning.data.dataset import StoredValues
from f2d2_lightning.data.images import imagenet
from f2d2_lightning.data.images._files import decoded
from f2d2_lightning.data.images._stores import open_store
from f2d2_lightning.data.images.edm_zip import _labels
from f2d2_lightning.data.images.fashion import read_idx
from f2d2_lightning.utils import arrays
from f2d2_lightning.utils.arrays import check_growth, check_stored_archive, map_numbers, read_numbers
from made_data import write_files

MIB = 2**20
LARGE = 256 * MIB


def peak_of(call):
    """Most memory that a call had, in bytes, and what it gave or raised."""
    tracemalloc.start()
    try:
        answer = call()
    except Exception as error:
        answer = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, answer


def refused(call, *says, most=8 * MIB):
    peak, answer = peak_of(call)
    assert type(answer) is ValueError, answer
    for what in says:
        assert what in str(answer)
    assert peak < most


def head(shape, descr="|u1", fortran=False):
    made = io.BytesIO()
    np.lib.format.write_array_header_1_0(made, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return made.getvalue()


def zeros_of(size):
    """Parts of a ``.npy`` file of zeros, none of them large."""
    yield head((size,))
    for start in range(0, size, MIB):
        yield bytes(min(MIB, size - start))


def zip_of(path, members, method=zipfile.ZIP_DEFLATED):
    """A zip file of members that are bytes or come in parts."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, parts in members:
            with archive.open(name, "w") as member:
                for part in [parts] if isinstance(parts, bytes) else parts:
                    member.write(part)
    return path


def patched(path, name, field, value):
    """Another number in both heads of a member: ``field`` is where it is in the local one."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        local = archive.getinfo(name).header_offset
    central = content.index(b"PK\1\2")
    while content[central + 46 : central + 46 + len(name)] != name.encode():
        central = content.index(b"PK\1\2", central + 4)
    for start in (local + field, central + field + 2):
        struct.pack_into("<I", content, start, value)
    path.write_bytes(content)
    return path


# --- numpy's files ---

PLANE = SimpleNamespace(levels=None, shape=(2,), conditional=False)
LIES = {
    "23 TiB": (head((23 * 2**40,)), "which is 25,288,767,438,848 bytes, and 50 follow"),
    "a product that wraps to the size": (head((2**33, 2**31, 1, 50)), "bytes, and 50 follow"),
    "an axis beyond 64 bits": (head((10**30,)), "bytes, and 50 follow"),
    "a negative axis": (head((-1,)), "bytes, and 50 follow"),
    "wide numbers": (head((50,), "<f8"), "400 bytes, and 50 follow"),
    "strings without length": (head((2**40,), "|S0"), "it holds |S0; integers"),
    "records": (head((5,), [("a", "<i8"), ("b", "<i2")]), "integers or floating numbers are needed"),
    "no version": (b"\x93NUMPY\x09\x00" + head((50,))[8:], "its version is (9, 0)"),
    "a long head": (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 100, "EOF"),
    "a deep head": (b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000, "cannot be read as a NumPy file"),
}


@pytest.mark.parametrize("case", list(LIES))
def test_a_head_that_lies(tmp_path, case):
    start, message = LIES[case]
    plain, zipped = tmp_path / "a.npy", tmp_path / "a.npz"
    plain.write_bytes(start + b"x" * 50)
    zip_of(zipped, [("x.npy", start + b"x" * 50)])
    remedy = "write it again with numpy.save or numpy.savez, not savez_compressed"
    refused(lambda: read_numbers(plain), f"{plain} cannot be read as a NumPy file of plain numbers", message, remedy)
    refused(lambda: read_numbers(zipped), f"{zipped} cannot be read", message, remedy)
    refused(lambda: map_numbers(plain), f"{plain} cannot be read", message)
    refused(lambda: StoredValues(plain), f"{plain} cannot be read", message, "remove it, and make it again")
    refused(lambda: load_points(str(plain), None, PLANE, Reading()), f"{plain} cannot be read", message)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """256 MiB of zeros in a quarter of one."""
    path = tmp_path_factory.mktemp("grown") / "a.npz"
    return zip_of(path, [(f"{name}.npy", zeros_of(LARGE)) for name in ("x", "mean", "data")])


def test_an_archive_that_grows_is_not_unpacked(grown):
    said = f"would become {3 * (LARGE + len(head((LARGE,)))):,}"
    for call, remedy in (
        (lambda: read_numbers(grown), "numpy.savez, not savez_compressed"),
        (lambda: load_points(str(grown), None, PLANE, Reading()), "numpy.savez, not savez_compressed"),
        (lambda: imagenet._read(grown), "get it again from https://image-net.org"),
    ):
        refused(call, str(grown), said, "1,0", "times as many; up to 100 times, or 67,108,864 bytes", remedy)


def test_members_that_grow_together(tmp_path):
    path = zip_of(tmp_path / "a.npz", [(f"{n}.npy", zeros_of(4 * MIB)) for n in range(20)])
    refused(lambda: read_numbers(path, ("3",)), "would become 83,8")
    # each alone, and fifteen of them, are no harm
    path = zip_of(tmp_path / "b.npz", [(f"{n}.npy", zeros_of(4 * MIB)) for n in range(15)])
    assert len(read_numbers(path)) == 15


def test_sizes_that_lie_in_an_archive(tmp_path):
    member = head((1000,)) + bytes(range(250)) * 4
    path = tmp_path / "a.npz"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # larger than it is, its own head included: no more is taken than the archive says
        large = head((60 * MIB,)) + bytes(1000)
        zip_of(path, [("x.npy", large)], method)
        patched(path, "x.npy", 22, len(large) - 1000 + 60 * MIB)
        refused(lambda: read_numbers(path), "cannot be read", most=61 * MIB)
        zip_of(path, [("x.npy", member)], method)
        patched(path, "x.npy", 22, 0xFFFFFFF0)
        refused(lambda: read_numbers(path), "would become 4,294,967,280")
        # smaller than it is
        zip_of(path, [("x.npy", [head((500,)), bytes(1000)])], method)
        patched(path, "x.npy", 22, len(head((500,))) + 500)
        refused(lambda: read_numbers(path), "cannot be read")
    # the most that deflate can do, said to be little
    zip_of(path, [("x.npy", [head((100,)), *(bytes(MIB) for _ in range(64))])])
    patched(path, "x.npy", 22, len(head((100,))) + 100)
    refused(lambda: read_numbers(path), "Bad CRC-32", most=MIB)


def test_members_that_are_counted_twice(tmp_path):
    content = head((MIB,)) + np.random.default_rng(0).bytes(MIB)
    path = tmp_path / "a.npz"
    with pytest.warns(UserWarning, match="Duplicate name"):
        zip_of(path, [("x.npy", content), ("x.npy", content)])
    refused(lambda: read_numbers(path), "two arrays of one name")
    zip_of(path, [("x.npy", content), ("x", content)])
    refused(lambda: read_numbers(path), "two arrays of one name")
    # one member's bytes contain those of the next: 40 of them in little more than one
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(40):
            archive.writestr(f"{n:02d}.npy", content if n == 39 else b"")
        last = archive.filelist[-1]
        for info in archive.filelist[:-1]:
            info.file_size = info.compress_size = last.header_offset - info.header_offset + last.file_size
    assert path.stat().st_size < 2 * MIB
    refused(lambda: read_numbers(path, ("00",)), "its members overlap", most=MIB)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_not_unpacked(tmp_path, method):
    path = zip_of(tmp_path / "a.npz", [("x.npy", zeros_of(32 * MIB))], method)
    refused(lambda: read_numbers(path), f"x.npy is compressed by method {method}, which numpy never writes")


def test_bad_archives(tmp_path):
    path = tmp_path / "a.npz"
    nothing = b"PK\5\6" + bytes(18)
    for content, message in (
        (b"", "not a zip file"),
        (b"no array" * 20, "not a zip file"),
        (nothing, "it holds nothing"),
    ):
        path.write_bytes(content)
        refused(lambda: read_numbers(path, ("x",)), f"{path} cannot be read as a NumPy file", message)
    np.savez(path, y=np.ones(3), z=np.ones(2))
    refused(lambda: read_numbers(path, ("x", "y")), "it holds y, z; an array 'x' is expected")
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    refused(lambda: read_numbers(path, ("y",)), "encrypted")
    with pytest.raises(FileNotFoundError):
        read_numbers(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError):
        map_numbers(tmp_path / "none.npy")


GENERATOR = np.random.default_rng(0)
ORDINARY = {
    "pictures": GENERATOR.integers(0, 256, (5, 3, 8, 8), np.uint8),
    "zeros": np.zeros((1000, 1000)),
    "one number": np.array(3.5),
    "of columns": np.asfortranarray(GENERATOR.standard_normal((4, 6, 2))),
    "big-endian": GENERATOR.standard_normal((3, 4)).astype(">f8"),
    "truth": GENERATOR.random((3, 5)) < 0.5,
    "none": np.zeros((0, 5), np.float32),
    "not in one piece": GENERATOR.standard_normal((6, 6))[::2, ::3],
}


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.flags.f_contiguous == expected.flags.f_contiguous
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", list(ORDINARY))
def test_ordinary_files_are_read_as_by_numpy(tmp_path, name):
    value = ORDINARY[name]
    np.save(tmp_path / "a.npy", value)
    np.savez(tmp_path / "a.npz", x=value, other=np.arange(3))
    np.savez_compressed(tmp_path / "b.npz", x=value, other=np.arange(3))
    same(read_numbers(tmp_path / "a.npy")[""], np.load(tmp_path / "a.npy"))
    same(read_numbers(str(tmp_path / "a.npy"), ("x", "y"))["x"], np.load(tmp_path / "a.npy"))
    same(map_numbers(tmp_path / "a.npy"), np.load(tmp_path / "a.npy", mmap_mode="r"))
    for archive in ("a.npz", "b.npz"):
        with np.load(tmp_path / archive) as expected:
            found = read_numbers(tmp_path / archive)
            assert list(found) == expected.files
            for key in expected:
                same(found[key], expected[key])
    if value.ndim and value.dtype.isnative:
        assert torch.equal(StoredValues(tmp_path / "a.npy")[:], torch.from_numpy(np.load(tmp_path / "a.npy")))


def test_only_what_is_asked_for_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3), z=np.array([{}], object), noise=np.zeros(4 * MIB))
    peak, found = peak_of(lambda: read_numbers(tmp_path / "a.npz", ("x", "y")))
    assert list(found) == ["x"]
    assert peak < MIB


def test_growth():
    assert (arrays.GROWTH, arrays.HARMLESS) == (100, 64 * MIB)
    check_growth(0, 64 * MIB)
    check_growth(MIB, 100 * MIB)
    for packed, size in ((0, 64 * MIB + 1), (MIB, 100 * MIB + 1)):
        with pytest.raises(ValueError, match=f"its {packed:,} bytes would become {size:,}"):
            check_growth(packed, size)


# --- archives of torch ---


def test_archives_of_torch(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(8 * MIB, dtype=torch.uint8)}, path)
    check_stored_archive(path)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as archive:
        zip_of(packed, [(name, archive.read(name)) for name in archive.namelist()])
    assert torch.equal(torch.load(packed)["a"], torch.load(path)["a"])
    refused(
        lambda: check_stored_archive(packed), f"{packed} is compressed, as torch.save never writes", "save it again"
    )
    for content in (b"", b"no archive", path.read_bytes()[:1000]):
        (tmp_path / "other").write_bytes(content)
        check_stored_archive(tmp_path / "other")
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"PK\1\2") + 1] ^= 1
    path.write_bytes(damaged)
    refused(lambda: check_stored_archive(path), f"{path} cannot be read as a zip file", "get it again")


# --- data sets ---


def idx_of(shape, content):
    return b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content


def test_idx_files_that_lie_or_grow(tmp_path):
    path = tmp_path / "a"
    for shape in ((2**32 - 1,), (60_000, 28, 28), (2**32 - 1,) * 60):
        for content in (idx_of(shape, b"x" * 50), gzip.compress(idx_of(shape, b"x" * 50))):
            path.write_bytes(content)
            refused(lambda: read_idx(path), str(path), "and it cannot; it is truncated or corrupt", most=MIB)
    for shape, content in (((0, *(2**32 - 1,) * 4), b""), ((1,) * 70, b"x")):
        path.write_bytes(idx_of(shape, content))
        refused(lambda: read_idx(path), f"{path} says that its shape is (", "it is corrupt, get it again")
    # no more is unpacked than the head says
    with gzip.open(path, "wb") as stream:
        stream.write(idx_of((2, 3, 4), b""))
        for _ in range(LARGE // MIB):
            stream.write(bytes(MIB))
    refused(lambda: read_idx(path), "2 x 3 x 4 bytes, and holds more;", most=MIB)


def test_ordinary_idx_files(tmp_path):
    path, zeros = tmp_path / "a", torch.zeros(1000, 28, 28, dtype=torch.uint8)
    for shape, content in (((1000, 28, 28), bytes(784_000)), ((), b"\7"), ((0, 3), b"")):
        for whole in (idx_of(shape, content), gzip.compress(idx_of(shape, content), 9)):
            path.write_bytes(whole)
            assert read_idx(path).shape == shape
    path.write_bytes(gzip.compress(idx_of((1000, 28, 28), bytes(784_000))))
    assert torch.equal(read_idx(path), zeros)
    # a checksum at the end is looked at
    damaged = bytearray(path.read_bytes())
    damaged[-6] ^= 1
    path.write_bytes(damaged)
    refused(lambda: read_idx(path), "truncated or corrupt gzip file", "CRC")


def test_files_in_zip_files_that_grow(tmp_path):
    path = tmp_path / "a.zip"
    zip_of(path, [("a.png", zeros_of(LARGE)), ("b.png", b"b"), ("c.png", b"c")])
    refused(lambda: open_store(path).content(0), f"{path}/a.png is damaged (it says that it has", "get")
    zip_of(path, [("a.png", zeros_of(80 * MIB)), ("b.png", b"b"), ("c.png", b"c")])
    patched(path, "b.png", 18, 0xFFFFFFF0)
    patched(path, "c.png", 22, 0xFFFFFFF0)
    store = open_store(path)
    for row, said in enumerate(("83,886,", "4,294,967,280", "4,294,967,280")):
        refused(lambda row=row: store.content(row), f"{path}/{store.names[row]} is damaged", said)


def test_lists_of_labels_that_grow_or_nest(tmp_path):
    picture, path = b"no picture", tmp_path / "a.zip"
    zip_of(path, [("a.png", picture), ("dataset.json", iter([b'{"labels": [', *[b" " * MIB] * 100, b"]}"]))])
    refused(lambda: _labels(open_store(path), ["a.png"]), f"{path}/dataset.json", "would become 104,857,6", "get")
    nested = b'{"labels": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    write_files(path, {"a.png": picture, "dataset.json": nested}, True)
    refused(lambda: _labels(open_store(path), ["a.png"]), f"{path}/dataset.json is not", "make it again", most=32 * MIB)
    write_files(path, {"a.png": picture, "dataset.json": json.dumps({"labels": [["a.png", 3]]}).encode()}, True)
    assert _labels(open_store(path), ["a.png"]).tolist() == [3]


def test_a_picture_that_says_it_is_huge(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    refused(
        lambda: decoded(content + chunk(b"IEND", b""), "a.png", "L", False),
        "a.png cannot be read as an image",
        "decompression bomb",
    )
