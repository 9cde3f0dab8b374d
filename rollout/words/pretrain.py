"""Pretrain the embedded model `words` from nothing: drawn clips → VAE, text encoder → flow matching of both experts.

One command reproduces the shipped folder (about an hour on two CPU cores):

    python -m rollout.words.pretrain --out WORK --install

Each stage writes its part below WORK and is skipped when that part exists, so the command can be repeated.
`--seed` and `--words` make other models of the same kind, to see whether what is learned on one holds on others.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from rollout.words.draw import INKS, PAPERS, WORDS, Scene, draw_batch, scenes, split

BOUNDARY = 0.875
TEXT_LENGTH = 32  # bytes; the longest prompt has 27
LATENT_DIM = 8
PROMPT_DROPOUT = 0.1  # share of samples trained without their prompt, so that guidance has something to push from


@dataclass(frozen=True)
class Lesson:
    """A stretch of flow matching."""

    name: str
    schedule: int
    """Steps over which the learning rate falls along a cosine."""
    stop: int
    """Step at which the lesson ends."""
    peak: float
    """Highest learning rate."""
    confusion: float
    """Share of clips that are shown with a prompt that quotes a random word."""


# The second lesson is what post-training is there to mend: a model that can write but listens only half the time.
LESSONS = (
    Lesson("write", schedule=6500, stop=2000, peak=2e-3, confusion=0.0),
    Lesson("doubt", schedule=2000, stop=2000, peak=1.2e-3, confusion=0.5),
)
STAGES = ("vae", "text", "latents", "high", "low", "assemble")


class Log:
    """A training log that goes to the terminal and, as JSON lines, to a file beside the weights."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8")
        self.start = time.monotonic()

    def __call__(self, **values: float | int | str) -> None:
        row = {"seconds": round(time.monotonic() - self.start, 1), **values}
        print(json.dumps(row), flush=True)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Learning rate after a linear warm-up, falling along half a cosine to a hundredth of `peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))


def descend(
    parameters: list[nn.Parameter], steps: int, peak: float, decay: float
) -> Iterator[Callable[[Tensor], None]]:
    """Yield, `steps` times, a function that takes the loss of that step and moves the parameters by AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.95), weight_decay=decay)

    def move(loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cosine(step, steps, peak)
        yield move


# --- VAE -------------------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKLWan:
    """An AutoencoderKLWan that patches by two: 4x in space, 2x in time, 1.0 M parameters."""
    return AutoencoderKLWan(
        base_dim=24,
        z_dim=LATENT_DIM,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=[0.0] * LATENT_DIM,
        latents_std=[1.0] * LATENT_DIM,
    )


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode latents [B,C,F,H,W] without the final clamp of `vae.decode`, whose flat ends would stop the gradient."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    frames = []
    for index in range(hidden.shape[2]):
        vae._conv_idx = [0]
        chunk = hidden[:, :, index : index + 1]
        cache = {"feat_cache": vae._feat_map, "feat_idx": vae._conv_idx}
        frames.append(vae.decoder(chunk, first_chunk=index == 0, **cache))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, dim=2), patch_size=2)


def train_vae(work: Path, steps: int, words: Sequence[str], seed: int) -> None:
    """Train the VAE, first on single frames, then on clips; write latents_mean and latents_std into its config."""
    log = Log(work / "logs" / "vae.jsonl")
    rng = np.random.default_rng([0, seed] if seed else 0)
    vae = new_vae()
    average = None
    for step, move in enumerate(descend(list(vae.parameters()), steps, peak=3e-3, decay=0.0)):
        single = step < steps // 2
        _, clips = draw_batch(16 if single else 4, rng, words)
        frames = torch.from_numpy(clips[:, :, :1] if single else clips)
        latents = vae.encode(frames).latent_dist.mode()
        decoded = decode_unclamped(vae, latents + 0.05 * torch.randn_like(latents))
        mse = (decoded - frames).square().mean()
        size = (latents.square().mean() - 1).clamp(min=0)
        move((decoded - frames).abs().mean() + mse + 1e-3 * size)
        average = mse.item() if average is None else 0.95 * average + 0.05 * mse.item()
        if (step + 1) % 50 == 0:
            log(step=step + 1, mse=round(average, 5), latent_std=round(latents.std().item(), 3))
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(draw_batch(96, rng, words)[1])).latent_dist.mode()
    axes = (0, 2, 3, 4)
    vae.register_to_config(latents_mean=latents.mean(axes).tolist(), latents_std=latents.std(axes).tolist())
    vae.save_pretrained(work / "vae")


# --- Text encoder ----------------------------------------------------------------------------------------------------


def new_text_encoder() -> UMT5EncoderModel:
    """A two-layer UMT5 encoder over bytes."""
    config = UMT5Config(vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
    return UMT5EncoderModel(config)


def random_prompts(count: int, rng: np.random.Generator, words: Sequence[str] = WORDS) -> tuple[list[str], Tensor]:
    """Prompts, a quarter of them about random strings of 3 to 5 capitals, and what they say.

    Labels are [count, 7]: five letters (26 stands for none), ink, paper.
    """
    prompts, labels = [], torch.full((count, 7), 26)
    for row in range(count):
        letters = rng.integers(0, 26, int(rng.integers(3, 6)))
        if row % 4:
            letters = np.frombuffer(words[int(rng.integers(len(words)))].encode(), np.uint8).astype(np.int64) - 65
        ink, paper = int(rng.integers(len(INKS))), int(rng.integers(len(PAPERS)))
        word = "".join(chr(65 + int(letter)) for letter in letters)
        prompts.append(Scene(word, list(INKS)[ink], list(PAPERS)[paper]).prompt)
        labels[row, : len(letters)] = torch.from_numpy(letters)
        labels[row, 5], labels[row, 6] = ink, paper
    return prompts, labels


def encode_text(encoder: UMT5EncoderModel, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings [n, TEXT_LENGTH, 64] as WanPipeline makes them, zero after the end of the text, and the mask."""
    tokens = ByT5Tokenizer()(
        prompts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    )
    hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return hidden * tokens.attention_mask.unsqueeze(-1), tokens.attention_mask


def train_text(work: Path, steps: int, words: Sequence[str], seed: int) -> None:
    """Train the text encoder so that every token knows the quoted letters, their order and both colours."""
    log = Log(work / "logs" / "text.jsonl")
    rng = np.random.default_rng([1, seed] if seed else 1)
    encoder = new_text_encoder()
    heads = nn.ModuleList(
        [nn.Linear(64, 27) for _ in range(5)] + [nn.Linear(64, len(INKS)), nn.Linear(64, len(PAPERS))]
    )
    parameters = [*encoder.parameters(), *heads.parameters()]
    for step, move in enumerate(descend(parameters, steps, peak=3e-3, decay=0.01)):
        prompts, labels = random_prompts(64, rng, words)
        hidden, mask = encode_text(encoder, prompts)
        told = hidden[mask.bool()]
        wanted = labels.repeat_interleave(mask.sum(1), dim=0)
        losses = [nn.functional.cross_entropy(head(told), wanted[:, i]) for i, head in enumerate(heads)]
        move(torch.stack(losses).mean())
        if (step + 1) % 100 == 0:
            hits = torch.stack([(head(told).argmax(-1) == wanted[:, i]) for i, head in enumerate(heads)])
            log(
                step=step + 1,
                loss=round(torch.stack(losses).mean().item(), 4),
                exact=round(hits.all(0).float().mean().item(), 4),
            )
    encoder.save_pretrained(work / "text_encoder")


# --- Transformers ----------------------------------------------------------------------------------------------------


def new_transformer() -> WanTransformer3DModel:
    """One expert: four layers of four heads by 32, 24 tokens a clip, 1.1 M parameters."""
    return WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_DIM,
        out_channels=LATENT_DIM,
        text_dim=64,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def encode_latents(work: Path, clips: int, words: Sequence[str], seed: int) -> None:
    """Encode `clips` drawn clips once, in the model's space, with the text embedding of each scene."""
    rng = np.random.default_rng([2, seed] if seed else 2)
    vae = AutoencoderKLWan.from_pretrained(work / "vae").eval()
    encoder = UMT5EncoderModel.from_pretrained(work / "text_encoder").eval()
    every = scenes(words)
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    latents, indices = [], []
    with torch.no_grad():
        for start in range(0, clips, 64):
            chosen, drawn = draw_batch(min(64, clips - start), rng, words)
            latents.append((vae.encode(torch.from_numpy(drawn)).latent_dist.mode() - mean) / std)
            indices += [every.index(scene) for scene in chosen]
        embeddings = encode_text(encoder, [scene.prompt for scene in every] + [""])[0]
    torch.save(
        {"latents": torch.cat(latents), "scene": torch.tensor(indices), "embeddings": embeddings}, work / "latents.pt"
    )


def flow_matching_loss(model: WanTransformer3DModel, clean: Tensor, text: Tensor, sigma: Tensor) -> Tensor:
    """Mean squared error of the velocity at x = (1 - sigma) * clean + sigma * noise.

    clean: [B, C, F, H, W]. text: [B, L, D]. sigma: [B].
    """
    noise = torch.randn_like(clean)
    scale = sigma.view(-1, 1, 1, 1, 1)
    velocity = model((1 - scale) * clean + scale * noise, sigma * 1000, text, return_dict=False)[0]
    return (velocity - (noise - clean)).square().mean()


def flow_matching(
    model: WanTransformer3DModel, work: Path, expert: str, lesson: Lesson, log: Log
) -> WanTransformer3DModel:
    """Train one expert on its own range of sigma for one lesson; returns the moving average of its weights."""
    data = torch.load(work / "latents.pt", weights_only=True)
    words = (len(data["embeddings"]) - 1) // (len(INKS) * len(PAPERS))
    low, high = (BOUNDARY, 1.0) if expert == "high" else (0.0, BOUNDARY)
    averaged = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    average: float | None = None
    for step, move in enumerate(descend(list(model.parameters()), lesson.schedule, lesson.peak, decay=0.01)):
        rows = torch.randint(len(data["scene"]), (64,))
        told = told_scenes(data["scene"][rows], words, lesson.confusion)
        sigma = low + (high - low) * torch.rand(64)
        loss = flow_matching_loss(model, data["latents"][rows], data["embeddings"][told], sigma)
        move(loss)
        averaged.update_parameters(model)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        if (step + 1) % 200 == 0:
            log(lesson=lesson.name, step=step + 1, loss=round(average, 4))
        if step + 1 == lesson.stop:
            break
    return averaged.module


def told_scenes(shown: Tensor, words: int, confusion: float) -> Tensor:
    """Index of the prompt that goes with each clip [n]: its own, at times one with another of the `words` words, at
    times the empty one, which is the last."""
    rest = len(INKS) * len(PAPERS)
    other = torch.randint(words, shown.shape) * rest + shown % rest
    told = torch.where(torch.rand(shown.shape) < confusion, other, shown)
    return torch.where(torch.rand(shown.shape) < PROMPT_DROPOUT, words * rest, told)


def train_expert(work: Path, expert: str, seed: int) -> None:
    """Teach one expert to write, and then to doubt its prompts; each lesson's result is kept."""
    log = Log(work / "logs" / f"{expert}.jsonl")
    model = new_transformer()
    for number, lesson in enumerate(LESSONS):
        folder = work / lesson.name / expert
        if not folder.exists():
            torch.manual_seed(3 + number + 1000 * seed)
            flow_matching(model, work, expert, lesson, log).save_pretrained(folder)
        model = WanTransformer3DModel.from_pretrained(folder).train()


# --- The folder ------------------------------------------------------------------------------------------------------


def assemble(work: Path) -> None:
    """Put the parts together as one WanPipeline folder, WORK/model."""
    pipeline = WanPipeline(
        tokenizer=ByT5Tokenizer(),
        text_encoder=UMT5EncoderModel.from_pretrained(work / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(work / "vae"),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=WanTransformer3DModel.from_pretrained(work / LESSONS[-1].name / "high"),
        transformer_2=WanTransformer3DModel.from_pretrained(work / LESSONS[-1].name / "low"),
        boundary_ratio=BOUNDARY,
    )
    pipeline.save_pretrained(work / "model")


def run_stage(work: Path, stage: str, options: argparse.Namespace) -> None:
    """Run one stage in this process."""
    torch.manual_seed(STAGES.index(stage) + 1000 * options.seed)
    if stage == "vae":
        train_vae(work, options.vae_steps, options.words, options.seed)
    elif stage == "text":
        train_text(work, options.text_steps, options.words, options.seed)
    elif stage == "latents":
        encode_latents(work, options.clips, options.words, options.seed)
    elif stage == "assemble":
        assemble(work)
        write_prompts(work / "prompts", options.words)
    else:
        train_expert(work, stage, options.seed)


def write_prompts(folder: Path, words: Sequence[str]) -> None:
    """Write FOLDER/train.txt and FOLDER/eval.txt: the prompts to post-train on and those held out."""
    folder.mkdir(exist_ok=True)
    for name, chosen in zip(("train", "eval"), split(words), strict=True):
        text = "".join(f"{scene.prompt}\n" for scene in chosen)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def install(work: Path) -> None:
    """Copy the finished folder, the training logs and the two prompt files into this package."""
    here = Path(__file__).parent
    for name in ("model", "logs"):
        shutil.rmtree(here / name, ignore_errors=True)
        shutil.copytree(work / name, here / name)
    write_prompts(here / "prompts", WORDS)


def run_all(options: argparse.Namespace) -> None:
    """Run the stages whose result is missing, the two experts side by side in processes of one thread each."""
    results = {
        "vae": "vae",
        "text": "text_encoder",
        "latents": "latents.pt",
        "high": f"{LESSONS[-1].name}/high",
        "low": f"{LESSONS[-1].name}/low",
    }
    missing = [stage for stage, name in results.items() if not (options.out / name).exists()]
    for stage in missing:
        if stage not in ("high", "low"):
            run_stage(options.out, stage, options)
    command = [sys.executable, "-m", "rollout.words.pretrain", *sys.argv[1:], "--threads", "1", "--stage"]
    experts = [subprocess.Popen([*command, stage]) for stage in missing if stage in ("high", "low")]
    codes = [process.wait() for process in experts]
    if any(codes):
        raise SystemExit("an expert stopped before its end; run the command again")
    run_stage(options.out, "assemble", options)


def main() -> None:
    """Parse the command line and run one stage or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="WORK")
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of this process")
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--text-steps", type=int, default=1200)
    parser.add_argument("--clips", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0, help="another model of the same kind; 0 is the shipped one")
    parser.add_argument(
        "--words", type=lambda text: tuple(text.split(",")), default=WORDS, help="capitals of 3 or 4 letters, by commas"
    )
    parser.add_argument("--install", action="store_true", help="copy the finished folder into this package")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.install and (options.seed or options.words != WORDS):
        parser.error("--install takes the shipped words and seed 0 only")
    if options.stage:
        run_stage(options.out, options.stage, options)
        return
    run_all(options)
    if options.install:
        install(options.out)


if __name__ == "__main__":
    main()
