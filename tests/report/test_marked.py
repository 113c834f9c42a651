"""What is generated stands between its marks, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from mllm_fl.errors import UserError
from mllm_fl.report.marked import fill, filled

PAGE = "a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\n<!-- /two -->\nc\n"


def test_both_tables_are_put_in_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert fill(page, {"one": "1", "two": "2"}, check=True) and page.read_text() == PAGE
    assert fill(page, {"one": "1", "two": "2"})
    assert page.read_text() == "a\n<!-- one -->\n1\n<!-- /one -->\nb\n<!-- two -->\n2\n<!-- /two -->\nc\n"
    assert not fill(page, {"one": "1", "two": "2"})


@pytest.mark.parametrize(
    "text",
    ["none", "<!-- one -->", "<!-- /one -->\n<!-- one -->", "<!-- one -->\n<!-- one -->\n<!-- /one -->", "<!-- one -->\n<!-- /one -->\n<!-- /one -->"],
)  # fmt: skip
def test_a_page_whose_marks_are_not_a_pair_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"page: needs <!-- one --> once and <!-- /one --> once after it"):
        filled(text, "one", "x", "page")


def test_a_page_that_lacks_one_of_the_marks_stays_as_it_was(tmp_path: Path) -> None:
    """Cutting at a mark that is not there would lose the rest of the page."""
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("<!-- /two -->", ""))
    with pytest.raises(UserError, match=r"page.md: needs <!-- two -->"):
        fill(page, {"one": "1", "two": "2"})
    assert "old" in page.read_text()
    with pytest.raises(UserError, match="cannot be read"):
        fill(tmp_path / "nowhere.md", {})
