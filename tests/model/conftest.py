"""Tiny models are quickest on one thread: waking a second one takes longer than their matrix products."""

import torch

torch.set_num_threads(1)
