"""Sizes and times of the codecs a pack could use."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import pack
from benchmarks.pack import Codec, codecs, measured


def test_every_codec_gives_back_what_it_was_given_also_a_last_row_that_is_not_full() -> None:
    report = pack.main(["--data", "synthetic", "--images", "23"])
    rows = {row["codec"]: row for table in report.tables for row in table.rows}
    assert list(rows) == [codec.name for codec in codecs(slowest=False)]
    assert {row["bytes"] > 3000 for row in rows.values()} == {True}, "random bytes cannot be made shorter"
    assert rows["pack"]["megabytes"] == pytest.approx(rows["pack"]["bytes"] * 0.03)


def test_slowest_adds_a_line_a_tiling() -> None:
    names = [codec.name for codec in codecs(slowest=True)]
    assert len(names) == len([codec.name for codec in codecs(slowest=False)]) + 3
    assert "WebP, slowest, a column" in names


def test_more_images_than_webp_is_tall_go_into_several_pictures() -> None:
    images = np.random.default_rng(0).integers(0, 256, (600, 3, 32, 32), dtype=np.uint8)
    column = next(codec for codec in codecs(slowest=False) if codec.name == "WebP, a column")
    parts = column.encode(images)
    assert len(parts) == 2
    np.testing.assert_array_equal(column.decode(parts, images.shape), images)


def test_a_codec_that_loses_a_bit_is_refused() -> None:
    wrong = Codec(name="wrong", encode=lambda images: [b""], decode=lambda parts, shape: np.ones(shape, np.uint8))
    with pytest.raises(AssertionError, match="wrong is not lossless"):
        measured(wrong, np.zeros((2, 3, 4, 4), np.uint8))
