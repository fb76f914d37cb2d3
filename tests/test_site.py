"""The documentation site: what its hooks make of pages, and that its reference holds every public name."""

import json
import logging
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import apo
from docs.site import hooks
from tests.documents import ROOT

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
DIRECTIVE = re.compile(r"^::: ([\w.]+)(?:\n +options: \{(.*)\})?$", re.MULTILINE)


def cell(source: str, *outputs: dict[str, Any]) -> dict[str, Any]:
    return {"cell_type": "code", "source": source.splitlines(keepends=True), "outputs": list(outputs)}


def test_a_pattern_in_the_nav_is_the_files_that_match(tmp_path: Path) -> None:
    for name in ("b.md", "a.md", "c.txt"):
        (tmp_path / name).touch()
    assert hooks.expanded([{"All": ["c.txt", "*.md"]}, "x.md"], tmp_path) == [
        {"All": ["c.txt", "a.md", "b.md"]},
        "x.md",
    ]


def test_a_link_counts_from_its_page() -> None:
    text = "[a](../apo/types.py#L3) [b](c.md) [c](https://example.org/x.py) [d](#here) ![e](images/x.png)"
    assert hooks.linked("docs/page.md", text) == ["apo/types.py", "docs/c.md", "docs/images/x.png"]


def test_a_source_file_is_a_block_of_code_whatever_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""\n```\n"""\n')
    (tmp_path / "a.cff").write_text("cff-version: 1.2.0\n")
    assert hooks.source("a.py", tmp_path).endswith('# a.py\n\n````python linenums="1"\n"""\n```\n"""\n````\n')
    assert '```text linenums="1"\ncff-version' in hooks.source("a.cff", tmp_path)


def test_what_belongs_to_an_item_is_indented_by_four() -> None:
    text = """Before:
- One,
  wrapped.

  ```python
  if x:
      - y
  ```
- Two.
  - Below.

Text of
2015. Not a list.

    - code

1. Three

   more
2. Four
"""
    made = """Before:

- One,
    wrapped.

    ```python
    if x:
        - y
    ```

- Two.
    - Below.

Text of
2015. Not a list.

    - code

1. Three

    more

