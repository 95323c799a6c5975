"""Every page in a real browser, from the file system: what it loads, how it looks at two widths, what keys and clicks do."""

import os
import shutil
from pathlib import Path

import pytest
from example_pages import PAGES

pytestmark = pytest.mark.browser

WITH_IMAGES = ("sweep", "story", "scan", "inversion")
WITH_SORTED_TABLES = ("sweep", "distillation", "run", "selection", "lab")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
INSTALL = (
    "apt-get install chromium (launch/test.sh does so as root), and pip install playwright; or leave them out: -m 'not browser'"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in PAGES.items()}


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail(f"these tests need playwright: {INSTALL}")
    if not (chromium := shutil.which("chromium")):
        pytest.fail(f"these tests need chromium: {INSTALL}")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        yield browser
        browser.close()


def watched(browser, wrong: list[str], **options):
    """A new tab that notes what is asked of a network, and what goes wrong."""
    context = browser.new_context(**{"viewport": DESK, **options})
    context.set_default_timeout(5000)
    context.on("request", lambda r: r.url.startswith(("file:", "data:")) or wrong.append(r.url))
    # what is still being read when a test goes on to another page is broken off; a file that is not there is another failure
    context.on("requestfailed", lambda r: "ERR_ABORTED" in (r.failure or "") or wrong.append(r.url))
    context.on("console", lambda m: m.type == "error" and wrong.append(m.text))
    context.on("weberror", lambda e: wrong.append(str(e.error)))
    return context.new_page()


@pytest.fixture(scope="module")
def shared(browser):
    """One tab for all tests that ask for nothing special, as each new one is a process; and what went wrong in it."""
    wrong: list[str] = []
    return watched(browser, wrong), wrong


@pytest.fixture
def open_page(browser, pages, shared):
    """Opens a page by name; afterwards nothing may have been asked of a network, and nothing may have gone wrong."""
    (tab, wrong), own = shared, []

    def opened(name: str, **options):
        page = tab
        if options:
            own.append(watched(browser, wrong, **options))
            page = own[-1]
        else:
            page.goto("about:blank")
            page.set_viewport_size(DESK)
            page.emulate_media(color_scheme="null")
        page.goto(pages[name].as_uri())
        return page

    yield opened
    for page in own:
        page.context.close()
    found = [*wrong]
    wrong.clear()
    assert found == []


def viewer_shows(page) -> str:
    """The image that is seen in the viewer."""
    assert page.locator(".viewer").is_visible()
    return page.locator(".stage img:not([hidden])").evaluate("image => image.src")


def enlarge(page, nth: int = 0) -> str:
    """Click on an image; returns what it links to."""
    shot = page.locator("a.shot:visible").nth(nth)
    url = shot.evaluate("shot => shot.href")
    shot.click()
    page.wait_for_function("document.querySelector('.stage .b').complete")
    return url


@pytest.mark.parametrize("name", PAGES)
def test_it_opens_and_fits(open_page, name):
    """No network, no error, nothing wider than the screen; every image has an alternative, every plot a name."""
    page = open_page(name)
    for viewport in (DESK, PHONE):
        page.set_viewport_size(viewport)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.evaluate("[...document.images].filter(i => !i.closest('dialog')).every(i => i.alt)")
    assert page.evaluate("[...document.querySelectorAll('svg')].every(s => s.role === 'img' && s.getAttribute('aria-label'))")
    page.evaluate("for (const image of document.images) image.loading = 'eager'")
    page.wait_for_function("[...document.images].every(i => i.complete)")
    assert page.evaluate("[...document.images].filter(i => i.src && !i.naturalWidth).map(i => i.src)") == []


CONTRAST = """() => {
  const probe = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (colour, under) => {
    probe.fillStyle = under; probe.fillRect(0, 0, 1, 1);
    probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .reduce((sum, v, i) => sum + [.2126, .7152, .0722][i] * (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4), 0);
  const paper = getComputedStyle(document.body).backgroundColor, found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || element.closest("script, dialog") || !element.checkVisibility()) continue;
    let behind = element;
    const clear = (e) => /, 0\\)$|transparent/.test(getComputedStyle(e).backgroundColor);
    while (behind !== document.body && clear(behind)) behind = behind.parentElement;
    const style = getComputedStyle(element), back = getComputedStyle(behind).backgroundColor;
    const ink = rgb(element.closest("svg") ? style.fill : style.color, back);
    const [a, b] = [ink, rgb(back, paper)].map(light).sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), element.tagName + " " + element.textContent.trim().slice(0, 30)]);
  }
  return found;
}"""


