"""Tests of rows in a file: nothing is lost on the way, and nothing else is taken for rows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnbench.exchange import read_rows, write_rows
from bnbench.probes import Trace
from bnbench.record import Record
from bnbench.registry import BadInput
from bnbench.study import Result, Trial
from tests.pilot_study import invented

ROWS = [
    (trial, invented(trial))
    for trial in (Trial(), Trial(norm="group", norm_options={"num_groups": 4}, curve_points=3), Trial(lr=0.3))
]


def exact(value: Any) -> str:
    """All digits and types, NaN and -0.0 among them."""
    return repr(value)


def finite(traces: Mapping[str, Trace]) -> dict[str, Trace]:
    """The traces with NaN for what is infinite, as they are kept."""

    def kept(numbers: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(number if math.isfinite(number) else math.nan for number in numbers)

    return {
        probe: dataclasses.replace(
            trace,
            values={name: kept(row) for name, row in trace.values.items()},
            series={name: tuple(map(kept, rows)) for name, rows in trace.series.items()},
        )
        for probe, trace in traces.items()
    }


numbers = st.floats(allow_nan=True, allow_infinity=True)
values = st.dictionaries(st.sampled_from(["a", "b"]), st.lists(numbers, min_size=2, max_size=2).map(tuple))
traces = st.builds(
    lambda index, values, series: Trace("layer", index, (0, 7), values, {"x": (series[: len(index)],) * 2}),
    st.lists(st.text(max_size=2) | st.floats(-9, 9), max_size=3).map(tuple),
    values,
    st.tuples(numbers, numbers, numbers),
)
results = st.builds(
    Result,
    st.sampled_from(["done", "diverged", "failed"]),
    st.dictionaries(
        st.text("abc/_ é", min_size=1, max_size=5), numbers.filter(lambda x: not math.isnan(x)), max_size=3
    ),
    st.dictionaries(st.sampled_from(["step", "val/acc"]), st.lists(numbers, max_size=3).map(tuple)),
    st.text(max_size=5).filter(lambda text: text.isprintable()),
    st.dictionaries(st.text("ab", max_size=2), st.none() | st.integers(0, 2**40) | st.text("xé", max_size=2)),
    traces=st.dictionaries(st.sampled_from(["rank", "drift"]), traces, max_size=1),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(results, max_size=4))
def test_rows_come_back_to_the_last_bit(tmp_path: Path, found: list[Result]) -> None:
    rows = [(Trial(seed=seed), result) for seed, result in enumerate(found)]
    path = tmp_path / "rows.parquet"
    assert write_rows(path, rows) == len(rows)
    back = read_rows(path)
    assert [trial for trial, _ in back] == [trial for trial, _ in rows]
    for (_, old), (_, new) in zip(rows, back, strict=True):
        assert exact(dataclasses.replace(new, metrics=dict(sorted(new.metrics.items())))) == exact(
            dataclasses.replace(old, metrics=dict(sorted(old.metrics.items())), traces=finite(old.traces))
        )
    assert [other.name for other in tmp_path.iterdir()] == ["rows.parquet"]


def test_a_record_goes_through_a_file(tmp_path: Path) -> None:
    one, two = Record(tmp_path / "one.db"), Record(tmp_path / "two.db")
    one.append(ROWS)
    write_rows(tmp_path / "rows.parquet", one.rows())
    assert two.append(read_rows(tmp_path / "rows.parquet")) == []
    assert list(two.rows()) == list(one.rows()) == ROWS
    one.close()
    two.close()


def test_a_file_from_before_there_were_probes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_rows(path, ROWS)
    pq.write_table(pq.read_table(path).drop_columns("traces"), path)
    assert read_rows(path) == ROWS


def doctored(path: Path, **columns: Any) -> Path:
    """An export of which some columns of the first row were changed."""
    write_rows(path, ROWS)
    lines = pq.read_table(path).to_pylist()
    lines[0].update(columns)
    pq.write_table(pa.Table.from_pylist(lines), path)
    return path


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"trial": json.dumps({"lr": 0.7})}, f"row {Trial().key}: its content does not give its key"),
        ({"trial": json.dumps({"rl": 0.7})}, "has no field 'rl'"),
        ({"trial": "{"}, "cannot be understood: the file was changed"),
        ({"trial": None}, "cannot be understood"),
        ({"curve": "[]"}, "cannot be understood"),
        ({"provenance": "3"}, "cannot be understood"),
        ({"traces": "[]"}, "cannot be understood"),
        ({"traces": '{"rank": {"axis": "layer"}}'}, "cannot be understood"),
        ({"traces": None}, "cannot be understood"),
        ({"status": "perfect"}, "cannot be understood"),
        ({"key": "0" * 16}, "its content does not give its key"),
        ({"row_version": 99}, "has rows of version 99, and this bnbench makes"),
    ],
)
def test_a_changed_row_is_refused(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    path = doctored(tmp_path / "rows.parquet", **columns)
    with pytest.raises(BadInput) as caught:
        read_rows(path)
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_rows(path, ROWS)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"cannot read .*rows\.parquet.*bnbench export") as caught:
            read_rows(path)
        assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"key": ["a"]}), path)
    with pytest.raises(BadInput, match="lacks the columns curve, provenance, reason, row_version"):
        read_rows(path)
    for nothing in (tmp_path, tmp_path / "nowhere.parquet"):
        with pytest.raises(BadInput, match="cannot read"):
            read_rows(nothing)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder.parquet").mkdir()
    for path in (tmp_path / "no" / "rows.parquet", tmp_path / "folder.parquet"):
        with pytest.raises(BadInput, match="cannot write") as caught:
            write_rows(path, ROWS)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.parquet"]
