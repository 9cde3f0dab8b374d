"""LoRA of a policy: adapters on every expert, saved and loaded in diffusers' own format, one folder per expert."""

from __future__ import annotations

import copy
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rollout.lora.find import WEIGHTS, LoraFile
from rollout.lora.read import Lora, read_lora
from shards.errors import UserError
from shards.files import publish_replace
from shards.records.opening import refuse_escape
from shards.tensors import header_in_order

ADAPTER = "policy"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def add_adapter(module: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Put a trainable adapter on attention and feed-forward layers: A gaussian from `seed`, B zero, both fp32.

    With B zero the model computes the same bits as without an adapter. diffusers would give the weights the dtype of
    the base; in bfloat16 updates of 1e-4 would be rounded away. Products are those of `compute_in_input_dtype`.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(TARGETS))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.add_adapter(config, adapter_name=ADAPTER)  # type: ignore[operator]
    _to_float(module)


class InputDtypeLinear(nn.Linear):
    """A linear layer that rounds its fp32 weights to the dtype of what it is given, and keeps them as they are.

    peft and diffusers have one dtype for both: an adapter is stored in that of the model, and loses small updates, or
    it is in fp32 (`autocast_adapter_dtype`), and so are its products, with every activation cast there and back.
    """

    @classmethod
    def around(cls, layer: nn.Linear) -> InputDtypeLinear:
        """The same layer, with the same parameters."""
        with torch.device("meta"):
            new = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        new.weight, new.bias = layer.weight, layer.bias
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """x A^T + b in the dtype of x [..., in]; gradients reach the fp32 weights."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


def compute_in_input_dtype(module: nn.Module, wanted: bool = True) -> None:
    """Whether products with the adapter are in the dtype of the activations, as with a LoRA that diffusers loads, or in
    fp32; where the activations are fp32 it is the same.

    Adapters on convolutions, which only foreign files have, stay in fp32.
    """
    for layer in _linear(module):
        layer.cast_input_dtype_enabled = not wanted


class MergedLinear(LoraLinear):
    """A layer of peft with an adapter that adds the adapter to its weights at every call, W + (alpha/r) B A.

    One product instead of three is faster where a batch has few tokens; with many, the sum costs little and a second
    copy of the weights much. Gradients reach A and B through the sum. Beyond plain adapters peft computes as always.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (W + (alpha/r) B A)^T + b of x [..., in]."""
        if args or kwargs or not self._is_plain():
            return super().forward(x, *args, **kwargs)
        weight, bias = self.base_layer.weight, self.base_layer.bias
        for name in self.active_adapters:
            if name in self.lora_A:
                b, scaling = self.lora_B[name], self.scaling[name]
                weight = torch.addmm(weight, b.weight, self.lora_A[name].weight, alpha=scaling)
                if b.bias is not None:
                    bias = scaling * b.bias if bias is None else bias + scaling * b.bias
        return nn.functional.linear(x, weight, bias)

    def _is_plain(self) -> bool:
        """Whether all adapters are two factors of a linear layer, switched on and without dropout."""
        dropout = any(isinstance(one, nn.Dropout) and one.training for one in self.lora_dropout.values())
        return not (self.disable_adapters or self.merged or self.lora_variant or dropout)


def merge_at_calls(module: nn.Module, wanted: bool = True) -> None:
    """Whether the policy's adapter is added to the weights at every call (`MergedLinear`) or computed beside them."""
    for layer in _linear(module):
        if type(layer) in (LoraLinear, MergedLinear) and type(layer.base_layer) is nn.Linear:
            layer.__class__ = MergedLinear if wanted else LoraLinear


def remove_adapter(module: nn.Module) -> None:
    """Take the adapter off, if there is one."""
    if has_adapter(module):
        module.delete_adapters(ADAPTER)  # type: ignore[operator]
        module.requires_grad_(False)


def has_adapter(module: nn.Module) -> bool:
    """Whether the module carries the policy's adapter."""
    return ADAPTER in getattr(module, "peft_config", {})


