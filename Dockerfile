# A server for the default model:  docker build -t medusa-apar . && docker run -p 8000:8000 medusa-apar
# Another model:                   docker run -p 8000:8000 -v medusa-apar:/cache medusa-apar owner/model --fork lists
# Without an argument pip's torch is installed, with CUDA: run it with  --gpus all. A CPU image is several gigabytes smaller:
# docker build --build-arg TORCH_INDEX=...  with the address that PyTorch's installation page gives for CPU builds.
FROM python:3.11-slim AS wheel
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir build==1.6.1 && python -m build --wheel

FROM python:3.11-slim
# The compiled step is made by the machine that runs it, for its own processor: the compiler stays.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
# An index with CPU builds of torch, whose address PyTorch's installation page gives; without one, pip's own.
ARG TORCH_INDEX=
COPY constraints.txt /tmp/
COPY --from=wheel /source/dist /tmp/dist
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --constraint /tmp/constraints.txt --index-url "$TORCH_INDEX" --no-deps torch; fi \
    && for wheel in /tmp/dist/*.whl; do pip install --no-cache-dir --constraint /tmp/constraints.txt "${wheel}[serve,structured]"; done \
    && rm -r /tmp/dist /tmp/constraints.txt \
    && useradd --create-home --uid 1000 server \
    && mkdir /cache && chown server /cache
USER 1000
ENV MEDUSA_APAR_CACHE=/cache HF_HOME=/cache/hub
# The default model is in the image, so that a container starts without a network.
RUN python -c "from medusa_apar.models import hub; hub.embedded_model_dir()"
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=15s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["medusa-apar", "serve", "--host", "0.0.0.0"]
CMD ["smollm2-135m", "--quantize", "int8"]
