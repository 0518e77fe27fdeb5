"""What exact match compares: the final answer of a rationale, a small program or an equation.

Generated text is untrusted. A program is never run: it is parsed, and only integer arithmetic is walked, with every
number and the length of the text bounded, so no text raises, hangs or grows.
"""

from __future__ import annotations

import ast
import re

_MARKER = "the answer is"
_MAX_PROGRAM_CHARS = 2_000
_MAX_ABS = 10**18
_PROGRAM_CHARS = re.compile(r"[A-Za-z0-9_ \t\n+\-*/%()=]+")
# A number glued to a letter ("1if") only makes Python's parser warn; no program of ours has one.
_GLUED_NUMBER = re.compile(r"(?<![A-Za-z0-9_])[0-9]+[A-Za-z_]")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


def final_answer(text: str) -> str:
    """The answer in ``text``, normalised for comparison.

    In this order: what follows the last ``The answer is``; the value of ``answer`` (else of the last name) if the
    text is a straight-line program; else the whole text, lower-case, with its whitespace collapsed.
    """
    _, marker, tail = text.lower().rpartition(_MARKER)
    if marker:
        return _normalised(tail)
    value = program_value(text)
    return _collapsed(text.lower()) if value is None else str(value)


def is_correct(generated: str, reference: str) -> bool:
    """Whether both texts end in the same final answer."""
    return final_answer(generated) == final_answer(reference)


def program_value(text: str) -> int | None:
    """The value that a straight-line program assigns to ``answer``, else to its last name; None if it is no program.

    A program has one ``name = expression`` on each non-empty line, over integers, ``+ - * // %``, unary minus,
    parentheses and the names assigned above.
    """
    lines = _program_lines(text)
    if not lines:
        return None
    try:
        statements = ast.parse("\n".join(lines)).body
        # Fewer statements than lines means that an expression runs over a line break.
        return _run(statements) if len(statements) == len(lines) else None
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _program_lines(text: str) -> list[str]:
    """The non-empty lines, stripped; [] if the text is too long, or has a character that no program has."""
    if len(text) > _MAX_PROGRAM_CHARS or not _PROGRAM_CHARS.fullmatch(text) or _GLUED_NUMBER.search(text):
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


def _run(statements: list[ast.stmt]) -> int | None:
    """The value of ``answer``, else of the last name assigned. Raises ValueError for anything but assignments."""
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
    """The value of one expression. Raises ValueError for what a program may not contain, ArithmeticError for / 0."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, names)
    if isinstance(node, ast.BinOp):
        return _bounded(_apply(node.op, _value(node.left, names), _value(node.right, names)))
    raise ValueError("not an expression of a program")


def _apply(op: ast.operator, left: int, right: int) -> int:
    """One of the five operations. Both sides are bounded, so the result takes at most twice their digits."""
    if isinstance(op, ast.Add):
        return left + right
    if isinstance(op, ast.Sub):
        return left - right
    if isinstance(op, ast.Mult):
        return left * right
    if isinstance(op, ast.FloorDiv):
        return left // right
    if isinstance(op, ast.Mod):
        return left % right
    raise ValueError("not an operation of a program")


def _bounded(value: int) -> int:
    if abs(value) > _MAX_ABS:
        raise ValueError("a number of a program is too large")
    return value


def _normalised(answer: str) -> str:
    """Whitespace collapsed, without a trailing period and thousands commas."""
    return _THOUSANDS.sub("", _collapsed(answer).rstrip(".").rstrip())


def _collapsed(text: str) -> str:
    return " ".join(text.split())
