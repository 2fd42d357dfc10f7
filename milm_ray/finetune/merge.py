"""Export: a base and its adapter as one checkpoint that loads without PEFT.

python -m milm_ray.finetune.merge --base bases/llama3 --adapter adapters/llama3 --out merged
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from milm_ray.errors import UserError

_COPIED = ("README.md", "chat_template.jinja")


def merge(base: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Write base + adapter to `out` in the base's layout and precision; returns `out`.

    base: a prepared base (models.checkpoint.prepare_base); adapter: a directory of adapters/. The
    tokenizer, the chat template and the model card come along. The sum is taken in fp32, so that a
    bf16 base loses no more than its own rounding.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    for place, file in ((base, "config.json"), (adapter, "adapter_config.json")):
        if not (place / file).is_file():
            raise UserError(f"{place} holds no {file}", "name a prepared base and a PEFT adapter")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty", "choose another --out, or remove it")
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    precision = AutoConfig.from_pretrained(base).dtype or torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.to(precision).save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    for name in _COPIED:
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, out / name)
    return out


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, meaning in (
        ("base", "prepared base checkpoint"),
        ("adapter", "directory of adapters/"),
        ("out", "directory to write"),
    ):
        parser.add_argument(f"--{name}", required=True, help=meaning)
    options = parser.parse_args()
    try:
        print(f"wrote {merge(options.base, options.adapter, options.out)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
