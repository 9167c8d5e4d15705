"""README.md and docs/*.md: what they show is generated, what they say to type works, what they link to is there."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import grid, launch
from experiments.config import EXPERIMENTS, typed
from experiments.grid.efficiency import BENCH
from scripts import collect
from scripts.draw import cells, efficiency, findings, pages, report, tables

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "results/REPORT.md")]


def name(path):
    return str(path.relative_to(ROOT))


def prose(path):
    """Without code and generated blocks."""
    text = re.sub(r"^(<!-- [\w:]+ -->)$.*?^<!-- /", r"\1\n<!-- /", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def test_readme_is_one_page_and_links_to_every_other():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    for page in PAGES[1:]:
        assert f"]({name(page)})" in text, f"README.md does not link {name(page)}"


# -- generated blocks


def possible():
    """Every name that a generator may write, today or once there are records."""
    names = {"found:times", "table:speed", "table:reproduction"}
    for table in grid.TABLES:
        for profile in grid.SCALES:
            if any(cell.table == table and profile in cell.profiles for cell in grid.CELLS):
                file = cells.file_name(table, profile)
                names |= {f"table:{file}", f"figure:{file}"}
                names |= {f"found:{file}"} if table in findings.FINDINGS else set()
    for (profile, machine), parts in efficiency.load(ROOT / "results").items():
        ending = efficiency.slug(profile, machine)
        names |= {f"found:efficiency_{ending}", f"figure:efficiency_{ending}"}
        names |= {f"table:efficiency_{part}_{ending}" for part in ("claims", *BENCH, *parts)}
    return names


def generated(monkeypatch):
    """What the committed records give today, by name."""
    monkeypatch.chdir(ROOT)
    found = tables.blocks("results") | report.blocks("results")
    return {key: text for key, text in found.items() if text.strip()}


def test_every_mark_has_a_generator_and_every_block_a_page(monkeypatch):
    shown = [mark for page in PAGES for mark in pages.marks(page.read_text())]
    assert len(shown) == len(set(shown)), "a block stands in two places"
    assert set(shown) <= possible(), f"nothing writes {set(shown) - possible()}"
    missing = set(generated(monkeypatch)) - set(shown)
    assert not missing, f"no page shows {missing}"
    later = {mark for mark in possible() if not mark.startswith("figure:")} - set(shown)
    assert not later, f"no page has marks for {later}"


def test_pages_show_what_the_records_say(monkeypatch):
    for key, text in generated(monkeypatch).items():
        (page,) = (page for page in PAGES if key in pages.marks(page.read_text()))
        block = re.search(rf"<!-- {key} -->\n(.*?)<!-- /{key} -->", page.read_text(), re.DOTALL)[1]
        assert block.strip() == text.strip(), f"{name(page)}: {key} is out of date: `make tables report`"


def test_one_renewer_for_every_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    page = "before\n<!-- table:a -->\nold\n<!-- /table:a -->\nbetween\n<!-- table:a_b -->\nkept\n<!-- /table:a_b -->\n"
    for path in (tmp_path / "README.md", tmp_path / "docs/a.md"):
        path.write_text(page)
    pages.renew("table:a", r"new \1")
    pages.renew("table:absent", "nowhere")
    for path in pages.pages():
        assert path.read_text() == page.replace("old", r"new \1")
    pages.renew("table:a", "")
    assert (tmp_path / "docs/a.md").read_text() == page.replace("old\n", "")


# -- what readers type


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_python_examples_run(page):
    """One after another, as on the page, where one knows what those before it made."""
    programs = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert programs and "minrnn.MinGRU(" in programs[0]
    subprocess.run([sys.executable, "-c", "\n".join(programs)], check=True, timeout=300, cwd=ROOT)


COMMAND = re.compile(r"python3? -m (experiments\.[\w.]+|scripts\.\w+)((?: [^`#\n]*)?)")


@pytest.mark.parametrize("page", [*PAGES, *OTHERS[:2]], ids=name)
def test_commands_compose(page):
    for module, rest in COMMAND.findall(page.read_text()):
        settings = [setting for setting in shlex.split(rest.rstrip("\\ ")) if not setting.startswith("-")]
        experiment = module.removeprefix("experiments.")
        if experiment in EXPERIMENTS:
            launch.check(experiment, settings, multirun=True)
        elif module.startswith("experiments."):
            importlib.import_module(module).parse(settings)
        elif module == "scripts.collect":
            collect.parse(settings)
        else:
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{name(page)}: {module}"


def test_commands_of_the_report_compose():
    """Some hundred, of which none is a sweep."""
    found = COMMAND.findall((ROOT / "results/REPORT.md").read_text())
    assert found
    for module, rest in found:
        typed(launch.compose(module.removeprefix("experiments."), shlex.split(rest)))


@pytest.mark.parametrize("page", [*PAGES, *OTHERS[:2]], ids=name)
def test_make_targets_exist(page):
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = re.findall(r"(?:`|^)make ([a-z][a-z -]*)", page.read_text(), re.MULTILINE)
    for target in (target for text in told for target in text.split()):
        assert target in known, f"{name(page)}: make {target}"


# -- links


def slugs(path):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name)
def test_links_and_images_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{name(page)}: {target}"
        assert not anchor or anchor in slugs(found), f"{name(page)}: {target}"


# -- how pages read


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name)
def test_no_sentence_begins_with_of(page):
    text = prose(page) if page in PAGES else page.read_text()
    assert not re.findall(r"(?:^|[.:!?] |\| |- )Of [a-z].*", text, re.MULTILINE), name(page)


def test_citation_agrees_with_the_package():
    import yaml

    import minrnn

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == minrnn.__version__
    assert f"## {minrnn.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["test"]["steps"][-1]["run"] == ".ci/run"
