"""What is published: one version, a wheel with all that the package reads, a page whose links work without a clone."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import medusa_apar
from tests.support.files import home, repository_files

ROOT = Path(__file__).parent.parent
MAPPED = ("heads", "eval", "triton_kernels")
# What lies in a package's folder for those who have a clone.
BESIDE = re.compile(r"\.md$|\.sh$|^eval/results/|^medusa_apar/serve/page\.png$")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The sdist of the repository's own files, and the wheel that is made of the sdist."""
    clone = tmp_path_factory.mktemp("published") / "clone"
    for path in repository_files(ROOT):
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, clone / path)
    setup = [sys.executable, "setup.py", "--quiet"]
    subprocess.run([*setup, "sdist", "--dist-dir", "dist"], cwd=clone, check=True, capture_output=True)
    (sdist,) = (clone / "dist").iterdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(clone / "unpacked", filter="data")
    (unpacked,) = (clone / "unpacked").iterdir()
    subprocess.run([*setup, "bdist_wheel", "--dist-dir", "wheel"], cwd=unpacked, check=True, capture_output=True)
    (wheel,) = (unpacked / "wheel").iterdir()
    return unpacked, wheel


def installed(path: Path) -> str | None:
    """Where a wheel has a file of the repository; None where it has no business there."""
    room = path.parts[0]
    if room not in ("medusa_apar", *MAPPED) or (BESIDE.search(path.as_posix()) and "weights" not in path.parts):
        return None
    return path.as_posix() if room == "medusa_apar" else f"medusa_apar/{path.as_posix()}"


def test_a_wheel_has_what_the_packages_read_and_nothing_else(published):
    with zipfile.ZipFile(published[1]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {place for path in repository_files(ROOT) if (place := installed(path))}
    assert (sorted(expected - found), sorted(found - expected)) == ([], [])


def test_an_sdist_has_every_file(published):
    assert [path for path in repository_files(ROOT) if not (published[0] / path).is_file()] == []


def test_the_published_page_needs_no_clone(published):
    with zipfile.ZipFile(published[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    page = metadata.get_payload()
    links = re.findall(r"\]\(([^)\s]+)\)", page) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", page)
    assert len(links) > 10 and not [link for link in links if not re.match(r"https?://|#", link)]
    for link in links:
        if link.startswith(home(ROOT)):
            kind, _, path = link.removeprefix(f"{home(ROOT)}/").split("#")[0].partition("/main/")
            assert kind == ("raw" if Path(path).suffix in (".png", ".webp", ".svg") else "blob"), link
            assert (ROOT / path).exists(), link
    assert metadata["Version"] == medusa_apar.__version__ and metadata["License-Expression"] == "Apache-2.0"


def test_one_version_and_one_home():
    """A number that is written down a second time is the same number."""
    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cite["version"] == medusa_apar.__version__
    first = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[0]
    assert first == medusa_apar.__version__
    assert cite["repository-code"] == home(ROOT)