def adapter_state(module: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of the adapter, or other ones under the module's names, under the names of files."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LoRA tensor.*invalid shape")  # peft takes biases for shards
        found: dict[str, Tensor] = get_peft_model_state_dict(
            module, None if state is None else dict(state), adapter_name=ADAPTER
        )
    return found


def save_adapter(module: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write FOLDER/pytorch_lora_weights.safetensors as `WanPipeline.save_lora_weights` does, alpha in the metadata.

    Without that metadata diffusers would load the adapter with alpha = rank, silently. `state` replaces the module's
    own weights (by averaged ones, or gathered from ranks), under the module's names.
    """
    layers = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_state(module, state).items()}
    config = module.peft_config[ADAPTER].to_dict()  # type: ignore[index, union-attr]
    # sets have no order of their own: sorted, so that equal adapters are equal files
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    refuse_escape(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as aside:
        WanPipeline.save_lora_weights(aside, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)
        publish_replace(folder / WEIGHTS, ordered((Path(aside) / WEIGHTS).read_bytes()))


@torch.no_grad()
def fold_strength(module: nn.Module) -> None:
    """Multiply alpha/rank into B and its bias, so that the adapter has its whole strength whoever reads it.

    Where alpha/rank is a power of two, no bit of what the module computes changes.
    """
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            for parameter in layer.lora_B[ADAPTER].parameters():
                parameter *= layer.scaling[ADAPTER]
            layer.scaling[ADAPTER] = 1.0
    config: LoraConfig = module.peft_config[ADAPTER]  # type: ignore[index, union-attr, assignment]
    config.lora_alpha, config.alpha_pattern, config.use_rslora = config.r, dict(config.rank_pattern), False


def load_adapter(module: nn.Module, file: LoraFile) -> None:
    """Put the LoRA of a file on a module, trainable, in fp32, replacing the one that is there.

    Raises UserError when the file is missing, damaged, or made for other layers.
    """
    put_on(module, read_lora(file))


def put_on(module: nn.Module, lora: Lora) -> None:
    """Put a LoRA on a module as `load_lora_weights` does, but trainable and fp32, replacing the one that is there.

    UserError where layers, shapes or ranks are not those of the module; then it carries none. On the meta device only
    that is checked.
    """
    remove_adapter(module)
    meta = any(parameter.is_meta for parameter in module.parameters())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the file has fewer layers than its metadata say, as it may
        try:
            config = copy.deepcopy(lora.config)
            inject_adapter_in_model(config, module, ADAPTER, low_cpu_mem_usage=meta, state_dict=lora.state)
        except ValueError as error:
            raise UserError(f"{lora.path}: {_unfit(module, lora, error)}", "a LoRA of another model") from error
    module._hf_peft_config_loaded = True  # type: ignore[assignment]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(f".{ADAPTER}." in name)
    _to_float(module)
    module.eval()  # layers that peft adds are in training: the dropout of a foreign adapter would be on
    misfit = _misfit(lora.state, adapter_state(module))
    if misfit:
        remove_adapter(module)
        raise UserError(f"{lora.path}: does not fit this model: {misfit[0]}", misfit[1])
    if not meta:
        set_peft_model_state_dict(module, lora.state, adapter_name=ADAPTER)


def _unfit(module: nn.Module, lora: Lora, error: ValueError) -> str:
    """Why peft finds nothing to do."""
    names = {name for name, _ in module.named_modules()}
    known = sorted({name.partition(".lora_")[0] for name in lora.state} & names)
    return f"peft puts no LoRA on {known[0]}: {str(error).splitlines()[0]}" if known else "has no layer of this model"


def _misfit(state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[str, str] | None:
    """How the weights of a LoRA differ from those a module has room for, by one example, and a hint."""
    for name in sorted(own.keys() | state.keys()):
        theirs, ours = (tuple(part[name].shape) if name in part else None for part in (state, own))
        if theirs and theirs != ours:
            known = f"is {list(ours)}" if ours else "does not exist"
            return f"{name} is {list(theirs)} there, and here {known}", "a LoRA of another model"
    missing = sorted(own.keys() - state.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"{missing[0]}{more} is missing there", "diffusers wants A, B and, where one layer has it, bias of all"
    return None


def ordered(data: bytes) -> list[bytes]:
    """A safetensors file with its header in order."""
    (length,) = struct.unpack_from("<Q", data)
    text = header_in_order(data[8 : 8 + length])
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return [struct.pack("<Q", len(text)), text, data[8 + length :]]


def _to_float(module: nn.Module) -> None:
    """Weights that learn to fp32, in layers that compute in the dtype of what they are given."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in _linear(module):
        for part in (layer.lora_A, layer.lora_B):
            part[ADAPTER] = InputDtypeLinear.around(part[ADAPTER])
    compute_in_input_dtype(module)


def _linear(module: nn.Module) -> Iterator[Any]:
    """The layers, of peft, on which the policy's adapter has two linear factors."""
    for layer in module.modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A and isinstance(layer.lora_A[ADAPTER], nn.Linear):
            yield layer
