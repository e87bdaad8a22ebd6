"""The curvature of a loss as a SciPy operator: its solvers work on it, no matrix is formed.

`eigsh` finds the ends of the Hessian's spectrum, beside Thalweg's own solver. Then conjugate
gradients solve (G + damping I) step = -gradient with G the Gauss-Newton matrix, which has no
negative eigenvalues, and the step is made. Needs SciPy: pip install 'thalweg[scipy]'.

    python examples/scipy_operator.py
"""

import torch
from scipy.sparse import eye_array
from scipy.sparse.linalg import aslinearoperator, cg, eigsh
from torch import nn

import thalweg
from thalweg.integrations import as_linear_operator

DAMPING = 0.1


def main() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(200, 10).double(), torch.randint(0, 3, (200,))
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    objective = thalweg.Objective(model, nn.CrossEntropyLoss(), (inputs, targets))

    # The graph is kept between products: solvers ask for many, one after another.
    hessian = thalweg.Hessian(objective, keep_graph=True)
    matrix = as_linear_operator(hessian)
    largest = eigsh(matrix, 3, which="LA", return_eigenvectors=False)[::-1]
    smallest = eigsh(matrix, 3, which="SA", return_eigenvectors=False)[::-1]
    top = thalweg.eigenpairs(hessian, 3, tolerance=1e-8)
    bottom = thalweg.eigenpairs(hessian, 3, which="smallest", tolerance=1e-8)
    for name, by_scipy, by_thalweg in (
        ("largest", largest, top.eigenvalues),
        ("smallest", smallest, bottom.eigenvalues),
    ):
        print(f"{name:8} by eigsh  ", *(f"{value:+.6f}" for value in by_scipy))
        print(f"{name:8} by Thalweg", *(f"{value:+.6f}" for value in by_thalweg.tolist()))

    value, gradient = objective.value_and_gradient()
    gauss_newton = as_linear_operator(thalweg.GaussNewton(objective, keep_graph=True))
    damping = aslinearoperator(DAMPING * eye_array(gauss_newton.shape[0]))
    step, failed = cg(gauss_newton + damping, -gradient.numpy(), rtol=1e-6)
    after = objective.value(objective.theta() + torch.from_numpy(step))
    print(f"damped Gauss-Newton step: solved: {not failed}, loss {value:.4f} -> {after:.4f}")


if __name__ == "__main__":
    main()