@pytest.mark.parametrize("name", PAGES)
def test_text_is_legible(open_page, name):
    """WCAG 1.4.3: 4.5 to 1 between every text of the page and what is behind it; dark is dark."""
    page = open_page(name)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = page.evaluate(CONTRAST)
        assert len(found) > 20 and min(found)[0] >= 4.5, sorted(found)[:3]
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) < 3 * 128) == (scheme == "dark")


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_click_and_arrows(open_page, name):
    """A click enlarges the image itself, arrows walk, Escape closes, and the focus is where it was seen last."""
    page = open_page(name)
    first = enlarge(page)
    assert viewer_shows(page) == first
    widths = page.locator("a.shot img").first.get_attribute("width"), page.locator(".stage .b").evaluate("i => i.naturalWidth")
    assert int(widths[0]) == widths[1]
    page.keyboard.press("ArrowRight")
    second = viewer_shows(page)
    assert second == page.locator("a.shot:visible").nth(1).evaluate("shot => shot.href") != first
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert viewer_shows(page) == second
    page.keyboard.press("?")
    assert page.get_by_text("pin this image as A").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator(".viewer").is_visible()
    page.wait_for_function("url => document.activeElement.href === url", arg=second)
    page.keyboard.press("Enter")
    assert viewer_shows(page) == second


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_two_images_in_one_place(open_page, name):
    """A is pinned by key, the viewer closed, another image opened; B flips between both without moving anything."""
    page = open_page(name)
    a = enlarge(page)
    assert page.get_by_role("button", name="Flip to A").is_disabled()
    page.keyboard.press("a")
    page.get_by_role("button", name="Close").click()
    assert page.locator("a.shot.pinned").evaluate("shot => shot.href") == a
    b = enlarge(page, 3)
    place = page.locator(".stage").bounding_box()
    assert (viewer_shows(page), page.locator(".badge").inner_text()) == (b, "B")
    page.keyboard.press("b")
    assert (viewer_shows(page), page.locator(".badge").inner_text()) == (a, "A")
    assert page.locator(".viewer .where").inner_text().startswith("A: ")
    assert page.locator(".stage").bounding_box() == place and page.locator(".stage .a").bounding_box() == place
    page.keyboard.press("b")
    assert viewer_shows(page) == b and page.locator(".viewer .where").inner_text().startswith("B: ")
    page.get_by_role("button", name="Flip to A").click()
    assert viewer_shows(page) == a
    page.keyboard.press("Escape")  # lets A go
    assert viewer_shows(page) == b and not page.locator(".badge").is_visible() and not page.locator("a.shot.pinned").count()
    page.keyboard.press("b")
    assert viewer_shows(page) == b
    page.keyboard.press("Escape")
    assert not page.locator(".viewer").is_visible()


def test_a_held_key_shows_a_for_as_long(open_page):
    page = open_page("sweep")
    a = enlarge(page)
    page.keyboard.press("a")
    page.keyboard.press("ArrowRight")
    b = viewer_shows(page)
    page.keyboard.down("b")
    page.wait_for_timeout(450)
    assert viewer_shows(page) == a
    page.keyboard.up("b")
    assert viewer_shows(page) == b


@pytest.mark.slow
def test_blinking_starts_only_where_motion_is_wanted(open_page):
    """It flips by itself, ends with Escape, and is not offered to whom asked for less motion."""
    page = open_page("story")
    a = enlarge(page)
    page.keyboard.press("a")
    page.keyboard.press("ArrowRight")
    b = viewer_shows(page)
    page.get_by_role("button", name="Blink").click()
    for src in (a, b, a):
        page.wait_for_function("src => document.querySelector('.stage img:not([hidden])').src === src", arg=src)
    page.keyboard.press("Escape")
    assert viewer_shows(page) == b
    page.wait_for_timeout(900)
    assert viewer_shows(page) == b
    calm = open_page("story", reduced_motion="reduce")
    enlarge(calm)
    assert (
        not calm.get_by_role("button", name="Blink").is_visible() and calm.get_by_role("button", name="Pin as A").is_visible()
    )


def test_the_next_candidate(open_page):
    """C goes to the same prompt and scale of the next candidate, whose grid is then the one on the page."""
    page = open_page("sweep")
    first = enlarge(page)
    page.keyboard.press("c")
    assert viewer_shows(page) != first
    assert page.locator(".viewer .where").inner_text().startswith("student/#1 %, CFG 1,")
    page.keyboard.press("Escape")
    assert page.get_by_role("radio", name="student/#1 %").is_checked()
    page.wait_for_function("document.activeElement.matches('a.shot') && document.activeElement.checkVisibility()")
    assert not page.get_by_role("radio", name="teacher").is_checked()


