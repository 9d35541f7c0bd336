"""Pictures of a pack: which slot sees which, drawn (:func:`draw_mask`) or as text (:func:`mask_text`).

Rows are queries, columns keys. A cell is coloured by the *key* it reads: strong where it lies in the
query's own segment, pale where it lies in an ancestor's, white where it is hidden. Reading down a prompt's
columns shows every response that shares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .batch import PackedBatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_mask", "mask_text", "slot_kinds"]

PROMPT, PADDING, SHARED, RESPONSE = 0, 1, 2, 3  # response r of its group is RESPONSE + r

PROMPT_COLOR, PADDING_COLOR, SHARED_COLOR = "#3d5a80", "#c9ced6", "#8a5a9e"
RESPONSE_COLORS = ("#e07a3f", "#2a9d8f", "#d1495b", "#c9a227", "#5b8e3e", "#4aa3d0")
PALE = 0.62
"""How far an ancestor's cells fade to white."""

SHORT = 64
"""Packs up to this many slots get a grid, and tick labels where given."""


def slot_kinds(batch: PackedBatch) -> NDArray[np.int64]:
    """What each slot holds, int64 ``[T]``: prompt (or whatever else is not scored) 0, padding 1, a token scored for
    several responses 2, or ``3 + r`` for response ``r`` of its group. A token that is scored for one response counts
    as that response's, also where another group's prompt runs through it.
    """
    kinds = np.full(batch.num_slots, PADDING, dtype=np.int64)
    kinds[: batch.num_tokens] = PROMPT
    within = np.concatenate([np.arange(size) for size in batch.group_sizes.tolist()])
    positions = batch.scored_positions.split(batch.lengths.tolist())
    for slots, scored_positions, r in zip(batch.sequence_slots(), positions, within, strict=True):
        scored = slots[scored_positions.cpu().numpy()]
        kinds[scored] = np.where(kinds[scored] == PROMPT, RESPONSE + r, SHARED)
    return kinds


