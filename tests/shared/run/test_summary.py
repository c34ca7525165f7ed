"""What a run says of itself before it begins."""

from shared.run.summary import table


def test_table_aligns_values():
    lines = table({"parameters": "1.8M", "a checkpoint": "21.6 MiB", "note": ""}).splitlines()
    assert lines == ["parameters    1.8M", "a checkpoint  21.6 MiB", "note"]
    assert table({}) == ""