def column(table, n: int) -> list[str]:
    return table.locator(f"tbody tr td:nth-child({n})").evaluate_all("cells => cells.map(c => c.dataset.value)")


@pytest.mark.parametrize("name", WITH_SORTED_TABLES)
def test_tables_sort_by_click_and_by_key(open_page, name):
    page = open_page(name)
    table = page.locator("table:has(button[data-sort])").first
    heads = table.locator("button[data-sort]")
    kinds = heads.evaluate_all("buttons => buttons.map(b => b.dataset.sort)")
    number = kinds.index("number")
    heads.nth(number).click()
    values = [float(v) for v in column(table, number + 1)]
    assert values == sorted(values, reverse=True)
    assert table.locator("th").nth(number).get_attribute("aria-sort") == "descending"
    heads.nth(number).focus()
    page.keyboard.press("Enter")
    assert [float(v) for v in column(table, number + 1)] == sorted(values)
    page.keyboard.press("Shift+Tab")
    if number:
        page.keyboard.press("Space")
        at = number - 1
        assert table.locator("th").nth(at).get_attribute("aria-sort")
        assert table.locator("th").nth(number).get_attribute("aria-sort") is None


def shown(table) -> list[list[str]]:
    script = "t => [...t.rows].map(r => [...r.cells].map(c => c.innerText.replace(/\\s+/g, ' ').trim()))"
    return table.evaluate(script)


@pytest.mark.parametrize("clipboard", [True, False], ids=["clipboard", "without"])
@pytest.mark.parametrize("name", ["run", "sweep", "distillation"])
def test_tables_can_be_copied(open_page, name, clipboard):
    """Also where a page from the file system is refused the clipboard: then by selecting."""
    page = open_page(name, permissions=["clipboard-read", "clipboard-write"])
    if not clipboard:
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('refused')); }")
    table = page.locator("table.numbers:visible").last
    button = page.get_by_role("button", name="Copy table").last
    button.click()
    page.get_by_role("button", name="Copied").wait_for()
    text = page.evaluate("navigator.clipboard.readText()")
    assert [line.split("\t") for line in text.splitlines()] == shown(table)


def test_spans_of_a_copied_table_become_empty_fields(open_page):
    page = open_page("influence", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy table").last.click()
    page.get_by_role("button", name="Copied").wait_for()
    lines = [line.split("\t") for line in page.evaluate("navigator.clipboard.readText()").split("\n")[:-1]]
    assert {len(line) for line in lines} == {3 + 2 * 8} and len(lines) == 2 + 3
    assert lines[0][:5] == ["block", "influence", "factor", "image", ""] and lines[1][:4] == ["", "", "", "1"]


@pytest.mark.parametrize("name", ["sweep", "story", "distillation", "influence", "run"])
def test_every_plot_has_its_numbers(open_page, name):
    """A list under each plot, opened by key, with a row per point."""
    page = open_page(name)
    for figure in page.locator("figure:visible").all():
        figure.locator("summary").focus()
        page.keyboard.press("Enter")
        rows = figure.locator("table.numbers tbody tr").count()
        points = figure.locator(".point, rect > title").count()
        assert figure.locator("table.numbers").is_visible() and rows == points > 0


@pytest.mark.parametrize("name", PAGES)
def test_the_keyboard_reaches_every_control(open_page, name):
    """WCAG 2.1.1 and 2.4.7: Tab comes to each button, link and choice that is seen, and the focus can be seen there."""
    page = open_page(name)
    wanted = page.evaluate(
        """() => { let n = 0; for (const e of document.querySelectorAll("a, button, summary, input:checked, [tabindex='0']"))
        if (e.checkVisibility() && !e.closest("dialog")) e.dataset.stop = n++; return n; }"""
    )
    reached, dull = set(), []
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        stop, visible = page.evaluate(
            """() => { const e = document.activeElement, seen = e.matches("input") ? e.nextElementSibling : e;
            return [e.dataset.stop, e === document.body || getComputedStyle(seen).outlineStyle !== "none"]; }"""
        )
        reached.add(stop)
        dull += [] if visible else [stop]
    assert wanted > 0 and reached >= {str(n) for n in range(wanted)} and dull == []
