"""The computed parts of the docs are what is computed now. To renew them: python -m docs.generate"""

from __future__ import annotations

import pytest

from docs.figures import measured
from docs.generate import PARTS, marks
from tests.conftest import ROOT


@pytest.mark.parametrize(("file", "name"), PARTS)
def test_a_computed_part_is_what_is_computed(file, name):
    begin, end = marks(name)
    text = (ROOT / "docs" / file).read_text(encoding="utf-8")
    assert text.split(begin)[1].split(end)[0] == PARTS[file, name](), "run: python -m docs.generate"


def test_the_picture_shows_every_network_and_step():
    """A dot of the picture that is not in the JSON would be a hole in it, and none may be made up."""
    values = measured.measured()
    assert {network: set(steps) for network, steps in values.items()} == {key: set(measured.STEPS) for key in measured.NETWORKS}
    missing = {(network, key) for network, steps in values.items() for row in steps.values() for key, value in row.items() if value is None}
    assert missing == {("resnet50", "top1")}  # of random weights
    assert "ONNX Runtime 1.31.1 and 1.32.0 on 2 cores of an AMD EPYC, 2 threads" in measured.note()


def test_the_readme_says_what_the_dense_networks_take_in_torch():
    eager = {row["network"]: row for row in measured.content()["rows"] if row["runtime"].startswith("torch") and row["step"] == "dense"}
    found = [f"{eager[network]['latency_ms_batch1']:.3g}" for network in measured.NETWORKS]
    assert f"take {found[0]}, {found[1]} and {found[2]} ms" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "value", "text"), [("top1", 0.7143, "71.43 %"), ("macs", 4089184256, "4,089 M"), ("bytes", 810397, "0.81 MB")]
)
def test_values_are_written_with_three_digits_at_least(key, value, text):
    assert next(panel for panel in measured.PANELS if panel.key == key).text(value) == text


def test_pictures_are_drawn(plots, tmp_path):
    from docs.figures import channels

    for name, theme in measured.THEMES.items():
        measured.draw(theme, tmp_path / f"measured_{name}.png")
        channels.draw(name, theme, tmp_path / f"channels_{name}.png")
        for figure in ("measured", "channels"):
            assert (tmp_path / f"{figure}_{name}.png").stat().st_size > 10_000
            assert (ROOT / "docs" / "figures" / f"{figure}_{name}.png").is_file()
