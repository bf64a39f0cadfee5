"""What the rule's own examples do not show of merged projections."""

from __future__ import annotations

import torch
from models.huggingface import ENTRIES

from graphopt.capture import capture
from graphopt.passes.merge_projections import MergeProjections
from graphopt.pipeline import Context, run_pass
from graphopt.source import module_path

aten = torch.ops.aten


def test_a_merged_product_belongs_to_the_module_around_its_parts() -> None:
    entry = ENTRIES["bert"]
    program = capture(entry.build(), (), entry.inputs())
    context = Context.of(program, strict=True, measure=False)
    after = run_pass(program, MergeProjections(), context)
    merged = [n for n in after.graph.nodes if "MergeSiblings" in n.meta.get("rewritten_by", ())]
    layers = {f"bert.encoder.layer.{i}.attention.self" for i in range(2)}
    made = [n for n in merged if n.op == "call_function"]
    assert {module_path(n) for n in made} == layers
    assert len(made) == 2 * (1 + 1 + 3)
