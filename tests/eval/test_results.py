"""Results that are kept are results that somebody is told of."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "eval" / "results"


def test_every_result_is_cited():
    """By name in the README, eval/README.md or a notebook; what lies within a folder, there or in the folder's own."""
    pages = [ROOT / "README.md", ROOT / "eval" / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]
    cited = "".join(page.read_text(encoding="utf-8") for page in pages)
    places = [place for place in (*RESULTS.iterdir(), *(RESULTS / "cpu").iterdir()) if place.name != "cpu"]
    assert len(places) > 5 and not [place for place in places if place.name not in cited]
    for place in places:
        about = place / "README.md"
        told = cited + (about.read_text(encoding="utf-8") if about.is_file() else "")
        folders = [inner.name for inner in place.glob("*/") if place.is_dir() and inner.is_dir()]
        assert not [name for name in folders if f"{name}/" not in told and f"`{name}`" not in told]
