"""From bytes to tensors, and bad bytes to one line."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.data.pictures import encoded, noise

from mllm_fl.data import decode
from mllm_fl.data.decode import EncodedPixels, FileContents, fit, fit_all, to_array, to_rgb
from mllm_fl.errors import UserError


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few bytes whose header promises ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "BMP", "GIF"])
def test_every_common_form_is_read(form: str) -> None:
    assert to_array(to_rgb(encoded(noise(1), form))).shape == (3, 32, 32)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"hello", "not an image"),
        (b"", "not an image"),
        (encoded(noise(1, 64, 64), "JPEG")[:300], "Truncated"),
        (encoded(noise(1, 64, 64))[:300], "."),
        (b"RIFF\0\0\0\0WEBPVP8 ", "."),
        (bomb(), "pixels"),
        (bomb(11_000), "11000x11000 pixels is more than"),
    ],
    ids=["text", "empty", "cut jpeg", "cut png", "cut webp", "bomb", "large"],
)
def test_bad_bytes_are_a_reason_not_a_crash(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        to_rgb(content)


def test_grey_palette_and_transparent_pictures_become_rgb() -> None:
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        buffer = io.BytesIO()
        Image.fromarray(noise(1)).convert(mode).save(buffer, "TIFF")
        assert to_array(to_rgb(buffer.getvalue())).shape == (3, 32, 32)


def test_a_photo_taken_sideways_is_turned_upright() -> None:
    picture = noise(1, 20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", exif=exif)
    assert (np.asarray(to_rgb(buffer.getvalue())) == np.rot90(picture, -1)).all()


def test_fit_keeps_the_middle_of_the_longer_side() -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    assert (np.asarray(fit(Image.fromarray(wide), 10)) == 255).all()
    assert fit(Image.fromarray(noise(1, 100, 50)), 224, 256 / 224).size == (224, 224)
    assert fit(Image.fromarray(noise(1, 3, 500)), 8).size == (8, 8)
    assert fit_all(np.zeros((2, 3, 5, 9), dtype=np.uint8), 4).shape == (2, 3, 4, 4)


def test_pixels_are_decoded_once_and_an_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = tuple(tmp_path / f"{i}.png" for i in range(3))
    for i in (0, 1):
        paths[i].write_bytes(encoded(noise(i)))
    pixels = EncodedPixels(FileContents(paths), 32)
    first = pixels.read([1, 0, 1])
    assert (first.numpy() == np.stack([noise(1), noise(0), noise(1)]).transpose(0, 3, 1, 2)).all()
    with pytest.raises(UserError, match=r"2\.png: no such file; repair or remove it"):
        pixels.read([0, 2])
    paths[0].unlink()
    assert (pixels.read([0]) == first[1]).all()

    monkeypatch.setattr(decode, "CACHE_LIMIT", 0)  # too large to keep: read from the disk again each time
    paths[0].write_bytes(encoded(noise(0)))
    again = EncodedPixels(FileContents(paths), 32)
    assert (again.read([0, 1] * 6)[:2] == first[[1, 0]]).all()
    paths[0].unlink()
    with pytest.raises(UserError, match="no such file"):
        again.read([0])
