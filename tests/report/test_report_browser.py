"""The page in a real browser: Debian's Chromium, driven by Playwright, with axe-core as the judge of accessibility."""

import contextlib
import csv
import json
import re
import shutil
from pathlib import Path

import made_up_results
import pytest
from made_up_results import Answered
from report_reader import facts

from workflow.report.page import render

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH")
WIDTHS = (360, 768, 1600)
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>\x00\u202e</style>'
REPAIRS = {"merging": {"faulty": "qlora_nf4_dq/requantized", "repaired": "qlora_nf4_dq"}}
ROWS = (
    Answered(HOSTILE, "x" * 2000, HOSTILE * 20),
    Answered("What is the capital of France?", "Paris.", "It is Paris."),
    Answered("How many legs has a spider?", "Eight.", "It has eight."),
)
NAMED_LONG = {
    "qlora_nf4_dq_own_rate": "qlora_nf4_dq",
    "qlora_fp4_own_rate": "qlora_fp4",
    "of_another_recipe": "qlora_nf4_dq",
}
A4_HEIGHT = 24 * 96 / 2.54  # px that a figure may have on a printed page


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The results of six variants and three seeds, measured devices, a fault, hostile texts, and the page of them."""
    folder = tmp_path_factory.mktemp("browser")
    with contextlib.chdir(folder):
        won = {("lora_16bit/as_trained", 1): 0.9, ("qlora_nf4/as_trained", 2): 0.8}
        made_up_results.write(
            variants=tuple(made_up_results.VARIANTS), seeds=(1, 2, 3), rows=ROWS, repairs=REPAIRS, scores=won
        )
        made_up_results.write_hardware()
        Path("index.html").write_text(render(facts()), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A page of the same parts with two variants, for what takes long."""
    folder = tmp_path_factory.mktemp("small")
    with contextlib.chdir(folder):
        made_up_results.write(rows=ROWS, repairs=REPAIRS)
        made_up_results.write_hardware()
        Path("small.html").write_text(render(facts()), encoding="utf-8")
    return folder / "small.html"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, folder):
    """Opens the page, and at the end checks that nothing was said on the console and nothing asked of a network."""
    opened, console, requests = [], [], []

    def opens(*, width: int = 1280, scheme: str = "light", script: bool = True, file: Path | None = None):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=script
        )
        tab = context.new_page()
        tab.on("console", lambda message: console.append(message.text))
        tab.on("pageerror", lambda error: console.append(str(error)))
        tab.on("dialog", lambda dialog: console.append(dialog.message))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto((file or folder / "index.html").as_uri())
        opened.append(context)
        return tab

    yield opens
    for context in opened:
        context.close()
    assert console == []
    assert all(url.startswith("file:") and url.endswith(".html") for url in requests)
    assert len(requests) == len(opened)


def open_all(tab) -> None:
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width_and_follows_the_theme(open_page, scheme):
    tab = open_page(scheme=scheme)
    for opened in (False, True):
        if opened:
            open_all(tab)
        for width in WIDTHS:
            tab.set_viewport_size({"width": width, "height": 800})
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = tab.evaluate(
        "(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))"
        ".map(c => c.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0))"
    )
    assert (ink < paper) == (scheme == "light")
    text_in_figures = tab.evaluate(
        "getComputedStyle(document.querySelector('#quality .panel svg text')).fill"
    )
    assert text_in_figures == tab.evaluate("getComputedStyle(document.body).color")


