"""The tests' own check of signatures finds what jaxtyping's would; see typecheck.py."""

from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import smalti
from smalti.functional.orders import halton
from smalti.functional.patches import patchify
from typecheck import check, check_once

checked = check_once(typechecker=check)


@checked
def joined(a: Float[Tensor, "B N"], b: Float[Tensor, "B M"], num: float = 1) -> Float[Tensor, "B N+M"]:
    return torch.cat([a, b], dim=1)[:, int(num) - 1 :]


@checked
def repeated(text: str, count: int = 2) -> list[str]:
    return [text] * count if count < 9 else text  # type: ignore[return-value]


@checked
def parts(x: Float[Tensor, "B N"]) -> Iterator[Float[Tensor, " N"]]:
    yield from x


@checked
def applied(function: "Callable[[Unknown], int]", count: int) -> int:  # type: ignore[name-defined]
    return count


def test_what_fits_is_passed_on() -> None:
    assert joined(torch.zeros(2, 3), torch.ones(2, 1), 1).shape == (2, 4)
    assert repeated("a", count=3) == ["a"] * 3 and repeated.__name__ == "repeated"
    assert [len(part) for part in parts(torch.zeros(2, 3))] == [3, 3]
    assert applied(len, 2) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: joined(torch.zeros(2, 3), torch.zeros(3, 3)),  # B twice
        lambda: joined(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)),
        lambda: joined(torch.zeros(2, 3), torch.zeros(2)),
        lambda: joined(torch.zeros(2, 3), torch.zeros(2, 3), 2),  # what comes back is one too narrow
        lambda: joined(torch.zeros(2, 3), torch.zeros(2, 3), "1"),
        lambda: repeated(1),
        lambda: repeated("a", 1.5),
        lambda: repeated("a", 9),
        lambda: parts(torch.zeros(2)),
        lambda: applied(len, "2"),
        lambda: halton((2, "3")),  # type: ignore[arg-type]
        lambda: patchify(torch.zeros(2, 8, 8), (4, 4)),
    ],
)
def test_what_does_not_fit_is_an_error(call: Callable[[], object]) -> None:
    with pytest.raises(TypeCheckError):
        call()


def test_it_is_what_the_hook_uses_and_it_can_be_turned_off() -> None:
    assert jaxtyping.jaxtyped is check_once
    assert smalti.functional.orders.halton.__code__.co_filename.endswith("typecheck.py")
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert repeated("a", 9) == "a"
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
