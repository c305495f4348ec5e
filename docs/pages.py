"""The documents beside the code as the pages of the site; pure functions, for hooks.py.

A document keeps its path, but for the sections that `CUT` makes pages of their own. Its links stay as they are written:
those to documents, sections, notebooks and pictures come to lead to pages, those to other files to the repository.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote

Sections = Mapping[str, tuple[tuple[str, str], ...]]

DOCUMENTS = (
    *("README.md", "medusa_apar/README.md", "medusa_apar/serve/README.md", "medusa_apar/engine/README.md"),
    *("triton_kernels/README.md", "eval/README.md", "heads/TRAINING.md", "heads/weights/smollm2-135m/README.md"),
    *("examples/README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
)
# Sections that readers look for by name: each page's documents and headings, the first of which is its title.
# They leave their documents. A notebook has to stay whole, so its sections are shown in both places.
CUT: Sections = {
    "limits.md": (("README.md", "Limits"),),
    "your-model-today.md": (("medusa_apar/README.md", "Your Llama or Qwen today"),),
    "your-own-model.md": (("README.md", "Your own model"),),
    "drafters.md": (("medusa_apar/README.md", "What is guessed"),),
    "what-it-runs-on.md": (("medusa_apar/README.md", "What it runs on"),),
    "many-requests.md": (("medusa_apar/README.md", "Requests that come and go"),),
    "vllm.md": (("medusa_apar/serve/README.md", "On vLLM"),),
    "many-nodes.md": (("medusa_apar/engine/README.md", "Toward many nodes"),),
    "how-it-works.md": (
        ("README.md", "How it works"),
        ("notebooks/2_watch_the_threads.ipynb", "The paragraph tree"),
        ("notebooks/2_watch_the_threads.ipynb", "The forest of one step"),
    ),
    "results.md": (("eval/README.md", "Results"),),
}
PICTURES = (".png", ".webp", ".svg", ".jpg", ".gif")

_CODE = re.compile(r"^(```+).*?^\1[ \t]*$|`(?:[^`\n]|\n(?!\s*\n))+`", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#+) +(.+?)[ #]*$", re.MULTILINE)
_LINK = re.compile(r'(?P<before>\]\(|^\[[^\]\n]+\]: +|\b(?P<raw>src|href)=")(?P<target>[^)\s"]+)', re.MULTILINE)
_PICTURE = re.compile(r"<picture>.*?</picture>", re.DOTALL)
# Whatever a browser fetches by itself: an address of a link that a reader may follow is none.
_FETCHED = re.compile(
    r"<(?:script|img|source|iframe|video|audio|embed|object)\b[^>]*?\b(?:src|srcset|data)\s*=\s*[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|<link\b(?![^>]*\brel=[\"']?(?:canonical|next|prev|alternate)\b)[^>]*?\bhref\s*=\s*[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|url\(\s*[\"']?((?:https?:)?//[^\"')\s]+)|@import\s+[\"']((?:https?:)?//[^\"']+)",
    re.IGNORECASE,
)


class Broken(Exception):
    """A link or a heading that leads nowhere."""


@dataclass(frozen=True)
class Part:
    """A piece of a document: from its beginning or a heading to the next heading of the first two levels."""

    source: str  # path of the document, from the repository's root
    level: int  # of its heading; 0 where it has none
    title: str
    text: str

    @property
    def anchors(self) -> set[str]:
        return {slug(heading[2]) for heading in headings(self.text)}


def slug(title: str) -> str:
    """A heading's anchor, as GitHub and pymdownx make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with `change` applied to all that is no code."""
    done, at = [], 0
    for code in _CODE.finditer(text):
        done += [change(text[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*done, change(text[at:])])


def headings(text: str) -> list[re.Match[str]]:
    # Comments of shell code look like headings: blocks are blanked, so that places stay.
    blank = _CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]) if code[1] else code[0], text)
    return list(_HEADING.finditer(blank))


def parts(source: str, text: str) -> list[Part]:
    starts = [(0, 0, ""), *((h.start(), len(h[1]), h[2]) for h in headings(text) if len(h[1]) <= 2)]
    ends = [start for start, *_ in starts[1:]] + [len(text)]
    pieces = [Part(source, level, title, text[at:end]) for (at, level, title), end in zip(starts, ends, strict=True)]
    return [piece for piece in pieces if piece.text.strip()]


def cut(document: list[Part], source: str, heading: str) -> list[Part]:
    """Takes a section, with the deeper ones below it, out of its document; a notebook's is copied."""
    at = next((i for i, part in enumerate(document) if part.title == heading), None)
    if at is None:
        raise Broken(f"{source} has no heading {heading!r}, of which docs/pages.py makes a page")
    end = at + 1
    while end < len(document) and document[end].level > document[at].level:
        end += 1
    section = document[at:end]
    if not source.endswith(".ipynb"):
        del document[at:end]
    return section


