#!/bin/sh
# Score files on Dataflow, with a Triton that its workers can reach:
#
#   PROJECT=my-project REGION=europe-west4 BUCKET=gs://my-bucket ENDPOINT=http://10.0.0.5:8000 MODEL=digits \
#     pipelines/dataflow/launch.sh --files='gs://my-bucket/digits-*.csv' --input=image=image --keep=id \
#       --output='gs://my-bucket/scored-*.jsonl'
#
# Whatever stands behind it goes to score_files.py too, and wins over what stands in here. With
# --template_location=gs://my-bucket/templates/digits a classic template is written, and no job started.
set -eu
cd "$(dirname "$0")/../.."

# Where the job runs, and where its package and temporary files go.
set -- --project="${PROJECT:?the Google Cloud project}" --region="${REGION:?such as europe-west4}" "$@"
set -- --staging_location="${BUCKET:?such as gs://my-bucket}/staging" --temp_location="$BUCKET/temp" "$@"

# Every worker installs the library from a package that is built here and now. What it requires is
# in Beam's worker image already, so workers need no way to PyPI.
set -- --setup_file=./setup.py "$@"

# One Python process a worker. Dataflow's default is one a vCPU, each with a connection pool of its own:
# connections at the server are workers x processes x max_total at most, requests at once are workers x
# processes x max_concurrent_requests. Leave it out, and take larger machines, where Python is the bottleneck
# and not the model.
set -- --experiments=no_use_multiple_sdk_containers "$@"

# One process uses one core; the other one is for Dataflow's own part, which shuffles and reads.
set -- --machine_type=n2-standard-2 "$@"

# Bundles at once in a process, each a thread. One thread keeps max_concurrent_requests in flight by itself;
# the second one parses rows while the first one waits. More of them only wait for each other.
set -- --number_of_worker_harness_threads=2 "$@"

# Dataflow adds workers while there is work. What the server can take is the limit, not what the job would
# like: workers x processes x max_concurrent_requests should stay below the requests that Triton runs and
# queues at once. Time lost to an overloaded server is reported as throttling, so that it is not answered
# with more workers.
set -- --autoscaling_algorithm=THROUGHPUT_BASED --max_num_workers="${MAX_WORKERS:-8}" "$@"

# A Triton with a private address is reached from its own VPC. Workers without public addresses need Private
# Google Access on the subnetwork for Cloud Storage.
if [ -n "${SUBNETWORK:-}" ]; then
  set -- --subnetwork="regions/$REGION/subnetworks/$SUBNETWORK" --no_use_public_ips "$@"
fi

# A token is never given here but as --auth_token=env:NAME or file:PATH, which is read on the worker: the
# worker's image sets the variable, or holds a program that writes the file.
set -- --endpoint="${ENDPOINT:?URL of the Triton server}" --model="${MODEL:?the name of the model}" "$@"

exec "${PYTHON:-python3}" pipelines/score_files.py --runner=DataflowRunner "$@"
