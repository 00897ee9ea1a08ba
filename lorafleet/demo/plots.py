"""The report's plots, each as a self-contained SVG string."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
ARMS = {
    "base": "#9AA0A6",
    "local": "#E69F00",
    "fedit": "#CC79A7",
    "federated": "#0072B2",
    "centralised": "#56B4E9",
    "routed": "#009E73",
    "oracle": "#444444",
}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E6EA",
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    # Without a fixed salt every run would write other ids for the same picture.
    "svg.hashsalt": "lorafleet",
}


def svg(draw: Callable[[Any], None], *, width: float = 9.0, height: float = 3.6, columns: int = 1) -> str:
    """Run ``draw`` on fresh axes (a list of them where ``columns`` > 1) and return the figure as SVG text."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
        draw(axes[0, 0] if columns == 1 else list(axes[0]))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def loss_over_rounds(
    curves: Mapping[str, Mapping[str, Sequence[float]]], flat: Mapping[str, Mapping[str, float]]
) -> str:
    """One panel a domain: ``curves[domain][arm]`` from round 0 (the base) on; ``flat[domain][arm]`` is a line."""

    def draw(axes: Any) -> None:
        panels = axes if isinstance(axes, list) else [axes]
        for panel, (domain, arms) in zip(panels, curves.items(), strict=True):
            for arm, values in arms.items():
                panel.plot(range(len(values)), values, marker="o", markersize=4, color=ARMS[arm], label=arm)
            for arm, value in flat[domain].items():
                panel.axhline(value, color=ARMS[arm], linestyle="--", linewidth=1.2, label=arm)
            panel.set_title(domain)
            panel.set_xlabel("round")
            panel.set_xticks(range(max(len(v) for v in arms.values())))
        panels[0].set_ylabel("held-out loss, nats per token")
        panels[-1].legend(frameon=False, fontsize=8)

    return svg(draw, width=2.9 * len(curves), height=3.2, columns=len(curves))


def loss_by_arm(domains: Mapping[str, Mapping[str, float]]) -> str:
    """Grouped bars: one group a domain, one bar an arm."""

    def draw(axis: Any) -> None:
        width = 0.8 / len(ARMS)
        for number, (arm, colour) in enumerate(ARMS.items()):
            places = [x + (number - (len(ARMS) - 1) / 2) * width for x in range(len(domains))]
            axis.bar(places, [losses[arm] for losses in domains.values()], width * 0.92, color=colour, label=arm)
        axis.set_xticks(range(len(domains)), list(domains))
        axis.set_ylabel("held-out loss, nats per token")
        axis.grid(axis="x", visible=False)
        axis.legend(frameon=False, ncols=len(ARMS), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.16))

    return svg(draw)


def router_heat_map(weights: Mapping[str, Mapping[str, float]]) -> str:
    """``weights[domain][adapter]``: the mean weight that the router gave each adapter, unasked."""
    columns = sorted({name for row in weights.values() for name in row}, key=lambda name: (name == "base", name))

    def draw(axis: Any) -> None:
        table = [[row.get(name, 0.0) for name in columns] for row in weights.values()]
        # Cells around whole numbers; drawn as shapes, where an image would be an embedded bitmap.
        edges = [[place - 0.5 for place in range(count + 1)] for count in (len(columns), len(table))]
        axis.pcolormesh(*edges, table, cmap="Blues", vmin=0.0, vmax=1.0, edgecolors="white")
        axis.invert_yaxis()
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 else "#333333")
        axis.set_xticks(range(len(columns)), [name.rpartition("/")[2] for name in columns])
        axis.set_yticks(range(len(weights)), list(weights))
        axis.set_xlabel("adapter that the router chose")
        axis.set_ylabel("domain of the prompt")
        axis.grid(visible=False)

    return svg(draw, width=7.5, height=0.9 + 0.55 * len(weights))


def versions_over_time(answers: Sequence[tuple[float, str, int]]) -> str:
    """Each answered request as a dot: (seconds, adapter, version that answered)."""
    names = sorted({name for _, name, _ in answers})

    def draw(axis: Any) -> None:
        for number, name in enumerate(names):
            dots = [(at, version) for at, other, version in answers if other == name]
            offset = (number - (len(names) - 1) / 2) * 0.07
            axis.plot(
                [at for at, _ in dots], [version + offset for _, version in dots], "o", markersize=3.5,
                color=COLOURS[number % len(COLOURS)], label=name.rpartition("/")[2],
            )  # fmt: skip
        axis.set_xlabel("seconds since the traffic began")
        axis.set_ylabel("version that answered")
        axis.set_yticks(sorted({version for _, _, version in answers}))
        axis.legend(frameon=False, fontsize=8, ncols=max(1, len(names)), loc="upper center", bbox_to_anchor=(0.5, 1.18))

    return svg(draw, height=2.8)


def tokens_per_second(points: Sequence[tuple[float, int]], *, measured: float, bin_s: float = 2.0) -> str:
    """Generated tokens per second while the last round ran, and the rate of the measured burst as a line."""

    def draw(axis: Any) -> None:
        end = max((at for at, _ in points), default=bin_s)
        bins = [0.0] * (int(end / bin_s) + 1)
        for at, tokens in points:
            bins[int(at / bin_s)] += tokens / bin_s
        axis.bar(
            [(i + 0.5) * bin_s for i in range(len(bins))],
            bins,
            bin_s * 0.9,
            color=COLOURS[0],
            label="while the last round ran",
        )
        axis.axhline(measured, color=COLOURS[1], linestyle="--", label=f"measured burst: {measured:.0f} tokens/s")
        axis.set_xlabel("seconds since the traffic began")
        axis.set_ylabel("tokens per second")
        axis.legend(frameon=False, fontsize=8, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.18))

    return svg(draw, height=2.8)
