# The student, and what prepares its data: `docker build -f docker/student.Dockerfile -t funmatch-student .`
#
# Down to the line of dashes this file equals teacher.Dockerfile, which says why.
FROM python:3.11-slim-bookworm
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN useradd --uid 1000 --user-group --no-create-home --home-dir /tmp funmatch \
 && mkdir /app /data /runs /cache /keys /locks && chown funmatch:funmatch /data /runs /cache /keys /locks
WORKDIR /app
COPY requirements.lock ./
RUN python -m pip install --constraint requirements.lock torch torchvision timm nvidia-dali-cuda130
# ----------------------------------------------------------------------------------------------------------------------
COPY pyproject.toml ./
RUN python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; print(*extras['student'], *extras['data'], sep='\n')" \
      > /tmp/student.txt \
 && python -m pip install --constraint requirements.lock --requirement /tmp/student.txt && rm /tmp/student.txt
COPY protos protos
COPY views views
COPY models models
COPY data_prep data_prep
COPY student_trainer student_trainer
RUN python -m compileall -q .

# With a store that torchrun keeps over its restarts (the default) ranks that begin again may read what those before them
# wrote there, and a host that comes back waits for an address that nobody tells it.
ENV TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface FUNMATCH_WEIGHTS=/cache/weights MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor TRITON_CACHE_DIR=/cache/triton CUDA_CACHE_PATH=/cache/cuda \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
USER funmatch
EXPOSE 9091
STOPSIGNAL SIGTERM
ENTRYPOINT ["torchrun"]
