"""Figures of a report: plain arrays in, SVG or PNG out; to be read on a phone, too, and with any colour vision.

Nothing here touches matplotlib's global state: no pyplot, and the style is set around each figure.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#4d4d4d")
"""After Okabe and Ito (2008), told apart with every kind of colour vision; their yellows darkened for white paper."""
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
WIDTH, HEIGHT = 5.2, 3.2  # inches: 10 points are 9.5 pixels on a screen of 360
POINTS = 300  # of a line at most, so that a long run does not make a heavy page
STYLE: Any = {
    "font.size": 10, "font.family": "DejaVu Sans", "axes.labelsize": 10, "xtick.labelsize": 9.5, "ytick.labelsize": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.edgecolor": "#9a9a94",
    "axes.labelcolor": "#44443f", "text.color": "#22221f", "xtick.color": "#77776f", "ytick.color": "#77776f",
    "xtick.labelcolor": "#44443f", "ytick.labelcolor": "#44443f", "ytick.major.size": 0, "xtick.major.size": 3,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e8e8e3", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "lines.linewidth": 1.7, "lines.solid_capstyle": "round", "legend.frameon": False, "legend.fontsize": 9.5,
    "legend.handlelength": 1.4, "svg.fonttype": "path", "svg.hashsalt": "llama4", "path.simplify": True,
    "text.parse_math": False,  # names come from the data
}  # fmt: skip


class Line(NamedTuple):
    """A named curve; its place in the order of all curves gives it colour and dash."""

    label: str
    index: int
    x: np.ndarray  # [n] steps
    y: np.ndarray  # [n]; what is not finite leaves a gap
    dashed: bool = False

    @property
    def look(self) -> dict[str, Any]:
        dash = DASHES[1] if self.dashed else DASHES[self.index // len(COLORS) % len(DASHES)]
        return {"color": color(self.index), "linestyle": dash}


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def smoothed(y: np.ndarray) -> np.ndarray:
    """Mean under a Gaussian window of a sixtieth of the curve; centred, so that it does not lag behind. Keeps gaps."""
    width = len(y) / 60
    reach = min(int(3 * width), (len(y) - 1) // 2)
    if reach < 1:
        return y
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    there = np.isfinite(y)
    total = np.convolve(np.where(there, y, 0.0), window, "same")
    weight = np.convolve(there.astype(float), window, "same")
    return np.divide(total, weight, out=np.full(len(y), np.nan), where=there)


# --- Figures


def curves(lines: Sequence[Line], ylabel: str, smooth: bool = False, log: bool = False, zero: bool = False) -> str:
    """SVG of values over steps. `smooth` draws the smoothed curve over a faint raw one; `zero` starts the axis at 0."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        draw(axes, lines, ylabel, smooth, log, layered=not smooth)  # schedules often coincide
        if zero:
            highest = max(np.nanmax(line.y, where=np.isfinite(line.y), initial=0) for line in lines)
            axes.set_ylim(0, 1.06 * highest or 1)
        return svg(figure)


