"""What is wrong with a YAML file is said in words, with the line and column to look at."""

import pytest

from workflow.runtime.errors import UserError
from workflow.runtime.files import read_yaml


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a:\n  b: 1\n\tc: 2\n", "(line 3, column 1): a tab stands where spaces must be."),
        ("a: [1, 2\nb: 3\n", "(line 1, column 4): a list that is not closed by ]."),
        ("a: {b: 1\nc: 3\n", "(line 1, column 4): a mapping that is not closed by }."),
        ("a:\n  b: 1\n  c:2\n  d: 2\n", "(line 3, column 3): a key without a colon and a space after it."),
        ("a:\n    b: 1\n  c: 2\n", "(line 3, column 3): an indentation that fits none of the lines above"),
        ('a: "x\nb: 3\n', "(line 1, column 4): a quote that is not closed."),
        ("a: 1\na: 2\n", "(line 2, column 1): a is a duplicate key: it stands above too."),
        ("a: x: y\n", "(line 1, column 5): a colon where no key can be: "),
        ("a: @x\n", "(line 1, column 4): a text cannot begin with @ unless it stands in quotes."),
        ("a: *x\n", "(line 1, column 4): *x refers to an anchor &x that there is not above it."),
        ('a: "C:\\p"\n', "(line 1, column 8): \\p in double quotes means nothing"),
        ("a: 1\nb: \a\n", "(line 2, column 4): unacceptable character #x0007"),
    ],
)
def test_an_error_of_yaml_is_said_in_words(tmp_path, text, sentence):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert str(error.value).startswith(f"{path} is not valid YAML {sentence}")
