"""A table of named entries: what can be added to it, and what it says of a name that it does not have."""

from dataclasses import replace

import pytest

from workflow import methods, precisions
from workflow.runtime.errors import UserError
from workflow.runtime.registry import Registry


def test_an_entry_is_known_by_its_name():
    registry = Registry("method")
    entry = registry.register(replace(methods.get("lora"), name="other"))
    assert registry.get("other") is entry and registry.names() == ["other"]
    assert "other" not in methods.names()


@pytest.mark.parametrize(
    ("table", "name", "noun"), [(methods, "lora", "method"), (precisions, "nf4", "precision")]
)
def test_a_name_has_one_entry(table, name, noun):
    entry = table.get(name)
    assert table.register(entry) is entry
    with pytest.raises(ValueError, match=f"there are two entries for the {noun} {name}"):
        table.register(replace(entry))
    assert table.get(name) is entry


def test_an_unknown_name_is_refused_with_the_known_ones_and_the_nearest():
    registry = Registry("precision", {name: precisions.get(name) for name in ("nf4", "int8")})
    with pytest.raises(
        UserError, match=r"^nf5 is not a known precision; known are nf4, int8 \(did you mean nf4\?\)\.$"
    ):
        registry.get("nf5")
    with pytest.raises(UserError, match=r"^awq is not a known precision; known are nf4, int8\.$"):
        registry.get("awq")
