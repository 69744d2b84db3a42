"""Settings of `pytest bench`."""

import torch

torch.set_num_threads(1)  # the reference needs no more, and one thread waits for no busy core
