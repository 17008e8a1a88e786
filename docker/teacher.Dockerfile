# The teacher: `docker build -f docker/teacher.Dockerfile -t funmatch-teacher .` from the repository's root.
#
# CUDA comes with the wheels (torch and DALI bring their own libraries), so that the base is a plain Python and not one
# of the CUDA images. Down to the line of dashes this file equals student.Dockerfile: the same steps are the same
# layers, built, stored and pulled once. (One file with two targets was the alternative: it would be rebuilt and read
# as one, though only these lines are shared; tests/test_deploy.py keeps them equal.)
FROM python:3.11-slim-bookworm
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN useradd --uid 1000 --user-group --no-create-home --home-dir /tmp funmatch \
 && mkdir /app /data /runs /cache /keys /locks && chown funmatch:funmatch /data /runs /cache /keys /locks
WORKDIR /app
COPY requirements.lock ./
RUN python -m pip install --constraint requirements.lock torch torchvision timm nvidia-dali-cuda130
# ----------------------------------------------------------------------------------------------------------------------
# torch.compile, used on CUDA, has Triton compile a small C launcher at run time.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['teacher'], sep='\n')" \
      > /tmp/teacher.txt \
 && python -m pip install --constraint requirements.lock --requirement /tmp/teacher.txt && rm /tmp/teacher.txt
# This image makes the keys of a fleet, too: three folders, for three volumes.
COPY docker/make_keys.sh docker/
RUN mkdir /keys/authority /keys/teacher /keys/student && chown funmatch:funmatch /keys/*
COPY protos protos
COPY views views
COPY models models
COPY data_prep data_prep
COPY teacher_server teacher_server
RUN python -m compileall -q .

# Everything that is written lies on volumes: the root file system may be read-only. What torch compiles is loaded from
# the cache's volume and not from /tmp, which may be mounted noexec.
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface FUNMATCH_WEIGHTS=/cache/weights \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor TRITON_CACHE_DIR=/cache/triton CUDA_CACHE_PATH=/cache/cuda \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
USER funmatch
EXPOSE 50051 9090
STOPSIGNAL SIGTERM
# A large network downloads, compiles and warms up for minutes before it serves.
HEALTHCHECK --interval=10s --timeout=10s --start-period=900s --retries=3 CMD ["python", "-m", "teacher_server.probe"]
ENTRYPOINT ["python", "-m", "teacher_server.main"]
