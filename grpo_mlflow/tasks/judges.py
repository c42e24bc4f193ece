"""Where reasoning-gym's own judges cannot be used: they run a model's text as code, or pass what is no answer.

`eval` or sympy's parser (which calls it) see the text in string_insertion, spiral_matrix, binary_matrix, n_queens,
puzzle24, countdown, simple_integration, intermediate_integration and polynomial_multiplication. game_of_life_halting
passes any text, letter_jumble and spell_backward one that goes on after the answer, gsm_symbolic one that names several
numbers, propositional_logic one with words in it where the premises contradict each other, coin_flip "0" for 0.89,
puzzle24 one with other numbers than those given, the integrations one that only names the integral.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from grpo_mlflow.tasks.expressions import arithmetic, same_derivative, symbolic
from grpo_mlflow.tasks.numbers import final_number, is_number

_ATOM = r"[(\s\u00ac]*[A-Z][)\s]*"
_FORMULA = re.compile(rf"{_ATOM}(?:[\u2227\u2228\u2192\u2194]{_ATOM})*")
Judge = Callable[[str, Mapping[str, Any]], bool]  # the answer, the generator's entry


def _same_text(answer: str, entry: Mapping[str, Any]) -> bool:
    return answer == str(entry["answer"]).strip()


def _same_words(answer: str, entry: Mapping[str, Any]) -> bool:
    return answer.casefold().split() == str(entry["answer"]).casefold().split()


def _same_number(answer: str, entry: Mapping[str, Any]) -> bool:
    return is_number(answer) and final_number(answer) == final_number(entry["answer"])


def _close_number(answer: str, entry: Mapping[str, Any]) -> bool:
    """Return whether two probabilities agree to four digits, as the generator means it."""
    found, wanted = final_number(answer), final_number(str(entry["answer"]))
    return is_number(answer) and found is not None and wanted is not None and abs(found - wanted) <= Fraction(1, 10**4)


def _valid_board(answer: str, entry: Mapping[str, Any]) -> bool:
    return any(answer == board for board in entry["metadata"]["valid_answers"])


def _reaches(target: int | None) -> Judge:
    def judge(answer: str, entry: Mapping[str, Any]) -> bool:
        found, given = arithmetic(answer), entry["metadata"]
        if found is None or sorted(found[1]) != sorted(given["numbers"]):
            return False
        return found[0] == (given["target"] if target is None else target)

    return judge


def _antiderivative(answer: str, entry: Mapping[str, Any]) -> bool:
    variable = entry["metadata"]["variable"]
    formula = symbolic(answer, {variable, "C"})
    integrand = symbolic(entry["metadata"]["integrand"], {variable})
    return formula is not None and integrand is not None and same_derivative(formula, integrand, variable)


def _same_polynomial(answer: str, entry: Mapping[str, Any]) -> bool:
    """Return whether the terms are the same, in any order; what is not multiplied out is not the same."""
    variables = entry["metadata"]["variables"]
    names = {str(name) for name in variables}
    found, wanted = symbolic(answer, names), symbolic(entry["answer"], names)
    return found is not None and wanted is not None and bool(found == wanted)


def _conclusion(answer: str, entry: Mapping[str, Any]) -> bool:
    """Return whether a formula follows, as the generator judges it; to its parser "P or banana" is a variable."""
    return _FORMULA.fullmatch(answer) is not None and float(entry["score"](answer, entry)) >= 1


JUDGES: dict[str, Judge] = {
    **dict.fromkeys(("string_insertion", "spiral_matrix", "binary_matrix"), _same_text),
    **dict.fromkeys(("game_of_life_halting", "letter_jumble", "spell_backward"), _same_words),
    **dict.fromkeys(("simple_integration", "intermediate_integration"), _antiderivative),
    "coin_flip": _close_number,
    "propositional_logic": _conclusion,
    "gsm_symbolic": _same_number,
    "n_queens": _valid_board,
    "countdown": _reaches(None),
    "puzzle24": _reaches(24),
    "polynomial_multiplication": _same_polynomial,
}