def panels(groups: Mapping[str, Sequence[Line]], ylabel: str) -> str:
    """SVG of small panels, two in a row, one a group, with one legend for all."""
    with matplotlib.rc_context(STYLE):
        rows = -(-len(groups) // 2)
        known = {line.label: line for lines in groups.values() for line in lines}
        several = len(known) > 1
        figure = Figure(figsize=(WIDTH, 1.75 * rows + 0.3 * several), layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False, sharex=True)
        for axes, (title, lines) in zip(grid.flat, groups.items(), strict=False):
            draw(axes, lines, "", named=False)
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_xlabel("")
        for axes in grid.flat[len(groups) :]:
            axes.remove()
        for axes in grid.flat[max(0, len(groups) - 2) : len(groups)]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("step")
        figure.supylabel(ylabel, fontsize=10, color=STYLE["axes.labelcolor"])
        if several:
            _legend(figure, list(known.values()))
        return svg(figure)


def dots(values: Mapping[str, Sequence[float]], labels: Sequence[str], indices: Sequence[int], xlabel: str) -> str:
    """SVG of one row a name and one dot a label: `values[name][i]` belongs to `labels[i]`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(values) + 0.25 * len(labels) / 2), layout="constrained")
        draw_dots(figure.subplots(), values, labels, indices, xlabel)
        return svg(figure)


def bars(counts: Mapping[str, int], xlabel: str, ylabel: str) -> str:
    """SVG of one upright bar a name, its number above it."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        drawn = axes.bar(range(len(counts)), list(counts.values()), color=COLORS[0], width=0.8)
        axes.bar_label(drawn, [f"{n:,}" if n else "" for n in counts.values()], fontsize=9, padding=2)
        tilt: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(counts) > 6 else {}
        axes.set_xticks(range(len(counts)), list(counts), **tilt)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        return svg(figure)


def heat(share: np.ndarray, layers: Sequence[int]) -> str:
    """SVG of each expert's load, share [layers, E], as a multiple of the even share 1/E."""
    with matplotlib.rc_context(STYLE):
        rows, experts = share.shape
        figure = Figure(figsize=(WIDTH, min(5.0, 1.15 + 0.28 * rows)), layout="constrained")
        axes = figure.subplots()
        axes.grid(False)
        times = share * experts
        with np.errstate(divide="ignore", invalid="ignore"):
            level = np.clip(np.log2(times), -2, 2)
        shades = matplotlib.colormaps["PuOr_r"].with_extremes(bad="#dddddd")
        image = axes.imshow(level, cmap=shades, norm=Normalize(-2, 2), aspect="auto", interpolation="none")
        if rows * experts <= 80 and experts <= 10:
            for (i, j), value in np.ndenumerate(times):
                text = f"{value:.2f}" if np.isfinite(value) else "–"
                shade = "white" if abs(level[i, j]) > 1.3 else STYLE["text.color"]
                axes.text(j, i, text, ha="center", va="center", fontsize=9, color=shade)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(min(experts, 9), integer=True))
        shown = range(0, rows, -(-rows // 12))
        axes.set_yticks(list(shown), [str(layers[i]) for i in shown])
        axes.spines["bottom"].set_visible(False)
        bar = figure.colorbar(image, ax=axes, ticks=range(-2, 3), pad=0.02, aspect=14)
        bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
        bar.outline.set_visible(False)  # pyright: ignore
        return svg(figure)


def overview(lines: Sequence[Line], ylabel: str, values: Mapping[str, Sequence[float]], labels: Sequence[str],
             indices: Sequence[int]) -> bytes:  # fmt: skip
    """PNG for a README: the loss curves and, where there are any, the held-out losses beside them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.7) if values else (6, 3.7), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, wspace=0.04)  # pyright: ignore
        grid = figure.subplots(1, 2 if values else 1, squeeze=False, width_ratios=(1.35, 1) if values else (1,))
        draw(grid[0, 0], lines, ylabel, smooth=True, named=False)
        if values:
            draw_dots(grid[0, 1], values, labels, indices, "held-out loss, nats a token", named=False)
        known = {line.label: line for line in lines} | {
            label: Line(label, i, np.zeros(0), np.zeros(0)) for label, i in zip(labels, indices, strict=True)
        }
        _legend(figure, list(known.values()), columns=4)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=160, facecolor="white")
        return out.getvalue()


# --- Their parts


def draw(axes: Axes, lines: Sequence[Line], ylabel: str, smooth: bool = False, log: bool = False,
         named: bool = True, layered: bool = False) -> None:  # fmt: skip
    """Curves on axes: directly labelled where the names are few and short, else with a legend above.

    `layered` draws the first ones wider, so that curves that coincide are all seen.
    """
    heights = []
    for above, line in zip(reversed(range(len(lines))), lines, strict=True):
        y = np.where(np.isfinite(line.y) & ((line.y > 0) | (not log)), line.y, np.nan)
        calm = smoothed(y) if smooth else y
        marker = "o" if np.isfinite(y).sum() < 3 else ""
        if smooth:
            axes.plot(*_thinned(line.x, y), color=line.look["color"], alpha=0.28, linewidth=0.8)
        width = 1.5 + 1.6 * min(above, 3) if layered else 1.7
        axes.plot(*_thinned(line.x, calm), marker=marker, markersize=4, linewidth=width, **line.look)
        heights.append(calm[np.isfinite(calm)])
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    everything = np.concatenate([*heights, np.zeros(0)])
    if smooth and len(everything):  # what a spike of the raw curve hides would be the rest of the figure
        low, high = everything.min(), everything.max()
        pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.1
        axes.set_ylim(low - pad, high + pad)
    axes.set_xlim(0, max((line.x.max() for line in lines if len(line.x)), default=1) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:g}")
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    if not named or len(lines) < 2:
        return
    if len(lines) <= 5 and max(len(line.label) for line in lines) <= 12:
        _label_ends(axes, [(line, y[-1]) for line, y in zip(lines, heights, strict=True) if len(y)])
    else:
        _legend(axes.figure, lines)


def draw_dots(axes: Axes, values: Mapping[str, Sequence[float]], labels: Sequence[str], indices: Sequence[int],
              xlabel: str, named: bool = True) -> None:  # fmt: skip
    names = list(values)
    table = np.array([values[name] for name in names], float)  # [names, labels]
    table[~np.isfinite(table)] = np.nan
    for row, of in enumerate(table):
        if np.isfinite(of).any():
            axes.hlines(row, np.nanmin(of), np.nanmax(of), color="#c9c9c2", linewidth=2, zorder=1)
    for column, index in enumerate(indices):
        axes.scatter(table[:, column], range(len(names)), s=44, color=color(index), zorder=2,
                     marker="osD"[index // len(COLORS) % 3], edgecolor="white", linewidth=0.8)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.grid(True, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(xlabel)
    if named and len(labels) > 1:
        _legend(axes.figure, [Line(x, i, np.zeros(0), np.zeros(0)) for x, i in zip(labels, indices, strict=True)])


def svg(figure: Figure) -> str:
    """The figure as an element that stands in HTML: no prologue, no metadata, its size left to the page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    left_out = r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>|(?<=<g) id=\"[^\"]*\""
    text = re.sub(left_out, "", text[text.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box, "matplotlib's SVG has a view box"
    text = re.sub(r"^<svg[^>]*>", f'<svg {box.group()} role="img" aria-hidden="true">', text)
    # `xlink:href` needs no declaration inside HTML; paths are in points, of which a tenth is enough.
    text = re.sub(r'(?<= d=")[^"]+', lambda path: re.sub(r"-?\d+\.\d{3,}", _shorter, path.group()), text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _shorter(number: re.Match[str]) -> str:
    return f"{float(number.group()):.2f}".rstrip("0").rstrip(".")


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` of a curve, evenly, its last one always."""
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int)) if len(x) else []
    return x[keep], y[keep]


def _label_ends(axes: Axes, ends: Sequence[tuple[Line, float]]) -> None:
    """Each curve's name at the height of its last point, moved apart where they would overlap."""
    if not ends:
        return
    axes.figure.draw_without_rendering()  # settles the limits  # pyright: ignore
    to_axes = axes.transData + axes.transAxes.inverted()
    places = sorted((float(to_axes.transform((0, y))[1]), line) for line, y in ends)
    gap = 0.085
    heights = [height for height, _ in places]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    over = max(0.0, heights[-1] - 1)
    for height, (_, line) in zip(heights, places, strict=True):
        axes.annotate(line.label, (1, height - over), xycoords="axes fraction", xytext=(5, 0), va="center",
                      textcoords="offset points", color=color(line.index), annotation_clip=False)  # fmt: skip


def _legend(figure: Any, lines: Sequence[Line], columns: int = 2) -> None:
    from matplotlib.lines import Line2D

    if max(len(line.label) for line in lines) > 26:
        columns = max(1, columns // 2)
    handles = [Line2D([], [], linewidth=2.2, label=line.label, **line.look) for line in lines]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(columns, len(lines)), columnspacing=1.4)
