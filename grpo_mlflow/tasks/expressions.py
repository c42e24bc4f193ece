"""Formulas as a model wrote them, read without ever being evaluated as code.

Python's parser only makes a syntax tree (`ast`); the tree is walked by hand and whatever is not named here is refused.
Sizes are bounded, so that no formula makes its judge slow: length, digits, the degree that powers multiply up to, and
functions inside functions.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Collection
from fractions import Fraction
from typing import Any

_LONGEST = 1000
_DIGITS = 30
_DEGREE = 200
_FUNCTIONS = {
    "sin",
    "cos",
    "tan",
    "sec",
    "csc",
    "cot",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "exp",
    "log",
    "sqrt",
}


def arithmetic(text: str) -> tuple[Fraction, list[int]] | None:
    """Return the value of a formula of integers, + - * / and brackets, and its integers; None where it is no such."""
    tree, numbers = _tree(text), list[int]()

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(_bounded(node.value))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add):
                return left + right
            if isinstance(node.op, ast.Sub):
                return left - right
            if isinstance(node.op, ast.Mult):
                return left * right
            if isinstance(node.op, ast.Div):
                return left / right
        raise ValueError("not arithmetic")

    try:
        return (value(tree), numbers) if tree is not None else None
    except (ValueError, ZeroDivisionError, RecursionError):
        return None


def symbolic(text: str, variables: Collection[str]) -> Any | None:
    """Return a formula of these variables as a sympy expression with exact numbers; None where it is no such."""
    tree, sympy = _tree(text.replace("^", "**")), importlib.import_module("sympy")

    def build(node: ast.expr, inside: bool) -> tuple[Any, int]:
        """Return the expression and a bound of its degree; `inside` a function there is no other."""
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
            return sympy.Rational(str(_bounded(node.value))), 1
        if isinstance(node, ast.Name) and node.id in variables:
            return sympy.Symbol(node.id), 1
        if isinstance(node, ast.Name) and node.id in ("pi", "E"):
            return getattr(sympy, node.id), 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            expression, degree = build(node.operand, inside)
            return -expression, degree
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            if inside or len(node.args) != 1 or node.keywords:
                raise ValueError("a function inside a function")
            return getattr(sympy, node.func.id)(build(node.args[0], True)[0]), 1
        if isinstance(node, ast.BinOp):
            (left, degree), (right, other) = build(node.left, inside), build(node.right, inside)
            if isinstance(node.op, ast.Add):
                return left + right, max(degree, other)
            if isinstance(node.op, ast.Sub):
                return left - right, max(degree, other)
            if isinstance(node.op, ast.Mult):
                return left * right, _bounded_degree(degree + other)
            if isinstance(node.op, ast.Div):
                return left / right, _bounded_degree(degree + other)
            if isinstance(node.op, ast.Pow) and right.is_Rational and abs(right) <= _DEGREE:
                return left**right, _bounded_degree(int(degree * max(1, abs(right))))
        raise ValueError("not a formula")

    try:
        return build(tree, False)[0] if tree is not None else None
    except (ValueError, ZeroDivisionError, RecursionError):
        return None


def same_derivative(formula: Any, integrand: Any, variable: str) -> bool:
    """Return whether d formula / d variable equals the integrand, by their values at a few points to 30 digits."""
    sympy = importlib.import_module("sympy")
    difference = sympy.diff(formula, sympy.Symbol(variable)) - integrand
    names = sorted(difference.free_symbols, key=str)
    for place in range(1, 6):  # inside (0, 1), where the arcs are real; no formula of the generators is special there
        point = {name: sympy.Rational(17 * place + 5 * i, 101 + 7 * i) for i, name in enumerate(names)}
        scale = 1 + abs(sympy.N(integrand.subs(point), 30))
        gap = sympy.N(difference.subs(point), 30)
        if not bool(abs(gap) <= scale / 10**18):  # what is no number at all (1/0, another letter) raises or is False
            return False
    return True


def _tree(text: str) -> ast.expr | None:
    if len(text) > _LONGEST:
        return None
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _bounded(number: int | float) -> int | float:
    if not abs(number) < 10**_DIGITS:  # also refuses what is no number
        raise ValueError("too large")
    return number


def _bounded_degree(degree: int) -> int:
    if degree > _DEGREE:
        raise ValueError("too high")
    return degree
