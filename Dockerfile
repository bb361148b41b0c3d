# docker build -t vesselrl .
# docker build -t vesselrl --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .     (for a GPU)
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY vesselrl ./vesselrl
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --constraint constraints.txt . && rm -r /source
# Runs and results are written to the folder that is mounted here.
WORKDIR /work
ENTRYPOINT ["vesselrl"]
