"""A graph rewriter from scratch, in the order in which graphopt's own parts build on each other.

Five steps of about twenty lines: capture, match, replace, prove, explain. Run it:

    python examples/rewriter_from_scratch.py
"""

from __future__ import annotations

import torch
from torch import fx, nn

aten = torch.ops.aten


class Model(nn.Module):
    """x * sigmoid(x) three times; one of them cannot be fused."""

    def forward(self, x):
        first = x * torch.sigmoid(x)
        second = torch.sigmoid(first) * first
        gate = torch.sigmoid(second)
        return second * gate + gate


# 1. Capture. A graph is a list of calls; each node names the nodes it reads.


def capture(model: nn.Module, *inputs: torch.Tensor) -> fx.GraphModule:
    return torch.export.export(model, inputs, strict=False).module()


# 2. Match. A pattern is a small tree; matching walks it and the graph together.
#    ("op", operator, left, right) is a call, a string is a variable.


def match(pattern, node, found: dict) -> bool:
    if isinstance(pattern, str):
        return found.setdefault(pattern, node) is node
    operator, *operands = pattern
    if not isinstance(node, fx.Node) or node.target is not operator:
        return False
    found.setdefault("inside", []).append(node)
    return all(match(p, a, found) for p, a in zip(operands, node.args, strict=False))


SIGMOID = aten.sigmoid.default
SILU = [(aten.mul.Tensor, "x", (SIGMOID, "x")), (aten.mul.Tensor, (SIGMOID, "x"), "x")]


# 3. Replace, but only what nobody else still needs.


def rewrite(graph_module: fx.GraphModule) -> list[str]:
    graph, notes = graph_module.graph, []
    for node in list(graph.nodes):
        for pattern in SILU:
            found: dict = {}
            if not match(pattern, node, found):
                continue
            _, sigmoid = found["inside"]
            outside = [u for u in sigmoid.users if u is not node]
            if outside:
                notes.append(
                    f"{node.name}: left alone, {sigmoid.name} also feeds {outside[0].name}"
                )
                break
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(aten.silu.default, (found["x"],)))
            graph.erase_node(node)
            graph.erase_node(sigmoid)
            notes.append(f"{node.name}: silu")
            break
    graph_module.recompile()
    return notes


# 4. Prove. Two float32 programs never agree exactly; both are held to float64.


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def prove(before, after, x: torch.Tensor) -> tuple[float, float]:
    exact = before(x.double())
    return error(before(x), exact), error(after(x), exact)


# 5. Explain. What happened, what did not, and the proof.


def main() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(64, 256)
    graph_module = capture(model, x)
    calls = sum(n.op == "call_function" for n in graph_module.graph.nodes)
    notes = rewrite(graph_module)
    left = sum(n.op == "call_function" for n in graph_module.graph.nodes)
    was, now = prove(model, graph_module, x)
    print("\n".join(notes))
    print(f"{calls} operators became {left}")
    print(f"relative error against float64: {was:.1e} before, {now:.1e} after")
    if now > 2 * was + 1e-6:
        raise SystemExit("the rewrite is wrong")


if __name__ == "__main__":
    main()
