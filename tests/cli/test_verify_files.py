"""``graphopt verify`` on ONNX files: their own signature, and inputs that do not fit it."""

from __future__ import annotations

import pytest

from graphopt.cli import main

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def write(path, element=1, shape=("batch", 6, 16)):
    """A file that returns twice its input."""
    x, y = (onnx.helper.make_tensor_value_info(name, element, shape) for name in ("x", "y"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "g", [x], [y])
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("good.onnx")


def verify(capsys, *arguments):
    """Exit status, standard output and standard error of ``graphopt verify``."""
    with pytest.raises(SystemExit) as leave:
        main(["verify", *arguments])
    out, err = capsys.readouterr()
    return leave.value.code, out, err


def test_inputs_are_drawn_from_the_signature(capsys):
    status, out, err = verify(capsys, "good.onnx", "good.onnx")
    assert status == 0, err
    assert "output 0 [2, 6, 16]" in out and "agree" in out


def test_types_that_cannot_be_drawn_are_named(capsys):
    write("words.onnx", element=onnx.TensorProto.UINT32)
    status, _, err = verify(capsys, "words.onnx", "words.onnx")
    assert status == 1 and "'x' of type tensor(uint32)" in err


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("x:float32[4,7,16]", "as float32[batch,6,16], but float32[4, 7, 16] was given"),
        ("x:float64[4,6,16]", "as float32[batch,6,16], but float64[4, 6, 16] was given"),
        ("x:float32[4,6]", "but float32[4, 6] was given"),
        ("y:float32[4,6,16]", "needs the input 'x'"),
        ("missing.pt", "no such file"),
        ("x:float32[99999999,99999,16]", "GiB of memory"),
    ],
)
def test_inputs_that_do_not_fit_are_one_error(capfd, given, hint):
    status, out, err = verify(capfd, "good.onnx", "good.onnx", "--inputs", given)
    assert status == 1 and hint in err
    assert "Traceback" not in out + err and "\x1b" not in out + err


def test_what_the_runtime_refuses_is_told_once(capfd):
    rows = onnx.numpy_helper.from_array(__import__("numpy").ones((4, 3), "float32"), "rows")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.INT64, ["n"])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3])
    node = onnx.helper.make_node("Gather", ["rows", "x"], ["y"], axis=0)
    graph = onnx.helper.make_graph([node], "g", [x], [y], [rows])
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), "rows.onnx")
    spec = "x:int64[300]<1000"
    status, out, err = verify(capfd, "rows.onnx", "rows.onnx", "--inputs", spec)
    assert status == 1 and "rows.onnx cannot run on these inputs (x: int64[300])" in err
    assert "\x1b" not in out + err and err.count("error:") == 1


@pytest.mark.parametrize("tolerance", ["-1", "nan", "inf"])
def test_a_tolerance_that_means_nothing_is_refused(capsys, tolerance):
    status, _, err = verify(capsys, "good.onnx", "good.onnx", "--tolerance", tolerance)
    assert status == 1 and "the tolerance is a number from 0 upward" in err


@pytest.mark.parametrize("kind", ["BertModel", "LlamaForCausalLM"])
def test_a_folder_and_what_was_made_of_it_agree(kind, capsys):
    """The flags with which a folder is captured are those with which its files are called."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = getattr(transformers, kind)
    model(model.config_class(**sizes, num_attention_heads=2)).save_pretrained("folder")
    main(["optimize", "folder", "-o", "made.pt2", "-o", "made.onnx"])
    for other in ("folder", "made.onnx"):
        status, out, err = verify(capsys, "made.pt2", other)
        assert status == 0 and "agree" in out, err
