"""The heat map: nothing is lost in it, and both drawings can be read."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fleet.trace.heatmap import heat_map, render_text, write_png
from fleet.trace.info import describe
from proto.errors import TraceError
from proto.trace import Trace, TraceMeta


def trace(pages: list[int]) -> Trace:
    n = len(pages)
    return Trace(
        np.array(pages, np.uint64) << np.uint64(12),
        np.zeros(n, np.uint8),
        np.ones(n, np.uint16),
        np.zeros(n, np.uint32),
        TraceMeta(source="pages"),
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=100), st.integers(2, 40), st.integers(1, 60))
def test_every_reference_is_in_its_cell(pages: list[int], rows: int, columns: int) -> None:
    heat = heat_map(describe(trace(pages)), rows, columns)
    assert heat.cells.shape[0] <= rows
    assert heat.cells.shape[1] <= columns
    counted = np.zeros_like(heat.cells)
    for index, page in enumerate(pages):
        row = int(np.searchsorted(heat.first_pages[:-1], page, "right")) - 1
        counted[row, index * heat.cells.shape[1] // len(pages)] += 1
    np.testing.assert_array_equal(heat.cells > 0, counted > 0)
    assert len(heat.labels) == len(heat.region_rows)


def test_text_shows_where_and_when() -> None:
    lines = render_text(heat_map(describe(trace([0, 0, 1, 1, 4000, 4000])), 4, 6), ascii_only=True)
    assert [line.partition("|")[2] for line in lines if "0x0 " in line] == ["@@    |"]
    assert [line.partition("|")[2] for line in lines if "0x1000 " in line] == ["  @@  |"]
    assert [line.partition("|")[2] for line in lines if "0xfa0000 " in line] == ["    @@|"]
    assert all(line.isascii() for line in lines)
    assert "6 references" in "".join(lines)


def test_blocks_where_the_terminal_has_them() -> None:
    assert "█" in "".join(render_text(heat_map(describe(trace([0, 1, 2])), 8, 6), ascii_only=False))


@pytest.mark.parametrize("pages", [[0], [0, 1, 2, 100_000] * 50, list(range(0, 300_000, 300))])
def test_png_is_drawn_in_shades_that_differ(tmp_path: Path, pages: list[int]) -> None:
    write_png(describe(trace(pages)), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 500
        assert len(image.convert("L").getcolors(256) or []) > 20


def test_png_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot write the figure"):
        write_png(describe(trace([0])), tmp_path / "no" / "x.png")
