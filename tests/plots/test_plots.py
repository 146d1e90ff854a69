"""Figures show the numbers they were given, say their units, and keep every word within the paper."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.image import imread
from matplotlib.text import Text

from f2d2_lightning import GaussianBaseline, log_prob
from f2d2_lightning.flows import GaussianFlow
from f2d2_lightning.plots import (
    calibration_figure,
    density_figure,
    nll_steps_figure,
    pixels,
    plane_grid,
    ranked_figure,
    sample_figure,
    save_figure,
    training_figure,
)
from f2d2_lightning.plots._figure import VERMILLION, number

NAN = math.nan
EXTENT = (-3.0, 3.0, -2.0, 2.0)


def words(figure):
    """Every word of a figure but the labels of ticks, with its box; none may be cut off or lie on another."""
    figure.canvas.draw()
    renderer, paper = figure.canvas.get_renderer(), figure.bbox
    ticks = {
        id(t) for ax in figure.axes for t in (*ax.get_xticklabels(which="both"), *ax.get_yticklabels(which="both"))
    }
    found = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible() and id(t) not in ticks]
    boxes = [text.get_window_extent(renderer) for text in found]
    for text, box in zip(found, boxes, strict=True):
        assert min(box.x0, box.y0, paper.x1 - box.x1, paper.y1 - box.y1) >= 0, text
    for i, box in enumerate(boxes):
        for j, other in enumerate(boxes[i + 1 :], i + 1):
            assert not box.overlaps(other), (found[i], found[j])
    return [text.get_text() for text in found]


@pytest.fixture
def values():
    generator = torch.Generator().manual_seed(0)
    reference = 2.2 + 0.3 * torch.randn(60, generator=generator)
    return {k: reference + 0.01 * k + 0.05 * torch.randn(60, generator=generator) for k in (1, 2, 4, 8)}, reference


# --- calibration ---


def test_calibration_shows_every_pair_and_its_summary(values):
    few, reference = values
    figure = calibration_figure(few, reference, "bits/dim")
    said = words(figure)
    assert "few-step NLL, bits/dim" in said
    assert "teacher NLL, bits/dim" in said
    for ax, (steps, value) in zip(figure.axes, few.items(), strict=True):
        (points,) = ax.collections
        assert np.array_equal(points.get_offsets(), np.stack((reference.numpy(), value.numpy()), 1))
        (line,) = ax.lines
        assert np.array_equal(line.get_xdata(), line.get_ydata())
        gap = np.mean(value.numpy() - reference.numpy())
        r = np.corrcoef(value.numpy(), reference.numpy())[0, 1]
        assert ax.get_title() == f"{steps} step{'' if steps == 1 else 's'}: gap {gap:+.3f}, r = {r:.3f}"
        # all of them within the axes
        (low, high) = ax.get_xlim()
        assert (low, high) == ax.get_ylim()
        assert low < min(reference.min(), value.min())
        assert high > max(reference.max(), value.max())


def test_calibration_counts_what_has_no_value_and_what_lies_outside(values):
    few, reference = values
    few[1][[0, 3]] = NAN
    few[2][5] = 1e4
    figure = calibration_figure(few, reference, "nats", "own velocity")
    said = words(figure)
    assert "own velocity NLL, nats" in said
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0].endswith("\n2 of 60 without a value")
    good = few[1].isfinite()
    assert f"gap {float((few[1] - reference)[good].mean()):+.3f}" in titles[0]
    assert len(figure.axes[0].collections[0].get_offsets()) == 58
    assert titles[1].endswith("\n1 point outside")
    assert figure.axes[0].get_xlim()[1] < 5


@pytest.mark.parametrize(
    ("value", "reference", "title"),
    [
        ([2.0], [1.5], "2 steps: gap +0.500, r undefined"),
        ([-1021.0] * 4, [-1021.0] * 4, "2 steps: gap +0.000, r undefined"),
        ([NAN] * 3, [1.0, 2.0, 3.0], "2 steps: no values\n3 of 3 without a value"),
        ([1.0, math.inf, 2.0], [1.0, 2.0, 3.0], "2 steps: gap -0.500, r = 1.000\n1 of 3 without a value"),
    ],
)
def test_calibration_of_little(value, reference, title):
    figure = calibration_figure({2: torch.tensor(value)}, torch.tensor(reference), "nats")
    words(figure)
    assert figure.axes[0].get_title() == title
    low, high = figure.axes[0].get_xlim()
    assert high > low


def test_many_step_counts_make_rows_with_ticks():
    few = {k: torch.arange(4.0) for k in (1, 2, 4, 8, 16, 32, 64)}
    figure = calibration_figure(few, torch.arange(4.0), "nats")
    assert len(figure.axes) == 7
    words(figure)
    # the fourth of the first row has none below it
    labelled = [any(t.get_visible() and t.get_text() for t in ax.get_xticklabels()) for ax in figure.axes]
    assert labelled == [False] * 3 + [True] * 4


# --- against the number of steps ---


def test_nll_against_steps():
    few, errors = {8: 2.24, 1: 2.22, 2: 2.21}, {8: 0.003, 1: 0.002, 2: 0.001}
    figure = nll_steps_figure(few, errors, "bits/dim", reference=2.23, reference_error=0.016, error_of="gap")
    said = words(figure)
    (ax,) = figure.axes
    (bars,) = [c for c in ax.containers if isinstance(c, ErrorbarContainer)]
    line, _, (vertical,) = bars
    assert line.get_xdata().tolist() == [1, 2, 8]
    assert line.get_ydata().tolist() == [2.22, 2.21, 2.24]
    ends = [tuple(segment[:, 1]) for segment in vertical.get_segments()]
    assert np.allclose(ends, [(2.218, 2.222), (2.209, 2.211), (2.237, 2.243)], atol=1e-12)
    teacher = next(line for line in ax.lines if line.get_label().startswith("teacher"))
    assert teacher.get_ydata() == [2.23, 2.23]
    assert "teacher: 2.230" in said
    assert "few-step, ± standard error of the gap" in said
    (band,) = ax.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((2.214, 2.246))
    assert ax.get_xscale() == "log"
    assert ax.xaxis.get_transform().base == 2
    assert ax.get_xticks().tolist() == [1, 2, 8]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "8"]
    assert {"steps", "NLL, bits/dim"} <= set(said)


def test_nll_against_one_step_count_without_reference():
    figure = nll_steps_figure({4: -1021.5}, {4: NAN}, "nats")
    said = words(figure)
    assert not any("teacher" in word for word in said)
    assert figure.axes[0].get_xticks().tolist() == [4]
    figure = nll_steps_figure({1: NAN, 2: 3.0}, {1: NAN, 2: 1.0}, "nats", reference=NAN)
    assert figure.axes[0].lines[0].get_ydata()[1] == 3.0


# --- most and least likely ---


@pytest.mark.parametrize("channels", [1, 3])
def test_ranked_images_stand_over_their_values(channels):
    images = 2 * torch.rand(20, channels, 5, 4) - 1
    value = torch.randperm(20).double()
    reference = value + 0.25
    value[[2, 7]] = NAN
    reference[value.nan_to_num(99).argmin()] = NAN
    figure = ranked_figure(images, value, "bits/dim", name="4 steps", reference=reference, count=3)
    said = words(figure)
    assert "beneath each image: NLL in bits/dim, 4 steps; below it, teacher" in said
    assert {"most likely\nof 18", "least likely\nof 18"} <= set(said)
    known = np.flatnonzero(~np.isnan(value.numpy()))
    order = known[np.argsort(value.numpy()[known])]
    for ax, index in zip(figure.axes, [*order[:3], *order[::-1][:3]], strict=True):
        expected = ((images[index] + 1) / 2).expand(3, -1, -1).permute(1, 2, 0)
        assert np.allclose(ax.images[0].get_array(), expected, atol=1e-6)
        assert ax.get_xlabel() == f"{float(value[index]):.3f}\n{float(reference[index]):.3f}".replace("nan", "none")


@pytest.mark.parametrize(("count", "rows"), [(1, [1]), (2, [1, 1]), (7, [4, 3]), (40, [8, 8])])
def test_ranked_images_never_twice(count, rows):
    value = torch.arange(float(count)) + 1000
    figure = ranked_figure(torch.zeros(count, 1, 4, 4), value, "nats")
    words(figure)
    shown = [float(ax.get_xlabel()) for ax in figure.axes if ax.images]
    assert len(shown) == sum(rows)
    assert len(set(shown)) == len(shown)
    assert shown[: rows[0]] == sorted(shown[: rows[0]])
    assert max(shown[: rows[0]]) <= min([*shown[rows[0] :], math.inf])


# --- samples ---


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_lie_in_a_grid_in_their_order(channels):
    x = 8 * torch.rand(5, channels, 3, 4)
    x[3, 0, 1, 2] = NAN
    figure = sample_figure({"1 step": x, "teacher, 200 evaluations": x[:1]}, low=0.0, high=8.0, columns=2)
    words(figure)
    picture = figure.axes[0].images[0].get_array()
    assert picture.shape == (3 * 4 + 1, 2 * 5 + 1, 3)
    for index in range(5):
        top, left = 4 * (index // 2) + 1, 5 * (index % 2) + 1
        tile = picture[top : top + 3, left : left + 4]
        expected = (x[index] / 8).expand(3, -1, -1).permute(1, 2, 0).numpy().copy()
        if index == 3:
            expected[1, 2] = to_rgb(VERMILLION)
        assert np.allclose(tile, expected, atol=1e-6)
    assert np.all(picture[9:12, 6:10] == 1)  # the place that is left is empty
    assert [ax.get_title() for ax in figure.axes] == ["1 step\n1 of 5 not finite", "teacher, 200 evaluations"]


def test_points_share_their_axes():
    x = torch.randn(400, 2)
    far = x.clone()
    far[0] = 1000.0
    far[1, 0] = NAN
    figure = sample_figure({"1 step": far, "2 steps": x})
    assert "$x_1$" in words(figure)
    assert figure.axes[0].get_title() == "1 step\n1 of 400 not finite\n1 point outside"
    assert np.array_equal(figure.axes[1].collections[0].get_offsets(), x.numpy())
    for side in ("get_xlim", "get_ylim"):
        assert getattr(figure.axes[0], side)() == getattr(figure.axes[1], side)()
    assert figure.axes[0].get_xlim()[1] < 10
    assert figure.axes[0].get_xlim()[1] > float(x[:, 0].max())


# --- densities ---


def test_densities_share_one_scale_and_stand_the_right_way_up():
    mean = torch.tensor([1.5, -1.0])
    flow = GaussianFlow(GaussianBaseline.from_covariance(mean, torch.diag(torch.tensor([0.2, 0.4]))))
    grid = plane_grid(EXTENT, 40)
    value = log_prob(flow, grid, 2).value.reshape(40, 40)
    exact = torch.distributions.MultivariateNormal(mean, torch.diag(torch.tensor([0.2, 0.4]))).log_prob(grid)
    figure = density_figure({"2 steps": value, "true density": exact.reshape(40, 40), "flat": value - 3}, EXTENT)
    assert {"log-density, nats", "$x_1$", "$x_2$"} <= set(words(figure))
    images = [ax.images[0] for ax in figure.axes[:3]]
    assert len({image.get_clim() for image in images}) == 1
    low, high = images[0].get_clim()
    assert high - low == pytest.approx(8.0)
    assert high == pytest.approx(float(exact.quantile(0.999)), rel=1e-9)
    for image, expected in zip(images, (value, exact.reshape(40, 40), value - 3), strict=True):
        assert np.array_equal(image.get_array(), expected.numpy())
        # where the picture is brightest, there is the mean
        row, column = np.unravel_index(np.argmax(image.get_array()), (40, 40))
        left, right, bottom, top = image.get_extent()
        assert image.origin == "lower"
        where = (left + (column + 0.5) / 40 * (right - left), bottom + (row + 0.5) / 40 * (top - bottom))
        assert where == pytest.approx(tuple(mean.tolist()), abs=0.1)


def test_densities_with_holes():
    value = torch.zeros(10, 10)
    value[0, 0], value[0, 1], value[0, 2] = NAN, -math.inf, math.inf
    figure = density_figure({"1 step": value}, EXTENT)
    words(figure)
    assert figure.axes[0].get_title() == "1 step\n1 of 100 cells without a value"
    shown = figure.axes[0].images[0].get_array()
    low, high = figure.axes[0].images[0].get_clim()
    assert shown.mask.sum() == 1
    assert shown[0, 1] < low < high < shown[0, 2]
    density_figure({"1 step": torch.full((3, 3), NAN)}, EXTENT)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_no_number_of_panels_cuts_words_off(count):
    reference = torch.arange(5.0)
    words(calibration_figure({2**k: reference + k for k in range(count)}, reference, "nats"))
    words(density_figure({f"{k} steps": torch.full((4, 4), NAN) for k in range(count)}, (-4.0, 4.0, -3.7, 4.0)))
    words(sample_figure({f"{k} steps": torch.randn(9, 2) for k in range(count)}))


def test_the_grid_runs_along_the_first_axis():
    grid = plane_grid((0.0, 4.0, 10.0, 12.0), 2)
    assert grid.tolist() == [[1.0, 10.5], [3.0, 10.5], [1.0, 11.5], [3.0, 11.5]]


# --- training ---


@pytest.mark.parametrize(
    ("values", "scale"), [([100.0, 10.0, 1.0], "log"), ([3.0, 2.0, 1.0], "linear"), ([1.0, -30.0, NAN], "linear")]
)
def test_training(values, scale):
    figure = training_figure({"train/loss": ([0, 50, 100], values), "val/loss": ([50], [2.0])})
    assert {"optimiser step", "loss", "train/loss", "val/loss"} <= set(words(figure))
    (ax,) = figure.axes
    assert ax.get_yscale() == scale
    assert np.array_equal(ax.lines[0].get_ydata(), values, equal_nan=True)
    assert ax.lines[1].get_xdata().tolist() == [50]


# --- files ---


def test_files_appear_whole_and_hold_the_pixels(tmp_path):
    figure = sample_figure({"1 step": torch.rand(4, 3, 4, 4)})
    path = save_figure(figure, tmp_path / "new/grid.png")
    assert pixels(figure).dtype == np.uint8
    assert np.array_equal(pixels(figure), (imread(path)[..., :3] * 255).round().astype(np.uint8))
    with pytest.raises(ValueError, match="nothing"):
        save_figure(figure, tmp_path / "new/grid.nothing")
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    assert save_figure(figure, tmp_path / "grid.pdf").read_bytes()[:4] == b"%PDF"


def test_notebooks_show_figures():
    figure = sample_figure({"points": torch.randn(5, 2)})
    assert imread(io.BytesIO(figure._repr_png_())).shape[:2] == pixels(figure).shape[:2]


def test_numbers():
    values = (2.2344, -1021.26, NAN, math.inf)
    assert [number(value) for value in values] == ["2.234", "-1021.3", "none", "inf"]


IMAGES, THREE = torch.zeros(3, 1, 4, 4), torch.zeros(3)
REFUSED = [
    (lambda: calibration_figure({1: THREE}, torch.zeros(4), "nats"), "3 values at 1 step and 4 of the reference"),
    (lambda: calibration_figure({2: torch.zeros(3, 1)}, THREE, "nats"), r"values at 2 steps has shape \(3, 1\)"),
    (lambda: calibration_figure({2: [1.0]}, torch.zeros(1), "nats"), "type list"),
    (lambda: calibration_figure({}, torch.zeros(4), "nats"), "nothing to show"),
    (lambda: nll_steps_figure({}, {}, "nats"), "step counts"),
    (lambda: nll_steps_figure({0: 1.0}, {0: 1.0}, "nats"), "step counts"),
    (lambda: nll_steps_figure({1: 1.0}, {2: 1.0}, "nats"), "step counts"),
    (lambda: ranked_figure(IMAGES, torch.full((3,), NAN), "nats"), "no image has a likelihood"),
    (lambda: ranked_figure(IMAGES, torch.zeros(2), "nats"), "3 images, 2 values"),
    (lambda: ranked_figure(IMAGES, THREE, "nats", reference=torch.zeros(2)), "2 of the reference"),
    (lambda: ranked_figure(torch.zeros(3, 2, 4, 4), THREE, "nats"), r"\(3, 2, 4, 4\)"),
    (lambda: ranked_figure(IMAGES, THREE, "nats", low=1.0, high=1.0), "high must be greater"),
    (lambda: ranked_figure(IMAGES, THREE, "nats", count=0), "count is at least 1"),
    *((lambda shape=shape: sample_figure({"1 step": torch.zeros(shape)}), "can be shown")
      for shape in ((3, 5), (3, 2, 4, 4), (3, 4, 4), (0, 1, 4, 4), (0, 2))),
    (lambda: sample_figure({}), "nothing to show"),
    (lambda: density_figure({}, EXTENT), "nothing to show"),
    (lambda: density_figure({"a": torch.zeros(4)}, EXTENT), r"'a' has shape \(4,\)"),
    (lambda: density_figure({"a": torch.zeros(2, 2)}, (1.0, 0.0, 0.0, 1.0)), "extent"),
    (lambda: density_figure({"a": torch.zeros(2, 2)}, EXTENT, span=0.0), "span"),
    *((lambda curves=curves: training_figure(curves), "value")
      for curves in ({}, {"train/loss": ([1], [NAN])}, {"train/loss": ([1, 2], [1.0])})),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_shown_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
