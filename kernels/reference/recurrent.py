"""Recurrent operations in plain torch: tokens go in order through a state that is kept between steps.

Every sum is taken term by term in one order, so a token's bits depend neither on the sequences beside it nor on how a
prompt is cut.
"""

import torch


def causal_convolution(
    x: torch.Tensor, before: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each channel's weighted sum over its last `taps` tokens: (y like x, float32; the state behind the last token).

    x (sequences, tokens, channels); `before` (sequences, taps - 1, channels): the inputs in front of it; weight
    (channels, taps), the last tap for the token itself; bias (channels,).
    """
    tokens, taps = x.shape[1], weight.shape[1]
    inputs = torch.cat((before, x), dim=1)
    values, weights = inputs.float(), weight.float()
    y = values[:, :tokens] * weights[:, 0]
    for tap in range(1, taps):
        y = y + values[:, tap : tap + tokens] * weights[:, tap]
    if bias is not None:
        y = y + bias.float()
    return y, inputs[:, tokens:]
