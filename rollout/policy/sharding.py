"""Experts over many ranks: weights sharded by FSDP2, token sequences by Ulysses, both on one device mesh."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from math import gcd
from typing import TYPE_CHECKING

import torch
from diffusers import ContextParallelConfig, WanTransformer3DModel
from diffusers.utils.logging import get_logger
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rollout.policy.folder import tokens
from rollout.ranks.backwards import Backwards
from shards.errors import UserError
from shards.run import EXPERT_NAMES

if TYPE_CHECKING:
    from rollout.ranks.world import World

EXACT = MixedPrecisionPolicy(cast_forward_inputs=False)  # compute in the dtypes that are there, as one process does


class Experts(nn.Module):
    """The experts of a policy in one module, so that FSDP has one root; a call names the expert it means.

    All ranks must call the same expert at the same time. With different ones each would gather half of one expert and
    half of the other, without any error.
    """

    def __init__(self, members: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleDict({EXPERT_NAMES[expert]: module for expert, module in members.items()})

    def forward(self, expert: int, *inputs: Tensor) -> Tensor:
        """What the expert's transformer returns for latents, timesteps and embeddings."""
        out: Tensor = self.members[EXPERT_NAMES[expert]](*inputs, return_dict=False)[0]
        return out


def distribute(members: dict[int, WanTransformer3DModel], world: World) -> Experts:
    """Shard experts over the ranks, in place, as plain modules of host memory; adapters must be on them already.

    Weights that learn are kept in fp32, and gathered in the dtype they had: the optimizer's masters are the module's
    own parameters then, and a forward computes the same bits as before. Each rank ends with its shards on its device.
    """
    assert world.fsdp_mesh is not None
    _be_quiet()
    for module in members.values():
        if world.ulysses > 1:
            split_tokens(module, world)
        for block in module.blocks:
            _shard(block, world.fsdp_mesh)
        _shard(module, world.fsdp_mesh)
    experts = Experts(members)
    fully_shard(experts, mesh=world.fsdp_mesh, mp_policy=EXACT)
    return experts


def backwards(experts: Experts) -> Backwards:
    """Backward passes through distributed experts. FSDP keeps its record of forwards until the last, to prefetch by."""
    assert isinstance(experts, FSDPModule)
    return Backwards(experts.set_is_last_backward)


def check_ulysses(
    module: WanTransformer3DModel, latents: tuple[int, int, int, int], world: World, setting: str = "train.ulysses"
) -> None:
    """UserError when the degree does not divide the heads or the tokens of latents (C, F, H, W); it says which do."""
    config = module.config
    heads = config.num_attention_heads
    count = tokens(latents, config.patch_size)
    if heads % world.ulysses == 0 and count % world.ulysses == 0:
        return
    fitting = [n for n in range(1, world.size + 1) if gcd(heads, count, world.size) % n == 0]
    raise UserError(
        f"{setting} = {world.ulysses}: does not divide the {heads} heads and {count} tokens of this model and "
        "video size",
        f"{', '.join(str(n) for n in fitting)} would do with {world.size} ranks",
    )


def plain_copy(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A transformer of the same configuration that is not sharded, with these weights; for `save_pretrained`."""
    with torch.device("meta"):
        copy: nn.Module = WanTransformer3DModel.from_config(module.config)
    copy.load_state_dict(state, strict=True, assign=True)
    return copy


def split_tokens(module: nn.Module, world: World) -> None:
    """Ulysses as diffusers has it, with PyTorch's own attention, the one backend that is right and has a backward."""
    assert world.device_mesh is not None
    config = ContextParallelConfig(ulysses_degree=world.ulysses, mesh=world.device_mesh["ring", "ulysses"])
    with _one_device():
        module.enable_parallelism(config=config)  # type: ignore[operator]


def _be_quiet() -> None:
    """Keep back what FSDP and diffusers say at every call, or on an interface that they may still change."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", message=".*all_gather_tensor. is deprecated", category=FutureWarning)
    for name in ("diffusers.models.modeling_utils", "diffusers.hooks.context_parallel"):
        get_logger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def _one_device() -> Iterator[None]:
    """diffusers divides by the number of accelerators, which is 0 on a CPU."""
    if torch.accelerator.is_available():
        yield
        return
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count


def _shard(unit: nn.Module, mesh: DeviceMesh) -> None:
    """Shard what of a module is not sharded yet. FSDP wants one dtype among the weights that learn of each part."""
    parts = _rounded(unit)
    for part in parts:
        learning = [weight for weight in part.parameters() if _free(weight)]
        dtype = learning[0].dtype
        for weight in learning:
            weight.data = weight.data.float()
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(part, mesh=mesh, mp_policy=policy)
    if unit not in parts:
        fully_shard(unit, mesh=mesh, mp_policy=EXACT)


def _rounded(module: nn.Module) -> list[nn.Module]:
    """The largest modules inside whose learning weights are all of half precision; none where all are fp32."""
    learning = [weight for weight in module.parameters() if _free(weight)]
    if not learning:
        return []
    if all(weight.dtype != torch.float32 for weight in learning):
        return [module]
    return [part for child in module.children() for part in _rounded(child)]


def _free(weight: nn.Parameter) -> bool:
    return weight.requires_grad and not isinstance(weight, DTensor)
