# SPDX-License-Identifier: BSD-3-Clause
"""Pages of the site that nobody writes: one for each public name, and files outside this folder.

Sphinx calls this through conf.py. Pages go to docs/generated, which git ignores.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import glimpse_ext

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
GENERATED = "generated"

OUTSIDE = {
    "csrc/README.md": "source",
    "benchmarks/README.md": "benchmarks",
    "examples/README.md": "examples",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "tests/golden/README.md": "golden",
}
"""Files that are pages of the site, too, by the name of that page."""

LINK = re.compile(r"(?<!\\)(\]\()([^)\s]+)(\))")

# ------------------------------------------------------------------------------------ public names


def public_names() -> list[str]:
    return sorted(set(glimpse_ext.__all__), key=str.lower)


def first_sentence(name: str) -> str:
    text = inspect.getdoc(getattr(glimpse_ext, name)) or ""
    sentence = " ".join(text.split("\n\n")[0].split())
    # Roles of docstrings as MyST has them.
    sentence = re.sub(r":(?:func|class):`([^`]+)`", r"`\1`", sentence)
    return sentence.replace("``", "`").removesuffix("::").replace("|", "\\|")


def operator_page(name: str) -> str:
    value = getattr(glimpse_ext, name)
    if inspect.ismodule(value):
        directive, options = "automodule", "   :members:\n"
    elif inspect.isclass(value):
        directive, options = "autoclass", "   :members:\n"
    else:
        directive, options = "autofunction", ""
    what = f".. {directive}:: glimpse_ext.{name}\n{options}"
    return f"# `{name}`\n\n```{{eval-rst}}\n{what}```\n"


def operators_index() -> str:
    names = public_names()
    rows = "\n".join(f"| [`{name}`]({name}.md) | {first_sentence(name)} |" for name in names)
    toctree = "\n".join(names)
    return f"""# Operators

Everything that `import glimpse_ext` gives, from the docstrings: `help(glimpse_ext.roi_align)` says
the same. What bad boxes give is in [special boxes](../../special_boxes.md), and what the numbers of
boxes mean in [coordinates](../../coordinates.md).

| name | |
|---|---|
{rows}

```{{toctree}}
:hidden:

{toctree}
```
"""


# ----------------------------------------------------------------------------------------- links


def relocated(text: str, origin: Path, page: Path) -> str:
    """Text of ``origin`` as it must be written in ``page`` (both in the repository) for Sphinx.

    A link to a file that is a page leads to that page, and one to another file of the repository
    offers the file. One to a folder is taken away: there is no such thing on the site.
    """
    pages = {(ROOT / path).resolve(): DOCS / GENERATED / f"{n}.md" for path, n in OUTSIDE.items()}
    pages[ROOT / "README.md"] = DOCS / "getting_started.md"

    def link(match: re.Match[str]) -> str:
        path, hash_, anchor = match[2].partition("#")
        if not path or re.match(r"[a-z]+:", match[2]):
            return match[0]
        target = (origin.parent / path).resolve()
        if target.is_dir():
            return f"{match[1]}#{match[3]}"
        goal = pages.get(target, target)
        # The sections of those pages are not always the sections of that file.
        tail = "" if target in pages and target.name == "README.md" else hash_ + anchor
        return f"{match[1]}{os.path.relpath(goal, page.parent)}{tail}{match[3]}"

    def relinked(line: str) -> str:
        return re.sub(r"\[([^\]]*)\]\(#\)", r"\1", LINK.sub(link, line))

    return outside_fences(text, relinked)


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Every line changed that is not code."""
    lines, fenced = [], False
    for line in text.split("\n"):
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        lines.append(line if fenced or fence else change(line))
    return "\n".join(lines)


def linked_names(text: str) -> str:
    """Public names in running text lead to their pages."""
    names = "|".join(public_names())
    name = re.compile(rf"(?<![\[`\w.])`({names})`(?![\]`])")

    def linked(line: str) -> str:
        if line.startswith("#"):
            return line
        return name.sub(rf"[`\1`]({GENERATED}/operators/\1.md)", line)

    return outside_fences(text, linked)


def outside_pages() -> dict[Path, str]:
    """Files that are not in docs, as pages."""
    pages = {}
    for path, name in OUTSIDE.items():
        origin = ROOT / path
        if origin.exists():
            page = DOCS / GENERATED / f"{name}.md"
            pages[page] = relocated(origin.read_text(), origin, page)
    return pages


def readme_section(heading: str) -> str:
    """A section of README.md without its heading."""
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if found is None:
        raise SystemExit(f"README.md has no section {heading!r}")
    return found[1].strip()


# ---------------------------------------------------------------------------------------- Sphinx


def pages() -> dict[Path, str]:
    folder = DOCS / GENERATED / "operators"
    made = {folder / f"{name}.md": operator_page(name) for name in public_names()}
    index = folder / "index.md"
    made[index] = relocated(operators_index(), index, index)
    return {**made, **outside_pages()}


def write(docs: Path) -> None:
    made = pages()
    for path in (docs / GENERATED).rglob("*.md"):
        if path not in made:
            path.unlink()
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Sphinx reads again what is newer.
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def clean(docs: Path = DOCS) -> None:
    shutil.rmtree(docs / GENERATED, ignore_errors=True)


FROM_README = re.compile(r"^<!-- README: (.*) -->$", re.M)
FURTHER = "further-pages"


def on_source_read(app: Any, docname: str, source: list[str]) -> None:
    """Sections of the README where a page asks for them, links, and new pages in the index."""
    if docname.startswith(f"{GENERATED}/"):
        return
    page = DOCS / f"{docname}.md"
    text = relocated(source[0], page, page)
    readme = ROOT / "README.md"
    text = FROM_README.sub(lambda m: relocated(readme_section(m[1]), readme, page), text)
    if docname == "index":
        listed = set(re.findall(r"^[\w/]+$", text, re.M))
        names = sorted(path.stem for path in DOCS.glob("*.md"))
        names += [f"{GENERATED}/{path.stem}" for path in outside_pages()]
        further = [name for name in names if name not in listed and name != "index"]
        text = text.replace(FURTHER, "\n".join(further))
    source[0] = linked_names(text)
