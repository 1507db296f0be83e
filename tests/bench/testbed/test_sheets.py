"""Contact sheets: every prompt has its tile, in order."""

import numpy as np
from PIL import Image

from bench.testbed import sheets
from fastguard import policy
from fastguard.testbed import prompts


def test_sheets_show_every_prompt(pipe, judge, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sheets, "sheet", lambda path, tiles, columns: drawn.append((list(tiles), columns)))
    shown = prompts("D", "test")[:3]
    plain = sheets.pictures(pipe, judge, shown, policy("cfg"))
    assert plain.shape == (3, 32, 32, 3) and plain.dtype == np.uint8 and plain.std() > 10
    sheets.memorized(tmp_path / "m.png", shown, plain, plain)
    sheets.ordinary(tmp_path / "o.png", shown, plain)
    (tiles, _), (others, _) = drawn
    assert [title for title, _ in tiles[::3]] == [title for title, _ in others] == [p.concept for p in shown]
    assert not np.array_equal(tiles[0][1], tiles[1][1]) and np.array_equal(tiles[1][1], tiles[2][1])


def test_a_sheet_draws_all_of_its_tiles(tmp_path):
    tile = ("red", np.full((32, 32, 3), (255, 0, 0), np.uint8))

    def red(count: int) -> int:
        sheets.sheet(tmp_path / "s.png", [tile] * count, 4)
        return int((np.asarray(Image.open(tmp_path / "s.png").convert("RGB")) == (255, 0, 0)).all(-1).sum())

    one = red(1)
    assert one > 60 * 60
    for count in (4, 5, 9):
        assert abs(red(count) / (count * one) - 1) < 0.1  # a little is lost or won by the spacing of several rows
