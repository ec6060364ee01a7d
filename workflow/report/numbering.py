"""Numbers for the figures and tables of the page, and permalinks of these and of the headings."""

import re
from itertools import count

PART = re.compile(r"<(figcaption|caption)>(<span>)?")
HEADING = re.compile(r'(<section id="([^"]+)">(?:(?!</section>).)*?)</h2>', re.DOTALL)
NAMES = {"figcaption": "figure", "caption": "table"}


def number_parts(page: str) -> str:
    """The page with `Figure 1.` or `Table 1.` before each caption, as a link to it, and a link after each heading."""
    counters = {tag: count(1) for tag in NAMES}

    def numbered(match: re.Match) -> str:
        tag, inner = match[1], match[2] or ""
        name, number = NAMES[tag], next(counters[tag])
        link = f'<a class="permalink" href="#{name}-{number}">{name.capitalize()} {number}.</a>'
        return f'<{tag} id="{name}-{number}">{inner}{link} '

    page = PART.sub(numbered, page)
    return HEADING.sub(
        r'\1 <a class="permalink" href="#\2" aria-label="Link to this section">#</a></h2>', page
    )
