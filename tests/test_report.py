"""The report: a page that stands alone, with its tables and pictures, as a real browser shows it."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from cli_runs import qgm
from qgm_ext.experiments import report
from qgm_ext.experiments.compare import compare
from qgm_ext.experiments.comparison_files import from_dict

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PLAN = {
    "title": "Small <comparison> & its report",
    "algorithms": ["dsgd", "qg_dsgdm_n", "csgd"],
    "topologies": ["ring:4"],
    "alphas": [10, 0.1],
    "lrs": [0.2],
    "seeds": 2,
    "train": {"num_train": 200, "batch": 8, "steps": 12},
    "published": [{"method": "dsgd", "topology": "ring:4", "alpha": 10, "value": 89.9, "verified": False}],
}


class Page(html.parser.HTMLParser):
    """Tables as lists of rows of texts, pictures and headings."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.pictures, self.links, self._cell = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = ""
        elif tag == "img":
            self.pictures.append(attributes)
        self.links += [value for key, value in attributes.items() if key in ("src", "href")]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._cell)
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data + " "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "comparison"
    compare(from_dict(PLAN), out, processes=1)
    report.write(out)
    return out


def check_content(page):
    scores = page.tables[0]
    assert scores[0] == ["method ", "alpha = 10 ", "alpha = 0.1 "]
    assert [row[0] for row in scores[1:]] == ["csgd ", "dsgd ", "qg_dsgdm_n "]
    assert re.match(r"\d+\.\d ± \d+\.\d ", scores[1][1])
    assert "published: 89.9 (not verified)" in scores[2][1]
    kinds = [
        "Learning curves: mlp, ring of 4, alpha 10",
        "Learning curves: mlp, ring of 4, alpha 0.1",
        "Accuracy against heterogeneity: mlp, ring of 4",
        "Consensus distance: mlp, ring of 4, alpha 10",
        "Consensus distance: mlp, ring of 4, alpha 0.1",
        "Accuracy against bytes sent: mlp, ring of 4, alpha 10",
        "Accuracy against bytes sent: mlp, ring of 4, alpha 0.1",
        "Accuracy against time: mlp, ring of 4, alpha 10",
        "Accuracy against time: mlp, ring of 4, alpha 0.1",
        "Classes of every worker: 4 workers, alpha 10, seed 0",
        "Classes of every worker: 4 workers, alpha 0.1, seed 0",
        "Topologies: ring of 4",
    ]
    assert [picture["alt"] for picture in page.pictures] == kinds


def test_the_page_has_its_tables_and_pictures_and_needs_no_network(folder):
    text = (folder / "report" / "index.html").read_text()
    page = Page(text)
    check_content(page)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|<script|@import|url\(", text)
    assert "Small &lt;comparison&gt; &amp; its report" in text
    pngs = sorted((folder / "report").glob("*.png"))
    assert len(pngs) == len(page.pictures)
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in pngs)


def pixels(path):
    from matplotlib import image

    return image.imread(path)[..., :3]


def test_the_pictures_show_something(folder):
    for path in (folder / "report").glob("*.png"):
        shown = pixels(path)
        assert min(shown.shape[:2]) > 100
        assert 0.005 < (shown.min(axis=2) < 0.9).mean() < 0.9, path.name


def browse(page, tmp_path, *options):
    # A home of its own: nothing of the caller's profile is read or left behind.
    return subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            *options,
            f"file://{page}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HOME": str(tmp_path)},
    ).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page(folder, tmp_path, width):
    page = folder / "report" / "index.html"
    shot = tmp_path / "shot.png"
    browse(page, tmp_path, f"--window-size={width},6000", f"--screenshot={shot}")
    shown = pixels(shot)
    assert shown.shape[:2] == (6000, width)
    ink = (shown.min(axis=2) < 0.9).mean(axis=1)
    assert (ink > 0).mean() > 0.3
    # The blue of the first method is in the curves, so pictures are drawn, not left as empty boxes.
    blue = np.abs(shown - np.array([0x2B, 0x6C, 0xB0]) / 255).max(axis=2) < 0.03
    assert blue.sum() > 500


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_loads_every_picture_and_a_phone_need_not_scroll_sideways(folder, tmp_path):
    page = folder / "report" / "index.html"
    # A frame as wide as a phone, for a browser window has a least width; its measurements are written into the page.
    probe = tmp_path / "probe.html"
    inner = page.read_text().replace("&", "&amp;").replace('"', "&quot;")
    probe.write_text(
        f'<iframe id=f style="width:390px;height:3000px;border:0" srcdoc="{inner}"></iframe><pre id=out></pre><script>'
        "f.onload = () => { const d = f.contentDocument; const images = [...d.images];"
        "out.textContent = `RESULT ${images.length} ${images.filter(i => i.complete && i.naturalWidth > 100).length} "
        "${d.documentElement.scrollWidth} ${d.querySelectorAll('table.scores tbody tr').length}`; }</script>"
    )
    dom = browse(probe, tmp_path, "--dump-dom", "--virtual-time-budget=20000")
    images, loaded, width, rows = map(int, re.search(r"RESULT (\d+) (\d+) (\d+) (\d+)<", dom).groups())
    assert images == loaded == 12
    assert width <= 390
    assert rows == 3
    check_content(Page(browse(page, tmp_path, "--dump-dom")))


def test_the_command_writes_the_report_where_it_says(folder, tmp_path):
    code, output = qgm("report", folder, "--out", tmp_path / "there", columns=200)
    assert code == 0
    assert output == f"The report is {tmp_path / 'there' / 'index.html'}\n"
    assert (tmp_path / "there" / "index.html").exists()


def test_the_command_refuses_what_is_no_comparison(tmp_path):
    code, output = qgm("report", tmp_path, columns=200)
    assert code == 2
    assert output.startswith(f"qgm: there is no comparison in {tmp_path}")


def test_the_worst_worker_is_reported_if_the_comparison_says_so(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    told = json.loads((copy / "comparison.json").read_text())
    told["comparison"]["metric"] = "worst"
    (copy / "comparison.json").write_text(json.dumps(told))
    page = report.write(copy).read_text()
    assert "of the worst local model at the end of the run" in page
    means, worst = (Page(text).tables[0] for text in ((folder / "report" / "index.html").read_text(), page))
    figure = re.compile(r"\d+\.\d")
    for row, mean_row in zip(worst[1:], means[1:], strict=True):
        if row[0] != "csgd ":  # whose workers are all the same
            assert float(figure.match(row[2])[0]) < float(figure.match(mean_row[2])[0])
    assert (copy / "report" / "curves-mlp-ring-4-0.1.png").read_bytes() != (
        folder / "report" / "curves-mlp-ring-4-0.1.png"
    ).read_bytes()


def test_a_comparison_that_is_not_complete_says_so(folder, tmp_path):
    out = tmp_path / "half"
    shutil.copytree(folder, out)
    done = sorted((out / "runs").iterdir())
    for run in done[3:]:
        shutil.rmtree(run)
    assert "Not complete: 3 runs are done, 12 are needed." in report.write(out).read_text()
    shutil.rmtree(out / "runs")
    with pytest.raises(ValueError, match="no run of the comparison in .* is done"):
        report.write(out)


def test_missing_data_is_told_instead_of_the_classes(folder, tmp_path, monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError("digits: not found. To get them: look")

    monkeypatch.setattr("qgm_ext.data.load", missing)
    text = report.write(folder, tmp_path / "page").read_text()
    assert "The classes of every worker are not drawn, for the labels are not at hand: digits: not found" in text
    assert not list((tmp_path / "page").glob("classes*"))
