"""A model, a loss and data of your own: how sharp is the loss, and where does its gradient point?

First the top eigenpairs of the Hessian from scratch, with their residual: the gap shows how many
belong to the dominant subspace. Then a tracker follows that subspace at every step of training,
with an estimate of its error, and its cost in gradients of the full loss.

    python examples/own_model.py
"""

import torch
from torch import Tensor, nn

import thalweg
from thalweg.spectrum import widest_gap

STEPS = 81


def main() -> None:
    torch.manual_seed(0)
    inputs, targets = clusters(1000, dimensions=20, classes=4)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))
    loss = nn.MSELoss()

    objective = thalweg.Objective(model, loss, (inputs, targets))
    hessian = thalweg.Hessian(objective, keep_graph=True)
    top = thalweg.top_eigenpairs(hessian, 8)  # NotConverged is a warning, never silence
    k = widest_gap(top.eigenvalues)
    print("eigenvalues", *(f"{value:.2f}" for value in top.eigenvalues.tolist()))
    print(f"{top.num_matvecs} products, converged: {top.converged}, widest gap below k = {k}")

    tracker = thalweg.SubspaceTracker(objective, k, gap_every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    cost = 0.0
    print("step   loss  sharpness  lambda_k  lambda_k+1  alignment  error")
    for step in range(STEPS):
        subspace, report = tracker.update(), tracker.report
        cost += report.subspace_cost
        if step % 20 == 0:
            value, gradient = objective.value_and_gradient()
            print(
                f"{step:4d} {value:6.3f} {subspace.eigenvalues[0]:10.2f}"
                f" {subspace.eigenvalues[-1]:9.2f} {report.next_eigenvalue:11.2f}"
                f" {subspace.alignment(gradient):10.3f} {tracker.estimate_error(gradient):6.2%}"
            )
        batch = torch.randint(0, len(inputs), (50,))
        optimizer.zero_grad()
        loss(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    print(f"the subspace cost {cost / STEPS:.1f} gradients a step")


def clusters(samples: int, dimensions: int, classes: int) -> tuple[Tensor, Tensor]:
    """Points (samples, dimensions) about one center a class, and their classes, one-hot."""
    centers = 1 + 0.3 * torch.randn(classes, dimensions)
    labels = torch.arange(samples) % classes
    return centers[labels] + torch.randn(samples, dimensions), torch.eye(classes)[labels]


if __name__ == "__main__":
    main()
