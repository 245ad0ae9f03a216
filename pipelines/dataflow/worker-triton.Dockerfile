# An image for Dataflow workers that run a Triton beside the pipeline: WorkerTriton finds it in /opt/tritonserver.
# Built from the repository's folder:
#   docker build --file pipelines/dataflow/worker-triton.Dockerfile --tag IMAGE .
# Triton's image is the base, as its libraries (CUDA, TensorRT, Ubuntu's glibc) are all over it.

# The release that requirements.txt pins: the machine that submits and the workers must run the same Beam. Its Python
# must be that of Triton's image (3.12 since 24.11).
FROM apache/beam_python3.12_sdk:2.77.0 AS beam

# Other variants hold other backends: vllm-python-py3, trtllm-python-py3.
FROM nvcr.io/nvidia/tritonserver:26.06-py3

COPY --from=beam /opt/apache/beam /opt/apache/beam

# The pipeline's packages have an environment of their own: Triton's Python models keep the image's, NumPy included.
RUN apt-get update \
  && apt-get install --yes --no-install-recommends python3-venv \
  && rm -rf /var/lib/apt/lists/* \
  && python3 -m venv /opt/pipeline
ENV PATH=/opt/pipeline/bin:$PATH

WORKDIR /template
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md ./
COPY beam_triton beam_triton
# The versions of what Beam needs are those of Beam's own image.
COPY engines/worker_constraints.txt ./
RUN pip install --no-cache-dir --constraint worker_constraints.txt 'apache-beam[gcp]==2.77.0' setuptools wheel
RUN pip install --no-cache-dir --constraint worker_constraints.txt --no-build-isolation .

# Beam's boot program would make an environment of its own, without these packages.
ENV RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
ENTRYPOINT ["/opt/apache/beam/boot"]
