"""What only a real browser shows: a derivation notebook run and moved in JupyterLab, the retrieval
explorer, the built site.

`make test-browser` runs this file with Debian's chromium; pytest alone does not collect it (its
name does not begin with test_).
No page may ask anything of another machine: every request that leaves is cut off and remembered.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'"
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: apt-get install chromium"
)
SWITCHES = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
]
# ms; a notebook runs in one minute on an idle core, and this machine may be busy
PATIENCE = 600_000


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A page of 1280 × 900; `page.left` lists requests that wanted to leave this machine (none got
    out).
    """
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.left, page.problems = [], []

    def guard(route):
        url = urlparse(route.request.url)
        if url.scheme in ("data", "blob", "file", "about") or url.hostname in (
            "127.0.0.1", "localhost",
        ):
            route.continue_()
        else:
            page.left.append(route.request.url)
            route.abort()

    page.route("**/*", guard)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    yield page
    page.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    "A copy of the files that git tracks: what a browser saves there changes nothing here."
    folder = tmp_path_factory.mktemp("project")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True,
        text=True, check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def lab(project, tmp_path_factory):
    "The address of a JupyterLab on the copy."
    home, port = tmp_path_factory.mktemp("home"), free_port()
    environment = os.environ | {
        "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": str(project),
        # two threads that wait for each other burn a busy machine's time
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
    }
    (home / "settings" / "@jupyterlab" / "apputils-extension").mkdir(parents=True)
    # as a reader may set it: no question about news
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (
        home
        / "settings"
        / "@jupyterlab"
        / "apputils-extension"
        / "notification.jupyterlab-settings"
    ).write_text(json.dumps(quiet))
    options = {
        "ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.port_retries": 0,
        "ServerApp.root_dir": project, "ServerApp.disable_check_xsrf": True,
        "IdentityProvider.token": "", "LabApp.expose_app_in_browser": True,
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
        *(f"--{k}={v}" for k, v in options.items()),
    ]
    with open(home / "log", "wb") as log:
        server = subprocess.Popen(
            command, cwd=project, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5)
                    break
                except OSError:
                    assert server.poll() is None, (home / "log").read_text()
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, 15)
            server.wait(30)


def open_notebook(page, lab: str, path: str) -> None:
    """In a workspace of its own: JupyterLab restores the tabs of the last visit, and one of them
    would be in front for a while.
    """
    page.goto(f"{lab}/lab/workspaces/{Path(path).parent.name}/tree/{path}", timeout=PATIENCE)
    page.wait_for_function(
        f"({SHOWN})() === {json.dumps(path)} && ({KERNEL})() === 'idle'", timeout=PATIENCE
    )


# questions to JupyterLab's own objects; everything that is done is done by mouse and keyboard
SHOWN = "() => window.jupyterapp?.shell.currentWidget?.context?.path"
KERNEL = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"
CELLS = """() => window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code').map(c => ({
    source: c.model.sharedModel.getSource(), count: c.model.executionCount,
    error: c.model.outputs.toJSON().filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue).join() }))"""
SHOW = """words => { const content = window.jupyterapp.shell.currentWidget.content;
    const index = content.widgets.findLastIndex(c => c.model.type === 'code' && c.model.sharedModel.getSource().includes(words));
    content.activeCellIndex = index; return content.scrollToItem(index, 'start').then(() => index); }"""


def run_all(page) -> list[dict]:
    "Run → Run All Cells, as a reader does; returns the code cells when the last one has run."
    page.get_by_role("menubar").get_by_text("Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    done = (
        f"({KERNEL})() === 'idle' && ({CELLS})().filter(c => c.source.trim()).every(c => c.count ||"
        " c.error)"
    )
    deadline = time.time() + PATIENCE / 1000
    while not page.evaluate(done):
        failed = [c["error"] for c in page.evaluate(f"({CELLS})()") if c["error"]]
        assert not failed, failed
        if time.time() > deadline:
            waiting = [c["source"][:80] for c in page.evaluate(f"({CELLS})()") if not c["count"]]
            status = page.evaluate(f"({KERNEL})()")
            raise AssertionError(f"not at its end; kernel {status}, cells not run: {waiting}")
        page.wait_for_timeout(1000)
    return page.evaluate(f"({CELLS})()")


def move_a_slider(page, slider) -> None:
    "A click near its end: another picture is shown, one at a time, under its own label."
    shown = slider.locator("img:not([hidden])")
    handle = slider.locator("input[type=range]")
    before, value = shown.get_attribute("src"), int(handle.input_value())
    handle.scroll_into_view_if_needed()
    place = handle.bounding_box()
    handle.click(position={"x": 0.8 * place["width"], "y": place["height"] / 2})
    assert int(handle.input_value()) > value
    assert shown.count() == 1 and shown.get_attribute("src") != before
    assert slider.locator("output").text_content() == shown.get_attribute("alt")


def test_jupyterlab_runs_a_derivation_and_a_slider_changes_the_picture(page, lab):
    open_notebook(page, lab, "nbs/5_papers/4_ianet/1_derive.ipynb")
    cells = run_all(page)
    assert len(cells) > 30 and not [c["error"] for c in cells if c["error"]]
    page.evaluate(f"({SHOW})('pictures.slides(')")
    slider = page.locator(".jp-CodeCell .reid-slides").last
    slider.wait_for(timeout=PATIENCE)
    move_a_slider(page, slider)
    assert not page.left, f"JupyterLab asked other machines: {page.left}"


def picked(page, name: str):
    "A part of the explorer by its class."
    return page.locator(f".reid-{name}").last


