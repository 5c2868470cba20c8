"""A file is the old one or the new one, and nothing is left beside it."""

import pytest

from rewardmodels.files import whole


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "notes"
    path.write_text("old")
    with whole(str(path)) as beside:
        assert beside.parent == path.parent  # elsewhere may be another disk, to which none moves
        beside.write_text("new")
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
        with whole(path) as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert [file.read_text() for file in tmp_path.iterdir()] == stood * ["old"]


def test_writers_at_once_do_not_share_a_file(tmp_path):
    path = tmp_path / "notes"
    with whole(path) as one, whole(path) as other:
        one.write_text("first")
        other.write_text("second, and longer")
    assert path.read_text() == "first"  # the outer one ends last
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "notes"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), whole(path):
        pass
    assert path.read_text() == "old"
