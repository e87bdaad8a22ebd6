"""Figure of the average sharpness of the blocks of a Transformer along training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thalweg.analysis.figures import drawing
from thalweg.analysis.figures.curves import column
from thalweg.analysis.figures.drawing import LOG_BAND, Look
from thalweg.analysis.figures.saving import Curves, Figure, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

#: Blocks in the published order, the flattest first: column, label, colour.
BLOCKS = (
    ("embedding", "embedding", "#0072b2"),
    ("query_key", "query, key", "#009e73"),
    ("feed_forward", "feed-forward", "#a07000"),
    ("value_output", "value, output", "#d55e00"),
    ("norm", "norm", "#7a3b8f"),
)


def _block_curves(source: Source) -> Curves:
    """Of the unsplit run alone: five lines of each branch would be too many."""
    return {
        f"block_sharpness_{block}|{branch}": source.curve(
            branch, column(f"block_sharpness_{block}"), logarithmic=True
        )
        for block, _, _ in BLOCKS
        for branch in source.plain_and_trunk()
    }


def _draw_blocks(canvas: Canvas, curves: Curves, look: Look) -> None:
    axes = canvas.subplots()
    axes.set_yscale("log")
    ends: list[drawing.EndLabel] = []
    for block, label, colour in BLOCKS:
        style = drawing.BranchStyle(label, colour, colour, (), 1.2)
        lines = [
            line
            for name, line in curves.items()
            if line and name.partition("|")[0] == f"block_sharpness_{block}"
        ]
        for line in lines:
            drawing.draw_curve(axes, line, style)
            axes.plot(line.steps, line.center, ".", color=colour, markersize=3.6)
        if lines:
            last = max(lines, key=lambda line: line.steps[-1])
            ends.append((label, float(last.center[-1]), colour))
    axes.set_ylabel("average sharpness")
    drawing.mark_branch_point(axes, look.axis)
    drawing.finish_steps(axes, look.axis)
    drawing.plain_log_ticks(axes)
    drawing.label_ends(axes, ends)


BLOCK_SHARPNESS = Figure(
    name="block-sharpness",
    title="Average sharpness of the blocks of the Transformer",
    caption="Trace of each block's Hessian over its number of parameters along the unsplit run, "
    "estimated with few products (dots; negative estimates are not drawn). " + LOG_BAND,
    needs=tuple(f"block_sharpness_{block}" for block, _, _ in BLOCKS),
    curves=_block_curves,
    draw=_draw_blocks,
)
