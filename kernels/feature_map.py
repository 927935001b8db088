"""phi: what queries and keys become before they meet."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu1": lambda x: F.elu(x) + 1,  # Katharopoulos et al. 2020, eq. 7: positive, so the weights are a mean
    "relu": torch.relu,
    "identity": lambda x: x,  # signed: the denominator may vanish, for tests and for maps applied outside
}
