from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.run.predictions import read_predictions, write_predictions

VALUES = st.text(st.characters(codec="utf-8")) | st.floats(allow_nan=False) | st.lists(st.text(max_size=5), max_size=3)


@given(st.lists(st.tuples(VALUES, VALUES), max_size=5))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_predictions_come_back_in_their_order(tmp_path: Path, pairs: list[tuple[object, object]]) -> None:
    labels, predictions = [label for label, _ in pairs], [guess for _, guess in pairs]
    write_predictions(tmp_path, ["a \udce9.png"] * len(pairs), labels, predictions)
    assert read_predictions(tmp_path) == (labels, predictions)
    assert (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").count("\n") == len(pairs)
