"""A mixture of experts in PyTorch whose data change at step 600: its loss and gradient norms, one row a step.

    python pytorch.py norms.csv
    cargo run -p mass-cpd --example gradient_norms -- norms.csv
"""

import csv
import sys

import torch

TOKENS, DIM, HIDDEN, EXPERTS, STEPS, CHANGE = 256, 8, 16, 4, 700, 600

torch.manual_seed(0)
torch.set_num_threads(1)
gate = torch.nn.Linear(DIM, EXPERTS)
experts = torch.nn.ModuleList(
    torch.nn.Sequential(torch.nn.Linear(DIM, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 1))
    for _ in range(EXPERTS)
)
optimizer = torch.optim.AdamW([*gate.parameters(), *experts.parameters()], lr=1e-3)
teacher = torch.randn(2, DIM, 1)

with open(sys.argv[1], "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["step", "loss"] + [f"norm_{e}" for e in range(EXPERTS)])
    for step in range(STEPS):
        x = torch.randn(TOKENS, DIM)
        target = torch.sin(x @ teacher[0])
        if step >= CHANGE:
            target = torch.where(x[:, :1] > 0, torch.cos(2 * x @ teacher[1]), target)
        weights = gate(x).softmax(-1)
        top, chosen = weights.topk(2)
        y = torch.zeros(TOKENS, 1)
        for e, expert in enumerate(experts):
            tokens, slot = (chosen == e).nonzero(as_tuple=True)
            y = y.index_add(0, tokens, top[tokens, slot, None] * expert(x[tokens]))
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms = [expert[0].weight.grad.norm().item() for expert in experts]
        rows.writerow([step] + [f"{x:.6g}" for x in [loss.item()] + norms])
        optimizer.step()
