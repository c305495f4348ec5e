"""Names for what files are made from: the same for the same, another for what lies there now."""

import os

from medusa_apar.models.fingerprint import files_at, name_of


def test_files_are_told_from_others_that_lay_there_before(tmp_path):
    folder = tmp_path / "heads"
    folder.mkdir()
    (folder / "b").write_text("one")
    (folder / "a").write_text("other")
    (folder / "inner").mkdir()
    before = files_at(folder)
    assert [line.split()[:2] for line in before] == [["a", "5"], ["b", "3"]] and files_at(str(folder)) == before
    assert files_at(folder / "b") == before[1:] and files_at(tmp_path / "gone") == []
    (folder / "b").write_text("two")
    os.utime(folder / "b", ns=(0, 1))
    after = files_at(folder)
    assert after[0] == before[0] and after[1] != before[1]
    assert name_of(after) != name_of(before) == name_of(files_at(folder / "a") + before[1:])
    assert len(name_of([])) == 16
