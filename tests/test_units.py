import pytest

from gptcore.units import clock, size


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0:00"), (9.4, "0:09"), (249.6, "4:10"), (3909, "1:05:09")]
)
def test_a_time_is_said_in_minutes_and_hours(seconds, said):
    assert clock(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (12, "12 B"), (720e6, "720 MB"), (1.234e9, "1.23 GB"), (5e12, "5 TB")],
)
def test_bytes_are_said_in_units_of_a_thousand(count, said):
    assert size(count) == said
