"""API keys for the endpoints and the chat: made, listed, removed.

    python jobs/keys.py add NAME [--rpm 600]     prints the key; only its digest is kept
    python jobs/keys.py list
    python jobs/keys.py remove NAME              takes effect within seconds, without a restart

The file (--file, default runs/keys.json) is what `access.keys_file` names.
"""

import sys

from milm_ray.serving.keys import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
