"""What is prose in a text: hostile lines cost no more than usual ones."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.markdown import _FENCE_LINE, CODE_SIGN, _fence_lines, ends_as_code
from pipelines.rules import prose
from pipelines.rules.prose import prose_of, proses_kept


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


_line_pieces = st.lists(
    st.sampled_from(
        "import |from |return |print |console.log|def |else|a|b1|x,|,|-|>|=|*|!|.|\t|    | |;|(|:".split("|")
    )
)


@given(_line_pieces.map("".join))
def test_the_first_question_about_a_line_lets_all_code_through(line: str) -> None:
    starts = (prose._CODE_START, prose._TABLE_LINE, prose._DATA_LINE)
    is_code = any(pattern.match(line) for pattern in starts) or CODE_SIGN.search(line) or ends_as_code(line)
    assert prose._MAY_BE_CODE.search(line) or not is_code


def test_inside_proses_kept_a_text_is_read_once_and_nothing_stays_behind() -> None:
    text = "One line\nand another.\n"
    with proses_kept():
        assert prose_of(text) is prose_of(text)
    assert prose_of(text) is not prose_of(text)
    assert not prose._kept


@given(st.lists(st.sampled_from("```|~~~|`|~|python|\n|\n\n|- |1. |> | |````|text".split("|"))).map("".join))
def test_lines_of_fences_are_all_found(text: str) -> None:
    found = [match.span() for match in _fence_lines(text)]
    assert found == [match.span() for match in _FENCE_LINE.finditer(text)]
