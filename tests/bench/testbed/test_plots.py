"""The plots of docs/testbed: what is printed in them can be read."""

import itertools

from matplotlib.text import Annotation

from bench.testbed import plots


def share(mean: float) -> dict:
    return {"mean": mean, "low": mean, "high": mean}


def test_no_label_of_a_preset_covers_another(monkeypatch, tmp_path):
    """Two presets at one point, a third close above them and one beside them."""
    points = {
        "one": (0.02, 0.55),
        "another": (0.02, 0.55),
        "above": (0.03, 0.57),
        "beside": (0.1, 0.55),
        "far": (0.9, 0.9),
    }
    main = {n: {"D": {"copies": share(x), "faithful, no copies": share(y)}} for n, (x, y) in points.items()}
    main["all copies"] = {"D": {"copies": share(1.0), "faithful, no copies": None}}
    made = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: made.append(figure))
    plots.presets(tmp_path / "presets.png", {"main": main, "ordinary, plain guidance": {"faithful": share(0.85)}})
    (figure,) = made
    figure.draw_without_rendering()
    labels = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    assert {label.get_text(): label.xy for label in labels} == points
    for a, b in itertools.combinations(labels, 2):
        assert not a.get_window_extent().overlaps(b.get_window_extent()), (a, b)
