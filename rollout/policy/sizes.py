"""Sizes of a model's parts from their configurations: built and run on the meta device, where nothing is computed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import UMT5Config, UMT5EncoderModel

from rollout.lora.adapter import add_adapter, merge_at_calls
from rollout.policy.folder import DTYPES
from rollout.ranks.allocator import Allocator, Block
from rollout.ranks.backwards import Backwards

if TYPE_CHECKING:
    from torch import UntypedStorage

Shape = tuple[int, int, int, int]


class TransformerConfig(TypedDict):
    """config.json of a WanTransformer3DModel, as far as it is looked at."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    text_dim: int
    patch_size: Sequence[int]


class VaeConfig(TypedDict, total=False):
    """config.json of an AutoencoderKLWan, likewise."""

    scale_factor_temporal: int
    scale_factor_spatial: int


@dataclass(frozen=True)
class ExpertSize:
    """A transformer by its configuration."""

    parameters: int
    kept: int
    """Of these, parameters that diffusers keeps in fp32 whatever the dtype."""
    lora: int
    """Parameters of an adapter."""
    layers: int
    width: int
    block: int
    """Parameters of one block."""
    block_kept: int
    """Of these, in fp32 whatever the dtype."""


@dataclass(frozen=True)
class Peak:
    """Bytes that are needed at once."""

    alive: int
    """Of tensors."""
    reserved: int
    """That PyTorch's allocator takes from the device for them."""


@dataclass(frozen=True)
class Pass:
    """A forward, or a forward and backward, of one batch, as `working_bytes` counts it."""

    shape: Shape
    """Latents (C, F, H, W)"""
    batch: int
    text_length: int
    dtype: str
    guided: bool
    rank: int = 0
    """Of the adapter; 0 stands for none, and trains all weights."""
    train: bool = False
    checkpointing: bool = False
    per_token: bool = False
    """Every token has its own timestep (TI2V)."""
    reference: bool = False
    """The reference policy is asked while the activations of the trained one wait (the KL term of LoRA)."""
    batch_guidance: bool = False
    """Both forwards of guidance in one batch."""
    merge_lora: bool = False
    """The adapter is added to the weights at every forward."""
    apart: bool = False
    """Every forward has a backward pass of its own, as `ExpertWeights.backward` has it on ranks."""


def expert_size(config: TransformerConfig, rank: int) -> ExpertSize:
    """Count the parameters of a WanTransformer3DModel and of an adapter of that rank.

    All blocks are equal, so that one and two of them tell the rest.
    """
    counts = []
    for layers in (1, 2):
        module = meta_expert(config, layers)
        kept = sum(p.numel() for name, p in module.named_parameters() if _kept(module, name))
        everything = sum(p.numel() for p in module.parameters())
        add_adapter(module, rank, rank, 0)
        counts.append((everything, kept, sum(p.numel() for p in module.parameters()) - everything))
    layers = int(config["num_layers"])
    parameters, kept, lora = (extrapolate(one, two, layers - 1) for one, two in zip(*counts, strict=True))
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    block, block_kept, _ = (two - one for one, two in zip(*counts, strict=True))
    return ExpertSize(parameters, kept, lora, layers, width, block, block_kept)


def extrapolate(fewer: int, more: int, blocks: int) -> int:
    """What a model has that has `blocks` more than the one with `fewer`, when one block more has `more`."""
    return fewer + blocks * (more - fewer)


