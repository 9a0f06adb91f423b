# NVIDIA's PyTorch image brings what the package index cannot: apex (the name there is another project; its fused norm is
# used, its Adam is not: torch's is fused as well), flash-attn and transformer-engine, all built against the image's own
# torch. So the one rule here is that pip must not replace that torch.
# No test builds this image, and nothing has run on a GPU yet.
#
#   docker build -t megaloop .
#   docker run --gpus all --ipc=host --rm -v "$PWD":/data -w /data megaloop train /opt/megaloop/configs/smollm_360m_baseline.yaml
ARG TAG=25.10-py3
FROM nvcr.io/nvidia/pytorch:${TAG}

WORKDIR /opt/megaloop
COPY setup.py pyproject.toml README.md LICENSE ./

# The image's builds carry versions of their own (2.9.0a0+...nv25.10), which pip takes for older than the release and
# would replace. Written into a constraint, they are the only ones it may choose; PIP_CONSTRAINT of the image stays in force.
RUN pip list --format=freeze \
    | grep -E '^(torch|torchvision|triton|numpy|flash[-_]attn|apex|transformer[-_]engine)==' > /opt/image-constraints.txt \
    && cat /opt/image-constraints.txt

# mosaicml-streaming and deepspeed come without their dependencies: streaming asks for an older numpy and for torchvision,
# deepspeed for torch, and the image already has all three. What they need besides is named here; the cloud storage
# libraries of streaming (boto3, google-cloud-storage, ...) are not: install the one that your shards' place needs.
RUN pip install --no-cache-dir -c /opt/image-constraints.txt \
        'hjson' 'pydantic>=2.7' 'pyyaml>=6' 'rich>=13.7' 'safetensors>=0.5' 'sentencepiece>=0.2' 'tensorboard>=2.16' \
        'tokenizers>=0.21' 'transformers>=4.51,<5' 'typer>=0.15' 'xxhash>=3.4' 'zstandard>=0.22' 'pyarrow>=15' 'scipy>=1.11' \
        'einops' 'msgpack' 'ninja' 'psutil' 'py-cpuinfo' 'tqdm' \
        'brotli' 'catalogue<3' 'cramjam' 'python-snappy' 'zstd' 'requests' \
    && pip install --no-cache-dir --no-deps 'deepspeed>=0.19.8,<0.19.9' 'mosaicml-streaming>=0.13,<0.14' 'spmd_types>=0.3,<0.4'

COPY megaloop megaloop
COPY data_prep data_prep
COPY launchers launchers
COPY configs configs
RUN pip install --no-cache-dir --no-deps . \
    && python -c 'import torch, deepspeed, megaloop; assert torch.version.cuda, "pip replaced the CUDA torch"' \
    && megaloop --version

ENTRYPOINT ["megaloop"]
