"""Folders of images: pixels arrive as they were written, and what does not fit is refused with a reason."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from f2d2_lightning.data.images._files import read_images

GRAY, COLOUR = (1, 5, 4), (3, 5, 4)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tiff", "tif", "PNG", "webp"])
def test_pixels_are_read_as_they_are(tmp_path, suffix):
    array = pixels(5, 4, 3)
    write(tmp_path / f"a.{suffix}", array, **({"lossless": True} if suffix == "webp" else {}))
    read = read_images(tmp_path, COLOUR)
    assert read.names == [f"a.{suffix}"]
    assert read.values.dtype == torch.uint8
    assert np.array_equal(read.values[0].permute(1, 2, 0).numpy(), array)


@pytest.mark.parametrize("suffix", ["png", "bmp", "pgm", "tiff"])
def test_grey_pixels_are_read_as_they_are(tmp_path, suffix):
    array = pixels(5, 4)
    write(tmp_path / f"a.{suffix}", array)
    assert np.array_equal(read_images(tmp_path, GRAY).values[0, 0].numpy(), array)


def test_jpeg_is_read_as_pillow_decodes_it(tmp_path):
    path = write(tmp_path / "a.jpg", pixels(5, 4))
    assert np.array_equal(read_images(tmp_path, GRAY).values[0, 0].numpy(), np.asarray(Image.open(path)))


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


def test_one_file_is_one_image(tmp_path):
    array = pixels(5, 4)
    read = read_images(write(tmp_path / "a.png", array), GRAY)
    assert read.names == ["a.png"]
    assert np.array_equal(read.values[0, 0].numpy(), array)


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
    assert np.abs(read_images(tmp_path, GRAY, convert=True).values[0, 0].numpy() - luma).max() <= 0.51


def test_grey_becomes_three_equal_channels(tmp_path):
    array = pixels(5, 4)
    write(tmp_path / "a.png", array)
    with pytest.raises(ValueError, match=r"has mode L, but the model is for mode RGB"):
        read_images(tmp_path, COLOUR)
    read = read_images(tmp_path, COLOUR, convert=True).values[0]
    assert all(np.array_equal(channel.numpy(), array) for channel in read)


def test_palettes_and_opaque_alpha_convert_without_loss(tmp_path):
    array = (pixels(5, 4, 3) // 64) * 64
    Image.fromarray(array).quantize(256).save(tmp_path / "palette.png")
    opaque = np.concatenate([array, np.full((5, 4, 1), 255, np.uint8)], -1)
    write(tmp_path / "alpha.png", opaque)
    read = read_images(tmp_path, COLOUR, convert=True)
    assert read.names == ["alpha.png", "palette.png"]
    assert np.array_equal(read.values[0].permute(1, 2, 0).numpy(), array)
    assert np.array_equal(
        read.values[1].permute(1, 2, 0).numpy(), np.asarray(Image.open(tmp_path / "palette.png").convert("RGB"))
    )


def test_transparent_pixels_are_refused(tmp_path):
    array = pixels(5, 4, 4)
    array[..., 3] = 255
    array[2, 2, 3] = 254
    write(tmp_path / "a.png", array)
    with pytest.raises(ValueError, match=r"a.png has transparent pixels"):
        read_images(tmp_path, COLOUR, convert=True)
    assert np.array_equal(read_images(tmp_path, (4, 5, 4)).values[0].permute(1, 2, 0).numpy(), array)


@pytest.mark.parametrize("convert", [False, True])
def test_sixteen_bits_are_refused(tmp_path, convert):
    Image.fromarray(pixels(5, 4).astype(np.uint16) * 257).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png has more than 8 bits a value"):
        read_images(tmp_path, GRAY, convert=convert)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("suffix", ["ppm", "png"])
def test_sixteen_bits_of_colour_are_refused(tmp_path, suffix):
    # Pillow reads them as 8 bits and writes none, so they are written by hand
    values = (np.arange(60) * 1000).astype(">u2").reshape(5, 12)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    png = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 5, 16, 2, 0, 0, 0)) + png_chunk(b"IDAT", zlib.compress(rows))
    content = {
        "ppm": b"P6 4 5 65535\n" + values.tobytes(),
        "png": b"\x89PNG\r\n\x1a\n" + png + png_chunk(b"IEND", b""),
    }
    (tmp_path / f"a.{suffix}").write_bytes(content[suffix])
    with pytest.raises(ValueError, match=rf"a.{suffix} has more than 8 bits a value"):
        read_images(tmp_path, COLOUR)


def test_mixed_sizes_name_the_first_two(tmp_path):
    for name, shape in {"a.png": (5, 4), "b.png": (5, 4), "c.png": (7, 9), "d.png": (2, 2)}.items():
        write(tmp_path / name, pixels(*shape))
    message = r"a.png is 4 x 5 and c.png is 9 x 7 \(width x height\), but the model is for 4 x 5.*--resize true"
    with pytest.raises(ValueError, match=message):
        read_images(tmp_path, GRAY)


def test_another_size_is_refused(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.png", pixels(4, 5))
    with pytest.raises(ValueError, match=r"a.png, b.png, ... are 5 x 4 \(width x height\), but the model is for 4 x 5"):
        read_images(tmp_path, GRAY)


def test_resizing_gives_the_models_size_and_integers(tmp_path):
    fine = np.kron(np.arange(20, dtype=np.uint8).reshape(5, 4) * 10, np.ones((6, 6), np.uint8))
    write(tmp_path / "big.png", fine)
    write(tmp_path / "right.png", pixels(5, 4))
    read = read_images(tmp_path, GRAY, resize=True)
    assert read.values.shape == (2, 1, 5, 4)
    assert read.values.dtype == torch.uint8
    # inner pixels of a linear ramp stay what they were; an image of the right size is left alone
    assert np.abs(read.values[0, 0, 1:-1, 1:-1].int().numpy() - np.arange(20).reshape(5, 4)[1:-1, 1:-1] * 10).max() <= 1
    assert np.array_equal(read.values[1, 0].numpy(), pixels(5, 4))


def test_other_files_are_listed(tmp_path):
    write(tmp_path / "a.png", pixels(5, 4))
    for name in ("notes.txt", "deep/labels.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=r"2 files of other types \(deep/labels.csv, notes.txt\)"):
        read_images(tmp_path, GRAY)


def test_linked_folders_are_refused(tmp_path):
    write(tmp_path / "images/a.png", pixels(5, 4))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "images", target_is_directory=True)
    with pytest.raises(ValueError, match=r"linked is a link to a folder"):
        read_images(tmp_path / "set", GRAY)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images"):
        read_images(tmp_path, GRAY)
    with pytest.raises(FileNotFoundError, match=r"neither a folder nor a file"):
        read_images(tmp_path / "nowhere", GRAY)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "webp", "ppm"])
@pytest.mark.parametrize("damage", ["empty", "other", "truncated"])
def test_damaged_files_are_named(tmp_path, suffix, damage):
    write(tmp_path / f"a.{suffix}", pixels(40, 40, 3))
    path = write(tmp_path / f"b.{suffix}", pixels(40, 40, 3))
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "other": b"GIF89a" + whole[6:], "truncated": whole[: len(whole) // 2]}[damage])
    with pytest.raises(ValueError, match=rf"b.{suffix} cannot be read as an image"):
        read_images(tmp_path, (3, 40, 40))


def test_several_pictures_in_a_file_are_refused(tmp_path):
    first, second = Image.fromarray(pixels(5, 4)), Image.fromarray(pixels(5, 4, seed=1))
    first.save(tmp_path / "a.tiff", save_all=True, append_images=[second])
    with pytest.raises(ValueError, match=r"a.tiff holds 2 pictures"):
        read_images(tmp_path, GRAY)


def test_states_that_are_no_images_are_refused(tmp_path):
    write(tmp_path / "a.png", pixels(5, 4))
    for shape in ((2,), (5, 5, 4)):
        with pytest.raises(ValueError, match=r"image files can be read for \(C, H, W\)"):
            read_images(tmp_path, shape)
