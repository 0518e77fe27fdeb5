"""Exact match: compares the final answers of rationales, small programs and equations.

Generated text is untrusted. A program is parsed and never executed: only integer arithmetic is evaluated, and the size
of numbers and of the text is bounded, so that no text can raise, hang or use up memory.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable

_MARKER = "the answer is"
_MAX_PROGRAM_CHARS = 2_000
_MAX_ABS = 10**18
_PROGRAM_CHARS = re.compile(r"[A-Za-z0-9_ \t\n+\-*/%()=]+")
# A number next to a letter ("1if") makes Python's parser warn; no valid program has one.
_GLUED_NUMBER = re.compile(r"(?<![A-Za-z0-9_])[0-9]+[A-Za-z_]")
_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


def final_answer(text: str) -> str:
    """Extract the answer of a text, normalised for comparison.

    It is the text after the last ``The answer is``; else, in a straight-line program, the value of ``answer`` or of the
    last name; else the whole text in lower case, with whitespace collapsed.
    """
    _, marker, tail = text.lower().rpartition(_MARKER)
    if marker:
        return _normalised(tail)
    value = program_value(text)
    return _collapsed(text.lower()) if value is None else str(value)


def is_correct(generated: str, reference: str) -> bool:
    """Tell whether both texts have the same final answer."""
    return final_answer(generated) == final_answer(reference)


def program_value(text: str) -> int | None:
    """Evaluate a straight-line program: the value of ``answer``, else of its last name; None if it is not a program.

    A program has one ``name = expression`` on each non-empty line, over integers, ``+ - * // %``, unary minus,
    parentheses and the names assigned above.
    """
    if len(text) > _MAX_PROGRAM_CHARS or not _PROGRAM_CHARS.fullmatch(text) or _GLUED_NUMBER.search(text):
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    try:
        statements = ast.parse("\n".join(lines)).body
        # Fewer statements than lines: an expression spans several lines.
        return _run(statements) if len(statements) == len(lines) else None
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _run(statements: list[ast.stmt]) -> int | None:
    """Evaluate assignments. Raises ValueError for any other statement."""
    names: dict[str, int] = {}
    last = None
    for statement in statements:
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise ValueError("not an assignment")
        target = statement.targets[0]
        if not isinstance(target, ast.Name):
            raise ValueError("not a name")
        last = names[target.id] = _value(statement.value, names)
    return names.get("answer", last)


def _value(node: ast.expr, names: dict[str, int]) -> int:
    """Evaluate an expression. Raises ValueError for one that is not allowed, ArithmeticError for a division by 0."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, names)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        # Both sides are bounded, so that the result has at most twice their digits.
        return _bounded(_OPERATIONS[type(node.op)](_value(node.left, names), _value(node.right, names)))
    raise ValueError("not an expression of a program")


def _bounded(value: int) -> int:
    if abs(value) > _MAX_ABS:
        raise ValueError("a number of a program is too large")
    return value


def _normalised(answer: str) -> str:
    """Collapse whitespace, and remove a trailing period and thousands commas."""
    return _THOUSANDS.sub("", _collapsed(answer).rstrip(".").rstrip())


def _collapsed(text: str) -> str:
    return " ".join(text.split())
