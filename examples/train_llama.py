"""Train a small Llama through graphopt's Dynamo backend and compare with eager, step by step.

python examples/train_llama.py [--steps 5]
"""

from __future__ import annotations

import argparse
import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    eager = LlamaForCausalLM(config)
    model = copy.deepcopy(eager)
    fast = graphopt.compile(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (eager, model)]
    for step in range(steps):
        tokens = torch.randint(256, (4, 32))
        losses = []
        for run, optimizer in zip((eager, fast), optimizers, strict=True):
            optimizer.zero_grad()
            loss = run(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"step {step}: loss {losses[0]:.6f} eager, {losses[1]:.6f} graphopt")
    kept = sum(len(r.applied) for r in fast.reports)
    verified = all(r.verified for r in fast.reports)
    print(f"{len(fast.reports)} graphs, {kept} rewrites kept, all verified: {verified}")


if __name__ == "__main__":
    main()
