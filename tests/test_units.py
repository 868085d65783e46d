import pytest

from gptcore.units import clock, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00 min"), (9.4, "0:09 min"), (249.6, "4:10 min"), (3909, "1:05:09 h")],
)
def test_durations_are_written_in_minutes_and_hours(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (12, "12 B"), (720e6, "720 MB"), (1.234e9, "1.23 GB"), (5e12, "5 TB")],
)
def test_sizes_are_written_in_units_of_a_thousand(count, text):
    assert size(count) == text
