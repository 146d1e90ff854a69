"""Folders of images: pixels arrive as they were written, and what does not fit is refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from f2d2_lightning.data.images._files import decoded
from f2d2_lightning.data.images._reader import Framing, read_images

GRAY, COLOUR = (1, 5, 4), (3, 5, 4)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def read(path, shape, **options):
    """Pixels ``(N, H, W)`` or ``(N, H, W, C)``, as Pillow has them, and names."""
    found = read_images(path, shape, **options)
    assert found.values.dtype == torch.uint8
    values = found.values.permute(0, 2, 3, 1).numpy()
    return values[..., 0] if shape[0] == 1 else values, found.names


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "pgm", "tiff", "tif", "PNG", "webp"])
def test_pixels_are_read_as_they_are(tmp_path, suffix):
    grey = suffix == "pgm"
    array = pixels(5, 4) if grey else pixels(5, 4, 3)
    path = write(tmp_path / f"a.{suffix}", array, **({"lossless": True} if suffix == "webp" else {}))
    for place in (tmp_path, path):
        values, names = read(place, GRAY if grey else COLOUR)
        assert names == [f"a.{suffix}"]
        assert np.array_equal(values[0], array)


def test_jpeg_is_read_as_pillow_decodes_it(tmp_path):
    path = write(tmp_path / "a.jpg", pixels(5, 4))
    assert np.array_equal(read(tmp_path, GRAY)[0][0], np.asarray(Image.open(path)))


def test_folders_are_read_recursively_in_the_order_of_their_paths(tmp_path):
    names = ["b.png", "a/10.png", "a/9.png", "a-b.png", "a/c/x.png", "B.png"]
    for value, name in enumerate(names):
        write(tmp_path / name, np.full((5, 4), value, np.uint8))
    (tmp_path / ".DS_Store").write_bytes(b"hidden")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "notes.txt").write_text("hidden as well")
    read = read_images(tmp_path, GRAY)
    assert read.names == sorted(names)
    assert [names[int(image[0, 0, 0])] for image in read.values] == read.names


def test_classes_are_the_topmost_folders(tmp_path):
    for name in ("0/a.png", "0/deep/b.png", "12/a.png"):
        write(tmp_path / name, pixels(5, 4))
    assert read_images(tmp_path, GRAY).classes() == ["0", "0", "12"]
    write(tmp_path / "a.png", pixels(5, 4))
    with pytest.raises(ValueError, match=r"a.png is in no folder that is named by a class label or name"):
        read_images(tmp_path, GRAY).classes()


def test_conversion_is_of_luma_and_only_on_request(tmp_path):
    array = pixels(5, 4, 3)
    write(tmp_path / "a.png", array)
    with pytest.raises(ValueError, match=r"a.png has mode RGB, but the model is for mode L \(grey\).*--convert true"):
        read_images(tmp_path, GRAY)
    luma = array.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(read(tmp_path, GRAY, convert=True)[0][0] - luma).max() <= 0.51


def test_palettes_and_opaque_alpha_convert_without_loss(tmp_path):
    array = (pixels(5, 4, 3) // 64) * 64
    Image.fromarray(array).quantize(256).save(tmp_path / "palette.png")
    write(tmp_path / "alpha.png", np.concatenate([array, np.full((5, 4, 1), 255, np.uint8)], -1))
    values, names = read(tmp_path, COLOUR, convert=True)
    assert names == ["alpha.png", "palette.png"]
    assert np.array_equal(values[0], array)
    assert np.array_equal(values[1], np.asarray(Image.open(tmp_path / "palette.png").convert("RGB")))


def test_transparent_pixels_are_refused(tmp_path):
    array = pixels(5, 4, 4)
    array[..., 3] = 255
    array[2, 2, 3] = 254
    write(tmp_path / "a.png", array)
    with pytest.raises(ValueError, match=r"a.png has transparent pixels"):
        read_images(tmp_path, COLOUR, convert=True)
    assert np.array_equal(read(tmp_path, (4, 5, 4))[0][0], array)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", ["grey", "ppm", "png"])
def test_sixteen_bits_are_refused(tmp_path, kind):
    # Pillow reads those of colours as 8 bits and writes none, so they are written by hand
    values = (np.arange(60) * 1000).astype(">u2").reshape(5, 12)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    png = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 5, 16, 2, 0, 0, 0)) + png_chunk(b"IDAT", zlib.compress(rows))
    if kind == "grey":
        Image.fromarray(pixels(5, 4).astype(np.uint16) * 257).save(tmp_path / "a.png")
    elif kind == "ppm":
        (tmp_path / "a.ppm").write_bytes(b"P6 4 5 65535\n" + values.tobytes())
    else:
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png + png_chunk(b"IEND", b""))
    for convert in (False, True):
        with pytest.raises(ValueError, match=r"a\.p.. ?.*has more than 8 bits a value"):
            read_images(tmp_path, GRAY if kind == "grey" else COLOUR, convert=convert)


def test_resizing_gives_the_models_size_and_integers(tmp_path):
    fine = np.kron(np.arange(20, dtype=np.uint8).reshape(5, 4) * 10, np.ones((6, 6), np.uint8))
    write(tmp_path / "big.png", fine)
    write(tmp_path / "right.png", pixels(5, 4))
    message = r"big.png is 24 x 30 \(width x height\), and 4 x 5 is expected.*--resize true"
    with pytest.raises(ValueError, match=message):
        read_images(tmp_path, GRAY)
    values, _ = read(tmp_path, GRAY, framing=Framing(1, resize="bicubic"))
    # inner pixels of a linear ramp stay what they were; an image of the right size is left alone
    assert np.abs(values[0, 1:-1, 1:-1].astype(int) - np.arange(20).reshape(5, 4)[1:-1, 1:-1] * 10).max() <= 1
    assert np.array_equal(values[1], pixels(5, 4))


def test_folders_of_other_things_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images"):
        read_images(tmp_path, GRAY)
    with pytest.raises(FileNotFoundError, match=r"neither a folder nor a file"):
        read_images(tmp_path / "nowhere", GRAY)
    write(tmp_path / "a.png", pixels(5, 4))
    for shape in ((2,), (5, 5, 4)):
        with pytest.raises(ValueError, match=r"image files can be read for \(C, H, W\)"):
            read_images(tmp_path, shape)
    for name in ("notes.txt", "deep/labels.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=r"2 files of other types \(deep/labels.csv, notes.txt\)"):
        read_images(tmp_path, GRAY)
    (tmp_path / "linked").symlink_to(tmp_path / "deep", target_is_directory=True)
    with pytest.raises(ValueError, match=r"linked is a link to a folder"):
        read_images(tmp_path, GRAY)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "webp", "ppm"])
def test_damaged_files_are_named(tmp_path, suffix):
    write(tmp_path / f"a.{suffix}", pixels(40, 40, 3))
    path = write(tmp_path / f"b.{suffix}", pixels(40, 40, 3))
    whole = path.read_bytes()
    for content in (b"", b"GIF89a" + whole[6:], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"b.{suffix} cannot be read as an image"):
            read_images(tmp_path, (3, 40, 40))


def test_several_pictures_in_a_file_are_refused(tmp_path):
    first, second = Image.fromarray(pixels(5, 4)), Image.fromarray(pixels(5, 4, seed=1))
    first.save(tmp_path / "a.tiff", save_all=True, append_images=[second])
    with pytest.raises(ValueError, match=r"a.tiff holds 2 pictures"):
        read_images(tmp_path, GRAY)


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_are_errors_that_name_the_file():
    """Whichever bytes are wrong: an image, or a refusal."""
    random = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(buffer, "TIFF")
    whole, said = buffer.getvalue(), []
    for _ in range(600):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 4):
            damaged[place] = random.integers(256)
        # where Pillow keeps its tags
        damaged[-random.integers(1, 150)] = random.integers(256)
        try:
            assert decoded(bytes(damaged), "one.tiff", "RGB", True).size
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 50
    assert all(text.startswith("one.tiff ") for text in said)
