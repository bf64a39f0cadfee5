"""Reports as JSON: strict, described by a schema, read back whole or refused with a reason."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from report_samples import certificate, deep_report, missed, small_report, summary
from schema_check import problems

from graphopt.errors import LoadError
from graphopt.report import (
    SCHEMA,
    Applied,
    Certificate,
    FloatWeight,
    MissedRewrite,
    NodeView,
    OutputFidelity,
    PassSummary,
    Quantization,
    QuantizedLayer,
    Report,
    Trade,
    json_schema,
)

ROWS = {
    "applied": Applied,
    "certificate": Certificate,
    "missed": MissedRewrite,
    "node": NodeView,
    "pass": PassSummary,
    "layer": QuantizedLayer,
    "float": FloatWeight,
    "output": OutputFidelity,
    "quantization": Quantization,
    "trade": Trade,
}


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def misfits(report: Report) -> list[str]:
    schema = json_schema()
    return problems(strict(report.to_json()), schema, schema)


@pytest.mark.parametrize("report", [Report("empty"), small_report(), deep_report(3, odd=1)])
def test_reports_fit_the_schema(report: Report) -> None:
    assert misfits(report) == []


def test_the_schema_notices_what_does_not_fit() -> None:
    schema = json_schema()
    data = small_report().to_dict()
    data["missed"][0]["stage"] = "maybe"
    data["passes"][0]["kept"] = -1
    data["whole"][0]["error"] = "small"
    del data["applied"][0]["certificate"]["bound"]
    found = "\n".join(problems(data, schema, schema))
    for where in ("missed[0].stage", "passes[0].kept", "whole[0].error", "certificate.bound"):
        assert where in found


@pytest.mark.parametrize("name", [*ROWS, None])
def test_the_schema_names_every_field(name: str | None) -> None:
    schema = json_schema()
    described = schema["$defs"][name] if name else schema
    fields = dataclasses.fields(ROWS[name] if name else Report)
    assert list(described["properties"]) in ([f.name for f in fields], described["required"])
    assert set(described["properties"]) == {f.name for f in fields}
    assert set(described["required"]) <= set(described["properties"])


def test_the_schema_is_of_this_version() -> None:
    assert json_schema()["properties"]["schema"]["const"] == SCHEMA


@pytest.mark.parametrize("report", [Report("empty"), small_report(), deep_report(2)])
def test_round_trip(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report
    assert Report.from_dict(report.to_dict()) == report


def test_to_json_writes_the_file(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert small_report().to_json(file) == file
    assert small_report().to_json(str(file)) == file
    assert file.read_text(encoding="utf-8") == small_report().to_json()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_null_with_a_note(value: float) -> None:
    report = small_report()
    report.whole = [certificate(error=value)]
    report.passes = [summary(options={"scale": value})]
    data = strict(report.to_json())
    assert data == report.to_dict()
    assert data["whole"][0]["error"] is None
    assert data["passes"][0]["options"]["scale"] is None
    assert f"whole[0].error is {value} (null in JSON)" in data["notes"]
    assert misfits(report) == []
    assert not any("null" in note for note in report.notes)


def test_null_errors_read_as_nan_and_are_noted_once() -> None:
    report = small_report()
    report.whole = [certificate(error=math.inf)]
    again = Report.from_json(report.to_json())
    assert math.isnan(again.whole[0].error)
    assert again.to_json() == report.to_json()


def test_options_of_any_type_become_plain(tmp_path: Path) -> None:
    options = {
        "dtype": torch.float16,
        "where": tmp_path,
        "sizes": (1, 2),
        "skip": frozenset({"b", "a"}),
        "exact": True,
        3: None,
    }
    report = Report("model", passes=[summary(options=options)], recipe=[options])
    data = strict(report.to_json())
    wanted = {
        "dtype": "torch.float16",
        "where": str(tmp_path),
        "sizes": [1, 2],
        "skip": ["a", "b"],
        "exact": True,
        "3": None,
    }
    assert data["passes"][0]["options"] == wanted
    assert data["recipe"] == [wanted]


def test_newer_schemas_are_refused() -> None:
    data = small_report().to_dict() | {"schema": SCHEMA + 1}
    with pytest.raises(LoadError, match=f"schema {SCHEMA + 1}; this graphopt reads up to {SCHEMA}"):
        Report.from_dict(data)


def test_fields_of_later_versions_are_left_out() -> None:
    data = small_report().to_dict()
    data["colour"] = "blue"
    data["missed"][0]["severity"] = 3
    assert Report.from_dict(data) == small_report()


@pytest.mark.parametrize(
    "text",
    ["", "[" * 100_000, "[]", "{}", '{"schema": "1"}', '{"schema": 1}', "\x00", '{"schema": null}'],
)
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(LoadError, match=r"not a graphopt report|is missing"):
        Report.from_json(text)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda d: d["missed"][1].update(reason=3), r"report\.missed\[1\]\.reason"),
        (lambda d: d["applied"][0].pop("rule"), r"report\.applied\[0\]"),
        (lambda d: d["applied"][0].update(certificate=[]), r"applied\[0\]\.certificate"),
        (lambda d: d["whole"][0].update(error="1"), r"whole\[0\]\.error"),
        (lambda d: d["whole"][0].update(runs=True), r"whole\[0\]\.runs"),
        (lambda d: d.update(passes={}), r"report\.passes"),
        (lambda d: d.update(seconds=[]), r"report\.seconds"),
        (lambda d: d["graph_after"][0].update(inputs=[1]), r"graph_after\[0\]\.inputs\[0\]"),
    ],
)
def test_damage_is_named(change: Any, where: str) -> None:
    data = small_report().to_dict()
    change(data)
    with pytest.raises(LoadError, match=where):
        Report.from_dict(data)


def test_missing_optional_fields_take_their_defaults() -> None:
    data = small_report().to_dict()
    for field in ("stage", "option", "source", "node"):
        del data["missed"][0][field]
    first = Report.from_dict(data).missed[0]
    assert first == MissedRewrite("Attention", "FuseAttention", missed().reason)
