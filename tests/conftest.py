"""Every process of the suite computes on one thread: `make test` runs two of them side by side."""

import torch

torch.set_num_threads(1)
