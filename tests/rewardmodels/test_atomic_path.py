"""A file is the old one or the new one, and nothing is left temporary it."""

import pytest

from rewardmodels.saving import atomic_path


def test_the_old_file_stands_until_the_new_one_is_atomic_path(tmp_path):
    path = tmp_path / "notes"
    path.write_text("old")
    with atomic_path(str(path)) as temporary:
        assert temporary.parent == path.parent  # elsewhere may be another disk, to which none moves
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("stood", [True, False])
def test_what_fails_leaves_the_old_file_and_no_other(tmp_path, error, stood):
    path = tmp_path / "notes"
    if stood:
        path.write_text("old")

    def write():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert [file.read_text() for file in tmp_path.iterdir()] == stood * ["old"]


def test_writers_at_once_do_not_share_a_file(tmp_path):
    path = tmp_path / "notes"
    with atomic_path(path) as one, atomic_path(path) as other:
        one.write_text("first")
        other.write_text("second, and longer")
    assert path.read_text() == "first"  # the outer one ends last
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "notes"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    assert path.read_text() == "old"
