"""The site: every public name has its page and an example that runs, every command is one, and the pages build."""

import contextlib
import functools
import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import trpo_jax
from trpo_jax.cli.arguments import make_parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "pages").rglob("*.md"))
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*/README.md"))
# Pages outside the site, whose strict build checks its own.
OUTSIDE = [ROOT / "README.md", ROOT / "experiments" / "README.md", *EXPERIMENTS]
OUTSIDE += sorted((ROOT / "experiments").glob("*/notes.md"))
# What needs another library is shown, and not run: `<!-- not run: needs stable-baselines3 -->` stands before it.
BLOCK = re.compile(r"(?P<not_run><!-- not run: [^\n]+ -->\n+)?^```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)


def name_of(path):
    return str(path.relative_to(DOCS))


def blocks(page):
    return [found["code"] for found in BLOCK.finditer(page.read_text()) if not found["not_run"]]


@pytest.fixture(scope="module")
def shown():
    """All Python that runs: the blocks of the pages, and the examples."""
    return "\n".join([*(code for page in PAGES for code in blocks(page)), *(file.read_text() for file in EXAMPLES)])


@pytest.mark.parametrize("name", trpo_jax.__all__)
def test_every_public_name_has_a_page_and_an_example(name, shown):
    assert any(f"\n::: trpo_jax.{name}\n" in f"\n{page.read_text()}\n" for page in PAGES), (
        "no page has `::: trpo_jax.…`"
    )
    assert re.search(rf"\b{name}\b", shown), "no example uses it"


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks(page)))
    run(script, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_example_runs_and_prints(example, tmp_path):
    assert run(example, tmp_path)
    assert len(example.read_text().splitlines()) <= 80, "short enough to copy"


@pytest.mark.long
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook_runs(notebook, tmp_path):
    cells = json.loads(notebook.read_text())["cells"]
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    run(script, tmp_path)


def run(script, folder):
    """What a script prints; each has a process of its own, as its reader has."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    result = subprocess.run(
        [sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def commands(page):
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("trpo-jax "):
                yield line


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=name_of)
def test_commands_of_a_page_are_commands(page):
    for line in commands(page):
        arguments = shlex.split(line, comments=True)[1:]
        if "--help" not in arguments:
            with contextlib.redirect_stderr(None):
                make_parser().parse_args(arguments)


def name_in_repository(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", EXPERIMENTS, ids=name_in_repository)
def test_an_experiment_opens_with_its_result_and_its_command(page):
    opening = page.read_text().partition("\n## ")[0]
    result, command = re.search(r"^(\||!\[)", opening, re.MULTILINE), opening.find("```bash\npython experiments/")
    assert result and result.start() < command


@pytest.mark.parametrize("page", OUTSIDE, ids=name_in_repository)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), target
        if anchor:
            headings = re.findall(
                r"^#+ (.*)", (place / "README.md" if place.is_dir() else place).read_text(), re.MULTILINE
            )
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_of_a_page_fits_into_its_column(page):
    lines = "\n".join(re.findall(r"^```\w+\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)).splitlines()
    assert not [line for line in lines if len(line) > 100], "a window of 1280 pixels shows 100 characters"


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=name_in_repository)
def test_pages_are_written_and_avoid_phrases(page):
    text = page.read_text()
    assert "To be written" not in text
    assert not re.search(r"\b(so often|a seed each|once a second|rows an agent|per each)\b", text)
    things = r"(`|\b(process|library|setting|message|page|matrix|sweep|it|table|figure|curve|report)\b)"
    assert not re.search(things + r" (says|asks|knows|wants|refuses|tells|looks at)\b", text)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    pytest.importorskip("mkdocs", reason="needs the extra docs: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    arguments = ["build", "--strict", "--config-file", str(DOCS / "mkdocs.yml"), "--site-dir", str(folder)]
    result = subprocess.run([sys.executable, "-m", "mkdocs", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_the_site_fetches_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    elsewhere = re.compile(r"""<(?:script|img|iframe)[^>]+src=["']?(?:https?:)?//|<link[^>]+stylesheet[^>]+//""")
    assert not [page for page in pages if elsewhere.search(page.read_text())]


def test_the_site_opens_in_a_browser_and_its_search_finds(site, browser):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra docs: pip install '.[docs]'")
    handler = functools.partial(QuietHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, playwright.sync_playwright() as started:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        # As root Chromium starts without its sandbox only; it is not to look for updates of its own.
        chromium = started.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--disable-background-networking", "--disable-quic"]
        )
        page, asked, failed = chromium.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfailed", lambda request: failed.append(request.url))
        for name, title in (("index.html", "trpo_jax"), ("steps/trpo-update.html", "trpo_update")):
            page.goto(f"{host}/{name}")
            assert title in page.inner_text("main")
            code = "[...document.querySelectorAll('article > .highlight code')]"
            assert not page.evaluate(f"{code}.some(block => block.scrollWidth > block.clientWidth)")
            page.set_viewport_size({"width": 400, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") == 400, "a phone need not scroll sideways"
            page.set_viewport_size({"width": 1280, "height": 800})
        page.keyboard.press("s")
        page.keyboard.type("conjugate gradient")
        page.wait_for_selector(".md-search-result__link")
        assert "onjugate" in page.inner_text(".md-search-result__list")
        chromium.close()
        server.shutdown()
    assert not failed and len(asked) > 5
    assert not [url for url in asked if not url.startswith((host, "data:", "blob:"))]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves the site, and keeps no log."""

    def log_message(self, *_):
        pass
