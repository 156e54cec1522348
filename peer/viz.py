"""Pictures of the experts, by matplotlib, which the extra `viz` of the distribution installs.

Every function returns a `matplotlib.figure.Figure`, which `savefig` writes to a file and a notebook
shows. `peer.report` needs no matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peer._charts import mean_blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["atlas", "changes", "history", "usage_curve"]


def atlas(counts: Tensor, grid: tuple[int, int], *, title: str = "") -> Figure:
    """Draws the grid of experts, coloured by how often each one is retrieved.

    The colours are logarithmic. Experts that are never retrieved are left blank. A grid with more
    than 512 rows or columns is drawn as means of square blocks.

    Args:
        counts: retrievals, or any other amount of at least 0, by expert, (R * C,).
        grid: (R, C), such as `(layer.router.rows, layer.router.columns)`.
        title: the heading.

    Returns:
        The figure.

    Raises:
        ValueError: the counts do not fit the grid.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch, peer
        >>> figure = peer.viz.atlas(torch.arange(24), (4, 6))
        >>> [axes.get_xlabel() for axes in figure.axes][0]
        'column'
    """
    figure, (axes,) = _figure(1, title)
    _draw_atlas(axes, counts, grid, "retrievals")
    return figure


def usage_curve(counts: Tensor | Mapping[str, Tensor], *, title: str = "") -> Figure:
    """Draws how often experts are retrieved, from the one that is used most to the one used least.

    Both axes are logarithmic. Experts without retrievals are beyond the end of the curve.

    Args:
        counts: retrievals by expert, (N,), or a mapping of such tensors by the name of the layer,
            as `peer.count_usage` returns.
        title: the heading.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch, peer
        >>> figure = peer.viz.usage_curve({"blocks.1": torch.tensor([5, 0, 2])})
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [5, 2]
    """
    figure, (axes,) = _figure(1, title)
    by_name = counts if isinstance(counts, Mapping) else {"": counts}
    for name, count in by_name.items():
        used = count[count > 0].sort(descending=True).values.cpu()
        places = torch.arange(1, len(used) + 1)
        # Enough points for a logarithmic axis.
        shown = torch.logspace(0, math.log10(max(len(used), 1)), 400).round().long().unique()
        shown = shown[shown <= len(used)] - 1
        axes.plot(places[shown].tolist(), used[shown].tolist(), label=f"{name} ({len(count):,})")
    axes.set(xscale="log", yscale="log", xlabel="expert, by rank", ylabel="retrievals")
    if any(by_name):
        axes.legend(title="layer (experts)")
    return figure


def history(rows: Sequence[Mapping[str, float | None]], *, title: str = "") -> Figure:
    """Draws usage and unevenness over training.

    Args:
        rows: `history` of a `peer.UsageTracker`.
        title: the heading.

    Returns:
        The figure, with a plot of each measure.

    Raises:
        ValueError: there are no rows.
        ImportError: matplotlib is not installed.

    Example:
        >>> import peer
        >>> rows = [{"step": step, "usage": 0.5, "unevenness": 1.0} for step in range(3)]
        >>> [axes.get_ylabel() for axes in peer.viz.history(rows).axes]
        ['usage', 'unevenness (nats)']
    """
    if not rows:
        raise ValueError("expected a history with at least one row")
    figure, plots = _figure(2, title)
    for axes, measure, label in zip(
        plots, ("usage", "unevenness"), ("usage", "unevenness (nats)"), strict=True
    ):
        names = {key for row in rows for key in row if key.rpartition("/")[2] == measure}
        for key in sorted(names):
            points = [
                (number if row.get("step") is None else row["step"], row[key])
                for number, row in enumerate(rows)
                if key in row
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=key.rpartition("/")[0])
        axes.set(xlabel="step", ylabel=label)
        axes.set_ylim(bottom=0)
        if any("/" in key for key in names):
            axes.legend()
    return figure


def changes(distances: Tensor, grid: tuple[int, int], *, title: str = "") -> Figure:
    """Draws how far experts have moved since an earlier checkpoint.

    Args:
        distances: those of a layer's experts, (R * C,), from `peer.inspect.distances`. NaN for
            experts that are new.
        grid: (R, C), such as `(layer.router.rows, layer.router.columns)`.
        title: the heading.

    Returns:
        The figure, with a map and a histogram. New experts and those that did not move are blank in
        the map.

    Raises:
        ValueError: the distances do not fit the grid.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch, peer
        >>> figure = peer.viz.changes(torch.tensor([0.0, 0.5, 0.1, torch.nan]), (2, 2))
        >>> figure.axes[1].get_title()
        '1 of 3 old experts did not move, 1 are new'
    """
    figure, (left, right) = _figure(2, title)
    is_new = distances.isnan()
    _draw_atlas(left, distances.nan_to_num(0.0), grid, "distance")
    old = distances[~is_new]
    right.hist(old[old > 0].cpu().tolist(), bins=50)
    right.set(xlabel="distance, relative to the expert", ylabel="experts")
    right.set_title(
        f"{int((old == 0).sum()):,} of {len(old):,} old experts did not move, "
        f"{int(is_new.sum()):,} are new"
    )
    return figure


def _draw_atlas(axes: Axes, values: Tensor, grid: tuple[int, int], label: str) -> None:
    from matplotlib.colors import LogNorm

    rows, columns = grid
    if values.shape != (rows * columns,):
        raise ValueError(
            f"expected {rows * columns} values for the grid {(rows, columns)}, got "
            f"{list(values.shape)}"
        )
    means = mean_blocks(values.detach().cpu().view(rows, columns))
    shown = torch.where(means > 0, means, torch.nan)
    used = means[means > 0]
    norm = None
    if len(used) > 0 and float(used.max()) > float(used.min()):
        norm = LogNorm(float(used.min()), float(used.max()))
    image = axes.imshow(
        shown.tolist(),
        norm=norm,
        interpolation="nearest",
        extent=(0.0, float(columns), float(rows), 0.0),
        aspect="equal" if max(rows, columns) < 8 * min(rows, columns) else "auto",
    )
    axes.set(xlabel="column", ylabel="row")
    axes.figure.colorbar(image, ax=axes, label=label)


def _figure(plots: int, title: str) -> tuple[Figure, Sequence[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "peer.viz draws with matplotlib, which is not installed: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(6.4 * plots, 4.8), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure, figure.subplots(1, plots, squeeze=False)[0]
