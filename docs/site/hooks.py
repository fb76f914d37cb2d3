"""What the site needs beyond Markdown: the project's tree, source files, notebooks, equations, and a check of links.

Pages link to each other, to source files and to notebooks as they lie in the project, where they read well, too. So a
page goes by its path from the root (``docs/decisions.md``), and what is linked to and is no page becomes one. In strict
mode whatever leads nowhere ends the build.
"""

import html
import json
import logging
import re
from base64 import b64decode
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any
from urllib.parse import unquote, urlsplit

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound

log = logging.getLogger("mkdocs.hooks.site")

OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "tutorials/README.md", "tutorials/*.ipynb")
"""The pages that do not lie in docs/."""
LINK = re.compile(r"\]\(([^)#\s]+)")
FIRST = re.compile(r"([-*+]|1\.) +")
"""What begins a list: in the middle of a paragraph, another number is part of the text."""
ITEM = re.compile(r"([-*+]|\d+\.) +")
FENCE = re.compile(r"`{3,}|~{3,}")
LINE = re.compile(r"__codelineno-\d+-(\d+)")
LINES = re.compile(r'(href="[^"#]*#L\d+)-L\d+"')
"""A link to several lines; only single ones have anchors here."""
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
NAME = re.compile(r"(<a [^>]*>)?<code>((?:apo\.)?([A-Z]\w+|(?<=apo\.)[\w.]+))</code>")
"""A name in a page, and the link around it if there is one."""
SOURCE = "---\nhide: [navigation, toc]\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{code}\n"


class Generated(File):
    """A page or an image that no file in docs/ holds."""

    def __init__(self, config: MkDocsConfig, path: str, content: str | bytes, url: str | None, shown: bool) -> None:
        """Hold the content of a path from the project's root; with a url it is a page, in the nav if it is shown."""
        inclusion = InclusionLevel.INCLUDED if shown else InclusionLevel.NOT_IN_NAV
        dest = url and f"{url}/index.html"
        super().__init__(path, None, config.site_dir, config.use_directory_urls, dest_uri=dest, inclusion=inclusion)
        self._is_page = url is not None
        self._content = content
        self.generated_by = "hooks"

    def is_documentation_page(self) -> bool:
        """Whether it is rendered, whatever its path ends with."""
        return self._is_page


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace the patterns in the nav by the files that they match."""
    config.nav = expanded(config.nav, root_of(config))
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Name the files of docs/ from the project's root, and add the pages that lie or are made elsewhere."""
    root = root_of(config)
    tree = Files([])
    for file in files:
        if file.src_dir == config.docs_dir:
            file = File(
                f"docs/{file.src_uri}",
                str(root),
                config.site_dir,
                config.use_directory_urls,
                dest_uri=file.dest_uri,
                inclusion=file.inclusion,
            )
        tree.append(file)
    for path in (path for pattern in OUTSIDE for path in sorted(root.glob(pattern))):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".md":
            tree.append(File(name, str(root), config.site_dir, config.use_directory_urls))
        else:
            text, images = notebook(json.loads(path.read_text(encoding="utf-8")), path.stem)
            tree.append(Generated(config, name, text, name.removesuffix(".ipynb"), shown=True))
            for image, content in images.items():
                tree.append(Generated(config, f"{dirname(name)}/{image}", content, None, shown=False))
    for page in tree.documentation_pages():
        for target in linked(page.src_uri, page.content_string):
            if target not in tree.src_uris and (root / target).is_file():
                tree.append(Generated(config, target, source(target, root), f"source/{target}", shown=False))
    return tree


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Indent lists as Python-Markdown reads them."""
    return markdown if page.file.dest_uri.startswith("source/") else indented(markdown)


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write equations as MathML, link names of the API, and give lines of source the anchors that GitHub gives them."""
    if page.file.dest_uri.startswith("source/"):
        content = LINE.sub(r"L\1", content)
    content = NAME.sub(referenced, LINES.sub(r'\1"', content))
    return EQUATION.sub(lambda found: mathml(html.unescape(found[2]), found[1], page.file.src_uri), content)


def on_post_build(*, config: MkDocsConfig) -> None:
    """Check every link and image of the site that has been built."""
    for problem in broken(Path(config.site_dir), urlsplit(config.site_url or "").path or "/"):
        log.warning(problem)


def root_of(config: MkDocsConfig) -> Path:
    """The project's root, where the configuration lies."""
    return Path(config.docs_dir).parent


def expanded(nav: Any, root: Path) -> Any:
    """The nav with each pattern replaced by the paths that match it, in order."""
    if isinstance(nav, dict):
        return {title: expanded(entry, root) for title, entry in nav.items()}
    if not isinstance(nav, list):
        return nav
    entries: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and "*" in entry:
            entries += sorted(path.relative_to(root).as_posix() for path in root.glob(entry))
        else:
            entries.append(expanded(entry, root))
    return entries


def linked(page: str, text: str) -> list[str]:
    """The paths, from the project's root, that the relative links of a page lead to."""
    links = [unquote(link) for link in LINK.findall(text) if not urlsplit(link).scheme]
    return [normpath(join(dirname(page), link)) for link in links]


