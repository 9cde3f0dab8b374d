"""How a transformer computes what it computes: one place for all that a plan decides of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollout.lora.adapter import compute_in_input_dtype, merge_at_calls
from rollout.policy.folder import DTYPES, EXPERT_FOLDERS, Layout, read_config
from rollout.policy.kernels.attention import SPLIT, check_attention, check_name, set_attention
from rollout.policy.kernels.compiled import check_compile, set_compiled
from shards.errors import UserError
from shards.plan import Adapters, Arithmetic

if TYPE_CHECKING:
    import torch
    from torch import nn

    from shards.config import RunConfig


def adapters_of(dtype: str, full: bool = False, merge: bool = False) -> Adapters:
    """How a model of that `dtype` computes with an adapter; in `full` training there is none.

    UserError where it is to `merge` into weights in which its small values would be lost.
    """
    if full:
        return "float32"
    if merge and dtype != "float32":
        problem = f"model.merge_lora = true would round LoRA to the {dtype} of the weights"
        raise UserError(problem, "set model.merge_lora = false, or model.dtype = float32")
    return "merged" if merge else "float32" if dtype == "float32" else "model"


def arithmetic_of(config: RunConfig) -> Arithmetic:
    """What run.toml asks for. UserError for an unknown name, and for settings that exclude each other."""
    model, rollout, train = config.model, config.rollout, config.train
    check_name(model.attention)
    for name, ulysses in (("rollout.ulysses", rollout.ulysses), ("train.ulysses", train.ulysses)):
        if ulysses > 1 and model.attention not in SPLIT:
            problem = f"model.attention = {model.attention!r} cannot share the tokens of a video"
            raise UserError(f"{problem}, but {name} = {ulysses}", f"set model.attention = auto, or {name} = 1")
    return Arithmetic(
        attention=model.attention,
        compile=model.compile,
        batch_guidance=rollout.batch_guidance,
        decode_batch=rollout.decode_batch,
        adapters=adapters_of(model.dtype, train.full, model.merge_lora),
    )


def check_arithmetic(arithmetic: Arithmetic, layout: Layout, dtype: str, device: torch.device) -> None:
    """UserError for what cannot be computed so on a device: attention that is not there, blocks without a compiler."""
    if arithmetic.compile:
        check_compile(device)
    config = read_config(layout.folder / EXPERT_FOLDERS[0] / "config.json", "save the transformer too")
    check_attention(arithmetic.attention, device, DTYPES[dtype], int(config["attention_head_dim"]))


def set_arithmetic(module: nn.Module, arithmetic: Arithmetic) -> None:
    """Have a transformer compute so, with the adapter that it carries."""
    compute_in_input_dtype(module, arithmetic.adapters == "model")
    merge_at_calls(module, arithmetic.adapters == "merged")
    set_attention(module, arithmetic.attention)
    set_compiled(module, bool(arithmetic.compile))
