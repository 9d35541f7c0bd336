"""Score and head programs: small functions written as text, pointwise or along one row.

The compiler finds, inside a model, what happens to an attention score between the ``q . k`` product
and the softmax, or to a hidden state between the last norm and the logits. It hands that on to the
runtime as a *program*: one Python expression over a fixed vocabulary of ATen ops, for example

    mul(tanh(div(s, 50.0)), 50.0)                       gemma2's attention softcap
    add(s, mul(at(c0, h), k))                           bloom's ALiBi, slopes in capture c0
    where(lt(sub(q, k), 16), s, -inf)                   a sliding window
    mul(tanh(div(linear(x, c0), 30.0)), 30.0)           gemma2's head with its logit softcap

Text, because a program travels through op schemas, prints in graph dumps as what it means, and survives
serialization. Names an expression may use:

========  ==================================================================================
``s``     the attention score ``scale * <query, key>`` (score programs)
``h``     query head index
``q k``   *logical* positions of the query and the key (never packed slots)
``i j``   packed slots of the query and the key, for captures that hold one value per token
``x``     rows of hidden states, ``[rows, D]`` (head programs)
``cN``    the N-th captured tensor; ``at(cN, a, b)`` reads one element per index tuple
========  ==================================================================================
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ALWAYS",
    "DTYPES",
    "OPS",
    "PLAIN",
    "VARIABLES",
    "Program",
    "compile_program",
    "evaluate_program",
    "num_captures",
]

PLAIN = "s"
"""The score program that changes nothing: ``softmax(scale * q . k)``."""

ALWAYS = "True"
"""The visibility program of a site that hides nothing beyond what the forest hides."""

VARIABLES = ("s", "h", "q", "k", "i", "j", "x")

Program = Callable[..., Any]


def _at(table: Tensor, *index: Any) -> Tensor:
    return table[index]


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, bool):
        return a if condition else b
    return torch.where(condition, a, b)


def _logical(name: str) -> Callable[[Any, Any], Any]:
    """``and``/``or`` over tensors and Python bools alike: a folded side stays a bool."""
    op = {"and_": torch.logical_and, "or_": torch.logical_or}[name]
    neutral = name == "and_"

    def apply(a: Any, b: Any) -> Any:
        for known, other in ((a, b), (b, a)):
            if isinstance(known, bool):
                return other if known is neutral else known
        return op(a, b)

    return apply


def _floordiv(a: Any, b: Any) -> Any:
    return torch.div(a, b, rounding_mode="floor")


def _truncdiv(a: Any, b: Any) -> Any:
    return torch.div(a, b, rounding_mode="trunc")


def _not(a: Any) -> Any:
    return (not a) if isinstance(a, bool) else torch.logical_not(a)


def _unary(name: str) -> Callable[[Any], Any]:
    """A torch function of one tensor that also takes a Python number (a folded constant)."""
    op = getattr(torch, name)

    def apply(a: Any) -> Any:
        return op(a if isinstance(a, Tensor) else torch.tensor(a))

    return apply


def _cast(dtype: torch.dtype) -> Callable[[Any], Any]:
    def apply(a: Any) -> Any:
        return a.to(dtype) if isinstance(a, Tensor) else torch.tensor(a, dtype=dtype)

    return apply


def _clamp(a: Any, low: Any, high: Any) -> Any:
    return torch.clamp(a, min=low, max=high)


def _gelu(a: Any, approximate: str = "none") -> Any:
    return F.gelu(a, approximate=approximate)


DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "bool")
}

OPS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "floordiv": _floordiv,
    "truncdiv": _truncdiv,
    "remainder": lambda a, b: a % b,
    "pow": lambda a, b: a**b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and_": _logical("and_"),
    "or_": _logical("or_"),
    "not_": _not,
    "where": _where,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "clamp": _clamp,
    "neg": lambda a: -a,
    "gelu": _gelu,
    "silu": F.silu,
    "linear": F.linear,
    "matmul": torch.matmul,
    "at": _at,
    # along a row of hidden units or of words, which stays an axis:
    "columns": lambda a, start, end: a[..., start:end],
    "wide": lambda a, width: a.expand(*a.shape[:-1], width),
    "log_softmax": lambda a: F.log_softmax(a, dim=-1),
    "softmax": lambda a: F.softmax(a, dim=-1),
    "logsumexp": lambda a: torch.logsumexp(a, dim=-1, keepdim=True),
    "mean": lambda a: a.mean(-1, keepdim=True),
    "sum": lambda a: a.sum(-1, keepdim=True),
    "amax": lambda a: a.amax(-1, keepdim=True),
    "norm": lambda a: torch.linalg.vector_norm(a, dim=-1, keepdim=True),
    **{
        name: _unary(name)
        for name in ("abs", "tanh", "sigmoid", "exp", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "relu", "erf")
    },
    **{name: _cast(dtype) for name, dtype in DTYPES.items()},
}

_CAPTURE = re.compile(r"c\d+")


def num_captures(text: str) -> int:
    """Number of captures a program expects: one more than the largest ``cN`` it names."""
    names = [node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)]
    return max((int(name[1:]) + 1 for name in names if _CAPTURE.fullmatch(name)), default=0)


def _check(text: str) -> None:
    """Raise ``ValueError`` unless ``text`` is an expression over the vocabulary above, and nothing else."""
    for node in ast.walk(ast.parse(text, mode="eval")):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in OPS:
                raise ValueError(f"unknown op in program {text!r}: accepted are {', '.join(sorted(OPS))}")
        elif isinstance(node, ast.Name):
            known = node.id in OPS or node.id in VARIABLES or node.id == "inf" or _CAPTURE.fullmatch(node.id)
            if not known:
                raise ValueError(f"unknown name {node.id!r} in program {text!r}")
        elif not isinstance(node, (ast.Expression, ast.Constant, ast.UnaryOp, ast.USub, ast.Load)):
            raise ValueError(f"{type(node).__name__} is not allowed in program {text!r}")


@functools.cache
def compile_program(text: str, arguments: tuple[str, ...]) -> Program:
    """Compile ``text`` to ``f(*arguments, captures)``.

    Args:
        text: the program.
        arguments: names of the positional arguments, a subset of :data:`VARIABLES`.

    Returns:
        A plain Python function (``torch.compile`` can inline it) of the arguments and a sequence of
        captured tensors. Arguments may be tensors of any mutually broadcastable shapes, or scalars.

    Raises:
        ValueError: a name or construct outside the vocabulary.
    """
    _check(text)
    unpack = "".join(f"    c{n} = captures[{n}]\n" for n in range(num_captures(text)))
    source = f"def program({', '.join((*arguments, 'captures'))}):\n{unpack}    return {text}\n"
    namespace: dict[str, Any] = {**OPS, "inf": float("inf")}
    exec(compile(source, f"<program {text}>", "exec"), namespace)
    return namespace["program"]


def evaluate_program(text: str, captures: Sequence[Tensor], **variables: Any) -> Any:
    """Evaluate ``text`` once; convenience over :func:`compile_program` where speed does not matter."""
    return compile_program(text, tuple(variables))(*variables.values(), tuple(captures))
