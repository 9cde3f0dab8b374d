"""What surrounds the experts of a policy: the text encoder before them, the VAE behind them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from rollout.policy.folder import Layout, load_text, load_vae
from rollout.policy.images import open_image
from rollout.policy.offload import Offload
from shards.text.cleaning import clean

if TYPE_CHECKING:
    from PIL import Image


class TextEncoder:
    """Prompts to embeddings, by the network of a model folder."""

    def __init__(self, layout: Layout, dtype: str, device: torch.device, length: int) -> None:
        """`length`: tokens of a prompt, padded or cut."""
        self.layout, self.dtype, self.device, self.length = layout, dtype, device, length
        self._offload = Offload(device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, cleaned: bool = False) -> list[Tensor]:
        """Embeddings of prompts, each [L,D] without padding, on the host; one prompt a forward.

        Prompts that are `cleaned` already, those of a plan, are taken as they are.
        """
        tokenizer, encoder = self._text
        result = []
        with self._offload.working(encoder):
            for prompt in prompts:
                tokens = tokenizer(
                    [prompt if cleaned else clean(prompt)],
                    padding="max_length",
                    max_length=self.length,
                    truncation=True,
                    return_tensors="pt",
                )
                ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
                hidden = encoder(ids, mask).last_hidden_state
                result.append(hidden[0, : int(mask.sum())].cpu().contiguous())
        return result

    def pad(self, embeds: Tensor, batch: int) -> Tensor:
        """Embeddings [L,D] repeated and padded with zeros, as in the pipeline: [batch,length,D] on the device."""
        padded = torch.zeros(batch, self.length, embeds.shape[1], dtype=embeds.dtype, device=self.device)
        padded[:, : embeds.shape[0]] = embeds.to(self.device)
        return padded

    def release(self) -> None:
        """Forget the network; it is loaded again when needed."""
        self.__dict__.pop("_text", None)

    @cached_property
    def _text(self) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
        return load_text(self.layout, self.dtype, self.device)


class Vae:
    """Latents to video and images to conditions, by the VAE of a model folder."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self._offload = Offload(device)

    def load(self) -> None:
        """Load the network into host memory now. UserError when it is damaged: before the sampling, not after."""
        _ = self._vae

    def release(self) -> None:
        """Forget the network; it is loaded again when needed."""
        self.__dict__.pop("_vae", None)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 1) -> NDArray[np.uint8]:
        """Frames [B,T,H,W,3] uint8 of latents [B,C,F,H,W]: WanPipeline's frames (output_type "np") times 255, rounded.

        `batch` videos are decoded at once. Their number changes the last bits, as PyTorch takes other kernels for
        one small video than for several, so the plan has it; what the other videos are changes nothing.
        """
        with self._offload.working(self._vae) as vae:
            mean, inverse_std = self._moments()
            # the pipeline divides by 1/std; multiplying by std would round differently
            clean = [some.to(self.device).float() / inverse_std + mean for some in latents.split(batch)]
            videos = [vae.decode(some, return_dict=False)[0] for some in clean]
        frames: NDArray[np.float32] = self._processor.postprocess_video(torch.cat(videos), output_type="np")
        return (frames * 255).round().astype(np.uint8)

    @torch.no_grad()
    def encode_image(self, image: str | Path | Image.Image, height: int, width: int, frames: int) -> Tensor:
        """The condition of an image (path or PIL image), on the host, fp32.

        I2V: [1,4+C,F,H,W], a mask and the encoded video that begins with the image and is grey after it. TI2V:
        [1,C,1,H,W], the clean first frame. As `prepare_latents` of diffusers' pipeline_wan_i2v.py. Raises UserError for
        a file that is not an image.
        """
        pixels = self._processor.preprocess(open_image(image), height=height, width=width).to(self.device).float()
        video = pixels[:, :, None]
        if not self.layout.expand_timesteps:
            video = torch.cat([video, video.new_zeros(1, 3, frames - 1, height, width)], 2)
        with self._offload.working(self._vae) as vae:
            mean, inverse_std = self._moments()
            latents = (vae.encode(video).latent_dist.mode() - mean) * inverse_std
        if self.layout.expand_timesteps:
            return latents.cpu()
        given = latents.new_zeros(1, self.layout.temporal_scale, *latents.shape[2:])
        given[:, :, 0] = 1
        return torch.cat([given, latents], 1).cpu()

    @cached_property
    def _vae(self) -> AutoencoderKLWan:
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
