"""bench.learn's own arithmetic; the run itself is long."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from bench.learn import new_kind, plot, smoothed, tpf


def test_new_traffic_is_distinct_and_repeats_itself() -> None:
    texts = new_kind(500, 1)
    assert len(set(texts)) == 500 and texts == new_kind(500, 1) and texts != new_kind(500, 2)
    assert all(text.startswith("Write a SQL query that ") and "{" not in text for text in texts)


def test_tokens_per_forward_of_the_latest_texts() -> None:
    texts = [([0] * 20, 10)] * 24 + [([0] * 30, 10)] * 24
    assert tpf(texts) == 2.5
    line = smoothed([i / 10 for i in range(48)], texts)
    assert line[0] == (2.3, 2.0) and line[-1] == (4.7, 3.0) and len(line) == 25


def test_the_plot_shows_lines_and_versions() -> None:
    lines = {"static": [(-1.0, 2.0), (1.0, 1.8), (3.0, 1.8)], "learns": [(-1.0, 2.0), (1.0, 1.8), (3.0, 2.2)]}
    tree = ElementTree.fromstring(plot(lines, [(1.5, "v000001")]))
    text = "".join(tree.itertext())
    assert "static" in text and "learns" in text and "v000001" in text
    paths = [path.get("d", "") for path in tree.iter("{http://www.w3.org/2000/svg}path")]
    heights = [[float(point.split()[1]) for point in path[1:].split("L")] for path in paths if path.count("L") == 2]
    assert heights[0][1] == heights[0][2] and heights[1][2] < heights[1][1]  # up is less in SVG
