"""What plan-memory predicts against what a process really holds, on a CPU, with layers of the size of Wan2.1-1.3B.

    python bench/memory.py                       four layers of 1536, 240x416, 9 frames, fp32
    python bench/memory.py --layers 2 --frames 17

Every figure comes from a process of its own: resident memory after loading, and the highest resident memory during a
pass above what was resident before it (VmHWM of Linux, which the kernel counts page by page). Predicted are the same
numbers that `rushes plan-memory` adds up. A CPU has no allocator that caches, so this tests the arithmetic, not what a
GPU's allocator adds to it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

MIB = 2**20
LAYER = {
    "patch_size": [1, 2, 2], "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960, "cross_attn_norm": True,
}  # fmt: skip
STAGES = ("weights", "rollout", "train LoRA, checkpointing", "train LoRA, no checkpointing", "decode")
RANK = 32


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 4, "height": 240, "width": 416, "frames": 9, "batch": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--stage", choices=STAGES, help="measure this one, in this process")
    return parser.parse_args(words)


def resident(field: str) -> int:
    """Bytes resident now (VmRSS), or at most since `highest` was reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def highest(function: Callable[[], Any]) -> int:
    """Most bytes resident while a function runs, above what was resident before."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    function()
    return resident("VmHWM") - before


def measure(arguments: argparse.Namespace) -> dict[str, int]:
    """Predicted and measured bytes of one stage; in this process, which should do nothing else."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    from rollout.lora.adapter import add_adapter
    from rollout.policy import sizes

    torch.set_num_threads(1)
    latent = (16, (arguments.frames - 1) // 4 + 1, arguments.height // 8, arguments.width // 8)
    config = cast(sizes.TransformerConfig, {**LAYER, "num_layers": arguments.layers})
    if arguments.stage == "decode":
        vae = AutoencoderKLWan().requires_grad_(False)
        z = torch.zeros(1, *latent)
        with torch.no_grad():
            vae.decode(z[:, :, :1, :8, :8])  # what the library sets up once
            measured = highest(lambda: vae.decode(z, return_dict=False))
        return {"predicted": sizes.decode_bytes(vae.config, latent), "measured": measured}
    size = sizes.expert_size(config, RANK)
    before = resident("VmRSS")
    module: Any = WanTransformer3DModel(**config).requires_grad_(False)
    if arguments.stage == "weights":
        return {"predicted": 4 * size.parameters, "measured": resident("VmRSS") - before}
    train, saving = "train" in arguments.stage, arguments.stage.endswith("LoRA, checkpointing")
    run = sizes.Pass(latent, arguments.batch, 512, "float32", True, RANK if train else 0, train, saving)
    if train:
        add_adapter(module, RANK, RANK, 0)
    if saving:
        module.enable_gradient_checkpointing()
    small = sizes.Pass((16, 1, 4, 4), 1, 16, "float32", True, run.rank, train, saving)
    sizes._pass(module, config, small)  # gradients are there, and what the library sets up once
    measured = highest(lambda: sizes._pass(module, config, run))
    return {"predicted": sizes.working_bytes(config, run), "measured": measured}


def main(words: list[str] | None = None) -> None:
    """Measure one stage, or each in a process of its own, and print the table."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    if arguments.stage:
        print(json.dumps(measure(arguments)))
        return
    # glibc keeps freed memory for later unless larger pieces are mapped on their own
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    print("| stage | predicted, MiB | measured, MiB |\n|-|-|-|")
    for stage in STAGES:
        command = [sys.executable, __file__, *words, "--stage", stage]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found = json.loads(result.stdout.splitlines()[-1])
        print(f"| {stage} | {found['predicted'] / MIB:.0f} | {found['measured'] / MIB:.0f} |", flush=True)


if __name__ == "__main__":
    main()
