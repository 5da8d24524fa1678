"""Reading a run folder's metrics and drawing them (``nitp_titan/tools/plot.py``)."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from nitp_titan.runs.scalars import Scalars, read_scalars, run_names
from nitp_titan.tools.plot import PANELS, build_figure, plot_runs
from tests.helpers.events import NITP, NTP, TOTAL, nitp_run, stock_run, write_events, write_metrics


def assert_same(found: Scalars, expected: Scalars) -> None:
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points]
        np.testing.assert_allclose([v for _, v in found[tag]], [v for _, v in points], rtol=1e-6)  # events are fp32


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def points(axes: Axes, line: int = 0) -> list[tuple[float, float]]:
    return [(x, y) for x, y in axes.get_lines()[line].get_xydata().tolist()]


# Reading


def test_events_are_read(tmp_path: Path):
    expected = nitp_run(60)
    assert_same(read_scalars(write_events(tmp_path, expected)), expected)


def test_metrics_file_is_read(tmp_path: Path):
    expected = nitp_run(60)
    assert_same(read_scalars(write_metrics(tmp_path, expected)), expected)


def test_events_come_before_metrics_file(tmp_path: Path):
    write_metrics(tmp_path, {NTP: [(1, 9.0)]})
    write_events(tmp_path, {NTP: [(1, 5.0)]})
    assert read_scalars(tmp_path) == {NTP: [(1, 5.0)]}


def test_metrics_file_where_the_events_hold_nothing(tmp_path: Path):
    write_metrics(tmp_path, {NTP: [(1, 9.0)]})
    write_events(tmp_path, {})
    assert read_scalars(tmp_path) == {NTP: [(1, 9.0)]}


def test_new_style_scalars_are_read(tmp_path: Path):
    writer = SummaryWriter(tmp_path / "tb")
    writer.add_scalar(NTP, 5.5, 1, new_style=True)
    writer.add_scalar(NTP, 4.5, 2, new_style=True, double_precision=True)
    writer.add_text("config", "not a number", 1)
    writer.close()
    assert read_scalars(tmp_path) == {NTP: [(1, 5.5), (2, 4.5)]}


def test_resumed_run_later_file_wins(tmp_path: Path):
    # The folder of the later start sorts first: what counts is when the file was begun.
    write_events(tmp_path, {NTP: [(s, 1.0) for s in range(1, 11)], NITP: [(5, 1.0), (10, 1.0)]}, start="b")
    write_events(tmp_path, {NTP: [(s, 2.0) for s in range(7, 15)]}, start="a")
    scalars = read_scalars(tmp_path)
    assert scalars[NTP] == [(s, 1.0) for s in range(1, 7)] + [(s, 2.0) for s in range(7, 15)]
    assert scalars[NITP] == [(5, 1.0), (10, 1.0)]


def test_resumed_run_drops_the_abandoned_end(tmp_path: Path):
    # Resumed at 10 with another logging frequency: points 11 to 20 of the first start would lie between.
    write_events(tmp_path, {NTP: [(s, 1.0) for s in range(1, 21)]})
    write_events(tmp_path, {NTP: [(10, 2.0), (15, 2.0)]})
    expected = [(s, 1.0) for s in range(1, 10)] + [(10, 2.0), (15, 2.0)]
    assert read_scalars(tmp_path)[NTP] == expected
    (tmp_path / "again").mkdir()
    lines = [{"step": s, NTP: 1.0} for s in range(1, 21)] + [{"step": s, NTP: 2.0} for s in (10, 15)]
    (tmp_path / "again" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_scalars(tmp_path / "again")[NTP] == expected


def test_truncated_event_file(tmp_path: Path):
    write_events(tmp_path, {NTP: [(s, 1.0) for s in range(1, 11)]})
    (path,) = tmp_path.glob("tb/*/events*")
    path.write_bytes(path.read_bytes()[:-7])
    assert read_scalars(tmp_path)[NTP] == [(s, 1.0) for s in range(1, 10)]


def test_truncated_last_line_is_skipped(tmp_path: Path):
    path = write_metrics(tmp_path, {NTP: [(1, 5.0), (2, 4.0)]}) / "metrics.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for end in ('{"step": 3, "loss_me', '{"step": 3, "loss_me\n', "\n\n", '{"step": 3'):
            path.write_text(path.read_text().rstrip("\n").split('{"step": 3')[0].rstrip("\n") + "\n" + end)
            assert read_scalars(tmp_path) == {NTP: [(1, 5.0), (2, 4.0)]}


@pytest.mark.parametrize("broken", ['{"step": 2, "loss', "[1, 2]", "{}", '{"step": "2"}', "7"])
def test_broken_line_in_the_middle_is_a_warning(tmp_path: Path, broken: str):
    lines = [json.dumps({"step": 1, NTP: 5.0}), broken, json.dumps({"step": 3, NTP: 4.0})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 2"):
        assert read_scalars(tmp_path) == {NTP: [(1, 5.0), (3, 4.0)]}


def test_values_that_are_not_numbers_are_left_out(tmp_path: Path):
    lines = ['{"step": 1, "a": null, "b": "x", "c": true, "d": NaN, "e": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    scalars = read_scalars(tmp_path)
    assert scalars.keys() == {"d", "e"}
    assert math.isnan(scalars["d"][0][1])
    assert scalars["e"] == [(1, 3.0)]


# The figure


def test_every_panel_holds_its_data():
    run = nitp_run()
    axes = panels(build_figure({"run": run}))
    assert list(axes) == [panel.title for panel in PANELS]
    for panel in PANELS:
        assert points(axes[panel.title]) == run[panel.tags[0]]
        assert axes[panel.title].get_yscale() == "linear"


def test_stock_run_beside_nitp_run():
    nitp, stock = nitp_run(), stock_run()
    figure = build_figure({"nitp": nitp, "stock": stock})
    axes = panels(figure)
    assert points(axes["NTP loss"], 0) == nitp[NTP]
    assert points(axes["NTP loss"], 1) == stock[TOTAL]
    assert points(axes["Total loss"], 1) == stock[TOTAL]
    assert points(axes["Validation NTP loss"], 1) == stock["validation_metrics/loss"]
    assert [line.get_label() for line in axes["NITP loss"].get_lines()] == ["nitp"]
    colours = {line.get_label(): line.get_color() for line in axes["NTP loss"].get_lines()}
    assert len(set(colours.values())) == 2
    assert all(line.get_color() == colours[line.get_label()] for a in axes.values() for line in a.get_lines())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["nitp", "stock"]
    assert figure.get_supxlabel() == "step"


def test_stock_run_alone_shows_its_loss_once():
    assert list(panels(build_figure({"stock": stock_run()}))) == [
        "NTP loss",
        "Validation NTP loss",
        "Throughput (tokens/s per device)",
    ]


def test_single_point_is_a_marker():
    run = {tag: values[:1] for tag, values in nitp_run().items()}
    figure = build_figure({"run": run})
    assert all(line.get_marker() == "o" for axes in figure.axes for line in axes.get_lines())
    low, high = figure.axes[0].get_xlim()
    assert low < 1 < high


def test_many_points_are_thinned():
    num = 100_000
    values = np.random.default_rng(0).normal(3, 0.1, num)
    values[54_321] = 8.0  # a spike stays visible, in the band
    figure = build_figure({"run": {NTP: list(zip(range(1, num + 1), values.tolist(), strict=True))}})
    axes = panels(figure)["NTP loss"]
    drawn = np.array(points(axes))
    assert 500 <= len(drawn) <= 5000
    assert np.all(np.diff(drawn[:, 0]) > 0)
    np.testing.assert_allclose(drawn[:, 1].mean(), values.mean(), rtol=1e-6)
    assert axes.get_ylim()[1] > 8


def test_values_that_are_not_finite_are_gaps(tmp_path: Path):
    run = {NTP: [(1, 5.0), (2, math.nan), (3, math.inf), (4, 4.0)], NITP: [(1, math.nan), (2, math.nan)]}
    figure = build_figure({"run": run})
    drawn = panels(figure)["NTP loss"].get_lines()[0].get_ydata()
    np.testing.assert_array_equal(drawn, [5.0, math.nan, math.nan, 4.0])
    assert [text.get_text() for text in panels(figure)["NITP loss"].texts] == ["no finite value"]
    figure.savefig(tmp_path / "figure.png")


@pytest.mark.parametrize("num_runs", [1, 2, 9])
def test_no_texts_overlap(num_runs: int):
    runs = {f"a_rather_long_name_of_a_run_{i}": nitp_run(120, seed=i) for i in range(num_runs)}
    figure = build_figure(runs)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for legend in figure.legends for text in legend.get_texts()]
    boxes += [text.get_window_extent() for text in figure.texts]
    for axes in figure.axes:
        boxes.append(axes.title.get_window_extent())
        boxes.append(axes._left_title.get_window_extent())
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            boxes += [
                tick.label1.get_window_extent() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
            ]
    boxes = [box for box in boxes if box.width > 1 and box.height > 1]
    assert len(boxes) > 50
    for index, box in enumerate(boxes):
        assert figure.bbox.contains(box.x0, box.y0)
        assert figure.bbox.contains(box.x1, box.y1)
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["outputs/nitp_debug"], ["nitp_debug"]),
        (["/x/ntp", "/y/nitp"], ["ntp", "nitp"]),
        (["sweep/lr_1/run", "sweep/lr_2/run"], ["lr_1", "lr_2"]),
        (["a/run", "b/run", "c/other"], ["a/run", "b/run", "other"]),
        (["/run", "/a/run"], ["run", "a/run"]),
        (["a/b", "a"], ["b", "a"]),
    ],
)
def test_run_names(paths: list[str], names: list[str]):
    assert run_names([Path(path) for path in paths]) == names


# The file


def test_png_of_two_runs(tmp_path: Path):
    runs = [write_events(tmp_path / "nitp", nitp_run()), write_metrics(tmp_path / "stock", stock_run())]
    out = tmp_path / "new" / "folder" / "curves.png"
    plot_runs(runs, out)
    height, width, _ = imread(out).shape
    assert 1200 <= width <= 4000
    assert 600 <= height <= 2500
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(("name", "start"), [("c.pdf", b"%PDF"), ("c.svg", b"<?xml"), ("c.PNG", b"\x89PNG")])
def test_format_by_suffix(tmp_path: Path, name: str, start: bytes):
    run = write_metrics(tmp_path / "run", {NTP: [(1, 5.0), (2, 4.0)]})
    plot_runs([run], tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_same_run_twice_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = write_metrics(tmp_path / "run", {NTP: [(1, 5.0)]})
    drawn: list[list[str]] = []
    monkeypatch.setattr(
        "nitp_titan.tools.plot.build_figure", lambda runs: drawn.append(list(runs)) or build_figure(runs)
    )
    plot_runs([run, tmp_path / "." / "run"], tmp_path / "c.png")
    assert drawn == [["run"]]


def test_odd_names_are_drawn_as_they_are(tmp_path: Path):
    runs = [write_metrics(tmp_path / name, {NTP: [(1, 5.0)]}) for name in ("_hidden", "$x_{$", "n" * 200)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_runs(runs, tmp_path / "c.png")
        plot_runs(runs[1:2], tmp_path / "c.png")


def test_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = write_metrics(tmp_path / "run", {NTP: [(1, 5.0)]})
    out = tmp_path / "out" / "c.png"
    out.parent.mkdir()
    out.write_bytes(b"old")

    def full(self: Figure, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(ValueError, match=r"c\.png: cannot be written: No space left"):
        plot_runs([run], out)
    assert out.read_bytes() == b"old"
    assert list(out.parent.iterdir()) == [out]


def test_parent_that_is_a_file(tmp_path: Path):
    run = write_metrics(tmp_path / "run", {NTP: [(1, 5.0)]})
    with pytest.raises(ValueError, match="cannot be written"):
        plot_runs([run], run / "metrics.jsonl" / "c.png")


# Errors


def test_unsupported_suffix(tmp_path: Path):
    with pytest.raises(ValueError, match=r"\.jpg is not supported.*\.png, \.pdf, \.svg"):
        plot_runs([tmp_path / "missing"], tmp_path / "c.jpg")
    with pytest.raises(ValueError, match=r"\(none\) is not supported"):
        plot_runs([tmp_path], tmp_path / "c")


def test_no_runs(tmp_path: Path):
    with pytest.raises(ValueError, match="no run folder"):
        plot_runs([], tmp_path / "c.png")


def test_missing_folder_names_the_nearest(tmp_path: Path):
    for name in ("nitp_debug", "ntp_0.5b"):
        write_metrics(tmp_path / name, {NTP: [(1, 5.0)]})
    (tmp_path / "nitp_debuq").mkdir()  # near, but no run
    with pytest.raises(ValueError, match=r"no such run folder; the nearest there is .*/nitp_debug$"):
        plot_runs([tmp_path / "nitp_debg"], tmp_path / "c.png")
    with pytest.raises(ValueError, match="nor is there a folder"):
        read_scalars(tmp_path / "x" / "y")
    with pytest.raises(ValueError, match=r"not a run folder but a file; did you mean .*/ntp_0\.5b\?"):
        read_scalars(tmp_path / "ntp_0.5b" / "metrics.jsonl")


def test_folder_without_metrics(tmp_path: Path):
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ValueError, match=r"neither TensorBoard events .* nor metrics\.jsonl in this folder$"):
        read_scalars(tmp_path)
    run = write_events(tmp_path / "run", {NTP: [(1, 5.0)]})
    with pytest.raises(ValueError, match=r"runs below it: .*/run$"):
        read_scalars(tmp_path)
    with pytest.raises(ValueError, match=r"did you mean .*/run\?$"):
        read_scalars(run / "tb")


def test_no_known_tag(tmp_path: Path):
    run = write_events(tmp_path / "run", {"grad_norm": [(1, 5.0)], "lr": [(1, 5.0)]})
    with pytest.raises(ValueError, match=r"no metric that is plotted; its tags: grad_norm, lr$"):
        plot_runs([run], tmp_path / "c.png")
    empty = write_events(tmp_path / "empty", {})
    with pytest.raises(ValueError, match="none yet"):
        plot_runs([empty], tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_all_bad_runs_are_reported_together(tmp_path: Path):
    good = write_metrics(tmp_path / "good", {NTP: [(1, 5.0)]})
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"(?s)goood: no such run folder.*\n.*bare: neither"):
        plot_runs([good, tmp_path / "goood", tmp_path / "bare"], tmp_path / "c.png")


def test_free_of_torch_and_of_pyplot(tmp_path: Path):
    run = write_events(tmp_path / "run", {NTP: [(1, 5.0), (2, 4.0)]})
    code = (
        "import sys; from pathlib import Path; from nitp_titan.tools.plot import plot_runs;"
        f"plot_runs([Path({str(run)!r})], Path({str(tmp_path / 'c.png')!r}));"
        "sys.exit(bool({'torch', 'tensorflow', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
