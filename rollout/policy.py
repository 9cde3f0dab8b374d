"""The policy: a Wan model with its experts, LoRA, guidance, text encoder and VAE, the same for rollout and training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.video_processor import VideoProcessor
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rollout.policy_folder import (
    DTYPES,
    EXPERT_FOLDERS,
    Layout,
    find_folder,
    fingerprint_folder,
    load_text,
    load_transformer,
    load_vae,
    read_layout,
)
from rollout.policy_full import copy_base, full_hashes, is_full, load_full, save_full
from rollout.policy_inputs import find_device, open_image
from rollout.policy_lora import (
    NAMES,
    adapter_hashes,
    add_adapter,
    canonical_sha256,
    expert_folder,
    has_adapter,
    load_adapter,
    remove_adapter,
    save_adapter,
)
from shards.errors import UserError
from shards.files import read_json

if TYPE_CHECKING:
    from shards.config import ModelConfig

Module = TypeVar("Module", bound=nn.Module)


class Policy:
    """A Wan model folder in memory. One loader for rollout and training, so that both compute the same bits.

    All parts rest in host memory; `use(expert)` brings one expert to the device and sends the other away. Text encoder
    and VAE are loaded when first needed and occupy the device only while they work.
    """

    def __init__(self, layout: Layout, dtype: str, device: torch.device, text_length: int) -> None:
        self.layout, self.dtype, self.device, self.text_length = layout, dtype, device, text_length
        self.boundary, self.expert_ids = layout.boundary, layout.expert_ids
        self.scheduler_config: Mapping[str, Any] = layout.scheduler_config
        self.start_lora: Path | None = None
        self._experts = {expert: load_transformer(layout, expert, dtype, device) for expert in self.expert_ids}
        self._bases: dict[int, nn.Module] = {}  # the base model's experts, while the policy has its own of all weights
        self._homes: dict[nn.Module, dict[str, Tensor]] = {}
        self._active: int | None = None

    @classmethod
    def of(cls, model: ModelConfig) -> Policy:
        """The model that [model] of run.toml names, as it was before any training. Raises UserError as `load` does."""
        return cls.load(
            model.path, dtype=model.dtype, device=model.device, text_length=model.text_length, lora=model.lora
        )

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: str = "float32", device: str = "auto", text_length: int = 512, lora: str = ""
    ) -> Policy:
        """Load a model folder (or hub id, or `words`), and the LoRA of folder `lora` when one is named.

        Raises UserError for a folder that is missing, foreign or damaged, and for a device that is not there.
        """
        if dtype not in DTYPES:
            raise UserError(f"model.dtype: {dtype!r} is unknown", f"one of {', '.join(DTYPES)}")
        where = find_device(device, dtype)
        policy = cls(read_layout(find_folder(str(path))), dtype, where, text_length)
        if lora:
            policy.start_lora = Path(lora).expanduser()
            policy._check_base(policy.start_lora)
            policy.become(None)
        return policy

    # --- Experts and where they are ----------------------------------------------------------------------------------

    def module(self, expert: int) -> nn.Module:
        """The transformer of an expert, wherever it is."""
        return self._experts[expert]

    def trainable(self, expert: int) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of an expert that take gradients: the adapter's, or all in full training."""
        return [(name, value) for name, value in self._experts[expert].named_parameters() if value.requires_grad]

    def use(self, expert: int | None) -> None:
        """Only this expert on the device; None sends both away. On a CPU nothing moves."""
        for other, module in self._experts.items():
            if other != expert:
                self._leave(module)
        if expert is not None:
            self._enter(self._experts[expert])
        self._active = expert

    def release(self) -> None:
        """Forget the text encoder and the VAE, and send the experts off the device; all come back when needed."""
        self.use(None)
        for name in ("_text", "_vae"):
            self.__dict__.pop(name, None)

    def _enter(self, module: nn.Module) -> None:
        """Bring a module to the device. Frozen weights keep their host copy, so that leaving costs no transfer."""
        if self.device.type == "cpu" or module in self._homes:
            return
        home = {name: tensor.data for name, tensor in _tensors(module) if not tensor.requires_grad}
        for _, tensor in _tensors(module):
            tensor.data = tensor.data.to(self.device, non_blocking=True)
        self._homes[module] = home

    def _leave(self, module: nn.Module) -> None:
        """Give a module's frozen weights their host copies back; weights that learn are copied from the device."""
        home = self._homes.pop(module, None)
        if home is None:
            return
        for name, tensor in _tensors(module):
            kept = home.get(name) if not tensor.requires_grad else None
            tensor.data = tensor.data.cpu() if kept is None else kept

    @contextlib.contextmanager
    def _working(self, module: Module) -> Iterator[Module]:
        """A helper module on the device for as long as it works."""
        self._enter(module)
        try:
            yield module
        finally:
            self._leave(module)

    # --- Adapters and identity ---------------------------------------------------------------------------------------

    @property
    def has_lora(self) -> bool:
        """Whether the experts carry adapters."""
        return all(has_adapter(module) for module in self._experts.values())

    def add_lora(self, rank: int, alpha: float, seed: int) -> None:
        """Fresh adapters on every expert; the same `seed` gives the same weights. Until trained they change nothing."""
        assert not self.has_lora, "adapters are added once"
        self.use(None)
        for expert, module in self._experts.items():
            add_adapter(module, rank, alpha, seed + expert)

    def load_lora(self, folder: str | Path) -> None:
        """Put on the adapters of a policy folder. Raises UserError when they are missing or of another model."""
        self.use(None)
        for expert, module in self._experts.items():
            load_adapter(module, expert_folder(Path(folder), expert, len(self._experts)))

    def save_lora(self, folder: str | Path, states: Mapping[int, dict[str, Tensor]] | None = None) -> None:
        """Write FOLDER/high_noise (and low_noise) as diffusers does; `states` replaces an expert's own weights."""
        for expert, module in self._experts.items():
            save_adapter(module, Path(folder) / NAMES[expert], (states or {}).get(expert))

    def train_all(self) -> None:
        """Let every weight of every expert take gradients. The base model stays beside them in host memory, frozen.

        That copy is the reference policy and costs what the base weights cost: 28 GB for each 14B expert in bfloat16.
        """
        assert not self.has_lora, "an adapter is trained instead of the weights, not with them"
        if not self._bases:
            self._replace(copy_base(self.layout, self.dtype, self.device))
        for module in self._experts.values():
            module.requires_grad_(True)

    @property
    def is_full(self) -> bool:
        """Whether the policy has all weights of its own, not adapters on those of the base model."""
        return bool(self._bases)

    def save(self, folder: Path) -> None:
        """Write what was trained: adapters, or whole transformer folders, below FOLDER/high_noise (and low_noise)."""
        if not self.is_full:
            return self.save_lora(folder)
        for expert, module in self._experts.items():
            save_full(module, folder / NAMES[expert], self.layout.folder / EXPERT_FOLDERS[expert])

    def become(self, folder: Path | None) -> None:
        """Take on the adapters or the transformers of a policy folder; which, its files tell.

        None is the policy as loaded: the base model, or `model.lora`. Raises UserError for what is not of this model.
        """
        self.use(None)
        source = folder if folder is not None else self.start_lora
        if source is not None and is_full(source):
            self._drop_adapters()
            return self._replace(load_full(self.layout, source, self.dtype, self.device))
        if self._bases:
            self._experts, self._bases = self._bases, {}
        if source is not None:
            return self.load_lora(source)
        self._drop_adapters()

    def _check_base(self, folder: Path) -> None:
        """UserError for a policy that says itself that it was trained on another base model."""
        record = folder / "policy.json"
        base = read_json(record).get("base") if record.is_file() else None
        if base is not None and base != self.base_fingerprint:
            raise UserError(
                f"model.lora: {folder} was trained on another base model than {self.layout.folder}",
                f"{record} has the fingerprint of its base; name that model in model.path",
            )

    def _replace(self, experts: dict[int, nn.Module]) -> None:
        """Put other weights in the place of the base model's, which are kept."""
        self.use(None)
        self._bases = self._bases or self._experts
        self._experts = experts

    def _drop_adapters(self) -> None:
        for module in self._experts.values():
            remove_adapter(module)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The reference policy: inside, the base model speaks, and what was trained is off.

        Adapters are switched off in the layers and not by peft's own call, which would also stop their gradients. A
        fully trained expert leaves the device for the base model's: one swap, so ask for many velocities at once.
        """
        with self._bases_in_place() if self.is_full else self._adapters_off():
            yield

    @contextlib.contextmanager
    def _bases_in_place(self) -> Iterator[None]:
        trained, active = self._experts, self._active
        self.use(None)
        self._experts = self._bases
        self.use(active)
        try:
            yield
        finally:
            self.use(None)
            self._experts = trained
            self.use(active)

    @contextlib.contextmanager
    def _adapters_off(self) -> Iterator[None]:
        modules = [module for expert in self._experts.values() for module in expert.modules()]
        layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
        before = [layer._disable_adapters for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, state in zip(layers, before, strict=True):
                layer._disable_adapters = state

    @cached_property
    def base_fingerprint(self) -> str:
        """sha256 (hex) of the base model: names and contents of every weight and configuration file."""
        return fingerprint_folder(self.layout)

    def fingerprint(self, policy_dir: str | Path | None) -> dict[str, Any]:
        """Identity of base and policy: {"fingerprint", "base", "adapters": {path in the folder: sha256}}.

        After full training `adapters` names the files of the transformers instead. None stands for the policy as
        loaded. Raises UserError when the folder lacks a file.
        """
        folder = Path(policy_dir) if policy_dir is not None else self.start_lora
        hashes = full_hashes if folder is not None and is_full(folder) else adapter_hashes
        adapters = {} if folder is None else hashes(folder, self.expert_ids)
        identity = {"base": self.base_fingerprint, "adapters": adapters}
        return {"fingerprint": canonical_sha256(identity), **identity}

    # --- The model ---------------------------------------------------------------------------------------------------

    def velocity(
        self,
        expert: int,
        x: Tensor,
        t: float,
        prompt_embeds: Tensor,
        negative_embeds: Tensor | None,
        guidance: float,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Guided velocity [B,C,F,H,W], fp32, of latents x [B,C,F,H,W] fp32 at timestep t (0 to 1000); takes gradients.

        prompt_embeds and negative_embeds are [B,L,D], padded; `condition` is what `encode_image` returned. With
        guidance above 1, v = u + g (v - u) of two forwards of the same batch, as WanPipeline does: one forward of twice
        the batch would round differently.
        """
        module = self._experts[expert]
        first: nn.Parameter = module.patch_embedding.weight  # type: ignore[assignment, union-attr]
        hidden, timestep = self._inputs(x, t, condition)
        hidden = hidden.to(first.dtype)

        def forward(embeds: Tensor) -> Tensor:
            out = module(hidden, timestep, embeds.to(first.dtype), return_dict=False)
            return out[0].float()  # type: ignore[no-any-return]

        conditional = forward(prompt_embeds)
        if guidance <= 1:
            return conditional
        assert negative_embeds is not None, "guidance needs the negative prompt"
        unconditional = forward(negative_embeds)
        return unconditional + guidance * (conditional - unconditional)

    def _inputs(self, x: Tensor, t: float, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Model input and timestep, as diffusers' pipeline_wan_i2v.py has them.

        I2V stacks the condition on the channels. TI2V puts the clean first frame in place and gives every token its
        own timestep, 0 for the given frame.
        """
        if not self.layout.expand_timesteps:
            hidden = x if condition is None else torch.cat([x, condition.expand(x.shape[0], -1, -1, -1, -1)], 1)
            return hidden, torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
        free = self.free_mask(x, condition)
        mask = torch.ones_like(x[:1, :1]) if free is None else free
        _, rows, columns = self.layout.patch
        timestep = (mask[0, 0, :, ::rows, ::columns] * t).flatten()
        return self.impose(x, condition), timestep.expand(x.shape[0], -1)

    def free_mask(self, x: Tensor, condition: Tensor | None) -> Tensor | None:
        """Latents that are the policy's to choose: [1,1,F,H,W], 0 on a given first frame (TI2V); None when all are."""
        if condition is None or not self.layout.expand_timesteps:
            return None
        mask = torch.ones_like(x[:1, :1])
        mask[:, :, : condition.shape[2]] = 0
        return mask

    def impose(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """x with the given first frame in its place (TI2V); x itself for other models."""
        mask = self.free_mask(x, condition)
        return x if mask is None else (1 - mask) * condition + mask * x  # type: ignore[operator]

    # --- Text --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embeddings of prompts, each [L,D] without padding, on the host; one prompt a forward."""
        tokenizer, encoder = self._text
        result = []
        with self._working(encoder):
            for prompt in prompts:
                tokens = tokenizer(
                    [prompt_clean(prompt)],
                    padding="max_length",
                    max_length=self.text_length,
                    truncation=True,
                    return_tensors="pt",
                )
                ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
                hidden = encoder(ids, mask).last_hidden_state
                result.append(hidden[0, : int(mask.sum())].cpu().contiguous())
        return result

    def pad(self, embeds: Tensor, batch: int) -> Tensor:
        """Embeddings [L,D] repeated and padded with zeros, as in the pipeline: [batch,text_length,D] on the device."""
        padded = torch.zeros(batch, self.text_length, embeds.shape[1], dtype=embeds.dtype, device=self.device)
        padded[:, : embeds.shape[0]] = embeds.to(self.device)
        return padded

    @cached_property
    def _text(self) -> Any:
        return load_text(self.layout, self.dtype, self.device)

    # --- Video -------------------------------------------------------------------------------------------------------

    def latent_shape(self, height: int, width: int, frames: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents of a video of that size in pixels and frames."""
        return self.layout.latent_shape(height, width, frames)

    def check_shape(self, height: int, width: int, frames: int) -> None:
        """Raise UserError for a size the model cannot make, naming the nearest it can."""
        self.layout.check_shape(height, width, frames)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Frames [B,T,H,W,3] uint8 of latents [B,C,F,H,W]: WanPipeline's frames (output_type "np") times 255, rounded.

        Videos are decoded one by one, so that a video's pixels do not depend on its neighbours in the batch.
        """
        with self._working(self._vae) as vae:
            mean, inverse_std = self._moments()
            # the pipeline divides by 1/std; multiplying by std would round differently
            clean = [row.to(self.device).float() / inverse_std + mean for row in latents[:, None]]
            videos = [vae.decode(row, return_dict=False)[0] for row in clean]
        frames: NDArray[np.float32] = self._processor.postprocess_video(torch.cat(videos), output_type="np")
        return (frames * 255).round().astype(np.uint8)

    @torch.no_grad()
    def encode_image(self, image: str | Path | Any, height: int, width: int, frames: int) -> Tensor:
        """The condition of an image (path or PIL image), on the host, fp32.

        I2V: [1,4+C,F,H,W], a mask and the encoded video that begins with the image and is grey after it. TI2V:
        [1,C,1,H,W], the clean first frame. As `prepare_latents` of diffusers' pipeline_wan_i2v.py. Raises UserError for
        a file that is no image.
        """
        pixels = self._processor.preprocess(open_image(image), height=height, width=width).to(self.device).float()
        video = pixels[:, :, None]
        if not self.layout.expand_timesteps:
            video = torch.cat([video, video.new_zeros(1, 3, frames - 1, height, width)], 2)
        with self._working(self._vae) as vae:
            mean, inverse_std = self._moments()
            latents = (vae.encode(video).latent_dist.mode() - mean) * inverse_std
        if self.layout.expand_timesteps:
            return latents.cpu()
        given = latents.new_zeros(1, self.layout.temporal_scale, *latents.shape[2:])
        given[:, :, 0] = 1
        return torch.cat([given, latents], 1).cpu()

    @cached_property
    def _vae(self) -> Any:
        return load_vae(self.layout, self.device)

    @cached_property
    def _processor(self) -> VideoProcessor:
        return VideoProcessor(vae_scale_factor=self.layout.spatial_scale)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and inverse standard deviation of the VAE's latents, each [1,C,1,1,1] on the device."""
        config = self._vae.config
        shape = (1, config.z_dim, 1, 1, 1)
        mean = torch.tensor(config.latents_mean).view(shape).to(self.device)
        return mean, 1.0 / torch.tensor(config.latents_std).view(shape).to(self.device)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
