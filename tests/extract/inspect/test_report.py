"""The report page: it loads nothing, shows the facts, escapes text, and fits a phone in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from stillhouse.extract.inspect.facts import store as facts
from stillhouse.extract.inspect.show import page as report

NASTY = [
    f"<SCRIPT>X</SCRIPT> {t}" for t in ("THE BANK & CO", "A BANK", "BANK RIVERSIDE", "RIVERSIDE BANK", "RIVERSIDE")
] * 3


@pytest.fixture(scope="module")
def page(known, tmp_path_factory) -> str:
    store = known.build(tmp_path_factory.mktemp("nasty"), NASTY)
    return report.render(report.collect(store, tokens=30))


def test_the_page_loads_nothing_else(page):
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


def test_an_unfinished_store_has_a_page(partial, tmp_path):
    text = report.render(report.collect(partial, tokens=100))
    share = 100 * facts.view_facts(partial, partial.planned_views)[-1].tokens / 9000
    assert "extraction not finished" in text and 0 < share < 100 and f"{share:.1f} %" in text


def test_a_page_of_a_large_store_is_made_from_samples(known, tmp_path, monkeypatch):
    store = known.build(tmp_path, NASTY, contexts=("alone", "both:8", "past:4"))
    for name, most in (("MOST_COMPARED", 6), ("MOST_MEASURED", 3), ("MOST_SHOWN", 2), ("COLOURS", 2), ("SEARCHED", 30)):
        monkeypatch.setattr(report, name, most)
    found = report.collect(store, tokens=30)
    text = report.render(found)
    [similarity] = found.similarities
    assert len(similarity.views) == 6 and "6 of 9 views" in text
    assert len(found.statistics) == 3 and text.count("not measured") == 6
    assert {len(t.views) for u in found.utterances for t in u.teachers} == {2}
    assert [len(m.views) for m in found.maps] == [2] and found.maps[0].found < 9
    assert found.neighbours[0].searched < 40 and "--full" in text
    full = report.collect(store, tokens=30, full=True)
    assert (len(full.similarities[0].views), len(full.statistics), full.maps[0].found) == (9, 9, 9)
    assert full.neighbours[0].searched > 40 and "not measured" not in report.render(full)


def test_a_store_without_states_has_a_page(known, tmp_path):
    store = known.build(tmp_path, ["A BANK"], stop_after=0)
    text = report.render(report.collect(store))
    assert "nothing yet" in text and "0 %" in text


@pytest.fixture(scope="module")
def broad(known, tmp_path_factory) -> str:
    """The page of a store with many views and with words that are wider than a window."""
    texts = [f"RIVERSIDE {'X' * 250}", "RIVERSIDE BANK"] * 3
    contexts = ("alone", "both:8", "past:8", "future:8")
    store = known.build(tmp_path_factory.mktemp("broad"), texts, layers=(0, 1, 2, 3, 4), contexts=contexts)
    return report.render(report.collect(store, tokens=30))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_nothing_is_wider_than_a_phone_or_a_desk(page, broad, tmp_path, scheme):
    """In frames 390 and 1280 wide: a browser's own window is no narrower than 500."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium here")
    frames = "".join(
        f'<iframe width="{width + 4}" height="900" srcdoc="{html.escape(text)}"></iframe>'
        for width in (390, 1280)
        for text in (page, broad)
    )
    measure = """<script>
    onload = () => document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(f => {
      const d = f.contentDocument, ink = e => getComputedStyle(d.querySelector(e));
      return [d.documentElement.scrollWidth, f.clientWidth, ink("body").backgroundColor, ink("h1").color]}))</script>"""
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><meta charset=utf-8><title></title>{frames}{measure}", encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--disable-quic", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--dump-dom"]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\[.*?)</title>", done.stdout)
    if found is None:
        pytest.skip(f"the browser does not run here: {done.stderr[-200:]}")
    measured = json.loads(html.unescape(found[1]))
    assert [round(width, -1) for _, width, *_ in measured] == [390, 390, 1280, 1280]
    for scrolled, width, paper, ink in measured:
        assert scrolled <= width
        light, dark = sorted((sum(map(int, re.findall(r"\d+", c)[:3])) for c in (paper, ink)), reverse=True)
        assert light > 600 and dark < 150
        assert (sum(map(int, re.findall(r"\d+", paper)[:3])) == light) is (scheme == "light")


def test_ids_are_not_broken_across_lines(known, tmp_path):
    """A line may break behind each hyphen of an id, unless the page forbids it."""
    store = known.build(tmp_path, ["one two riverside"] * 9, contexts=("alone",))
    found = report.collect(store, words=["riverside"])
    text = report.render(found)
    for name in (found.utterances[0].utterance, found.neighbours[0].utterance):
        assert f'<span class="whole">{name}</span>' in text
    assert re.search(r"\.whole \{[^}]*white-space: nowrap", text)
    assert not re.search(r"\.near td\.soft \{[^}]*overflow-wrap: anywhere", text)
