"""Where the copy of MLflow's database is kept, and which copy is never restored."""

import re

import pytest

from gptcore.config import InputError
from tracking.backup import DUMP, check_no_older_backup


@pytest.fixture
def places(tmp_path):
    """A folder by its address is what a bucket is: the shared one, and the head's own in it."""
    (tmp_path / "head").mkdir()
    return f"file://{tmp_path}", f"file://{tmp_path}/head"


def test_a_copy_where_workers_could_write_is_refused_with_the_way_out(places, tmp_path):
    (tmp_path / DUMP).write_bytes(b"anything")
    shared, own = places
    way = f"`aws s3 mv {shared}/{DUMP} {own}/{DUMP}`, or else delete it"
    with pytest.raises(InputError, match=re.escape(way)):
        check_no_older_backup(*places)
    assert (tmp_path / DUMP).read_bytes() == b"anything"


def test_it_no_longer_matters_once_the_head_has_a_copy_of_its_own(places, tmp_path):
    (tmp_path / DUMP).write_bytes(b"anything")
    (tmp_path / "head" / DUMP).write_bytes(b"ours")
    check_no_older_backup(*places)


def test_a_new_cluster_has_none(places):
    check_no_older_backup(*places)
