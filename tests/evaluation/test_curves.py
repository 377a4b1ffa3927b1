"""The figure of a run: what is drawn, and that nothing hides it."""

import math

import pytest

from dpo_wrapper.evaluation import curves
from dpo_wrapper.evaluation.curves import list_panels, plot_curves, smooth


def make_records(num_steps=60):
    records = []
    for stage in ("sft", "dpo"):
        for step in range(num_steps + 1):
            values = {"loss": math.exp(-step / 20)}
            if stage == "dpo":
                names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
                names += ("logps/chosen", "logps/ref_chosen", "logps/rejected", "logps/ref_rejected")
                values |= {name: 0.01 * step for name in names}
            place = {"stage": stage, "step": step}
            if step:
                records.append(place | values | {"part": "step", "lr": 1e-3 * step, "grad_norm": 1.0})
            if step % 20 == 0:
                records.append(place | values | {"part": "eval"})
    return records


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a figure and returns its axes, as they are drawn."""
    from matplotlib.figure import Figure

    def drawn(records):
        figures = []
        savefig = Figure.savefig

        def recorded(self, *args, **kwargs):
            figures.append(self)
            savefig(self, *args, **kwargs)

        monkeypatch.setattr(Figure, "savefig", recorded)
        plot_curves(records, tmp_path / "curves.png", "a run")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
        return figures[0]

    return drawn


def test_all_stages_are_drawn_by_names_that_can_be_read(draw):
    figure = draw(make_records())
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:3] == ["supervised training: loss", "preference training: loss", "reward accuracy"]
    assert titles[3:8] == [
        "reward margin", "rewards", "log-prob of chosen", "log-prob of rejected", "gradient norm"
    ]  # fmt: skip
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    labels = {text.get_text() for legend in legends for text in legend.texts}
    assert labels == {"learning rate", "chosen", "rejected", "policy", "reference"}
    assert figure.get_suptitle() == "a run"
    rates = [axes for axes in figure.axes if not axes.get_title(loc="left")]
    assert len(rates) == 2 and max(rates[0].lines[0].get_ydata()) == pytest.approx(0.06)


def test_legends_and_titles_are_beside_the_data(draw):
    figure = draw(make_records())
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        if axes.get_legend():
            legend = axes.get_legend().get_window_extent(renderer)
            assert legend.y0 >= axes.get_window_extent(renderer).y1 - 1
            title = axes._left_title.get_window_extent(renderer)
            assert title.x1 < axes.get_legend().legend_handles[0].get_window_extent(renderer).x0


def test_values_that_are_not_finite_leave_gaps(draw):
    records = make_records(6)
    records[3]["loss"] = None
    figure = draw([record for record in records if record["stage"] == "sft"])
    assert len(figure.axes) == 2  # one panel, with its learning rate
    assert list(figure.axes[0].lines[0].get_xdata()) == [1, 2, 4, 5, 6]


def test_many_steps_are_smoothed(draw):
    figure = draw(make_records(100))
    raw, smoothed, dots = figure.axes[0].lines
    assert len(raw.get_xdata()) == len(smoothed.get_xdata()) == 100 and len(dots.get_xdata()) == 6
    assert smooth([1.0, 2.0, 6.0, 10.0], 2) == [1.0, 1.5, 4.0, 8.0]
    assert smooth([], 3) == []


def test_without_a_reference_its_panels_have_one_curve():
    records = [{"stage": "dpo", "part": "step", "step": 1, "loss": 1.0, "logps/chosen": -3.0}]
    panels = [panel.title for panel, _ in list_panels(records)]
    assert panels == ["preference training: loss", "log-prob of chosen"]
    assert curves.PREFERENCE_PANELS[0].title not in panels


def list_key(figure):
    return [text.get_text() for text in figure.legends[0].texts]


def test_one_evaluation_has_whole_steps_and_no_legend_of_what_is_not_there(draw):
    figure = draw([record for record in make_records() if record["part"] == "eval" and record["step"] == 0])
    assert list_key(figure) == ["evaluation"]
    labels = {text.get_text() for axes in figure.axes if (one := axes.get_legend()) for text in one.texts}
    assert labels == {"chosen", "rejected", "policy", "reference"}
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert [step for step in axes.get_xticks() if low <= step <= high] == [0]


@pytest.mark.parametrize("num_steps", [1, 7])
def test_steps_are_whole_numbers(draw, num_steps):
    figure = draw([record for record in make_records(num_steps) if record["part"] == "step"])
    assert list_key(figure) == ["training steps, smoothed"]
    assert all(step == int(step) for axes in figure.axes for step in axes.get_xticks())
