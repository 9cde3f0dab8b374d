# docker build -t rushes .
# docker run --rm --init --gpus all --shm-size 16g -v /data:/data rushes loop /data/runs/first --iterations 10
# docker run --rm --init --gpus all --shm-size 16g -v /data:/data --entrypoint torchrun rushes \
#   --standalone --nproc-per-node 8 --no-python rushes loop /data/runs/first --iterations 10
#
# PyTorch's wheels bring CUDA; the host needs a driver and the NVIDIA container toolkit. A model and its prompts are
# mounted, not copied. Never built by us; what it copies was installed in a new environment as its RUN line does, and ran
# an iteration of the demo there.
FROM python:3.12-slim-bookworm

# of the optional parts: s3, gs, wandb
ARG EXTRAS=s3,gs

RUN useradd --create-home --uid 1000 rushes && install --directory --owner rushes /data
WORKDIR /opt/rushes
COPY constraints.txt pyproject.toml README.md cli.py ./
COPY shards shards
COPY rollout rollout
COPY score score
COPY train train
RUN pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"
USER rushes
WORKDIR /data
ENTRYPOINT ["rushes"]
CMD ["--help"]
