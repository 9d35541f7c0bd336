"""einsum: equations written out as permutations and one product, so that passes see the products they know.

before    einsum("bqhd,bkhd->bhqk", query, key)
after     matmul(permute(query) [b,h,q,d], permute(key) [b,h,d,k]) [b,h,q,k]

Letters are sorted by where they stand. *Shared* ones are in both tensors and in the result: axes that a product
repeats over. *Contracted* ones are in both and not in the result. Of the letters that one tensor has alone, one becomes
the rows (or columns) of the product, tokens if they are among them; the others are shared with an axis of size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .base import PackGraph, argument, is_op, shape_of

__all__ = ["write_out_einsums"]

aten = torch.ops.aten
_ROW, _COLUMN, _MERGED = "<", ">", "."
"""Letters of axes that no equation has: the one row or column of a vector, and several axes as one."""


def write_out_einsums(graph: PackGraph) -> int:
    """Replace every ``aten.einsum`` in which no tensor repeats a letter; returns how many were."""
    changed = 0
    for node in list(graph.graph.nodes):
        if not is_op(node, "aten.einsum"):
            continue
        tensors = argument(node, "tensors")
        *inputs, result = _letters(argument(node, "equation"), [len(shape_of(tensor)) for tensor in tensors])
        if any(len(set(letters)) != len(letters) for letters in inputs) or not _same_sizes(tensors, inputs):
            continue  # the token-mixing check has no rule for it
        with graph.graph.inserting_before(node):
            product, *others = (_Term(graph, *term, node) for term in zip(tensors, inputs, strict=True))
            for place, other in enumerate(others):
                product = _product(product, other, result + "".join(term.letters for term in others[place + 1 :]))
            replacement = product.without(set(product.letters) - set(result)).in_order(result).node
        node.replace_all_uses_with(replacement)
        graph.graph.erase_node(node)
        changed += 1
    return changed


def _same_sizes(tensors: Sequence[fx.Node], letters: Sequence[str]) -> bool:
    """True if a letter has the same size wherever it stands, and is not broadcast."""
    sizes: dict[str, Any] = {}
    return all(
        sizes.setdefault(letter, size) == size
        for tensor, its in zip(tensors, letters, strict=True)
        for letter, size in zip(its, shape_of(tensor), strict=True)
    )


def _letters(equation: str, ranks: Sequence[int]) -> list[str]:
    """The letters of each tensor and of the result, those that ``...`` stands for written as digits."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = max((rank - len(term) + 3 for rank, term in zip(ranks, terms, strict=True) if "..." in term), default=0)
    if not arrow:
        once = sorted(letter for letter in set(left) - set(",.") if left.count(letter) == 1)
        right = ("..." if "..." in left else "") + "".join(once)
    digits = "".join(str(n) for n in range(hidden))
    own = [digits[hidden - (rank - len(term) + 3) :] for rank, term in zip(ranks, terms, strict=True)]
    written = [term.replace("...", mine) for term, mine in zip(terms, own, strict=True)]
    return [*written, right.replace("...", digits)]


class _Term:
    """A tensor whose axes have letters; its methods return it rearranged."""

    def __init__(self, graph: PackGraph, node: fx.Node, letters: str, like: fx.Node) -> None:
        self.graph, self.node, self.letters, self.like = graph, node, letters, like

    def call(self, op: Callable[..., Any], args: Sequence[Any], letters: str) -> _Term:
        """``op(self, *args)``, with axes ``letters``."""
        return _Term(self.graph, self.graph.call(op, (self.node, *args), like=self.like), letters, self.like)

    def size(self, letter: str) -> Any:
        """How many there are along the axis ``letter``."""
        return shape_of(self.node)[self.letters.index(letter)]

    def without(self, letters: set[str]) -> _Term:
        """Summed over ``letters``."""
        axes = [axis for axis, letter in enumerate(self.letters) if letter in letters]
        rest = "".join(letter for letter in self.letters if letter not in letters)
        return self.call(aten.sum.dim_IntList, (axes,), rest) if axes else self

    def in_order(self, letters: str) -> _Term:
        """Axes as in ``letters``, of size 1 where this tensor has none."""
        order = [self.letters.index(letter) for letter in letters if letter in self.letters]
        found = self
        if order != sorted(order):
            found = self.call(aten.permute.default, (order,), "".join(self.letters[axis] for axis in order))
        for axis, letter in enumerate(letters):
            if letter not in found.letters:
                wider = found.letters[:axis] + letter + found.letters[axis:]
                found = found.call(aten.unsqueeze.default, (axis,), wider)
        return found

    def merged(self, count: int) -> _Term:
        """The last ``count`` axes as one."""
        if count == 1:
            return self
        return self.call(aten.flatten.using_ints, (-count, -1), self.letters[:-count] + _MERGED)

    def rows(self, own: str) -> str:
        """The letter of ``own`` that becomes the rows of a product: the tokens, or else the last."""
        return next((letter for letter in own if self.graph.mentions_length(self.size(letter))), own[-1:])


def _product(left: _Term, right: _Term, wanted: str) -> _Term:
    """The product of two tensors, summed over the letters that nobody wants afterwards."""
    result = "".join(dict.fromkeys(wanted))
    left, right = (
        a.without({letter for letter in a.letters if letter not in b.letters and letter not in result})
        for a, b in ((left, right), (right, left))
    )
    both = [letter for letter in left.letters if letter in right.letters]
    contracted = "".join(letter for letter in both if letter not in result)
    shared = "".join(letter for letter in result if letter in both)
    of_left, of_right = ("".join(x for x in term.letters if x not in both) for term in (left, right))
    if not contracted:
        letters = shared + of_left + of_right
        return left.in_order(letters).call(aten.mul.Tensor, (right.in_order(letters).node,), letters)
    if len(of_left) < len(of_right):
        left, right, of_left, of_right = right, left, of_right, of_left
    if not shared and len(of_right) <= 1:  # a matrix applied to rows with any number of axes
        leading, row, column = of_left[:-1], of_left[-1:], of_right
        of_matrix = column or _COLUMN
    else:
        row, column = left.rows(of_left), right.rows(of_right)
        leading = shared + "".join(letter for letter in of_left + of_right if letter not in row + column)
        of_matrix = leading + (column or _COLUMN)
    rows = left.in_order(leading + (row or _ROW) + contracted).merged(len(contracted))
    matrix = right.in_order(of_matrix + contracted).merged(len(contracted))
    matrix = matrix.call(aten.transpose.int, (-2, -1), matrix.letters)
    product = rows.call(aten.matmul.default, (matrix.node,), leading + (row or _ROW) + (column or _COLUMN))
    for axis, letter in ((-1, _COLUMN), (len(leading), _ROW)):
        if letter in product.letters:
            product = product.call(aten.squeeze.dim, (axis,), product.letters.replace(letter, ""))
    return product
