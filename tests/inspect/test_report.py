"""The page: self-contained, true to the facts, safe, and as wide as a phone in a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from stillhouse.extract.inspect import facts, report

NASTY = [
    f"<SCRIPT>X</SCRIPT> {t}" for t in ("THE BANK & CO", "A BANK", "BANK RIVERSIDE", "RIVERSIDE BANK", "RIVERSIDE")
] * 3


@pytest.fixture(scope="module")
def page(known, tmp_path_factory) -> str:
    store = known.build(tmp_path_factory.mktemp("nasty"), NASTY)
    return report.render(report.collect(store, tokens=30))


def test_the_page_needs_nothing_else(page):
    assert page.startswith("<!doctype html>")
    assert not re.search(r"https?://|<script|<link|src=|@import|url\(", page)
    assert "&lt;script&gt;x&lt;/script&gt;" in page


def test_the_page_shows_what_the_commands_say(page, known):
    assert ">15<" in page and "structure verified" in page and "complete" in page
    assert page.count("<circle") == 2 * 9  # "riverside" in two contexts, the one word that is long and frequent enough
    assert "riverside <span" in page
    assert len(re.findall(r'style="background: rgba', page)) == 36  # six views


def test_words_can_be_asked_for(store, tmp_path, stillhouse):
    path = tmp_path / "store.html"
    done = stillhouse("inspect", "report", store.path, path, "--word", "bank", "--word", "absent")
    assert done.code == 0 and done.out.strip() == str(path)
    text = path.read_text(encoding="utf-8")
    assert "4 of 4 occurrences" in text and "absent" not in text
    assert stillhouse("inspect", "report", store.path, path).code == 2
    assert stillhouse("inspect", "report", store.path, tmp_path / "store.pdf").code == 2


def test_a_store_in_the_making_has_a_page(partial, tmp_path):
    text = report.render(report.collect(partial, tokens=100))
    share = 100 * facts.view_facts(partial, partial.planned_views)[-1].tokens / 9000
    assert "extraction not finished" in text and 0 < share < 100 and f"{share:.1f} %" in text


def test_a_store_of_which_nothing_is_there_has_a_page(known, tmp_path):
    store = known.build(tmp_path, ["A BANK"], stop_after=0)
    text = report.render(report.collect(store))
    assert "nothing yet" in text and "0 %" in text


@pytest.mark.parametrize("width", [500, 1200])  # a browser's window is no narrower than 500
def test_in_a_browser_nothing_is_wider_than_the_window(page, tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium here")
    file = tmp_path / "page.html"
    measure = "<script>document.title = document.documentElement.scrollWidth + ' of ' + window.innerWidth</script>"
    file.write_text(page.replace("</body>", measure + "</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    if found is None:
        pytest.skip(f"the browser does not run here: {done.stderr[-200:]}")
    assert int(found[1]) <= int(found[2]) == width
