"""A notebook as a page, with the outputs that are stored in it; a pure function, for hooks.py.

GitHub drops the styles that the pictures of `medusa_apar.display` bring along, so a link would not show them. They are
plain HTML without a script and take their colours from the page, so mkdocs-jupyter's two dozen packages are not needed.
"""

from __future__ import annotations

import html
import json
from typing import Any


def notebook_page(name: str, text: str) -> tuple[str, dict[str, str]]:
    """Markdown of a stored notebook, and what stands for each output: links are looked for in the rest."""
    pieces: list[str] = []
    outputs: dict[str, str] = {}
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            pieces.append(source)
            continue
        shell = source.startswith("%%bash\n")
        pieces.append(f"```{'sh' if shell else 'python'}\n{source.removeprefix('%%bash').lstrip()}\n```")
        for output in cell["outputs"]:
            mark = f"<!-- {name} {len(outputs)} -->"
            outputs[mark] = shown(output)
            pieces.append(mark)
    return "\n\n".join(pieces) + "\n", outputs


def shown(output: dict[str, Any]) -> str:
    """The richest form of an output. Search finds what was written by hand."""
    if output["output_type"] == "stream":
        data = {"text/plain": "".join(output["text"])}
    else:
        data = {kind: "".join(value) for kind, value in output["data"].items()}
    if "text/html" in data:
        return f'<div class="output" data-search-exclude>{data["text/html"]}</div>'
    if "image/png" in data:
        alt = html.escape(data.get("text/plain", ""))
        return f'<p><img alt="{alt}" src="data:image/png;base64,{"".join(data["image/png"].split())}"></p>'
    if "text/markdown" in data:
        return data["text/markdown"]
    return f'<pre class="output" data-search-exclude><code>{html.escape(data["text/plain"])}</code></pre>'
