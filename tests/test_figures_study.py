"""figures/study.py, study_space.py: what is good stays readable, what is absent is said, names are as they are."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure

from earthprior.figures.study import curves_figure, history_figure, importances_figure, pareto_figure
from earthprior.figures.study_space import parallel_figure, slices_figure
from earthprior.figures.trials import Dial, Trial, shown_from

LR = Dial("lr", 1e-4, 1e-1, log=True)
LOSS = Dial("loss_fn", choices=("mse", "$l$_1", "null"))
ALPHA = Dial("loss_weights.alpha", 0.5, 1.0)
WARMUP = Dial("warmup_epochs", 2, 2, whole=True)
TRIALS = [
    Trial(0, "finished", (0.1,), {"lr": 1e-3, "loss_fn": "mse", "warmup_epochs": 2}, {1: -0.2, 2: 0.1}),
    Trial(1, "finished", (0.3,), {"lr": 1e-2, "loss_fn": "mse", "warmup_epochs": 2}, {1: 0.0, 2: 0.3}),
    Trial(2, "pruned", (), {"lr": 1e-4, "loss_fn": "$l$_1", "loss_weights.alpha": 0.7, "warmup_epochs": 2}, {1: -0.1}),
    Trial(3, "finished", (-40.0,), {"lr": 1e-1, "loss_fn": "mse", "warmup_epochs": 2}, {1: -3.0, 2: -40.0}),
    Trial(4, "failed", (), {"lr": 1e-1, "loss_fn": "null", "warmup_epochs": 2}),
    Trial(5, "finished", (0.2,), {"lr": 2e-3, "loss_fn": "$l$_1", "loss_weights.alpha": 0.9, "warmup_epochs": 2}),
    Trial(6, "waiting"),
]


def text_of(figure: Figure) -> str:
    figure.savefig(io.BytesIO(), format="png")
    return " ".join(text.get_text() for text in figure.findobj(mpl.text.Text)).replace(r"\$", "$")


def marks(axes: Axes, label: str) -> int:
    found = [c for c in axes.collections if isinstance(c, PathCollection) and c.get_label() == label]
    return sum(len(np.asarray(collection.get_offsets())) for collection in found)


def test_a_diverged_trial_does_not_flatten_the_others() -> None:
    assert shown_from([0.1, 0.2, 0.3, -40.0]) == 0.1
    assert shown_from([0.1, 0.2, 0.3]) == 0.1
    assert shown_from([0.0]) == 0.0
    (axes,) = history_figure(TRIALS, ["gain, dB"]).axes
    assert axes.get_ylim()[0] > -1
    assert marks(axes, "below the picture") == 1
    assert (marks(axes, "finished"), marks(axes, "pruned")) == (3, 1)
    assert curves_figure(TRIALS, "gain, dB", 1).axes[0].get_ylim()[0] > -1


def test_the_best_so_far_never_falls() -> None:
    (axes,) = history_figure(TRIALS, ["gain, dB"]).axes
    (line,) = [line for line in axes.lines if line.get_label() == "best so far"]
    assert list(line.get_ydata()) == [0.1, 0.3, 0.3, 0.3]


def test_pruned_curves_end_with_a_mark() -> None:
    (axes,) = curves_figure(TRIALS, "gain, dB", 1).axes
    (ends,) = [line for line in axes.lines if line.get_label() == "pruned here"]
    assert (list(ends.get_xdata()), list(ends.get_ydata())) == ([1], [-0.1])
    assert "trial 1, the best" in axes.get_legend_handles_labels()[1]


def test_slices_show_the_trials_that_had_the_dial() -> None:
    figure = slices_figure(TRIALS, [LR, LOSS, ALPHA, WARMUP], "a metric without a line at 0")
    lr, loss, alpha, warmup = figure.axes
    assert [tick.get_text() for tick in lr.get_xticklabels()] == ["0.0001", "0.001", "0.01", "0.1"]
    assert np.allclose(lr.get_xticks(), [-4, -3, -2, -1])
    assert (marks(lr, "finished"), marks(alpha, "finished"), marks(alpha, "pruned")) == (3, 1, 1)
    medians = {
        round(np.mean(line.get_xdata())): line.get_ydata()[0] for line in loss.lines if len(line.get_xdata()) == 2
    }
    assert medians[0] == pytest.approx(0.1)
    assert medians[1] == pytest.approx(0.2)
    assert warmup.get_xlim()[0] < 2 < warmup.get_xlim()[1]
    assert "$l$_1" in text_of(figure)


def test_parallel_coordinates_pass_below_what_was_not_set() -> None:
    figure = parallel_figure(TRIALS, [LR, LOSS, ALPHA], ["gain, dB"])
    text = text_of(figure)
    assert text.count("not set") == 1
    assert "loss_weights." in text
    pruned, finished, best = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    assert [len(lines.get_segments()) for lines in (pruned, finished, best)] == [1, 4, 1]
    heights = best.get_segments()[0][:, 1]
    assert heights[2] < 0
    assert heights[3] == 1
    assert np.all((heights[[0, 1]] >= 0) & (heights[[0, 1]] <= 1))


def test_the_front_is_joined_and_numbered() -> None:
    trials = [Trial(n, "finished", values) for n, values in enumerate([(0.1, 0.9), (0.5, 0.5), (0.4, 0.4), (0.9, 0.1)])]
    figure = pareto_figure(trials, ["gain, dB", "probe"], [0, 1, 3])
    (axes,) = figure.axes
    (front,) = [line for line in axes.lines if line.get_label() == "the front"]
    assert list(front.get_xdata()) == [0.1, 0.5, 0.9]
    assert [text.get_text() for text in axes.texts] == ["0", "1", "3"]


def test_two_objectives_have_a_panel_each() -> None:
    trials = [Trial(n, "finished", (n / 10, 1 - n / 10), {"lr": 10.0**-n}) for n in range(1, 4)]
    assert len(history_figure(trials, ["gain, dB", "probe"]).axes) == 2
    figure = importances_figure({"gain, dB": {"lr": 0.7, "a$b": 0.3}, "probe": {"lr": 0.1, "a$b": 0.9}})
    assert len(figure.axes) == 2
    assert {"70%", "10%", "90%", "a$b"} <= set(text_of(figure).split())


def test_many_trials_are_drawn_all() -> None:
    rng = np.random.default_rng(0)
    trials = [Trial(n, "finished", (float(v),), {"lr": 1e-3}, {1: float(v)}) for n, v in enumerate(rng.random(300))]
    assert marks(history_figure(trials, ["gain, dB"]).axes[0], "finished") == 300
    lines = [
        c for c in parallel_figure(trials, [LR], ["gain, dB"]).axes[0].collections if isinstance(c, LineCollection)
    ]
    assert len(lines[1].get_segments()) == 300
