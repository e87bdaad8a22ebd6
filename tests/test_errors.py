from __future__ import annotations

import pytest

from thalweg.errors import (
    Diverged,
    IntegrityError,
    Interrupted,
    InvalidInput,
    ThalwegError,
    invalid,
    unknown_name,
)


@pytest.mark.parametrize(
    ("kind", "status", "built_in"),
    [
        (InvalidInput, 2, ValueError),
        (Diverged, 3, ArithmeticError),
        (IntegrityError, 4, Exception),
        (Interrupted, 75, Exception),
    ],
)
def test_each_error_has_its_documented_exit_status(
    kind: type[ThalwegError], status: int, built_in: type[Exception]
) -> None:
    assert kind.exit_code == status
    assert issubclass(kind, (ThalwegError, built_in))
    assert issubclass(kind, built_in)


def test_a_bad_input_says_what_was_given_what_is_allowed_and_the_mend() -> None:
    error = invalid("k", 0, "an integer >= 1", "use the number of classes")
    assert isinstance(error, InvalidInput)
    assert str(error) == "k: got 0, allowed: an integer >= 1; use the number of classes"
    assert str(invalid("k", "a", "b")) == "k: got 'a', allowed: b"


def test_an_unknown_name_names_the_nearest_known_one_and_all() -> None:
    assert str(unknown_name("probe", "los", ["test", "loss"])) == (
        "probe: got 'los', allowed: one of loss, test; did you mean 'loss'?"
    )
    assert "did you mean" not in str(unknown_name("probe", "xyzzy", ["loss"]))


def test_a_keyword_is_taken_by_its_former_name_with_a_warning() -> None:
    from thalweg.operators.symmetric import DenseOperator
    from thalweg.spectrum.eigensolver import eigenpairs
    from thalweg.spectrum.trace_estimation import trace

    torch = pytest.importorskip("torch")
    operator = DenseOperator(torch.diag(torch.tensor([2.0, 1.0, 0.5])))
    with pytest.warns(DeprecationWarning, match="`max_products` is called `max_matvecs`") as said:
        found = eigenpairs(operator, 1, max_products=50)  # type: ignore[call-arg]
    assert said[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="`products` is called `num_matvecs`"):
        assert trace(operator, products=3).value == 3.5  # type: ignore[call-arg]
    for counted in (found, operator):
        with pytest.warns(DeprecationWarning, match="`products` is called `num_matvecs`") as said:
            assert counted.products == counted.num_matvecs
        assert said[0].filename == __file__
