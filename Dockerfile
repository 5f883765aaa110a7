# docker build -t priorhole .                          for processors
# docker build --build-arg TORCH=cu130 -t priorhole .  for NVIDIA's GPUs; run it with --gpus all
FROM python:3.11-slim
ARG TORCH=cpu
# A wheel of this index has a local version, which pip takes before PyPI's of the same number.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/${TORCH} PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /priorhole
COPY . .
RUN make .venv/installed
ENV PATH=/priorhole/.venv/bin:$PATH
CMD ["make", "repro"]
