"""The operations of recurrent layers in decode steps: what each computes, as operations.py has it for the others."""

from typing import Protocol

from torch import Tensor


class RecurrentOps(Protocol):
    """One token of each sequence through a state that is kept between steps.

    States lie in pools (pool rows, …). Row i of a step reads the state in row reads[i] (rows,) int64 and leaves the new
    one in row writes[i]; no row of a pool is written that another row of the step reads. Arithmetic is float32.
    """

    def convolve_row(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activates: bool,
        reads: Tensor,
        writes: Tensor,
        states: Tensor,
        out: Tensor,
    ) -> None:
        """out = each channel's weighted sum over its last tokens, of x (rows, channels) and of those in the state.

        weight (channels, taps), the last tap for the token itself; bias (channels,); states (pool rows, taps - 1,
        channels). With `activates` silu follows, of the rounded sum. Rows of x may lie apart, those of out do not.
        """

    def delta_update(
        self,
        mixed: Tensor,
        decay: Tensor,
        beta: Tensor,
        reads: Tensor,
        writes: Tensor,
        states: Tensor,
        out: Tensor,
    ) -> None:
        """The gated delta rule, see kernels.reference.recurrent.gated_delta_rule.

        mixed (rows, queries, keys and values side by side), whose key heads are shared by neighbouring heads; decay
        (rows, heads) float32, or as many for each as keys have channels; beta (rows, heads) float32; states (pool rows,
        heads, key dim, value dim) float32; out (rows, heads * value dim).
        """

    def space_update(
        self,
        mixed: Tensor,
        decay: Tensor,
        steps: Tensor,
        skip: Tensor,
        reads: Tensor,
        writes: Tensor,
        states: Tensor,
        out: Tensor,
    ) -> None:
        """The state space of Mamba-2, see kernels.reference.recurrent.state_space, plus skip (heads,) times the values.

        mixed (rows, values, keys and queries side by side); decay and steps (rows, heads) float32, the latter scale the
        values that the state takes in; states as in `delta_update`; out (rows, heads * value dim) float32.
        """
