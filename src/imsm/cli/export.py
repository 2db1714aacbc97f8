"""`imsm export`: what others can read of a checkpoint."""

from __future__ import annotations

import argparse

from imsm.checkpoint import export_adapter
from imsm.errors import InputError


def run(argv: list[str]) -> int:
    """Runs the verb; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="imsm export",
        description="Give a checkpoint's adapter back in peft's own format (adapter_config.json, adapter_model.safetensors), "
        "byte for byte as it is there.",
    )
    parser.add_argument("checkpoint", help="folder or Hub name of a siamese checkpoint")
    parser.add_argument("--adapter-only", action="store_true", help="the adapter, without gate and relevance head")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for it")
    args = parser.parse_args(argv)
    if not args.adapter_only:
        raise InputError(
            "say what to export: --adapter-only gives the adapter in peft's format. Nothing else can be exported: gate and "
            "relevance head have no meaning without imsm"
        )
    folder = export_adapter(args.checkpoint, args.output)
    print(f"The adapter is in {folder}; load it with peft's PeftModel.from_pretrained.")
    return 0
