"""System-aware biased local SGD in one process: two classes take turns and differ in local steps."""

from itertools import islice

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

torch.manual_seed(0)
torch.set_num_threads(1)
x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
train_x, train_y, test_x, test_y = x[:1500].float() / 16, y[:1500], x[1500:].float() / 16, y[1500:]
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

n, batch_size, hard_ratio = len(train_x), 8, 0.5
tau = {"fast": 16, "slow": 2}  # local steps in a round, of classes of which one is 8 times slower
rounds = n // (batch_size * sum(tau.values()))
common = parameters_to_vector(model.parameters()).detach()
loss = torch.full((n,), torch.inf)  # the last known one of each sample

for _ in range(10):  # epochs
    size = {name: rounds * steps * batch_size for name, steps in tau.items()}
    hard = loss.topk(int(hard_ratio * size["fast"])).indices  # biased sampling: the hardest samples for the fast class
    others = torch.tensor(sorted(set(range(n)) - set(hard.tolist())))
    others = others[torch.randperm(len(others))[: size["fast"] - len(hard)]]
    drawn = {"fast": torch.cat([hard, others])[torch.randperm(size["fast"])], "slow": torch.randperm(n)[: size["slow"]]}
    batches = {name: iter(indices.split(batch_size)) for name, indices in drawn.items()}
    for _ in range(rounds):
        average = torch.zeros_like(common)
        for name, steps in tau.items():
            vector_to_parameters(common.clone(), model.parameters())  # every class starts from the common model
            for rows in islice(batches[name], steps):
                losses = nn.functional.cross_entropy(model(train_x[rows]), train_y[rows], reduction="none")
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                loss[rows] = losses.detach()
            weight = steps / sum(tau.values())  # biased average: by local steps
            average += weight * parameters_to_vector(model.parameters()).detach()
        common = average

vector_to_parameters(common, model.parameters())
print(f"accuracy {(model(test_x).argmax(1) == test_y).float().mean():.4f}")