2. Four
"""
    assert hooks.indented(text) == made


def test_a_notebook_is_its_cells_and_their_outputs() -> None:
    prose = {"cell_type": "markdown", "source": ["# Title\n", "Text."]}
    printed = {"output_type": "stream", "text": ["1\n", "2\n"]}
    value = {"output_type": "execute_result", "data": {"text/plain": ["3"]}}
    drawn = {"output_type": "display_data", "data": {"image/png": PIXEL, "text/plain": ["<Figure>"]}}
    text, images = hooks.notebook({"cells": [prose, cell("a = 1\na", printed, value, drawn)]}, "1_x")
    block = "```{}\n{}\n```"
    output = "{ .text .output }"
    parts = [block.format("python", "a = 1\na"), block.format(output, "1\n2"), block.format(output, "3")]
    assert text == "\n\n".join(["# Title\nText.", *parts, "![What the cell above draws](1_x/1_2.png)\n"])
    assert list(images) == ["1_x/1_2.png"]
    assert images["1_x/1_2.png"].startswith(b"\x89PNG")


def test_a_notebook_with_an_output_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="1_x: cell 0 has an output of error"):
        hooks.notebook({"cells": [cell("1 / 0", {"output_type": "error"})]}, "1_x")


def test_equations_are_mathml(caplog: pytest.LogCaptureFixture) -> None:
    aligned = r"\begin{aligned} a &= \tfrac12 \end{aligned}"
    content = rf'<span class="arithmatex">\(\theta\)</span><div class="arithmatex">\[{aligned}\]</div>'
    made = hooks.EQUATION.sub(lambda found: hooks.mathml(found[2], found[1], "a.md"), content)
    assert re.findall('<math [^>]*display="([a-z]+)"', made) == ["inline", "block"]
    assert "arithmatex" not in made
    assert "<mtable" in made
    assert not caplog.records


@pytest.mark.parametrize(("tex", "unknown"), [(r"\nosuch x", r"\nosuch"), ("a & b", "&")])
def test_what_an_equation_cannot_show_is_warned_of(tex: str, unknown: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        hooks.mathml(tex, "span", "a.md")
    assert f"a.md: {unknown} in the equation" in caplog.text


def test_a_public_name_refers_to_the_reference_unless_it_is_a_link() -> None:
    content = "<code>apo.sgd</code> <code>Tune</code> <code>sgd</code> <a href='x'><code>apo.sgd</code></a>"
    made = hooks.NAME.sub(hooks.referenced, content)
    assert re.findall('<autoref identifier="([^"]*)" optional><code>([^<]*)', made) == [
        ("apo.sgd", "apo.sgd"),
        ("apo.Tune", "Tune"),
    ]


def test_what_leads_nowhere_in_a_built_site_is_found(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text('<p id="there"><a href="..">up</a><a href="#there">same</a>')
    (tmp_path / "x.png").touch()
    good = '<a href="b/#there">1</a><a href="/p/b/">2</a><img src="x.png"><a href="https://example.org">3</a>'
    good += '<link rel="canonical" href="https://example.org/p/">'
    (tmp_path / "index.html").write_text(good)
    assert list(hooks.broken(tmp_path, "/p/")) == []
    assert list(hooks.broken(tmp_path)) == ["index.html leads to /p/b/, which is not there"]
    bad = '<a href="b/#gone">1</a><a href="c/">2</a><img src="y.png"><script src="https://example.org/s.js"></script>'
    (tmp_path / "index.html").write_text(bad)
    assert list(hooks.broken(tmp_path)) == [
        "index.html loads https://example.org/s.js from elsewhere",
        "index.html leads to b/#gone, which has no such anchor",
        "index.html leads to c/, which is not there",
        "index.html leads to y.png, which is not there",
    ]


def test_the_reference_holds_every_public_name() -> None:
    pages = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/api/*.md"))]
    given = dict(DIRECTIVE.findall("\n".join(pages)))
    whole = [path for path, options in given.items() if path in sys.modules and "members: false" not in options]
    assert {f"apo.{name}" for name in apo.__all__ if not isinstance(getattr(apo, name), ModuleType)} <= given.keys()
    assert {"apo.discrepancies", "apo.domains"} <= set(whole)
    assert set(apo.problems.__all__) <= {name for path in whole for name in vars(sys.modules[path])}


def test_no_docstring_holds_what_a_page_takes_for_an_element() -> None:
    for path in ROOT.glob("apo/**/*.py"):
        text = "\n".join(DOCSTRING.findall(path.read_text(encoding="utf-8")))
        assert re.findall(r"</?[a-zA-Z][^>\n]*>", re.sub(r"(`+)[^`]*\1", "", text)) == [], path


def test_a_project_becomes_a_site(tmp_path: Path) -> None:
    files = {
        "mkdocs.yml": f"site_name: x\nstrict: true\nsite_dir: build\nplugins: []\nhooks: [{hooks.__file__}]\n"
        "theme: {name: mkdocs, highlightjs: false}\nvalidation: {anchors: ignore}\n"
        "markdown_extensions: [{pymdownx.highlight: {anchor_linenums: true}}, pymdownx.superfences]\n"
        "nav: [README.md, docs/*.md, tutorials/*.ipynb]\n",
        "README.md": "# X\n\n[a](docs/a.md#there) [b](src/b.py#L2)\n",
        "docs/a.md": "# A\n\n## There\n\n[up](../README.md) [b](../src/b.py#L1-L2) [c](../tutorials/1_c.ipynb)\n",
        "docs/a.json": "{}",
        "src/b.py": "x = 1\ny = 2\n",
        "tutorials/1_c.ipynb": json.dumps(
            {"cells": [cell("1", {"output_type": "display_data", "data": {"image/png": PIXEL}})]}
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    build(load_config(str(tmp_path / "mkdocs.yml")))
    site = tmp_path / "build"
    assert all(link in (site / "index.html").read_text() for link in ('href="a/#there"', 'href="source/src/b.py/#L2"'))
    assert 'href="../source/src/b.py/#L1"' in (site / "a" / "index.html").read_text()
    assert 'id="L2"' in (site / "source" / "src" / "b.py" / "index.html").read_text()
    assert (site / "tutorials" / "1_c" / "0_0.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "README.md").write_text("[b](src/b.py#L3)")
    with pytest.raises(Abort, match="1 warnings"):
        build(load_config(str(tmp_path / "mkdocs.yml")))
