"""Pictures of packs: files come out, and say what the layout says."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ppcompile.runtime.batch import Group, pack
from ppcompile.runtime.picture import draw_mask, mask_text, slot_kinds

SMALL = pack([Group([1, 2], [[3], [4, 5]])])
TREE = pack([Group([1, 2], [[3, 4], [3, 5]]), Group([1, 6], [[7]])], share="tree", pad_to_multiple_of=8)


def test_text_draws_the_mask():
    assert mask_text(SMALL).splitlines()[1:-1] == [
        "      P P A B B",
        "0 0 P ■ · · · ·",
        "1 1 P ■ ■ · · ·",
        "2 2 A □ □ ■ · ·",
        "3 2 B □ □ · ■ ·",
        "4 3 B □ □ · ■ ■",
    ]
    assert "5 tokens instead of 7 (29% saved)" in mask_text(SMALL)
    assert mask_text.__doc__
    assert all(line in mask_text.__doc__ for line in mask_text(SMALL).splitlines())


def test_text_cells_are_the_visible_pairs():
    rows = [line.split()[3:] for line in mask_text(TREE).splitlines()[2:-1]]
    slot, end = np.arange(TREE.num_slots), TREE.subtree_end.numpy()
    visible = (slot[None] <= slot[:, None]) & (slot[:, None] < end[None])
    assert (np.array([[cell != "·" for cell in row] for row in rows]) == visible).all()


def test_kinds():
    # 1 | 2 3 | 4 | 5 | 6 7 | padding
    assert slot_kinds(TREE).tolist() == [0, 0, 2, 3, 4, 0, 3, 1]
    assert "* shared by responses" in mask_text(TREE)
    assert "- padding" in mask_text(TREE)


def test_text_refuses_what_no_terminal_shows():
    with pytest.raises(ValueError, match=r"up to max_slots=60 slots, the pack has 101.*draw_mask"):
        mask_text(pack([(range(100), [[1]])]))


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_draws_a_file_of_its_suffix(tmp_path, suffix, magic):
    path = tmp_path / f"mask.{suffix}"
    draw_mask(TREE, path, labels=["$x", *"abcdefg"])
    assert path.read_bytes().startswith(magic)


def test_draws_without_touching_global_state():
    before = "matplotlib.pyplot" in sys.modules
    figure = draw_mask(SMALL)
    assert ("matplotlib.pyplot" in sys.modules) == before
    assert figure.get_suptitle() == "1 group, 2 responses: 5 tokens instead of 7 (29% saved)"
    assert draw_mask(SMALL, title="Mine").get_suptitle() == "Mine"


def test_white_is_what_is_hidden():
    image = draw_mask(SMALL).axes[0].images[0].get_array()
    slot, end = np.arange(SMALL.num_slots), SMALL.subtree_end.numpy()
    visible = (slot[None] <= slot[:, None]) & (slot[:, None] < end[None])
    assert ((np.asarray(image) < 1).any(-1) == visible).all()


def test_samples_large_packs():
    batch = pack([(range(3000), [range(1000), range(2000)])])
    assert draw_mask(batch, max_cells=100).axes[0].images[0].get_array().shape == (100, 100, 3)


def test_one_label_per_slot():
    with pytest.raises(ValueError, match="labels holds 2 texts; expected one for each of the 5 slots"):
        draw_mask(SMALL, labels=["a", "b"])


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_mask(SMALL)
