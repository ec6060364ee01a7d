"""Make an SVG of matplotlib small: no groups that say nothing, and one path for lines that look the same."""

import re
import xml.etree.ElementTree as ET

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
GROUP, PATH, TEXT, USE, DEFS, STYLE = (
    f"{{{SVG}}}{name}" for name in ("g", "path", "text", "use", "defs", "style")
)
DECIMALS = re.compile(r"(\.\d\d)\d+")  # of coordinates: more are smaller than a pixel shows


def compact(svg: str) -> str:
    """The same drawing with fewer elements.

    Args:
        svg: a document of matplotlib, whose groups carry ids that nothing refers to.
    """
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(svg)
    _unwrap(root)
    definitions = ET.Element(DEFS)
    _collect(root, definitions)
    root.append(definitions)
    for parent in root.iter():
        parent[:] = _joined([child for child in parent if not _is_invisible(child)])
    for element in root.iter():
        for name in {"d", "x", "y", "transform"}.intersection(element.keys()):
            element.set(name, DECIMALS.sub(r"\1", element.get(name)))
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
    return ET.tostring(root, encoding="unicode")


def _unwrap(parent: ET.Element) -> None:
    """Put the children of each group that does nothing in its place."""
    children = []
    for child in parent:
        _unwrap(child)
        children += child if child.tag == GROUP and _does_nothing(child) else [child]
    parent[:] = children


def _does_nothing(group: ET.Element) -> bool:
    """Whether a group changes nothing: markers lie at data, within the axes that they are clipped to."""
    clips = set(group.keys()) <= {"id", "clip-path"} and all(child.tag == USE for child in group)
    return clips or not set(group.keys()) - {"id"}


def _collect(parent: ET.Element, definitions: ET.Element) -> None:
    """Move what is defined all over a drawing into one place."""
    for child in list(parent):
        _collect(child, definitions)
        if child.tag == DEFS:
            definitions.extend(one for one in child if one.tag != STYLE)
            parent.remove(child)


def _is_invisible(element: ET.Element) -> bool:
    style = element.get("style", "")
    return (
        element.tag == PATH
        and "id" not in element.attrib
        and "fill: none" in style
        and "stroke:" not in style
    )


def _joined(children: list[ET.Element]) -> list[ET.Element]:
    """With one path of several that differ in their points alone; texts may stand between them."""
    joined: list[ET.Element] = []
    for child in children:
        before = next((element for element in reversed(joined) if element.tag != TEXT), None)
        if before is not None and _look_alike(before, child):
            before.set("d", f"{before.get('d').rstrip()} {child.get('d')}")
        else:
            joined.append(child)
    return joined


def _look_alike(one: ET.Element, other: ET.Element) -> bool:
    """Whether two elements are lines of one style, without transparency, which would add up where they cross."""
    if not one.tag == other.tag == PATH:
        return False
    style = one.get("style", "")
    looks = [{k: v for k, v in element.items() if k != "d"} for element in (one, other)]
    return looks[0] == looks[1] and "id" not in looks[0] and "fill: none" in style and "opacity" not in style
