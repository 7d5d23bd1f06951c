"""`worker.py` with the Hub at an address and a cache in a folder: `hub_worker.py RECIPE hub=URL cache=FOLDER ...`."""

import os
import runpy
import sys
from pathlib import Path

from huggingface_hub import constants, file_download

options = dict(option.split("=", 1) for option in sys.argv[2:4])
del sys.argv[2:4]
# what HF_ENDPOINT and HF_HOME would have set: this process is a fork of one that has imported the library
constants.ENDPOINT = options["hub"]
file_download.HUGGINGFACE_CO_URL_TEMPLATE = options["hub"] + "/{repo_id}/resolve/{revision}/{filename}"
constants.HF_HUB_CACHE = f"{options['cache']}/hf"
os.environ |= {"HF_ENDPOINT": options["hub"], "NEMOTRON_H_CACHE": options["cache"]}
os.environ |= {"HTTPS_PROXY": "http://127.0.0.1:9"}  # nothing leaves this machine
runpy.run_path(str(Path(__file__).with_name("worker.py")), run_name="__main__")
