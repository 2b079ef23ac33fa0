"""What `tools/convert_checkpoint.py` offers: import, export and manifest. torch is imported once the work begins."""

import argparse
from pathlib import Path

from megatron_klong.config import ConfigError
from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.conversion.weights_manifest import write_weights_manifest
from megatron_klong.model.conversion.workers import WorkerError, default_processes, one_thread
from megatron_klong.model.meta import hide_gpus


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """The three commands and their options."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|manifest")
    made = commands.add_parser("import", help="weights in Hugging Face format -> a Megatron checkpoint")
    made.add_argument("--hf", type=Path, required=True, help="folder with config.json and *.safetensors")
    made.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    sizes = made.add_argument_group("layout", "how the files are cut; the checkpoint loads on any other layout too")
    for name in ("tensor", "pipeline", "expert", "expert-tensor"):
        sizes.add_argument(f"--{name}-parallel", type=_positive, default=1, metavar="N")
    made.add_argument("--precision", choices=("bf16", "fp32"), help="of the checkpoint; without it: as the weights are")
    made.add_argument("--without-mtp", action="store_true", help="leave out the layer for multi-token prediction")
    made = commands.add_parser("export", help="a Megatron checkpoint -> weights in Hugging Face format")
    made.add_argument("--megatron", type=Path, required=True, help="a checkpoint, or the checkpoints folder of a run")
    made.add_argument("--hf", type=Path, required=True, help="folder to write")
    made.add_argument(
        "--like",
        type=Path,
        help="folder of the same model, whose tokenizer, chat template and generation settings are copied, and its "
        "layer for multi-token prediction if the checkpoint has none",
    )
    for made in commands.choices.values():
        made.add_argument("--overwrite", action="store_true", help="replace what is there")
    made = commands.add_parser("manifest", help="write checksums beside weights; an import compares them")
    made.add_argument("hf", type=Path, help="folder with config.json and *.safetensors")
    for made in commands.choices.values():
        made.add_argument("--processes", type=_positive, default=default_processes(), help="default: %(default)s")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1 is needed")
    return number


def convert(options: argparse.Namespace) -> str:
    """Do what the command line says; a line on what was done. Raises ValueError, OSError: what a user can mend."""
    hide_gpus()
    one_thread()
    try:
        if options.command == "manifest":
            return f"{write_weights_manifest(options.hf, processes=options.processes)}: written"
        return _import(options) if options.command == "import" else _export(options)
    except WorkerError as error:
        raise ConfigError(str(error)) from error


def _import(options: argparse.Namespace) -> str:
    layout = LayoutConfig(
        tensor_parallel=options.tensor_parallel,
        pipeline_parallel=options.pipeline_parallel,
        expert_parallel=options.expert_parallel,
        expert_tensor_parallel=options.expert_tensor_parallel,
    )
    from megatron_klong.model.conversion.import_checkpoint import import_checkpoint

    found = import_checkpoint(
        options.hf,
        options.out,
        layout,
        processes=options.processes,
        precision=options.precision,
        without_mtp=options.without_mtp,
        overwrite=options.overwrite,
    )
    size = sum(entry["bytes"] for entry in found.files.values())
    return (
        f"{found.folder}: {size / 1e9:,.2f} GB in {len(found.files)} files, cut for {layout.model_processes} processes"
    )


def _export(options: argparse.Namespace) -> str:
    from megatron_klong.model.conversion.export_checkpoint import export_checkpoint

    folder = export_checkpoint(
        options.megatron, options.hf, processes=options.processes, like=options.like, overwrite=options.overwrite
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    return f"{folder}: {size / 1e9:,.2f} GB in {len(list(folder.iterdir()))} files"
