"""The table of a backend: its defaults, and what is said of a wrong one."""

from __future__ import annotations

import pytest

from mortise.errors import ConfigError
from mortise_cuda_common.options import CommonOptions, read_options


def test_defaults() -> None:
    options = read_options(CommonOptions, "cuda_hopper", {})
    assert options.wants_deep_gemm
    assert not options.demands_deep_gemm


@pytest.mark.parametrize(
    ("table", "wants", "demands"),
    [
        ({"runner": "triton"}, True, False),
        ({"runner": "triton", "indexer": "triton"}, False, False),
        ({"runner": "triton", "indexer": "deep_gemm"}, True, True),
        ({"runner": "deep_gemm"}, True, True),
    ],
)
def test_deep_gemm_is_loaded_where_anything_may_use_it(
    table: dict[str, object], wants: bool, demands: bool
) -> None:
    options = read_options(CommonOptions, "cuda_hopper", table)
    assert (options.wants_deep_gemm, options.demands_deep_gemm) == (wants, demands)


def test_every_wrong_key_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_options(CommonOptions, "cuda_hopper", {"runer": "auto", "num_workers": 0})
    text = str(caught.value)
    assert "backend_options.cuda_hopper is wrong" in text
    assert "unknown key 'runer', did you mean 'runner'?" in text
    assert "num_workers is 0" in text
