"""The number of threads of one operation, for as long as a model runs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def num_threads(count: int | None) -> Iterator[None]:
    """Let torch use ``count`` threads inside, and what it used before afterwards.

    torch keeps the number for the whole process; giving it back keeps two engines apart.
    """
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