PHOTOGRAPH = ".reid-ranking img"


def settled(page, before: str | None) -> str:
    """Waits until the query is another photograph than `before`, and the explorer says what it
    asks; returns the address of the query's photograph and the words of its answers.
    """
    for _ in range(int(PATIENCE / 500)):
        src = page.locator(PHOTOGRAPH).last.get_attribute("src")
        words = picked(page, "status").inner_text()
        shown = f"{src} {picked(page, 'ranking').inner_text()}"
        if src and shown != before and "working" not in words:
            return shown
        page.wait_for_timeout(500)
    raise AssertionError(f"the ranking did not change: {picked(page, 'status').inner_text()}")


def says(page, words: str) -> str:
    """Waits for the pair's picture whose text alternative holds `words`, below the same words on
    the screen; returns its address.
    """
    image = page.locator(f'.reid-pair img[alt*="{words}"]').last
    image.wait_for(timeout=PATIENCE)
    assert words in picked(page, "words").inner_text()
    return image.get_attribute("src")


def test_the_explorer_opens_from_its_one_cell_asks_and_compares(page, lab):
    open_notebook(page, lab, "nbs/6_comparison/05_explorer.ipynb")
    page.evaluate(f"({SHOW})('lab.explore()')")
    page.locator(".jp-CodeCell", has_text="lab.explore()").last.locator(".cm-content").click()
    began = time.time()
    page.keyboard.press("Control+Enter")  # this cell and no other
    page.locator(PHOTOGRAPH).last.wait_for(timeout=PATIENCE)
    first = settled(page, None)
    print(f"the first list after {time.time() - began:.1f} s")
    assert not [c["error"] for c in page.evaluate(f"({CELLS})()") if c["error"]]
    assert "ranks no method" in picked(page, "status").inner_text()
    page.get_by_role("button", name="Next wrong answer").last.click()
    second = settled(page, first)
    assert "wrong" in picked(page, "status").inner_text().lower()
    number = picked(page, "number").locator("input")
    number.fill("7")
    number.press("Enter")
    third = settled(page, second)
    assert picked(page, "status").inner_text().startswith("Query 7")
    answers = picked(page, "ranking").get_by_role("button")
    pair, button = says(page, "Query 7 and"), answers.nth(3)
    size = button.bounding_box()
    assert 60 < size["width"] < size["height"] < 300, size
    assert "person" in button.inner_text() and "cam" in button.inner_text()
    button.click()
    distance = button.inner_text().split()[2]
    assert says(page, f"distance {distance}") != pair, "another answer, the same pair"
    picked(page, "checkpoint").locator("select").select_option(index=1)
    assert settled(page, third) != third
    assert picked(page, "status").inner_text().startswith("Query 7"), "the query is kept"
    page.get_by_role("button", name="All networks").last.click()
    for _ in range(int(PATIENCE / 500)):
        if picked(page, "rows").locator("p b").count() >= 7:
            break
        page.wait_for_timeout(500)
    assert picked(page, "rows").locator("img").count() >= 6 * 7
    assert not page.left, f"the explorer asked other machines: {page.left}"


@pytest.fixture(scope="module")
def site() -> Path:
    "The built site; built here when `make test` has not."
    built = ROOT / "docs" / "_build" / "html"
    if not (built / "index.html").is_file():
        done = subprocess.run(
            [sys.executable, "ci/docs.py", "--jobs", "2"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return built


PAGES = (
    "index.html", "nbs/index.html", "nbs/notation.html", "nbs/5_papers/4_ianet/1_derive.html",
    "nbs/6_comparison/06_compare.html",
)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_the_site_is_whole_and_asks_nobody(page, site, name):
    page.goto((site / name).as_uri(), timeout=PATIENCE)
    written = "[...document.querySelectorAll('.math')].length"
    done = (
        "[...document.querySelectorAll('.math')].every(m => m.querySelector('mjx-container') &&"
        " !m.querySelector('mjx-merror'))"
    )
    page.wait_for_function(f"{written} === 0 || {done}", timeout=PATIENCE)
    if "derive" in name or "notation" in name:
        assert page.evaluate(written) > 50, "equations are missing"
    assert (
        page.evaluate("document.documentElement.scrollWidth") <= 1280
    ), "the page scrolls sideways at 1280 pixels"
    bare = (
        "[...document.querySelectorAll('article img')].filter(i => !i.alt || i.alt.length <"
        " 8).map(i => i.src)"
    )
    assert not page.evaluate(bare), "pictures without a text in their place"
    assert not page.left and not page.problems, (page.left, page.problems)


def test_a_slider_of_the_site_moves_without_python(page, site):
    page.goto((site / "nbs/5_papers/4_ianet/1_derive.html").as_uri(), timeout=PATIENCE)
    move_a_slider(page, page.locator(".reid-slides").first)


@pytest.mark.parametrize(
    "words,found", [("co-attention", "2_dcc"), ("mAP", "2_scores"), ("rank-1", "2_scores")]
)
def test_the_search_of_the_site_finds_what_is_looked_for(page, site, words, found):
    page.goto((site / "index.html").as_uri(), timeout=PATIENCE)
    page.goto((site / "search.html").as_uri() + f"?q={words}", timeout=PATIENCE)
    answer = page.locator(f"#search-results li a[href*='{found}']").first
    answer.wait_for(timeout=120_000)
    first = page.locator("#search-results li a").first.get_attribute("href")
    assert found in first or words == "co-attention", f"'{first}' stands above {found}"
    assert not page.left
