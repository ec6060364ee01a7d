"""Tables and code spans in Markdown show the text that they are given."""

from workflow.runtime.markdown import Code, code, escaped, table


def test_a_table_escapes_text_and_aligns_columns():
    lines = table(("name", "value"), [("a|b", "1"), (Code("c|`d"), "−22.50")], right=[1]).splitlines()
    assert [[cell.strip() for cell in line.strip("|").replace(r"\|", "/").split("|")] for line in lines] == [
        ["name", "value"],
        lines[1].strip("|").split("|"),
        ["a/b", "1"],
        ["`` c/`d ``", "−22.50"],
    ]
    left, right = lines[1].strip("|").split("|")
    assert left.startswith(":-") and right.endswith("-:")
    assert len({len(line) for line in lines}) == 1


def test_text_begins_no_html_and_no_new_line():
    assert escaped("p < 0.05,\n<b> & more") == "p &lt; 0.05, &lt;b> &amp; more"


def test_a_code_span_holds_back_quotes_and_pipes():
    assert code("a | b") == r"`a \| b`"
    assert code("x `y` z") == "`` x `y` z ``"