def source(path: str, root: Path) -> str:
    """The page of a source file: its text, with numbered lines."""
    text = (root / path).read_text(encoding="utf-8")
    try:
        language = get_lexer_for_filename(path).aliases[0]
    except ClassNotFound:
        language = "text"
    return SOURCE.format(path=path, code=fenced(text, f'{language} linenums="1"'))


def fenced(text: str, info: str) -> str:
    """A block of code, behind a fence that is longer than any within."""
    fence = max([*re.findall(r"^`{3,}", text, re.MULTILINE), "``"], key=len) + "`"
    return f"{fence}{info}\n{text.rstrip()}\n{fence}"


def indented(text: str) -> str:
    """What belongs to an item of a list indented by four a level: GitHub needs the width of the item's mark, "- ".

    As on GitHub, a list may follow a paragraph, and an item the paragraphs of another, without an empty line between.
    """
    lines: list[str] = []
    width, shift, fence, nested = 0, 0, "", False
    for line in text.split("\n"):
        content = line.lstrip(" ")
        indent = len(line) - len(content)
        if not fence:
            if content and not indent:
                item = (ITEM if width else FIRST).match(line)
                if item and (nested or not width) and lines and lines[-1]:
                    lines.append("")
                nested = False
                if item or not lines or not lines[-1]:
                    width = item.end() if item else 0
            nested = nested or bool(content and indent and lines and not lines[-1])
            shift = (4 - width) * (indent // width) if width else 0
            opening = FENCE.match(content)
            fence = opening[0] if opening else ""
        elif content.rstrip() == fence:
            fence = ""
        lines.append(" " * shift + line if content else "")
    return "\n".join(lines)


def notebook(content: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """The cells of a notebook and their outputs as Markdown, and its images by their path beside it.

    Raises:
        ValueError: If an output is neither text nor an image.
    """
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for number, cell in enumerate(content["cells"]):
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else fenced(text, "python"))
        for place, output in enumerate(cell.get("outputs", ())):
            data = output.get("data", {})
            if "image/png" in data:
                image = f"{name}/{number}_{place}.png"
                images[image] = b64decode("".join(data["image/png"]))
                parts.append(f"![What the cell above draws]({image})")
            elif "text" in output or "text/plain" in data:
                parts.append(fenced("".join(output.get("text") or data["text/plain"]), "{ .text .output }"))
            else:
                raise ValueError(f"{name}: cell {number} has an output of {[*data] or output['output_type']}")
    return "\n\n".join(parts) + "\n", images


def mathml(tex: str, tag: str, page: str) -> str:
    """An equation as MathML, in a line of text (span) or on its own (div); one with an unknown command is warned of."""
    known = tex.replace("{aligned}", "{align*}").replace(r"\arg", r"\operatorname{arg}")
    equation = str(convert(known, display="block" if tag == "div" else "inline"))
    if unknown := re.findall(r"\\\w*|(?<=<mi>)&(?=</mi>)", equation):
        log.warning(f"{page}: {', '.join(unknown)} in the equation {tex!r} cannot be shown")
    return equation


def referenced(name: re.Match[str]) -> str:
    """The name in a page as a reference to its entry in the API, if there is one, unless it is in a link already."""
    if name[1]:
        return name[0]
    return f'<autoref identifier="apo.{name[3]}" optional><code>{name[2]}</code></autoref>'


class Links(HTMLParser):
    """The anchors of a page, where it leads to, and what it loads."""

    def __init__(self, text: str) -> None:
        """Read a page."""
        super().__init__()
        self.anchors: set[str] = set()
        self.hrefs: set[str] = set()
        self.loads: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element says."""
        found = {name: value for name, value in attrs if value}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if "src" in found:
            self.loads.add(found["src"])
        if "href" in found and found.get("rel") != "canonical":
            (self.loads if tag == "link" else self.hrefs).add(found["href"])


def broken(site: Path, base: str = "/") -> Iterator[str]:
    """What is wrong with the links of a built site: no such file or anchor, or something loaded from elsewhere.

    Args:
        site: Where it has been built.
        base: The path that it will have on its host.

    Yields:
        A sentence for each.
    """
    site = site.resolve()
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        yield from (f"{name} loads {url} from elsewhere" for url in sorted(page.loads) if is_external(url))
        for url in sorted(url for url in page.hrefs | page.loads if not is_external(url)):
            _, _, target, _, anchor = urlsplit(url)
            absolute = target.startswith(base)
            file = site / unquote(target.removeprefix(base)) if absolute else path.parent / unquote(target)
            file = file if target else path
            file = (file / "index.html" if file.is_dir() else file).resolve()
            if not file.is_file():
                yield f"{name} leads to {url}, which is not there"
            elif anchor and file in pages and unquote(anchor) not in pages[file].anchors:
                yield f"{name} leads to {url}, which has no such anchor"


def is_external(url: str) -> bool:
    """Whether a URL names a host or a scheme of its own."""
    return bool(urlsplit(url).scheme or urlsplit(url).netloc)
