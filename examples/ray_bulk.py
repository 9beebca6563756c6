"""A data set through two engines on a Ray cluster, here one of this machine."""

import tempfile

import ray
from ray.data import from_items

from stars_fast import StarsParams, demo
from stars_fast.cluster.bulk import calibrate, map_rows
from stars_fast.cluster.files import read_records, remaining, write_records
from stars_fast.cluster.rows import as_rows

models = (str(demo.model_dir()), str(demo.reward_model_dir()))
options = {
    "params": StarsParams(segment_length=16, max_tokens=32, target_reward="auto"),
    "seed": 1,
    "num_pages": 400,
}

if __name__ == "__main__":
    # On a cluster: ray.init("auto"). A CPU more than the workers have, for what writes.
    # Workers import what is installed, nothing from the folders where this was started.
    only_installed = {"working_dir": tempfile.mkdtemp()}
    ray.init(num_cpus=3, object_store_memory=200 * 2**20, runtime_env=only_installed)
    rows = as_rows({"prompt": prompt} for prompt in demo.prompts(16))  # or read_rows(FILE)
    calibration = calibrate(rows, *models, **options)
    folder = tempfile.mkdtemp()  # on a cluster: one that all machines share
    todo = from_items(remaining(rows, folder))  # all; in a second run, what the first has not done
    results = map_rows(todo, *models, workers=2, batch_size=8, calibration=calibration, **options)
    write_records(results, folder)
    for record in read_records(folder):
        print(record["line"], record["prompt"], "->", record["outputs"][0]["text"])
    ray.shutdown()