def draw_mask(
    batch: PackedBatch,
    path: str | Path | None = None,
    *,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    size: float = 6.0,
    max_cells: int = 768,
) -> Figure:
    """Draw a pack and its visibility mask.

    Args:
        batch: the pack.
        path: where to save, PNG, SVG or PDF by suffix; ``None`` to only return the figure.
        labels: one text per slot, shown on packs of up to 64 slots.
        title: above the picture; the default tells what packing saved.
        size: width in inches.
        max_cells: of a larger pack every ``ceil(T / max_cells)``-th slot is drawn.

    Returns:
        A matplotlib figure that belongs to no window.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``labels`` does not hold one text per slot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("draw_mask() needs matplotlib: pip install matplotlib. mask_text() does not") from error
    if labels is not None and len(labels) != batch.num_slots:
        raise ValueError(f"labels holds {len(labels)} texts; expected one for each of the {batch.num_slots} slots")

    # A Figure of its own, without pyplot: no global state, no window, any backend.
    figure = Figure(figsize=(size, size * 1.12), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 32), height_ratios=(1, 32), wspace=0.01, hspace=0.01)
    mask, top, left = (figure.add_subplot(grid[cell]) for cell in ((1, 1), (0, 1), (1, 0)))

    slots = np.arange(0, batch.num_slots, -(-batch.num_slots // max_cells))
    kinds = slot_kinds(batch)
    colors = _colors(kinds)
    _draw_cells(mask, batch, slots, colors)
    extent = (0, batch.num_slots)
    top.imshow(colors[slots][None], aspect="auto", extent=(*extent, 1, 0), interpolation="nearest")
    left.imshow(colors[slots][:, None], aspect="auto", extent=(0, 1, *extent[::-1]), interpolation="nearest")
    for strip in (top, left):
        strip.set(xticks=[], yticks=[])
        strip.spines[:].set_visible(False)
    _draw_ticks(mask, top, left, batch, labels)
    _draw_legend(figure, kinds)
    figure.suptitle(_title(batch) if title is None else title, fontsize=10.5)
    if path is not None:
        figure.savefig(path, dpi=160)
    return figure


def _draw_cells(axes: Axes, batch: PackedBatch, slots: NDArray[np.int64], colors: NDArray[np.float64]) -> None:
    end = batch.subtree_end.cpu().numpy()
    rows = batch.segments.numpy()
    segment = np.repeat(np.arange(len(rows)), rows[:, 1] - rows[:, 0])
    query, key = slots[:, None], slots[None, :]
    visible = (key <= query) & (query < end[key])
    own = segment[query] == segment[key]
    strong, pale = colors[slots][None], (colors + (1 - colors) * PALE)[slots][None]
    image = np.where(visible[..., None], np.where(own[..., None], strong, pale), 1.0)
    length = batch.num_slots
    axes.imshow(image, extent=(0, length, length, 0), interpolation="nearest", aspect="auto")
    if length <= SHORT:
        lines = np.arange(1, length)
        axes.vlines(lines, 0, length, color="white", linewidth=0.8)
        axes.hlines(lines, 0, length, color="white", linewidth=0.8)
    for first, _, last, parent in rows.tolist():
        if parent < 0:  # a thin frame around each tree: nothing outside it is ever seen
            axes.plot([first, last, last, first, first], [first, first, last, last, first], color="#9aa3ad", lw=0.7)
    axes.set(xlim=(0, length), ylim=(length, 0))
    axes.spines[:].set_color("#9aa3ad")


def _draw_ticks(mask: Axes, top: Axes, left: Axes, batch: PackedBatch, labels: Sequence[str] | None) -> None:
    mask.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)
    top.set_xlabel("keys: what is read", fontsize=8.5, color="#555b63")
    left.set_ylabel("queries: who reads", fontsize=8.5, color="#555b63")
    top.xaxis.set_label_position("top")
    if labels is None or batch.num_slots > SHORT:
        return
    centers = np.arange(batch.num_slots) + 0.5
    small = max(5.0, min(9.0, 300 / batch.num_slots))
    top.set_xticks(centers, labels, fontsize=small, rotation=90, parse_math=False)  # a token may hold a $
    left.set_yticks(centers, labels, fontsize=small, parse_math=False)
    top.tick_params(bottom=False, labelbottom=False, top=False, labeltop=True)
    left.tick_params(left=False)


def _draw_legend(figure: Figure, kinds: NDArray[np.int64]) -> None:
    from matplotlib.patches import Patch

    present = sorted(np.unique(kinds).tolist(), key=lambda kind: (kind == PADDING, kind))
    shown = [kind for kind in present if kind < RESPONSE + len(RESPONSE_COLORS)]  # colours repeat after these
    handles = [Patch(color=_color(kind), label=_name(kind)) for kind in shown]
    own_and_read: list[Any] = [
        Patch(color="#555b63", label="own segment"),
        Patch(color="#bfc1c4", label="read from an ancestor"),
    ]
    figure.legend(
        handles=handles + own_and_read, loc="outside lower center", ncols=4, fontsize=8, frameon=False, handlelength=1.2
    )


def _colors(kinds: NDArray[np.int64]) -> NDArray[np.float64]:
    """RGB per slot, float64 ``[T, 3]``."""
    from matplotlib.colors import to_rgb

    palette = np.array([to_rgb(_color(kind)) for kind in range(int(kinds.max()) + 1)])
    return palette[kinds]


def _color(kind: int) -> str:
    if kind >= RESPONSE:
        return RESPONSE_COLORS[(kind - RESPONSE) % len(RESPONSE_COLORS)]
    return (PROMPT_COLOR, PADDING_COLOR, SHARED_COLOR)[kind]


def _name(kind: int) -> str:
    if kind >= RESPONSE:
        return f"response {kind - RESPONSE + 1}"
    return ("prompt", "padding", "shared by responses")[kind]


def _title(batch: PackedBatch) -> str:
    groups = f"{batch.num_groups} group" + "s" * (batch.num_groups != 1)
    saved = batch.tokens_saved / batch.unpacked_tokens
    return (
        f"{groups}, {batch.num_responses} responses: {batch.num_tokens:,} tokens "
        f"instead of {batch.unpacked_tokens:,} ({saved:.0%} saved)"
    )


# --------------------------------------------------------------------------- text


def mask_text(batch: PackedBatch, *, max_slots: int = 60) -> str:
    """The mask as text, for packs of up to about 60 slots.

    ::

        1 group, 2 responses: 5 tokens instead of 7 (29% saved)
              P P A B B
        0 0 P ■ · · · ·
        1 1 P ■ ■ · · ·
        2 2 A □ □ ■ · ·
        3 2 B □ □ · ■ ·
        4 3 B □ □ · ■ ■
        slot, position, kind: P prompt, A response 1 (B: 2, ...); ■ own segment, □ ancestor, · hidden

    Raises:
        ValueError: the pack has more than ``max_slots`` slots.
    """
    if batch.num_slots > max_slots:
        raise ValueError(
            f"mask_text() draws up to max_slots={max_slots} slots, the pack has {batch.num_slots:,}. "
            "Try: draw_mask(batch, 'mask.png'), which samples large packs"
        )
    letters = [_letter(kind) for kind in slot_kinds(batch).tolist()]
    end, position = batch.subtree_end.tolist(), batch.position_ids[0].tolist()
    rows = batch.segments.numpy()
    first = np.repeat(rows[:, 0], rows[:, 1] - rows[:, 0]).tolist()
    width = len(str(batch.num_slots - 1))
    lines = [_title(batch), " " * (2 * width + 4) + " ".join(letters)]
    for i, letter in enumerate(letters):
        cells = ["·" if j > i or i >= end[j] else "■" if j >= first[i] else "□" for j in range(batch.num_slots)]
        lines.append(f"{i:{width}} {position[i]:{width}} {letter} " + " ".join(cells))
    return "\n".join([*lines, _key(letters)])


def _letter(kind: int) -> str:
    if kind >= RESPONSE:
        return chr(ord("A") + (kind - RESPONSE) % 26)
    return "P-*"[kind]


def _key(letters: list[str]) -> str:
    names = {"P": "prompt", "A": "response 1 (B: 2, ...)", "*": "shared by responses", "-": "padding"}
    kinds = ", ".join(f"{letter} {name}" for letter, name in names.items() if letter in letters)
    return f"slot, position, kind: {kinds}; ■ own segment, □ ancestor, · hidden"
