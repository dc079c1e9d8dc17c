# For CPUs:  docker build -t smalti .
# With CUDA: docker build -t smalti:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
# Run it:    docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" smalti train mae --data images --out runs/a
#            (with CUDA: --gpus all; with data workers: --shm-size 8g)
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-slim

# torch.compile and Triton compile C and C++ at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# PyTorch's wheels bring CUDA themselves; the host needs a driver and the NVIDIA Container Toolkit.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch>=2.10" "torchvision>=0.25"

COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
COPY recipes /src/recipes
ARG EXTRAS=samples,onnx,detection
RUN pip install --no-cache-dir "/src[${EXTRAS}]" && rm -rf /src

RUN useradd --create-home --uid 1000 smalti && mkdir /work && chown smalti /work
USER smalti
# Writable for any --user.
ENV MPLCONFIGDIR=/tmp/matplotlib HF_HOME=/tmp/huggingface
WORKDIR /work
ENTRYPOINT ["smalti"]
CMD ["--help"]
