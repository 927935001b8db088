"""All that `drl` imports on its way, so that who is forked from here has it: nothing is computed, no thread begins."""

import gymnasium.envs.classic_control  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import torture.hostile  # noqa: F401  # whose table of inputs takes longer than most of them
import torture.toy  # noqa: F401

import drl.card  # noqa: F401
import drl.cli  # noqa: F401
import drl.collect  # noqa: F401
import drl.export  # noqa: F401
import drl.train  # noqa: F401