def vae_parameters(config: VaeConfig) -> int:
    """Parameters of an AutoencoderKLWan."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoencoderKLWan.from_config(dict(config)).parameters())


def text_parameters(config: Mapping[str, object]) -> int:
    """Parameters of a UMT5 encoder."""
    with torch.device("meta"):
        return sum(p.numel() for p in UMT5EncoderModel(UMT5Config(**config)).parameters())


def working_bytes(config: TransformerConfig, run: Pass) -> int:
    """Most bytes alive at once beside weights and gradients, in one forward (and backward) of an expert."""
    return working(config, run).alive


def working(config: TransformerConfig, run: Pass) -> Peak:
    """What one forward (and backward) of an expert needs beside weights and gradients.

    Run on meta tensors with two and three blocks and extrapolated: the peak grows by the same with every block after
    the second, and by more with the second, which is the first to compute while another waits. Attention counts as one
    fused kernel, which saves its inputs, its output and one number a query. Scratch space inside kernels is not seen.
    """
    peaks, fewer = [], min(2, int(config["num_layers"]))
    for layers in (fewer, fewer + 1):
        module = _cast(meta_expert(config, layers), run.dtype)
        module.requires_grad_(run.train and run.rank == 0)
        if run.rank:
            add_adapter(module, run.rank, run.rank, 0)
            merge_at_calls(module, run.merge_lora)
        if run.checkpointing:
            module.enable_gradient_checkpointing()
        with fused_attention():
            peaks.append(pass_peak(module, config, run))
    blocks = int(config["num_layers"]) - fewer
    alive, reserved = (
        extrapolate(getattr(peaks[0], name), getattr(peaks[1], name), blocks) for name in ("alive", "reserved")
    )
    return Peak(alive, max(alive, reserved))


def pass_bytes(module: nn.Module, config: TransformerConfig, run: Pass) -> int:
    """`working_bytes` of this module, which may be real."""
    return pass_peak(module, config, run).alive


def pass_peak(module: nn.Module, config: TransformerConfig, run: Pass) -> Peak:
    """`working` of this module, which may be real. Its gradients are there before, as from the second chunk on.

    Were they made in the pass, the largest activations and all gradients would be taken for simultaneous.
    """
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return peak_of(partial(_pass, module, config, run), module)


def decode_bytes(config: VaeConfig, shape: Shape) -> int:
    """Most bytes alive at once beside the weights while the VAE decodes one video of latents (C, F, H, W) in fp32."""
    return decode_peak(config, shape).alive


def decode_peak(config: VaeConfig, shape: Shape, videos: int = 1) -> Peak:
    """What the VAE needs beside its weights to decode some videos of latents (C, F, H, W) at once in fp32.

    The VAE works frame by frame, so three latent frames are run and the rest of the video is added.
    """
    channels, frames, rows, columns = shape
    some = min(frames, 3)
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(dict(config))
        latents = torch.zeros(videos, channels, some, rows, columns)
    vae.requires_grad_(False)
    with torch.no_grad():
        peak = peak_of(lambda: vae.decode(latents, return_dict=False)[0], vae)
    scale, step = int(config.get("scale_factor_spatial", 8)), int(config.get("scale_factor_temporal", 4))
    rest = videos * (frames - some) * step * 3 * rows * scale * columns * scale * 4
    return Peak(peak.alive + rest, peak.reserved + rest)


def peak_bytes(function: Callable[[], object], *modules: nn.Module) -> int:
    """Most bytes of new tensors alive at once while `function` runs, on any device; those of `modules` do not count."""
    return peak_of(function, *modules).alive


def peak_of(function: Callable[[], object], *modules: nn.Module) -> Peak:
    """What the new tensors of a function need at once, on any device; those of `modules` do not count."""
    known = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    live = _Live(known + [tensor.grad for tensor in known if tensor.grad is not None])
    with live:
        result = function()
    del result
    return Peak(live.peak, live.allocator.reserved)


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention is one fused kernel on every device; meta and fake tensors would else count scores in full."""
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        if query.device.type != "meta" and not isinstance(query, FakeTensor):
            return original(query, key, value, **options)  # type: ignore[no-any-return]
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]  # type: ignore[no-any-return]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until they die."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.allocator = Allocator()
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size, self.allocator.allocate(size))

    def _remove(self, key: int, size: int, block: Block) -> None:
        self.seen.discard(key)
        self.now -= size
        self.allocator.free(block)


def _pass(module: WanTransformer3DModel, config: TransformerConfig, run: Pass) -> None:
    """Forward, twice when guided, the reference's forwards, and backward; as Policy.velocity and training do it."""
    _, frames, rows, columns = run.shape
    dtype, where = DTYPES[run.dtype], module.patch_embedding.weight.device
    x = torch.zeros(run.batch, config["in_channels"], frames, rows, columns, dtype=dtype, device=where)
    text = torch.zeros(run.batch, run.text_length, config["text_dim"], dtype=dtype, device=where)
    t = torch.full((run.batch,), 500.0, device=where)
    if run.per_token:
        _, high, wide = config["patch_size"]
        t = t[:, None].expand(-1, frames * (rows // high) * (columns // wide))
    backwards = Backwards() if run.apart else None

    def forward(*inputs: Tensor) -> Tensor:
        out: Tensor = module(*inputs, return_dict=False)[0]
        return (out if backwards is None else backwards.cut(out)).float()

    with contextlib.nullcontext() if run.train else torch.no_grad():
        velocity = _velocity(forward, (x, t, text), run)
        if run.reference:
            with torch.no_grad():
                other = _velocity(forward, (x, t, text), run)
            velocity = velocity - other
        if run.train:
            loss = velocity.square().mean()
            loss.backward() if backwards is None else backwards.run(loss)


def _velocity(forward: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor], run: Pass) -> Tensor:
    """One forward, or two, perhaps in one batch, and what guidance makes of them: [B,C,F,H,W] fp32."""
    if run.guided and run.batch_guidance:
        velocity, other = forward(*(torch.cat([one, one]) for one in inputs)).chunk(2)
        return other + 2.0 * (velocity - other)
    velocity = forward(*inputs)
    if run.guided:
        other = forward(*inputs)
        velocity = other + 2.0 * (velocity - other)
    return velocity


def meta_expert(config: TransformerConfig, layers: int) -> WanTransformer3DModel:
    """A frozen transformer of so many blocks on the meta device."""
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        return WanTransformer3DModel.from_config({**known, "num_layers": layers}).requires_grad_(False)


def _kept(module: WanTransformer3DModel, name: str) -> bool:
    return not set(module._keep_in_fp32_modules or ()).isdisjoint(name.split("."))


def _cast(module: WanTransformer3DModel, dtype: str) -> WanTransformer3DModel:
    """Weights in the dtypes that `from_pretrained` gives them."""
    for name, parameter in module.named_parameters():
        if not _kept(module, name):
            parameter.data = parameter.data.to(DTYPES[dtype])
    return module
