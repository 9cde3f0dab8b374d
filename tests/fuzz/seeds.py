"""Makes the corpus: one small whole file of each kind, from runs as the program writes them.

    python -m tests.fuzz.seeds     # writes tests/fuzz/corpus/KIND/whole*

What a fuzzer has found lies beside them as `found-*`, and stays.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pyarrow

from shards import parquet
from shards.config import RunConfig
from shards.records.reading import CHECKSUM, sealed
from shards.run import Stage
from shards.run_toml import dump_config
from tests.faults import small_run
from tests.support.shard_fixtures import make_sample, make_video

CORPUS = Path(__file__).parent / "corpus"


def of_run(stage: Stage) -> dict[str, bytes]:
    """The content of the files of a run, by kind."""
    files = small_run.records(stage) | small_run.others(stage)
    found = {kind: path.read_bytes() for kind, path in files.items() if kind not in ("scores", "advantages", "weights")}
    found["table"] = files["scores"].read_bytes()
    found["table-2"] = files["advantages"].read_bytes()
    found["json"] = found["summary"]
    sample = make_sample(stage, "i000000-p000000", 0)
    found["sample"] = json.dumps(sample.meta).encode()
    found["tensors"] = _tensors(stage)
    found["claim"] = json.dumps(small_run.OWNER).encode() + b"\n000000000001\n"
    found["expert"] = _expert(files["policy"])
    return found


def of_user() -> dict[str, bytes]:
    """The content of files that a user brings, by kind."""
    rows = [{"prompt": f'a sign "{word}"', "target": word} for word in ("FILM", "CAT")]
    table = pyarrow.Table.from_pylist(rows)
    return {
        "header": make_video(0),
        "video": make_video(0),
        "toml": dump_config(RunConfig()).encode(),
        "text": b'a sign "FILM"\n# a comment\n\na sign "CAT"\n',
        "csv": b'prompt,target\n"a sign ""FILM""",FILM\r\na cat,CAT\n',
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "parquet": parquet.encode(table, {}),
    }


def main() -> None:
    """Write the corpus anew."""
    with tempfile.TemporaryDirectory() as folder:
        found = of_run(small_run.make(Path(folder) / "run")) | of_user()
    for name, data in found.items():
        kind, _, number = name.partition("-")
        _write(CORPUS / kind / f"whole{number}", data)
        if data.startswith(b"{") and (bare := _without_checksum(data)) != data:
            _write(CORPUS / kind / f"bare{number}", bare)  # its checksum does not hide what else the reader looks at


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _without_checksum(data: bytes) -> bytes:
    lines = [json.loads(line) for line in data.splitlines() if line.startswith(b"{")]
    return b"".join(json.dumps({k: v for k, v in one.items() if k != CHECKSUM}).encode() + b"\n" for one in lines)


def _tensors(stage: Stage) -> bytes:
    from shards import tensors
    from tests.support.shard_fixtures import make_group

    return b"".join(bytes(part) for part in tensors.encode(make_group("i000000-p000000")))


def _expert(policy: Path) -> bytes:
    """What a process leaves that trained one expert alone."""
    hashes = json.loads(policy.read_bytes())["adapters"]
    record = {"schema": 1, "iteration": 0, "expert": "high_noise", "train_plan": "0" * 64, "adapters": hashes}
    return sealed(record | {"average": hashes, "unmoved": [], "replay": 0.0}, "expert.json")


if __name__ == "__main__":
    main()
