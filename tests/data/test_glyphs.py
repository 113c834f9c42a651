"""Rendered characters: the same from the same seed, each with a scene that is true, in the geometry of the real digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mllm_fl.data.digits import load_digits
from mllm_fl.data.glyphs import DIGIT_NAMES, cells_to_images, character_of, glyph_set, render_glyphs
from mllm_fl.errors import UserError


def test_a_glyph_depends_on_seed_and_index_only() -> None:
    many, scenes = render_glyphs(12, seed=3)
    few, first = render_glyphs(5, seed=3)
    other, _ = render_glyphs(5, seed=4)
    assert torch.equal(many.read(range(5)), few.read(range(5)))
    assert scenes[:5] == first
    assert not torch.equal(few.read(range(5)), other.read(range(5)))


def test_scenes_name_what_is_drawn() -> None:
    images, scenes = render_glyphs(40, seed=0)
    for label, scene in zip(images.labels, scenes, strict=True):
        assert images.class_names[label] == scene.name
        assert scene.kind == ("digit" if scene.character.isdigit() else "letter")
        plain = scene.to_json()
        assert plain["weight"] in ("thin", "medium", "bold") and plain["posture"] in ("left", "upright", "right")
    assert len({s.family for s in scenes}) > 1


def test_alignment_set_is_balanced_in_the_order_of_the_names() -> None:
    images, scenes = glyph_set(DIGIT_NAMES, 3, seed=0)
    assert images.class_counts() == [3] * 10
    assert [s.character for s in scenes] == [str(c) for c in range(10) for _ in range(3)]
    by_figure, _ = glyph_set([str(c) for c in range(10)], 3, seed=0)
    assert torch.equal(images.read(range(30)), by_figure.read(range(30)))


def test_geometry_is_that_of_the_real_digits() -> None:
    """The character fills the height of the picture, light on dark, in three equal channels; mean ink is near the digits'."""
    glyphs, _ = glyph_set(DIGIT_NAMES, 20, seed=1)
    real = load_digits(16)[0]
    x, r = glyphs.read(range(200)), real.read(range(200))
    assert x.shape == r.shape == (200, 3, 16, 16)
    assert torch.equal(x[:, 0], x[:, 2])
    top = (x[:, 0, :3].amax((1, 2)) > 60).double().mean()
    bottom = (x[:, 0, -3:].amax((1, 2)) > 60).double().mean()
    assert top > 0.95 and bottom > 0.95
    assert abs(float(x.double().mean()) - float(r.double().mean())) < 15  # of 255


def test_cells_become_images_as_digits_do() -> None:
    cells = torch.zeros(1, 8, 8, dtype=torch.uint8)
    cells[0, 2:4, 2:4] = 16
    image = cells_to_images(cells, 16)
    assert image.dtype == torch.uint8
    assert image.max() == 255 and image[0, 0, 6, 6] == 255 and image[0, 0, 12, 12] == 0


def test_cache_gives_the_same_and_survives_damage(tmp_path: Path) -> None:
    fresh, scenes = render_glyphs(6, seed=9)
    for _ in range(2):
        cached, read = render_glyphs(6, seed=9, cache=tmp_path)
        assert torch.equal(cached.read(range(6)), fresh.read(range(6))) and read == scenes
    (file,) = tmp_path.glob("glyphs-*")
    file.write_bytes(file.read_bytes()[:50])
    again, _ = render_glyphs(6, seed=9, cache=tmp_path)
    assert torch.equal(again.read(range(6)), fresh.read(range(6)))


@pytest.mark.parametrize(
    ("name", "character"), [("seven", "7"), ("7", "7"), ("digit_7", "7"), ("letter A", "A"), ("a", "A")]
)
def test_class_names_that_mean_a_character(name: str, character: str) -> None:
    assert character_of(name) == character


def test_unknown_class_names_are_refused() -> None:
    with pytest.raises(UserError, match="glyphs: class 'airplane': no glyph is known by this name"):
        glyph_set(["airplane"], 1, seed=0)
