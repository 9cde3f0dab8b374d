"""The policy: a Wan model with its experts, LoRA, guidance, text encoder and VAE, the same for rollout and training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rollout.lora.start import check_model, check_records, of_one_expert, open_base, open_start
from rollout.policy.experts import ExpertWeights
from rollout.policy.folder import DTYPES, Layout, find_folder, read_layout
from rollout.policy.media import TextEncoder, Vae
from rollout.ranks.device import find_device
from shards.errors import UserError

if TYPE_CHECKING:
    from rollout.lora.merged import BaseLora
    from shards.config import ModelConfig


class Policy:
    """A Wan model folder in memory. One loader for rollout and training, so that both compute the same bits.

    `experts`, `text` and `vae` rest in host memory, and each brings itself to the device: `experts.use` brings one
    expert and sends the other away; text encoder and VAE are loaded when first needed and occupy the device only while
    they work. The policy itself computes velocities and keeps given frames in place.
    """

    def __init__(
        self,
        layout: Layout,
        dtype: str,
        device: torch.device,
        text_length: int,
        base_lora: BaseLora | None = None,
        experts: ExpertWeights | None = None,
    ) -> None:
        """`experts` are those of the model folder if absent, with `base_lora` merged into them."""
        self.layout, self.dtype, self.device = layout, dtype, device
        self.experts = experts or ExpertWeights(layout, dtype, device, base_lora)
        self.text = TextEncoder(layout, dtype, device, text_length)
        self.vae = Vae(layout, device)

    @classmethod
    def of(cls, model: ModelConfig) -> Policy:
        """The model that [model] of run.toml names, as it was before any training. Raises UserError as `load` does."""
        names = ("dtype", "device", "text_length", "lora", "lora_2", "base_lora", "base_lora_2", "base_lora_scale")
        return cls.load(model.path, **{name: getattr(model, name) for name in names})

    @staticmethod
    def device_of(model: ModelConfig) -> torch.device:
        """Where [model] of run.toml runs. UserError when that device is not there."""
        return find_device(model.device, model.dtype)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "float32",
        device: str = "auto",
        text_length: int = 512,
        lora: str = "",
        lora_2: str = "",
        base_lora: str = "",
        base_lora_2: str = "",
        base_lora_scale: float = 1.0,
    ) -> Policy:
        """Load a model folder (or hub id, or `words`), merge the LoRA beneath it, and put on the one to start from.

        Raises UserError for a folder or LoRA that is missing, foreign or damaged, and for a device that is not there.
        """
        if dtype not in DTYPES:
            raise UserError(f"model.dtype: {dtype!r} is unknown", f"one of {', '.join(DTYPES)}")
        where = find_device(device, dtype)
        layout = read_layout(find_folder(str(path)))
        start = open_start(lora, lora_2, layout)
        policy = cls(layout, dtype, where, text_length, open_base(base_lora, base_lora_2, base_lora_scale, layout))
        policy.experts.start = start
        check_records(policy.experts)
        if start is not None:
            policy.experts.become(None)
        return policy

    @staticmethod
    def check_loras(model: ModelConfig, layout: Layout) -> list[str]:
        """A sentence for the user about each LoRA that only one of two experts gets. Raises UserError as `load`."""
        return of_one_expert(model, layout)

    def check_model(self, path: Path) -> None:
        """UserError where base model and `model.base_lora` are not those in model.json of a run, if that is there."""
        check_model(self.experts, path)

    def release(self) -> None:
        """Forget the text encoder and the VAE, and send the experts off the device; all come back when needed."""
        self.experts.use(None)
        self.text.release()
        self.vae.release()

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

        prompt_embeds and negative_embeds are [B,L,D], padded; `condition` is what `vae.encode_image` returned. With
        guidance above 1, v = u + g (v - u) of two forwards of the same batch, as WanPipeline does. One forward of twice
        the batch, `batch_guidance` of the plan, rounds differently.
        """
        dtype = DTYPES[self.dtype]
        hidden, timestep = self._inputs(x, t, condition)
        hidden = hidden.to(dtype)

        def forward(hidden: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
            return self.experts.forward(expert, hidden, timestep, embeds.to(dtype)).float()

        if guidance <= 1:
            return forward(hidden, timestep, prompt_embeds)
        assert negative_embeds is not None, "guidance needs the negative prompt"
        if self.experts.arithmetic.batch_guidance:
            both = torch.cat([prompt_embeds, negative_embeds])
            conditional, unconditional = forward(hidden.repeat(2, 1, 1, 1, 1), torch.cat([timestep] * 2), both).chunk(2)
        else:
            conditional, unconditional = (forward(hidden, timestep, one) for one in (prompt_embeds, negative_embeds))
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
        """x [B,C,F,H,W] with the given first frame, `condition`, in its place (TI2V); x itself for other models."""
        mask = self.free_mask(x, condition)
        return x if mask is None else (1 - mask) * condition + mask * x  # type: ignore[operator]
