"""Reading what llama-perplexity prints, and the table of figures."""

import pytest

from deploy.benchmarks.quantization import figures_in, table

PRINTED = """
====== Perplexity statistics ======
Mean PPL(Q)                   :   8.061230 ±   0.312341
Mean PPL(base)                :   7.936000 ±   0.301000
Cor(ln(PPL(Q)), ln(PPL(base))):  99.87%
Mean ln(PPL(Q)/PPL(base))     :   0.015660 ±   0.002000
Mean PPL(Q)/PPL(base)         :   1.015780 ±   0.002000
====== KL divergence statistics ======
Mean    KLD:   0.012345 ±   0.000400
Maximum KLD:   1.200000
99.9%   KLD:   0.300000
99.0%   KLD:   0.110000
====== Token probability statistics ======
Same top p: 93.456 ± 0.300 %
"""


def test_the_figures_of_a_file_are_read() -> None:
    assert figures_in(PRINTED) == {
        "perplexity": 8.06123,
        "perplexity_ratio": 1.01578,
        "kl_mean": 0.012345,
        "kl_p99": 0.11,
        "same_best": pytest.approx(0.93456),
    }


def test_a_figure_that_is_missing_is_a_dash_in_the_table() -> None:
    printed = table({"one": {"perplexity": 8.0}})
    assert printed.splitlines()[1].split() == ["one", "8.0000", "-", "-", "-", "-"]
