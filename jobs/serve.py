"""The configured models and their adapters as OpenAI-compatible endpoints, until interrupted.

    python jobs/serve.py --config jobs/configs/quickstart.yaml [--port 8000]

For a cluster: `serve deploy serve_config.yaml`. Needs no adapter: one that a later finetune writes
into the workspace is served at once, as `<model>:mi`.
"""

import sys

from milm_ray.serving.running import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
