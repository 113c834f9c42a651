"""The open images in the corpus folder: kept as they are, hashed once, and one line for every one that cannot be used."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_fl.annotate import open_images
from mllm_fl.annotate.open_images import Source, lay_out, pixel_hash
from mllm_fl.data.decode import to_array, to_rgb
from mllm_fl.data.images import ImageSet, MemoryPixels
from mllm_fl.errors import UserError


def photos(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(draws.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return folder


def bomb(path: Path, side: int = 30_000) -> None:
    """A real PNG of side x side black pixels, 900 million of them in a few hundred kilobytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    squeeze = zlib.compressobj(1)
    row = bytes(1 + side // 8)  # one bit a pixel
    rows = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def source(root: Path, size: int | None = None, **options: str) -> Source:
    return Source(f"folder:{root}", 100, size, 7, **options)


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]


def test_files_are_copied_as_they_are_and_their_pixels_named(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    found = lay_out(source(root, licence="CC0"), tmp_path / "corpus")
    assert found.sources == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert found.licences == ["CC0"] * 4
    for path, sha, name in zip(found.paths, found.hashes, found.sources, strict=True):
        assert (tmp_path / "corpus" / path).read_bytes() == (root / name).read_bytes()
        pixels = to_array(to_rgb(root / name))
        assert (
            sha
            == pixel_hash(pixels)
            == ImageSet("", MemoryPixels(torch.from_numpy(pixels.copy())[None]), np.full(1, -1), ()).hashes()[0]
        )
    small = lay_out(source(root, size=16), tmp_path / "small")
    assert [Path(p).suffix for p in small.paths] == [".png"] * 4
    assert to_rgb(tmp_path / "small" / small.paths[0]).size == (16, 16)


def test_what_readers_may_see_differently_becomes_a_plain_png(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(root / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (16, 8)).save(root / "turned.jpg", exif=turned)
    Image.new("CMYK", (8, 8)).save(root / "print.jpg")
    found = lay_out(source(root), tmp_path / "corpus")
    assert [Path(p).suffix for p in found.paths] == [".png"] * 3
    assert Image.open(tmp_path / "corpus" / found.paths[found.sources.index("turned.jpg")]).size == (8, 16)


def test_a_second_start_decodes_nothing_and_sees_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, corpus = photos(tmp_path / "photos"), tmp_path / "corpus"
    first = lay_out(source(root), corpus)
    digest = source(root).digest(corpus)
    with monkeypatch.context() as blind:
        blind.setattr(open_images, "to_rgb", lambda content: pytest.fail("decoded again"))
        assert lay_out(source(root), corpus) == first
        assert source(root).digest(corpus) == digest == source(root).digest(tmp_path / "elsewhere")
    Image.new("RGB", (9, 9)).save(root / "2.jpg")
    second = lay_out(source(root), corpus)
    assert [a == b for a, b in zip(first.hashes, second.hashes, strict=True)] == [True, True, False, True]
    assert source(root).digest(corpus) != digest


def test_a_bomb_and_other_broken_files_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    bomb(root / "bomb.png")
    (root / "empty.jpg").write_bytes(b"")
    (root / "half.jpg").write_bytes((root / "0.jpg").read_bytes()[:300])
    found = lay_out(source(root), tmp_path / "corpus")
    assert len(found.paths) == 4
    assert set(found.unreadable) == {"bomb.png", "empty.jpg", "half.jpg"}
    assert "pixels" in found.unreadable["bomb.png"]
    assert found.coverage == {"ok": 4, "corrupt": 3}
    assert {r["state"] for r in rows(tmp_path / "corpus") if "image" not in r} == {"corrupt"}


def test_what_was_not_acquired_is_counted_and_licences_are_carried(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 3)
    lines = [
        {"path": "0.jpg", "state": "ok", "licence": "CC-BY", "url": "http://a/0.jpg"},
        {"path": "1.jpg", "state": "duplicate", "why": "same as 0.jpg"},
        {"path": "9.jpg", "state": "dead", "why": "HTTP 404", "url": "http://a/9.jpg"},
    ]
    (root / "acquired.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"path": "2.jp')
    found = lay_out(source(root), tmp_path / "corpus")
    assert found.sources == ["0.jpg", "2.jpg"]  # 2.jpg: nobody says anything against it
    assert found.licences == ["CC-BY", ""]
    assert found.coverage == {"duplicate": 1, "dead": 1, "ok": 2}
    assert rows(tmp_path / "corpus")[1]["why"] == "HTTP 404"


def test_sources_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        lay_out(source(tmp_path / "absent"), tmp_path / "corpus")
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="no image"):
        lay_out(source(tmp_path / "photos"), tmp_path / "corpus")
    (tmp_path / "photos/a.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"no readable image \(first: a.png: "):
        lay_out(source(tmp_path / "photos"), tmp_path / "corpus")
