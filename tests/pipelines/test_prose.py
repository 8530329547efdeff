"""What is prose in a text: hostile lines cost no more than usual ones."""

import time

import pytest

from pipelines.rules.prose import prose_of


@pytest.mark.parametrize("piece", ["({[", "(", "if (", "(x", "{}", "(;", "for a in ", "| a ", "a,", " "])
def test_long_lines_of_code_signs_take_linear_time(piece: str) -> None:
    """As one pattern "a sign, anything, a brace at the end" took 77 s for these four lines."""
    line = piece * (60_000 // len(piece)) + "x"
    started = time.process_time()
    prose_of("\n".join([line] * 4))
    assert time.process_time() - started < 2


def test_lines_that_end_in_a_brace_or_semicolon_after_a_sign_are_code() -> None:
    code = ["int main(void) {", "  total += values[i];", "}", "call(x);", "int other(void) {"]
    assert prose_of("\n".join(["How does this work?", "", *code])).strip() == "How does this work?"
