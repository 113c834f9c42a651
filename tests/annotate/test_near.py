"""Near-duplicates: the bands find exactly what comparing all pairs finds, and a copy that was resized and saved again."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from tests.annotate.corpora import png

from mllm_fl.annotate.quality.near import COLOUR, SPOT, Look, look, near_pairs


def test_bands_find_what_all_pairs_find() -> None:
    rng = np.random.RandomState(0)
    base = [int(x) for x in rng.randint(0, 2**62, 40)]
    bits = [
        b ^ sum(1 << int(i) for i in rng.choice(64, rng.randint(0, 9), replace=False)) for b in base for _ in range(5)
    ]
    looks = [Look(b, np.zeros(192, dtype=np.uint8)) for b in bits]
    for radius in (0, 3, 4, 7):
        wanted = [
            (i, j, (bits[i] ^ bits[j]).bit_count())
            for i in range(200)
            for j in range(i + 1, 200)
            if (bits[i] ^ bits[j]).bit_count() <= radius
        ]
        assert near_pairs(looks, radius) == wanted
        assert near_pairs(looks, radius, block=7) == wanted
    assert len(near_pairs(looks, 4)) > 20


def test_a_copy_that_was_resized_and_saved_again_is_near_and_others_are_not() -> None:
    pictures = [Image.open(io.BytesIO(png(n, 64))).convert("RGB") for n in range(30)]
    small = io.BytesIO()
    pictures[3].resize((56, 56), Image.Resampling.BICUBIC).save(small, "JPEG", quality=90)
    looks = [look(p) for p in [*pictures, Image.open(small).convert("RGB")]]
    assert [(i, j) for i, j, _ in near_pairs(looks)] == [(3, 30)]


def test_another_colour_or_a_thing_at_another_place_is_another_picture() -> None:
    grey, one = np.full(192, 100, dtype=np.uint8), np.full(192, 100, dtype=np.uint8)
    one[7] = 100 + SPOT + 1
    assert near_pairs([Look(5, grey), Look(5, grey + np.uint8(COLOUR) + np.uint8(1))]) == []
    assert near_pairs([Look(5, grey), Look(5, one)]) == []
    assert near_pairs([Look(5, grey), Look(5, grey)]) == [(0, 1, 0)]
    assert near_pairs([]) == []
