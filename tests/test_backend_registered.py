"""The backend by its name alone: options that are registered, and the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import backend
from graphopt.errors import RecipeError
from graphopt.kernels.deferred.origin import Product
from graphopt.presets import EXACT, resolve

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "unregistered")

LAZY = ["exact", "FuseLossHead:lazy_logits=true"]


@pytest.fixture
def unregistered() -> Iterator[None]:
    yield
    backend.registered.clear()


def test_the_name_takes_what_was_registered_last() -> None:
    first = graphopt.register_backend(passes="none")
    second = graphopt.register_backend(passes=["Canonicalize"], measure=False)
    torch.compile(nn.Linear(4, 4), backend="graphopt")(torch.randn(2, 4))
    assert not first and [list(step) for step in second[0].recipe] == [["Canonicalize"]]


def test_options_of_its_own_come_first() -> None:
    reports = graphopt.register_backend(passes="none")
    options = {"passes": ["Canonicalize"]}
    torch.compile(nn.Linear(4, 4), backend="graphopt", options=options)(torch.randn(2, 4))
    assert not reports


@pytest.mark.parametrize("options", [{"pases": []}, {"passes": "exakt"}, {"budget": 1.0}])
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        graphopt.register_backend(**options)
    assert not backend.registered


def test_a_preset_in_a_list_with_other_options_for_one_pass() -> None:
    steps = resolve(LAZY)
    assert [s.name for s in steps] == [name.partition(":")[0] for name in EXACT]
    (head,) = [s for s in steps if s.name == "FuseLossHead"]
    assert head.options()["lazy_logits"]
    assert [s.name for s in resolve(["Canonicalize", "none", "Canonicalize"])] == [
        "Canonicalize",
        "Canonicalize",
    ]


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=1100, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def rows() -> list[dict[str, Tensor]]:
    made = torch.randint(1100, (16, 20), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in made]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product of deferred logits that is taken."""
    found: list[int] = []
    honest = Product._computed

    def noted(self: Product, operands: Any) -> Tensor:
        found.append(len(operands.hidden[0]))
        return honest(self, operands)

    monkeypatch.setattr(Product, "_computed", noted)
    return found


def curve(folder: Any, compiled: bool, calls: Any = (), **options: Any) -> tuple[list[float], Any]:
    """The Trainer's losses, and the Trainer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        str(folder), torch_compile=compiled, torch_compile_backend="graphopt" if compiled else None,
        max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=0, **options,
    )  # fmt: skip
    given = {"train_dataset": rows(), "eval_dataset": rows()[:8], "callbacks": list(calls)}
    if not options.get("prediction_loss_only"):
        given["compute_metrics"] = lambda p: {"highest": int(p.predictions.argmax(-1).sum())}
    trainer = transformers.Trainer(llama(), arguments, **given)
    trainer.train()
    return [h["loss"] for h in trainer.state.log_history if "loss" in h], trainer


@pytest.mark.parametrize("prediction_loss_only", [False, True])
def test_the_trainer(tmp_path: Any, computed: list[int], prediction_loss_only: bool) -> None:
    transformers = pytest.importorskip("transformers")

    class Counter(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            counts.append(len(computed))

    counts: list[int] = []
    reports = graphopt.register_backend(passes=LAZY, measure=False)
    options = {"prediction_loss_only": prediction_loss_only}
    wanted, eager = curve(tmp_path / "eager", False, **options)
    found, trainer = curve(tmp_path / "lazy", True, [Counter()], **options)
    assert found == pytest.approx(wanted, rel=1e-3)
    assert reports[0].verified and any("never held whole" in n for n in reports[0].notes)
    assert counts[0] == counts[-1], "the steps after the one that compiles compute no logits"
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(eager.evaluate()["eval_loss"], rel=1e-3)
    assert ("eval_highest" in metrics) != prediction_loss_only


def test_predictions_of_the_compiled_model(tmp_path: Any, computed: list[int]) -> None:
    """The Trainer evaluates the model itself; a loop of one's own may evaluate the compiled one."""
    graphopt.register_backend(passes=LAZY, measure=False)
    model = llama()
    fast = torch.compile(model, backend="graphopt")
    batch = {k: torch.stack([row[k] for row in rows()[:4]]) for k in ("input_ids", "labels")}
    fast(**batch).loss.backward()
    computed.clear()
    with torch.no_grad():
        made, wanted = fast(**batch), model(**batch)
        computed.clear()
        last = made.logits[:, -1].argmax(-1)
    assert computed == [4] and last.equal(wanted.logits[:, -1].argmax(-1))
    assert list(made.keys()) == list(wanted.keys())
    torch.testing.assert_close(made.to_tuple()[1].float().numpy(), wanted.logits.numpy())
    recursively = pytest.importorskip("accelerate.utils").convert_to_fp32(made)
    torch.testing.assert_close(recursively.logits.clone(), wanted.logits)