@pytest.mark.parametrize(("scheme", "options"), [("light", {}), ("dark", {"runOnly": ["color-contrast"]})])
def test_axe_finds_no_violation(open_page, small, scheme, options):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    tab = open_page(scheme=scheme, file=small)
    open_all(tab)
    found = axe.Axe().run(tab, options=options).response["violations"]
    said = [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"][:3]]
    assert said == []


@pytest.mark.parametrize("variants", [6, 2])
def test_every_number_of_the_first_screen_is_that_of_the_results(open_page, folder, small, variants):
    file = folder / "index.html" if variants == 6 else small
    tab, folder = open_page(file=file), file.parent
    shown = tab.evaluate(
        "[...document.querySelectorAll('header data')].map(d => [d.textContent, d.value, d.dataset.key])"
    )
    assert len(shown) > (30 if variants == 6 else 15)
    for text, value, key in shown:
        file, _, path = key.partition("#")
        assert float(value) == (found := number_at(json.loads((folder / file).read_text()), path))
        assert re.search(r"\d", text) and nearly(text, found), (text, found)
    # And there is no other number: what is left are names, and what was counted or chosen.
    left = tab.evaluate(
        "(h => { h.querySelectorAll('data, figure, nav, details, h1').forEach(e => e.remove()); return h.textContent })"
        "(document.querySelector('header').cloneNode(true))"
    )
    for known in (r"16-bit|8-bit|4-bit|NF4|FP4|CPU, 2 threads", r"\d of the 5 variants|, \d are|and \d is", r"seeds 1, 2 and 3|seeds 1 and 2",
                  r"of 16 rows|float32", r"90\xa0% interval", r"Made-Up-135M.Q4_1", r"\d+( to \d+)?\xa0GB", r"(merged into|in) 16 bits",
                  r"perplexity [\d.]+×", r"shape of Llama-2-7B|6\.7\xa0billion|pass of 128 tokens|any(\d+ GB)+", r"\d seeds", r"probability 0\.8"):  # fmt: skip
        left = re.sub(known, "", left)
    assert not re.findall(r"\d+", left), left


def number_at(content, path: str):
    """The number at a key such as `scores[3].per_seed.1`."""
    for part in re.findall(r"[^.\[\]]+", path):
        content = content[int(part)] if isinstance(content, list) else content[part]
    return content


def nearly(text: str, value: float) -> bool:
    """Whether the text is the value as rounded to the digits that it shows; signs may be in words."""
    digits = re.search(r"-?[\d,]*\.?\d+", text.replace("−", "-"))[0].replace(",", "")
    scale = 1e6 if "million" in text else 1
    scale *= 0.01 if "%" in text else 1
    decimals = len(digits.partition(".")[2])
    return abs(abs(float(digits)) * scale - abs(value)) <= 0.5001 * 10**-decimals * scale


def test_a_table_is_sorted_by_a_click_on_its_head(open_page):
    tab = open_page()
    head = tab.locator("#evidence table").first.locator("thead th").nth(2)
    column = (
        "[...document.querySelector('#evidence table').tBodies[0].rows].map(r => r.cells[2].dataset.sort)"
    )
    for direction, sign in (
        ("ascending", 1),
        ("descending", -1),
    ):  # the best first: a loss is better if it is lower
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        values = [float(value) for value in tab.evaluate(column) if value != ""]
        assert values == sorted(values, key=lambda value: sign * value) and len(set(values)) > 5
    assert tab.evaluate(column)[-1] != ""


def test_answers_are_found_by_category_by_who_won_and_by_search(open_page):
    tab = open_page()
    titles = "[...document.querySelectorAll('#answers article')].filter(a => a.checkVisibility()).map(a => a.querySelector('h3').textContent)"
    assert len(tab.evaluate(titles)) == 2  # the rest is folded until something is looked for
    tab.locator("[name=category]").select_option("other")
    assert tab.evaluate(titles) == ["What is the capital of France?"]
    assert tab.locator("form.filters output").inner_text() == "1 of 3 shown"
    tab.locator("[name=category]").select_option("")
    tab.locator("[name=winner]").select_option("qlora_nf4/as_trained")
    assert tab.evaluate(titles) == ["How many legs has a spider?"]
    tab.locator("[name=winner]").select_option("")
    tab.locator("[name=text]").fill("SPIDER eight")
    assert tab.evaluate(titles) == ["How many legs has a spider?"]
    tab.locator("[name=text]").fill("no such words")
    assert tab.evaluate(titles) == []


# The boxes of a drawing's texts and points, and the places that a line goes through, in pixels of the window.
MEASURE = """
svg => {
  const box = e => { const { left, right, top, bottom } = e.getBoundingClientRect(); return [left, right, top, bottom] };
  const places = path => {
    const [matrix, length] = [path.getScreenCTM(), path.getTotalLength()];
    return Array.from({ length: Math.ceil(length) }, (_, at) => path.getPointAtLength(at).matrixTransform(matrix)).map(p => [p.x, p.y]);
  };
  return {
    texts: [...svg.querySelectorAll("text")].map(t => [t.textContent, box(t)]),
    points: [...svg.querySelectorAll(".point")].map(box),
    reference: places(svg.querySelector(".reference")),
    whole: box(svg),
  };
}
"""


@pytest.fixture(scope="module")
def crowded(tmp_path_factory) -> Path:
    """A page of nine variants, some with long names."""
    folder = tmp_path_factory.mktemp("crowded")
    with contextlib.chdir(folder), made_up_results.further_variants(NAMED_LONG):
        variants = tuple(made_up_results.VARIANTS)
        training = {name: {"learning_rate": 3e-3} for name in NAMED_LONG}
        made_up_results.write(
            variants=variants, seeds=(1, 2, 3, 4, 5), rows=ROWS * 8, repairs=REPAIRS, training=training
        )
        made_up_results.write_hardware()
        Path("index.html").write_text(render(facts()), encoding="utf-8")
    return folder / "index.html"


@pytest.fixture(scope="module")
def uncertain(tmp_path_factory) -> Path:
    """A page of two variants whose shares of the gain are far from certain, so that the line lies at the right."""
    folder = tmp_path_factory.mktemp("uncertain")
    with contextlib.chdir(folder):
        made_up_results.write(half_width=0.8)
        Path("index.html").write_text(render(facts()), encoding="utf-8")
    return folder / "index.html"


@pytest.mark.parametrize("page", ["folder", "crowded", "uncertain"])
def test_no_text_of_the_answer_s_figure_covers_a_point_or_another_text_or_crosses_its_line(
    open_page, request, page
):
    file = request.getfixturevalue(page)
    tab = open_page(file=file / "index.html" if file.is_dir() else file)
    for width in (390, 768, 1440):
        tab.set_viewport_size({"width": width, "height": 800})
        for svg in tab.locator("#answer-figure .panel svg").all():
            drawn = svg.evaluate(MEASURE)
            texts = drawn["texts"]
            assert len(texts) > 4 and len(drawn["points"]) > 1 and len(drawn["reference"]) > 12
            for index, (text, box) in enumerate(texts):
                assert inside(box, drawn["whole"]), (width, text)
                others = drawn["points"] + [other for _, other in texts[index + 1 :]]
                assert not any(overlap(box, other) for other in others), (width, text)
                left, right, top, bottom = box
                assert not any(left < x < right and top < y < bottom for x, y in drawn["reference"]), (
                    width,
                    text,
                )


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether two boxes of left, right, top and bottom have a pixel in common."""
    across, down = (min(one[i + 1], other[i + 1]) - max(one[i], other[i]) for i in (0, 2))
    return across > 0.5 and down > 0.5


def inside(box: list[float], whole: list[float]) -> bool:
    return (
        box[0] >= whole[0] - 1
        and box[1] <= whole[1] + 1
        and box[2] >= whole[2] - 1
        and box[3] <= whole[3] + 1
    )


def test_a_budget_dims_what_does_not_fit_and_marks_its_advice(open_page):
    tab = open_page()
    dimmed = "[...document.querySelectorAll('.dots-row.out')].map(r => Number(r.dataset.planned))"
    limit = "Number(document.querySelector('form.budget [name=budget]').selectedOptions[0].dataset.planned)"
    chosen = "[...document.querySelectorAll('li.chosen')].map(i => i.dataset.budgets.split(' '))"
    rows = tab.evaluate("[...document.querySelectorAll('.dots-row')].map(r => Number(r.dataset.planned))")
    assert tab.evaluate(dimmed) == [] and tab.evaluate(chosen) == []
    tab.locator("form.budget [name=model]").select_option("planned")
    for budget in ("8", "24", "80"):
        tab.locator("form.budget [name=budget]").select_option(budget)
        assert tab.evaluate(dimmed) == [gib for gib in rows if gib > tab.evaluate(limit)]
        marked = tab.evaluate(chosen)
        assert len(marked) == 2 and all(budget in budgets for budgets in marked)  # for each model
    tab.locator("form.budget [name=budget]").select_option("8")
    assert 0 < len(tab.evaluate(dimmed)) < len(rows)
    tab.locator("form.budget [name=budget]").select_option("")
    assert tab.evaluate(dimmed) == []


def test_a_click_on_a_number_says_where_it_is_from(open_page):
    tab = open_page()
    number = tab.locator("header data").first
    number.click()
    box = tab.locator(".origin")
    assert box.is_visible()
    assert number.get_attribute("data-key").partition("#")[2] in box.inner_text()
    assert "results/compare/comparison.json" in box.inner_text()
    tab.keyboard.press("Escape")
    assert not box.is_visible()


def test_a_number_s_origin_opens_by_keyboard_and_is_that_of_the_results(open_page, folder):
    tab = open_page()
    tab.locator("#evidence td[data-n]").first.focus()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    terms = tab.evaluate("[...document.querySelectorAll('.origin dt, .origin dd')].map(e => e.textContent)")
    origin = dict(zip(terms[::2], terms[1::2], strict=True))
    content = json.loads((folder / origin["File"]).read_text())
    assert float(origin["Value"]) == number_at(content, origin["Key"])


def test_every_number_of_the_tables_is_that_of_the_results(open_page, folder):
    tab = open_page(script=False)
    cells = tab.evaluate(
        "[...document.querySelectorAll('td[data-n]')].map(c => [c.textContent, c.dataset.n])"
    )
    origins = json.loads(tab.evaluate("document.getElementById('origins').textContent"))
    files = {
        row[0]: json.loads((folder / row[0]).read_text())
        for row in origins["files"]
        if row[0].endswith(".json")
    }
    assert len(cells) > 300
    for text, places in cells:
        for place in map(int, places.split()):
            value, file, key = origins["numbers"][place]
            assert value == number_at(files[origins["files"][file][0]], key), (text, key)


def test_a_long_table_is_filtered_and_saved_and_a_figure_is_saved(open_page):
    tab = open_page()
    rows = "[...document.querySelector('#evidence table').tBodies[0].rows].filter(r => !r.hidden).length"
    every = tab.evaluate(rows)
    tab.locator("#evidence .tools input").fill("FP4 again")
    assert 0 < tab.evaluate(rows) < every
    with tab.expect_download() as download:
        tab.locator("#evidence .tools button").first.click()
    table = list(csv.reader(download.value.path().read_text(encoding="utf-8").splitlines()))
    assert len(table) == every + 1 and len({len(row) for row in table}) == 1
    for kind, begins in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        with tab.expect_download() as download:
            tab.locator("#cost .panel .tools button", has_text=kind).first.click()
        saved = download.value.path().read_bytes()
        assert saved.startswith(begins) and b"var(--" not in saved


def test_a_saved_figure_of_the_answer_has_the_page_s_colors(open_page):
    tab = open_page()
    with tab.expect_download() as download:
        tab.locator("#answer-figure .panel .tools button", has_text="SVG").first.click()
    saved = download.value.path().read_text(encoding="utf-8")
    tab.set_content(saved)
    looks = tab.evaluate(
        "['.band', '.grid', '.reference', '.point'].map(c => getComputedStyle(document.querySelector(c)))"
        ".map(s => [s.fill, s.stroke])"
    )
    assert all(fill != "rgb(0, 0, 0)" for fill, _ in looks)  # which is what a path has without rules
    assert looks[1][0] == "none" and looks[2][1] != "none"


@pytest.mark.parametrize(("page", "longest"), [("folder", 19_000), ("crowded", 25_000)])
def test_the_page_is_short(open_page, request, page, longest):
    file = request.getfixturevalue(page)
    file = file / "index.html" if file.is_dir() else file
    tab = open_page(width=1440, script=False, file=file)
    assert tab.evaluate("document.documentElement.scrollHeight") < longest
    assert tab.evaluate("document.querySelectorAll('*').length") < 8_000
    assert file.stat().st_size < 1_500_000


def test_a_mark_opens_the_panel_of_its_numbers(open_page):
    tab = open_page()
    tab.locator("#evidence a.mark").first.click()
    assert tab.locator("#source-evidence").is_visible()


def test_it_is_complete_without_a_script(open_page, folder):
    tab = open_page(script=False)
    assert tab.locator("form.filters").is_hidden() and tab.locator("form.budget").is_hidden()
    assert tab.locator("th button, .tools").count() == 0 and tab.locator(".hint").is_hidden()
    assert tab.locator("#answers article").count() == 3
    assert tab.locator("table").count() == (folder / "index.html").read_text(encoding="utf-8").count("<table")


def test_no_figure_is_cut_in_print(open_page, tmp_path):
    tab = open_page(width=720)
    tab.emulate_media(media="print")
    heights = tab.evaluate(
        "[...document.querySelectorAll('.panel')].map(p => p.getBoundingClientRect().height)"
    )
    assert len(heights) > 15 and max(heights) <= A4_HEIGHT
    breaks = tab.evaluate(
        "[...document.querySelectorAll('.panel')].map(p => getComputedStyle(p).breakInside)"
    )
    assert set(breaks) == {"avoid"}
    tab.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").stat().st_size > 50_000
