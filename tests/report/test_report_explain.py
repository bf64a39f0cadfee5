"""Why was this not rewritten? Answers by source line, node, module and line."""

from __future__ import annotations

import pytest
from report_samples import SOURCE, applied, deep_report, missed, small_report

from graphopt.errors import GraphoptError
from graphopt.report import Report
from graphopt.report.terminal import explain_lines


def test_answers_are_grouped_by_source_line() -> None:
    rows = [
        missed("A", source="m.py:3", reason="first"),
        missed("B", source="m.py:9", reason="second"),
        missed("C", source="m.py:3", reason="third"),
        missed("D", source=None, reason="fourth"),
    ]
    lines = explain_lines(Report("m", missed=rows))
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads == ["m.py:3:", "m.py:9:", "(source line unknown)"]
    third = next(i for i, line in enumerate(lines) if "third" in line)
    assert third < lines.index("m.py:9:")


def test_an_answer_names_reason_node_and_option() -> None:
    text = "\n".join(explain_lines(Report("m", missed=[missed()])))
    assert "FuseAttention does not apply: the mask is added after `softmax_1`" in text
    assert "at node add_1" in text
    assert "allowed by: Attention approximate=True" in text


def test_an_option_that_names_its_pass_stands_alone() -> None:
    text = "\n".join(explain_lines(Report("m", missed=[missed(option="Attention:heads=4")])))
    assert "allowed by: Attention:heads=4" in text


def test_braces_in_reasons_are_text() -> None:
    lines = explain_lines(Report("m", missed=[missed(reason="found {rule} and {0}")]))
    assert "found {rule} and {0}" in "\n".join(lines)


def test_control_characters_are_spelled_out() -> None:
    lines = explain_lines(Report("m", missed=[missed(reason="\x1b[2J\nx", source="a\x07:1")]))
    assert not any(set("\x1b\x07\n") & set(line) for line in lines)


def test_a_path_may_contain_any_word() -> None:
    assert "/unknown/m.py:3:" in explain_lines(
        Report("m", missed=[missed(source="/unknown/m.py:3")])
    )


def test_stages_of_later_versions_are_told_like_refusals() -> None:
    assert explain_lines(Report("m", missed=[missed(stage="later")]))


def test_one_node() -> None:
    lines = explain_lines(small_report(), "add_2")
    assert "softmax_2" in "\n".join(lines)
    assert "softmax_1" not in "\n".join(lines)


def test_a_rewritten_node_says_what_became_of_it() -> None:
    assert explain_lines(small_report(), "mean") == [
        "FuseNorm rewrote mean into rms_norm (error 1.5e-07, allowed 4e-07, 1.40x as fast)."
    ]


def test_a_module() -> None:
    text = "\n".join(explain_lines(deep_report(12, odd=1), "encoder.layer.1"))
    assert "`matmul_1` has another user" in text
    assert "`gelu_1`" in text
    assert "times" not in text, "layers 10 and 11 belong to no module encoder.layer.1"


@pytest.mark.parametrize("line", [f"{SOURCE}:40", "model.py:40", "project/model.py:40"])
def test_a_source_line(line: str) -> None:
    assert "softmax_1" in "\n".join(explain_lines(small_report(), line))


def test_a_line_must_match_whole() -> None:
    with pytest.raises(GraphoptError, match=r"odel\.py:40"):
        explain_lines(small_report(), "odel.py:40")


def test_a_node_without_candidates() -> None:
    assert "No rule found a candidate at scaled" in explain_lines(small_report(), "scaled")[0]


def test_an_unknown_node_names_the_nearest() -> None:
    with pytest.raises(GraphoptError, match="did you mean softmax_2"):
        explain_lines(small_report(), "softmaxx_2")


def test_nodes_are_known_without_graphs() -> None:
    report = Report("m", missed=[missed(node="a")], applied=[applied("R", ("b",), ("c",))])
    assert explain_lines(report, "a")
    assert "R rewrote b into c" in explain_lines(report, "b")[0]


def test_nothing_missed() -> None:
    assert "No rule found a candidate" in explain_lines(Report("m"))[0]
    done = Report("m", applied=[applied("R", ("a",), ("b",))])
    assert explain_lines(done) == ["Every candidate that was found was rewritten."]
