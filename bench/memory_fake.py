"""Memory that `rushes plan-memory` predicts against what PyTorch tracks on fake tensors at full size, without a GPU.

    OMP_NUM_THREADS=1 python bench/memory_fake.py --page docs/benchmarks.md       minutes on one core
    OMP_NUM_THREADS=1 python bench/memory_fake.py --preset wan21-1.3b --row update

The models are those of the presets, at their shapes. What runs is the product's own: `take_step` with the adapter on,
`Policy.decode`, `Policy.encode`, `ExpertTrainer.update`. Fake tensors on `cuda` stand for those of a device. Updates
run on fake tensors of the CPU with the kernels of a GPU, as autograd of fake CUDA tensors asks for a CUDA context.
Steps and updates are tracked with two and with three blocks, three and four on ranks, and the difference stands for
each of the others (`rollout.policy.sizes.working` says why not with one and two). Decoding has its whole expert, the
text encoder all its layers. On 8 ranks FSDP2 shards the expert over a process group that sends nothing. What kernels
and cuDNN take for scratch space is in neither column.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.gpu import tracked
from bench.gpu.models import MODELS
from bench.learn import replace_section
from rollout.memory.estimate import Model, read_model
from rollout.memory.needs import Need, plan_memory
from shards.run import Run
from shards.run_toml import apply_sets, parse_config, read_preset

GIB = 2**30
RANKS = 8
LOW, HIGH = 0.97, 1.10
UMT5 = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
VAE22: dict[str, Any] = {
    "z_dim": 48, "base_dim": 160, "decoder_base_dim": 256, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "is_residual": True, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
PRESETS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "wan21-1.3b": ("Wan2.1-1.3B", "1.3b", {}, {}),
    "wan22-a14b": ("Wan2.2-A14B", "a14b", {}, {"boundary_ratio": 0.875}),
    "wan22-ti2v-5b": ("Wan2.2-TI2V-5B", "5b", VAE22, {"expand_timesteps": True}),
}
"""Name, transformer, VAE and entries of the index, by preset."""
SCHEDULER = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "use_flow_sigmas": True}
ROWS = ("step", "decode", "encode", "update", "update on 8 ranks")


def write_configs(folder: Path, preset: str) -> Path:
    """A model folder of which only the configurations are there."""
    _, transformer, vae, index = PRESETS[preset]
    parts = ["tokenizer", "text_encoder", "vae", "scheduler", "transformer"]
    parts += ["transformer_2"] if "boundary_ratio" in index else []
    files = {
        "model_index.json": {"_class_name": "WanPipeline", **{part: ["x", "y"] for part in parts}, **index},
        "text_encoder/config.json": UMT5,
        "vae/config.json": vae,
        "scheduler/scheduler_config.json": SCHEDULER,
        "transformer/config.json": MODELS[transformer],
    }
    for path, values in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(values), encoding="utf-8")
    return folder


def make_run(folder: Path, preset: str, sets: list[str]) -> Run:
    """A run of a preset on the configurations of its model."""
    model = write_configs(folder / "model", preset)
    config = parse_config(apply_sets(read_preset(preset), [f"model.path={model}", *sets]), f"preset {preset}")
    return Run.create(folder / "run", config)


def measured(row: str, model: Model) -> int:
    """Bytes that are tracked for a row."""
    if row == "step":
        return tracked.sampling(model)
    if row == "decode":
        return tracked.decoding(model)
    if row == "encode":
        return tracked.encoding(model, UMT5)
    if row == "update":
        return tracked.updating(model)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        return tracked.updating(model, init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",)))
    finally:
        dist.destroy_process_group()


def planned(row: str, run: Run, known: dict[int, list[Need]]) -> Need:
    """What `rushes plan-memory` says of a row; `known` keeps its answers by the number of ranks."""
    stage = {"step": "rollout", "decode": "decode", "encode": "encode prompts"}.get(row, "train LoRA, checkpointing")
    ranks = RANKS if "ranks" in row else 0
    if ranks not in known:
        known[ranks] = plan_memory(run, ranks)
    return next(need for need in known[ranks] if need.stage == stage)


def compare(presets: list[str], rows: list[str], sets: list[str], told: Callable[[list[str]], None]) -> list[str]:
    """Lines of the table; `told` gets those that are there after each of them."""
    lines: list[str] = []
    for preset in presets:
        with tempfile.TemporaryDirectory(prefix="rushes-fake-") as folder:
            run = make_run(Path(folder), preset, sets)
            model, video = read_model(run.config), run.config.rollout
            known: dict[int, list[Need]] = {}
            for row in rows:
                need, found = planned(row, run, known), measured(row, model)
                ratio = need.device / found
                shape = f"{video.height}×{video.width}×{video.frames}"
                verdict = "yes" if LOW <= ratio <= HIGH else "**no**"
                lines.append(
                    f"| {PRESETS[preset][0]}, {shape} | {row} | {need.device / GIB:.2f} | {found / GIB:.2f} | "
                    f"{ratio:.2f} | {verdict} |"
                )
                told(lines)
    return lines


def main(words: list[str] | None = None) -> list[str]:
    """Track every row, print the table, and write it into the page if one is named."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", choices=PRESETS, help="only this one; may be repeated")
    parser.add_argument("--row", action="append", choices=ROWS, help="only this one; may be repeated")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--page", type=Path, help="write the table into this page")
    arguments = parser.parse_args(words)
    warnings.filterwarnings("ignore", module=r"torch\..*")
    presets, rows = arguments.preset or list(PRESETS), arguments.row or list(ROWS)

    def told(lines: list[str]) -> None:
        print(lines[-1], flush=True)
        if arguments.page is not None:
            replace_section(arguments.page, "memory", render(words, lines))

    return compare(presets, rows, arguments.sets, told)


def render(words: list[str], lines: list[str]) -> str:
    """The section of the page."""
    return "\n".join([
        f"`python bench/memory_fake.py {' '.join(words)}`, torch {torch.__version__}: GiB alive on one device at the "
        f"peak. Goal: predicted / tracked between {LOW} and {HIGH}.",
        "",
        "| model, shape of its preset | what | predicted | tracked | ratio | in the goal |",
        "|-|-|-|-|-|-|",
        *lines,
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
