"""onnx's own node tests: what ONNX Runtime runs, it runs with the stored outputs once optimized.

Cases whose original ONNX Runtime does not run have nothing to be compared with. Where the original
in ONNX Runtime is not what onnx stores, the optimized model is held to the original.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import numpy_helper

from graphopt.onnx_files.document import document_of, serialized, session_of
from graphopt.onnx_files.examine import Examiner
from graphopt.onnx_files.feeds import Feeds
from graphopt.onnx_files.pipeline import Pipeline
from graphopt.onnx_files.recipe import resolve_onnx
from graphopt.onnx_files.steps import Surroundings
from graphopt.onnx_files.values import flat, run

SHARDS = 16
LEAST = {"run": 1700, "changed": 300}
"""Of all cases: fewer would mean that this tests less than it says."""


@cache
def cases():
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():  # numpy's, while the cases are made
        warnings.simplefilter("ignore")
        return load_model_tests(kind="node")


def array(given):
    """An input or output as ONNX Runtime has it."""
    if isinstance(given, onnx.TensorProto):
        return numpy_helper.to_array(given)
    if isinstance(given, list):
        return [array(item) for item in given]
    return np.asarray(given) if isinstance(given, np.generic) else given


def parsed(case):
    """The model of a case; cases of older kinds lie in files."""
    return case.model if case.model is not None else onnx.load(Path(case.model_dir) / "model.onnx")


def data_of(case):
    """Stored inputs and outputs."""
    if case.data_sets is not None:
        return case.data_sets[0]
    folder = Path(case.model_dir) / "test_data_set_0"
    counts = {kind: len(list(folder.glob(f"{kind}_*"))) for kind in ("input", "output")}
    names = ([folder / f"{kind}_{i}.pb" for i in range(n)] for kind, n in counts.items())
    return tuple([onnx.load_tensor(name) for name in found] for found in names)


def original(case):
    """The parsed case with its inputs by name, and its outputs in ONNX Runtime."""
    document = document_of(parsed(case), Path("model.onnx"))
    session = session_of(document.model)
    named = zip(session.get_inputs(), data_of(case)[0], strict=True)
    feed = {entry.name: array(given) for entry, given in named}
    return document, feed, run(session, feed)


def close(case, wanted, found):
    pairs = list(zip(flat(wanted), flat(found), strict=False))
    return len(flat(wanted)) == len(flat(found)) and all(
        leaf_close(case, a, b) for (_, a), (_, b) in pairs
    )


def leaf_close(case, a, b):
    if not isinstance(b, np.ndarray) or b.dtype.kind in "OUS":
        return np.array_equal(np.asarray(a, object), np.asarray(b, object))
    a = np.asarray(a)
    if a.shape != b.shape:
        return False
    if b.dtype.kind not in "fc":  # integers, booleans, and what ml_dtypes adds
        a, b = a.astype(np.float64), b.astype(np.float64)
    return np.allclose(a, b, rtol=case.rtol, atol=case.atol, equal_nan=True)


def check(case, *, rolls_back=False):
    """``refused`` by ONNX Runtime, ``changed`` or ``same``; asserts that nothing broke.

    Args:
        rolls_back: whether passes may be taken back.
    """
    try:
        document, feed, before = original(case)
    except Exception:
        return "refused"
    feeds = Feeds(feed)
    pipeline = Pipeline(
        Examiner(document.model, feeds), Surroundings(document.model, feeds, measure=False)
    )
    result = pipeline.run(document.model, resolve_onnx("exact"))
    failed = [m for m in result.missed if m.stage == "verify"]
    assert rolls_back or not failed, case.name
    if not result.applied:
        return "same"
    made = onnx_ir.serde.deserialize_model(onnx.load_from_string(serialized(result.model)))
    after = run(session_of(made), feed)
    stored = [array(value) for value in data_of(case)[1]]
    wanted = stored if close(case, stored, before) else before
    loose = pipeline.examiner.wanted[0].loose
    kept = [i for i in range(len(after)) if i not in loose]
    assert close(case, [wanted[i] for i in kept], [after[i] for i in kept]), case.name
    return "changed"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_cases_come_through(shard):
    found = [check(case) for case in cases()[shard::SHARDS]]
    print({kind: found.count(kind) for kind in ("refused", "changed", "same")})
    ran, changed = len(found) - found.count("refused"), found.count("changed")
    assert ran * SHARDS > LEAST["run"] * 0.9 and changed * SHARDS > LEAST["changed"] * 0.5


@pytest.mark.parametrize("kind", ["simple", "pytorch-operator", "pytorch-converted"])
def test_files_of_operator_sets_before_thirteen_come_through(kind):
    """For those the rewriter is not made: what it gets wrong is taken back."""
    from onnx.backend.test.loader import load_model_tests

    found = [check(case, rolls_back=True) for case in load_model_tests(kind=kind)]
    assert len(found) - found.count("refused") >= 17
