"""A run that is taken over from another study is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from thalweg.lab import sharing


def test_a_copy_that_is_cut_off_leaves_nothing_of_the_other_run(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = quick_path / "source", quick_path / "target"
    for folder, names in ((source, ("run.toml", "a", "b", "status.json")), (target, ("run.toml",))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(name)
    copy, copied = sharing._copy, []

    def cut_off(one: Path, other: Path) -> None:
        copied.append(one.name)
        copy(one, other)
        if len(copied) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sharing, "_copy", cut_off)
    with pytest.raises(KeyboardInterrupt):
        sharing._copy_all(source, target)
    monkeypatch.undo()
    assert [path.name for path in target.iterdir()] == ["run.toml"]
    sharing._copy_all(source, target)
    assert len(list(target.iterdir())) == 4
