"""Any operator of Thalweg as a `scipy.sparse.linalg.LinearOperator`, for SciPy's solvers.

Example:
    >>> import torch
    >>> from thalweg.operators.symmetric import DenseOperator
    >>> matrix = as_linear_operator(DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 5.0]))))
    >>> matrix.shape, matrix.matvec([1.0, 1.0, 1.0]).tolist()
    ((3, 3), [1.0, 2.0, 5.0])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from thalweg.errors import InvalidInput
from thalweg.operators.symmetric import SymmetricOperator

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator


def as_linear_operator(operator: SymmetricOperator) -> LinearOperator:
    """A SciPy view of a symmetric operator: `matvec` and `matmat` on float64 arrays.

    A block is one block product. Each product copies to the operator's dtype and device and back:
    for the top eigenpairs `top_eigenpairs` is several times faster than `eigsh`.

    Raises:
        InvalidInput: SciPy is not installed.
    """
    try:
        import numpy as np
        from scipy.sparse.linalg import LinearOperator
    except ImportError:
        raise InvalidInput("as_linear_operator needs SciPy: pip install 'thalweg[scipy]'") from None

    def multiply(array: np.ndarray) -> np.ndarray:
        # SciPy hands out columns (P, 1) as vectors.
        columns = np.ascontiguousarray(array, dtype=np.float64)
        vectors = torch.from_numpy(columns).to(operator.device, operator.dtype)
        flat = vectors.reshape(len(columns)) if vectors.dim() == 1 else vectors
        return (operator @ flat).double().cpu().numpy()

    # The arguments are those of the class that LinearOperator's constructor chooses.
    build: Any = LinearOperator
    return build(
        operator.shape, matvec=multiply, rmatvec=multiply, matmat=multiply, dtype=np.float64
    )
