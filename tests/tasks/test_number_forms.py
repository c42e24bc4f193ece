"""How people and models write a number: 200 answers, each with the number that it states, worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from grpo_mlflow.tasks.numbers import final_number, is_number
from tests.support.timing import quick


def tag(content: str) -> str:
    return f"<SOLUTION>{content}</SOLUTION>"


def box(content: str) -> str:
    return f"\\boxed{{{content}}}"


Form = tuple[str, str | None]

SIGNS: list[Form] = [
    ("\u20133", "-3"),  # en dash
    (tag("\u20147"), "-7"),  # em dash
    ("\u22127.5", "-15/2"),  # minus sign
    (tag("\u20114"), "-4"),  # hyphen that does not break
    ("The answer is \uff0d12.", "-12"),  # full width
    (tag("\u2012 5"), "-5"),  # figure dash
    (tag("+7"), "7"),
    (tag("\uff0b7"), "7"),
    ("The temperature is minus 3 degrees.", "-3"),
    ("The answer is negative 12.", "-12"),
    (box("x = - 3 1/2"), "-7/2"),
    ("The answer is -$5.", "-5"),
    ("\u2212US$5", "-5"),
    (tag("-\u20ac1,250.50"), "-2501/2"),
    ("She has \u22482 = -\\$4", "-4"),
    ("The total\u20147 apples", "7"),  # an em dash after a word is punctuation
    ("10\u20133 = 7", "7"),
    (box("{-3}"), "-3"),
    (box("-{3}"), "-3"),
    (tag("--7"), None),  # a dash of two hyphens, or minus minus 7
    (tag("\u00b15"), None),
    (box("\\pm 5"), None),
    (tag("x-5"), None),
    (tag("-(5)"), None),
]

LATEX: list[Form] = [
    (box("\\dfrac{-3}{4}"), "-3/4"),
    (box("\\frac34"), "3/4"),
    (box("\\frac{3}4"), "3/4"),
    (box("\\frac3{4}"), "3/4"),
    (box("\\tfrac{3}{4}"), "3/4"),
    (box("\\frac 3 4"), "3/4"),
    (box("-\\frac{3}{4}"), "-3/4"),
    (box("\\frac{3}{-4}"), "-3/4"),
    (box("-\\frac{-3}{4}"), "3/4"),
    (box("\\frac{\u22123}{4}"), "-3/4"),
    (box("2\\frac{1}{2}"), "5/2"),
    (box("-2\\tfrac12"), "-5/2"),
    (box("\\frac{1,500}{7}"), "1500/7"),
    (box("\\frac{1.5}{2}"), "3/4"),
    (box("\\frac{3}{4}\\text{ cup}"), "3/4"),
    (box("\\displaystyle\\cfrac{7}{2}"), "7/2"),
    ("\\(\\frac{5}{8}\\)", "5/8"),
    ("$$x = \\frac{22}{7}$$", "22/7"),
    (box("1{,}450"), "1450"),
    (box("1\\,450"), "1450"),
    (box("1,\\!450"), "1450"),
    (box("12{.}5"), "25/2"),
    (box("42^\\circ"), "42"),
    (box("42^{\\circ}\\text{C}"), "42"),
    (box("12\\text{ cm}^2"), "12"),
    (box("12\\,\\mathrm{m}^{3}"), "12"),
    (box("\\textbf{42}"), "42"),
    (box("\\mathbf{-42}"), "-42"),
    (box("\\left(42\\right)"), "42"),
    (box("\\text{Total: } 42"), "42"),
    (box("42\\text{ USD}"), "42"),
    (box("\\$1{,}250.00"), "1250"),
    (box("12.5\\,\\%"), "25/2"),
    ("\\boxed 42", "42"),
    ("\\boxed {42}", "42"),
    ("\\fbox{42}", "42"),
    ("\\[ \\boxed{42} \\]", "42"),
    ("\\begin{aligned} x &= 6 \\cdot 7 \\\\ &= 42 \\end{aligned}", "42"),
    (box("3 \\times 10^{5}"), "300000"),
    (box("\\sqrt{16}"), None),
    (box("4\\sqrt{3}"), None),
    (box("5\\pi"), None),
    (box("\\frac{3}{0}"), None),
    (box("\\frac{x}{4}"), None),
    (box("0.\\overline{3}"), None),
    (box("3, 4"), None),
    (box("(3,4)"), None),
    (box("x = 5 \\text{ or } x = 6"), None),
    ("\\boxed{3} or \\boxed{4}", None),
    ("So it is \\boxed{42", None),
]

SEPARATORS: list[Form] = [
    ("1,234", "1234"),
    ("12,345.67", "1234567/100"),
    ("1,234,567.5", "2469135/2"),
    ("1,00,000", "100000"),  # as in India
    (tag("1 450"), "1450"),
    (tag("12 345 678"), "12345678"),
    ("It is 12 345 678", "12345678"),
    ("1\u2009450", "1450"),  # thin space
    ("1\u00a0234\u00a0567", "1234567"),  # no-break space
    ("1\u202f234,5", "2469/2"),
    ("1'234", "1234"),
    ("1\u2019234.50", "2469/2"),
    ("1_000_000", "1000000"),
    ("\uff11,\uff12\uff13\uff14", "1234"),  # full width digits
    ("\u0661\u0662", "12"),  # Arabic-Indic digits
    ("\u0661\u066c\u0662\u0663\u0664\u066b\u0665", "2469/2"),  # with their own separators
    ("0,5", "1/2"),
    ("3,75", "15/4"),
    ("0,125", "1/8"),
    ("-2,5", "-5/2"),
    ("12,5 %", "25/2"),
    ("1.234,56", "30864/25"),
    ("1.234.567", "1234567"),
    ("1.234.567,8", "6172839/5"),
    (tag("1 234,5"), "2469/2"),
    ("1.234", "617/500"),
    ("12.", "12"),
    ("It is 12...", "12"),
    ("...12", "12"),
    ("12,", "12"),
    ("1" + ",000" * 1500, None),
    ("1234,567", None),  # a decimal comma, or a missing comma
    ("12,34,5", None),
    ("012,345", None),
    ("1,234,56", None),
    ("2, 3", "3"),
    (tag("2, 3"), None),
    ("1,2,3,4", None),
    ("1 450", None),  # 1450, or 1 and then 450
    (tag("1 45"), None),
    (tag("1234 567"), None),
    ("192.168.0.1", None),
]

FRACTIONS: list[Form] = [
    ("3/4", "3/4"),
    ("-3/4", "-3/4"),
    ("3\u20444", "3/4"),  # fraction slash
    ("\u00be", "3/4"),
    ("1\u00bd", "3/2"),
    ("-1 \u215b", "-9/8"),
    ("1 3/4 cups", "7/4"),
    (tag("3/-4"), "-3/4"),
    ("1/1,000", "1/1000"),
    ("0.5/2", "1/4"),
    ("2 and 1/2", "5/2"),
    ("two and 2 and a half", "5/2"),
    ("**3/4**", "3/4"),
    (tag("1/2 = 0.5"), "1/2"),
    (tag("0.5 or 1/2"), "1/2"),
    (tag("1-1/2"), None),  # one and a half, or one half
    (tag("1/2/3"), None),
    (tag("3 5/4"), None),
    (tag("1/2 or 1/3"), None),
    (tag("0.333 (1/3)"), None),
]

POWERS: list[Form] = [
    ("1e3", "1000"),
    ("2.5E+4", "25000"),
    ("5e-2", "1/20"),
    ("3 \u00d7 10^5", "300000"),
    ("3\u00d710\u2075", "300000"),
    ("1.5 x 10\u207b\u00b2", "3/200"),
    (tag("2*10**3"), "2000"),
    (tag("10^6"), "1000000"),
    ("-4 \\cdot 10^{2}", "-400"),
    (tag("12 cm\u00b2"), "12"),
    (tag("12 m^2"), "12"),
    ("2 million", "2000000"),
    ("1.5 Billion", "1500000000"),
    ("2 hundred thousand", "200000"),
    ("$5k", "5000"),
    ("1e999", None),
    (tag("2^3"), None),
    (tag("2\u00b3"), None),
    (tag("2**3"), None),
]

UNITS: list[Form] = [
    ("50 percent", "50"),
    ("12\u20ac", "12"),
    ("\u20b9 1,00,000", "100000"),
    ("US$ 30", "30"),
    ("30 EUR", "30"),
    ("Rs.250/-", "250"),
    ("18 km/h", "18"),
    ("90\u00b0", "90"),
    ("5 pm", "5"),
    ("x\u2081 = 9", "9"),
    ("x_1 = 9", "9"),
    ("CO2: 12 kg", "12"),
    ("12 of them, on the 5th day", "12"),
    (tag("$12/hour"), "12"),
]

MARKUP: list[Form] = [
    ("**42**", "42"),
    ("*42*", "42"),
    ("__42__", "42"),
    ("`42`", "42"),
    ("**$1,450**", "1450"),
    ("The answer is ***-3***.", "-3"),
    ("~~41~~ 42", "42"),
    ("| total | 42 |", "42"),
    ("\u200b42\u200b", "42"),
    ("- 3 apples\n- 42 pears", "42"),
    (tag(box("42")), "42"),
]

SEVERAL: list[Form] = [
    ("2024-01-05", None),
    ("05/01/2024", None),
    ("05.01.2024", None),
    ("It ends on January 5, 2024.", None),
    (tag("5 January"), None),
    (tag("5:30"), None),
    ("The answer is 17:45.", None),
    (tag("3:1"), None),
    ("10-12", None),
    ("10\u201312", None),
    (tag("5 - 5"), None),
    ("It takes 10 to 12 days.", None),
    ("The answer is between 10 and 12.", None),
    ("The answer is 12 or 13.", None),
    ("The answer is 12 apples or 13 pears.", None),
    ("It is 12 or 13", None),
    ("The answer is 1 hour and 30 minutes.", None),
    (tag("2+2"), None),
    ("The total is 3 * 4", None),
    (tag("x = 5, y = 6"), None),
]

FORMS = [*SIGNS, *LATEX, *SEPARATORS, *FRACTIONS, *POWERS, *UNITS, *MARKUP, *SEVERAL]


def test_there_are_two_hundred_different_forms() -> None:
    assert len({text for text, _ in FORMS}) == len(FORMS) == 200


@pytest.mark.parametrize(("text", "number"), FORMS, ids=[ascii(text)[:60] for text, _ in FORMS])
def test_the_number_of_a_form(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize("dash", ["-", "\u2010", "\u2011", "\u2012", "\u2013", "\u2014", "\u2212", "\uff0d"], ids=ascii)
def test_every_dash_is_a_minus_sign_before_a_number_and_a_range_between_two(dash: str) -> None:
    for text in (
        f"{dash}1,250.5",
        tag(f"{dash}$1250.5"),
        box(f"{dash}\\frac{{2501}}{{2}}"),
        f"The answer is {dash}1250\xbd",
    ):
        assert final_number(text) == Fraction(-2501, 2), text
    assert final_number(tag(f"10{dash}12")) is None


@pytest.mark.parametrize(
    "mark", [",", ".", "'", "\u2019", " ", "\u00a0", "\u2009", "\u202f", "{,}", "\\,", ",\\!", "_"], ids=ascii
)
def test_every_thousands_separator_reads_alike(mark: str) -> None:
    for number in (1_234_567, 10_000_000, 999_000_001):
        written = f"{number:,}".replace(",", mark)
        assert final_number(tag(written)) == final_number(written) == number
        assert final_number(tag(f"\u2212{written} km")) == -number


def test_no_text_raises_or_takes_long() -> None:
    """Texts of pieces that numbers are made of; one that raises ends the run that it is judged in."""
    pieces = [
        *(
            "1",
            "12",
            "000",
            "0",
            ".",
            ",",
            "-",
            "\u2014",
            " ",
            "\u2009",
            "/",
            "^",
            "e",
            "\\frac",
            "\\boxed",
            "{",
            "}",
            "=",
            "(",
        ),
        *(
            ")",
            "$",
            "%",
            "or",
            "and",
            "minus",
            "x",
            "10",
            "*",
            "**",
            "\n",
            "####",
            "The answer is",
            "May",
            "hour",
            "million",
            "~~",
        ),
        *(
            "<SOLUTION>",
            "</SOLUTION>",
            "\\text{",
            "\\over",
            "\u00bd",
            "\u00b2",
            "\u2081",
            "\u0663",
            "\u0301",
            "not",
            "_",
            "|",
            ":",
        ),
    ]
    rng = np.random.default_rng(18)
    texts = ["".join(rng.choice(pieces, size=int(rng.integers(1, 16)))) for _ in range(5000)]
    quick(lambda: [(final_number(text), is_number(text)) for text in texts[:1000]])
    for text in texts:
        final_number(text)
        assert not is_number(text) or final_number(tag(text)) is not None, text
