"""The configured models and their adapters as OpenAI-compatible endpoints at /v1, and the live chat
at /chat, until interrupted.

    python jobs/serve.py --config jobs/configs/quickstart.yaml [--port 8000]

For a cluster: `serve deploy serve_config.yaml`. Needs no adapter: one that a later finetune writes
into the workspace is served at once, as `<model>:mi`. Other machines are answered only with API
keys (jobs/keys.py): access.host=0.0.0.0 access.keys_file=runs/keys.json.
"""

import sys

from milm_ray.serving.running import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
