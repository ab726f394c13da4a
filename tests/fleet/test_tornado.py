"""fleet.tornado: what the table says, and that unpublished costs show in the figure."""

import io
from pathlib import Path

from rich.console import Console

from fleet.sensitivity import Effect
from fleet.tornado import draw, print_effects

EFFECTS = [
    Effect("invept", "ns", 150, 500, 1000, "elapsed.virtual_s", 8.0, 10.0, 14.0, "estimated", "unpublished", False),
    Effect("invlpg", "ns", 70, 100, 130, "elapsed.virtual_s", 9.5, 10.0, 10.5, "read", "a commit", False),
    Effect("vmexit", "us", 0.4, 0.6, 1.2, "elapsed.virtual_s", None, 10.0, 10.0, "recalled", "folklore", True),
    Effect("pmi", "us", 1, 1.5, 3, "elapsed.virtual_s", 10.0, 10.0, 10.0, "estimated", "unpublished", False),
]


def printed(effects: list[Effect]) -> str:
    out = io.StringIO()
    print_effects(effects, Console(file=out, width=160))
    return out.getvalue()


def test_the_table_tells_what_decides_and_what_is_a_guess() -> None:
    text = printed(EFFECTS)
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert "60.0 %" in rows["invept"]
    assert "UNPUBLISHED" in rows["invept"]
    assert "UNPUBLISHED" not in rows["invlpg"]
    assert "the run at an end of its range failed: vmexit" in text
    assert "pmi" not in rows
    assert "nobody has published: invept\n" in text
    assert "1 other costs" in text


def test_a_result_that_no_cost_moves_says_so() -> None:
    text = printed(EFFECTS[3:])
    assert "no cost moves it" in text
    assert "nobody has published" not in text


def test_the_figure_marks_what_nobody_has_published(tmp_path: Path) -> None:
    draw(EFFECTS, tmp_path / "tornado.svg")
    svg = (tmp_path / "tornado.svg").read_text()
    for label in ("invept *", "<!-- invlpg -->", "elapsed.virtual_s", "1000 ns"):
        assert label in svg
    assert "pmi" not in svg
    draw(EFFECTS[3:], tmp_path / "tornado.png")
    assert (tmp_path / "tornado.png").read_bytes().startswith(b"\x89PNG")