def raised(section: list[Part]) -> list[Part]:
    """The section as a page of its own, whose heading is of the first level."""
    by = section[0].level - 1
    lifted = [outside_code(part.text, lambda text: _HEADING.sub(lambda found: found[0][by:], text)) for part in section]
    return [replace(part, text=text) for part, text in zip(section, lifted, strict=True)]


def both_themes(picture: str) -> str:
    """A <picture> for light and dark systems as two images, of which the site shows the one of its own theme."""
    image = re.search(r"<img\b[^>]*>", picture)
    named = re.findall(r'prefers-color-scheme: (light|dark)\)"\s+srcset="([^"]+)"', picture)
    if image is None or len(named) != 1:
        return picture
    ((scheme, other),) = named
    lazy = image[0].replace("<img", '<img loading="lazy"', 1)  # what is not shown is not loaded
    rest = "light" if scheme == "dark" else "dark"
    return re.sub(r'\bsrc="([^"]+)"', rf'src="\1#only-{rest}"', lazy) + re.sub(
        r'\bsrc="[^"]+"', f'src="{other}#only-{scheme}"', lazy
    )


def asked_hosts(text: str) -> list[str]:
    """Addresses outside the site that a page or a style sheet has its browser fetch."""
    return [next(filter(None, found.groups())) for found in _FETCHED.finditer(text)]


def address(page: str) -> str:
    """Where a page lies in the site, as a browser sees it; pictures stay where they are."""
    stem = page.removesuffix(".md")
    return page if stem == page else stem.removesuffix("README").removesuffix("index") or "."


@dataclass
class Site:
    """Pages whose links are right. `complaints` has what leads nowhere, a sentence each."""

    root: Path  # of the repository
    repo_url: str
    homes: dict[str, str] = field(default_factory=dict)  # of each document, its page
    parts: dict[str, list[Part]] = field(default_factory=dict)  # of each page
    pictures: set[str] = field(default_factory=set)  # paths, the same in the repository and in the site
    complaints: list[str] = field(default_factory=list)

    @property
    def places(self) -> dict[tuple[str, str], str]:
        """The page of each document's heading, by its anchor."""
        return {(part.source, name): page for page, of in self.parts.items() for part in of for name in part.anchors}

    def markdown(self) -> dict[str, str]:
        """Every page, with its links as the site needs them."""
        places = self.places
        return {
            page: "".join(outside_code(part.text, self._linked(page, part.source, places)) for part in of)
            for page, of in self.parts.items()
        }

    def _linked(self, page: str, source: str, places: Mapping[tuple[str, str], str]) -> Callable[[str], str]:
        def link(found: re.Match[str]) -> str:
            try:
                return found["before"] + self.leads_to(page, source, found["target"], bool(found["raw"]), places)
            except Broken as broken:
                self.complaints.append(str(broken))
                return found[0]

        return lambda text: _LINK.sub(link, _PICTURE.sub(lambda picture: both_themes(picture[0]), text))

    def leads_to(self, page: str, source: str, target: str, raw: bool, places: Mapping[tuple[str, str], str]) -> str:
        """What a document's link is on a page; raw: in HTML, which mkdocs leaves as it is."""
        if re.match(r"[a-z][a-z+.-]*:|//", target):
            return target
        path, _, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(path))) if path else source
        if file.startswith("..") or not (self.root / file).exists():
            raise Broken(f"{source} links to {target}, which does not exist")
        if file in self.homes:
            if anchor and (file, anchor) not in places:
                raise Broken(f"{source} links to {target}, but {file} has no such heading")
            to = places[file, anchor] if anchor else self.homes[file]
        elif file.endswith(PICTURES):
            self.pictures.add(to := file)
        else:
            kind = "tree" if (self.root / file).is_dir() else "blob"
            return f"{self.repo_url}/{kind}/main/{quote(file)}{target[len(path) :]}"
        here, there = (address(page), address(to)) if raw else (posixpath.dirname(page) or ".", to)
        return posixpath.relpath(there, here) + ("/" if raw and to in self.parts else "") + target[len(path) :]


def site(
    root: Path, repo_url: str, notebooks: Mapping[str, str] | None = None, sections: Sections | None = None
) -> Site:
    """notebooks: their Markdown by their path; on the site they end in .md. sections: None is `CUT`."""
    made = Site(root, repo_url)
    made.homes = {name: name for name in DOCUMENTS if (root / name).exists()}
    written = {path.relative_to(root).as_posix() for path in (root / "docs").rglob("*.md")}
    made.homes |= {name: name.removeprefix("docs/") for name in sorted(written)}
    texts = {name: (root / name).read_text(encoding="utf-8") for name in made.homes} | dict(notebooks or {})
    made.homes |= {name: name.removesuffix(".ipynb") + ".md" for name in notebooks or {}}
    whole = {name: parts(name, text) for name, text in texts.items()}
    for page, wanted in (CUT if sections is None else sections).items():
        try:
            first, *further = [cut(whole.get(name, []), name, heading) for name, heading in wanted]
            made.parts[page] = sum(further, raised(first))
        except Broken as broken:
            made.complaints.append(str(broken))
    made.parts |= {made.homes[name]: rest for name, rest in whole.items()}
    return made
