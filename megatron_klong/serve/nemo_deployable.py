"""Export-Deploy's deployable: whether a configuration suits it, loading it, and setting it up for rollouts.

It has never run on a GPU here; names and shapes are those of nemo-export-deploy 0.7.0 on megatron-core 0.19.0
(tests/unit/serve/test_nemo.py). Imports no torch by itself.
"""

import importlib
import math
import os
import socket
from pathlib import Path
from typing import Any

import yaml

from megatron_klong.config import ConfigError
from megatron_klong.model.config import LayoutConfig
from megatron_klong.serve.config import ServeConfig

# what importing a half-installed GPU stack raises: transformer-engine's empty package a RuntimeError, a library that
# is not there an OSError; upstream itself reckons with AssertionError
IMPORT_FAULTS = (ImportError, RuntimeError, OSError, AssertionError)
_RUN_CONFIG = "run_config.yaml"  # what Megatron-Bridge writes into a checkpoint, and finds its model by
_REPLICAS = 4096  # seeds of one server


def check_config(config: ServeConfig) -> None:
    """Raises ConfigError, naming the field and the cure, for what Export-Deploy cannot do."""
    _check_weights(Path(config.weights), config.precision)
    layout = config.layout
    if layout.context_parallel > 1 or layout.virtual_pipeline_parallel > 1 or layout.layers_per_stage:
        raise ConfigError(
            "layout: NeMo takes no context_parallel, virtual_pipeline_parallel or layers_per_stage; leave them out"
        )
    if config.max_requests % layout.tensor_parallel:
        raise ConfigError(
            f"max_requests {config.max_requests}: NeMo needs a multiple of layout.tensor_parallel "
            f"{layout.tensor_parallel}"
        )
    if config.kv_cache_gib % 1:
        raise ConfigError(
            f"kv_cache_gib {config.kv_cache_gib}: NeMo takes whole GiB; give {int(config.kv_cache_gib) + 1}"
        )
    for name in ("step_tokens", "block_tokens"):
        if getattr(config, name) != type(config).model_fields[name].default:
            raise ConfigError(f"{name} {getattr(config, name)}: NeMo has no such setting; leave it out")
    if config.routes:
        raise ConfigError("routes: NeMo does not record them; leave it out, or serve with --engine megatron")


def _check_weights(folder: Path, precision: str) -> None:
    file = folder / _RUN_CONFIG
    if not file.is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{_RUN_CONFIG}"))
        cure = (
            f"give {folder / inside[-1]}"
            if inside
            else "export Hugging Face format and convert it where the GPU set is installed: "
            "python -c \"from megatron.bridge import AutoBridge; AutoBridge.import_ckpt('FOLDER', 'NEW')\", then "
            "give NEW/iter_0000000"
        )
        raise ConfigError(f"weights {folder}: no {_RUN_CONFIG}, so NeMo cannot read it; {cure}")
    try:
        model = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
        found = next((name for name in ("bf16", "fp16") if model.get(name)), "fp32")
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"weights {file}: not readable ({error}); convert the weights again") from None
    if found != precision:
        raise ConfigError(
            f"precision {precision}: {file} says {found}, and NeMo computes as that says; give --precision as it says, "
            "or convert the weights again"
        )


def gpus_needed(layout: LayoutConfig) -> int:
    """By one copy of the model: its experts may be divided otherwise than the rest."""
    return layout.pipeline_parallel * math.lcm(
        layout.tensor_parallel, layout.expert_parallel * layout.expert_tensor_parallel
    )


def not_installed(error: BaseException) -> ConfigError:
    """What to tell who asked for NeMo where it cannot be had."""
    return ConfigError(
        f"engine: NeMo cannot be used here ({type(error).__name__}: {error}); it needs a GPU and `pip install -r "
        "requirements-gpu.txt` (see that file), or serve with --engine megatron"
    )


def load(config: ServeConfig) -> Any:
    """Export-Deploy's deployable, ready for rollouts; on all ranks. Raises ConfigError, and what loading raises."""
    try:
        torch = importlib.import_module("torch")
        deployables = importlib.import_module("nemo_deploy.llm.megatronllm_deployable")
        unavailable = importlib.import_module("nemo_export_deploy_common.import_utils").UnavailableError
    except IMPORT_FAULTS as error:
        raise not_installed(error) from error
    if not torch.cuda.is_available():
        raise not_installed(RuntimeError("torch finds no CUDA device"))
    layout, processes = config.layout, int(os.environ.get("WORLD_SIZE", "1"))
    if processes % gpus_needed(layout):
        raise ConfigError(
            f"layout: it divides the model among {gpus_needed(layout)} processes, but there are {processes}; start so "
            "many, or a multiple, with torchrun --nproc-per-node"
        )
    if "RANK" not in os.environ:
        _rendezvous_alone()
    try:
        deployable = deployables.MegatronLLMDeployable(
            megatron_checkpoint_filepath=config.weights,
            tensor_model_parallel_size=layout.tensor_parallel,
            pipeline_model_parallel_size=layout.pipeline_parallel,
            expert_model_parallel_size=layout.expert_parallel,
            expert_tensor_parallel_size=layout.expert_tensor_parallel,
            sequence_parallel=layout.tensor_parallel > 1,  # which Megatron's experts ask for
            inference_max_seq_length=config.max_sequence_length,
            max_batch_size=config.max_requests,
            buffer_size_gb=config.kv_cache_gib,
        )
    except unavailable as error:  # it is not an ImportError
        raise not_installed(error) from error
    try:
        _set_up(deployable.mcore_engine, config)
    except ConfigError:
        end_coordinator(deployable.mcore_engine)
        raise
    return deployable


def end_coordinator(engine: Any) -> None:
    """The process between engine and callers is no daemon: left alone, it would keep this one from exiting."""
    process = getattr(engine.engine, "inference_coordinator_process", None)  # rank 0 has one
    if process is not None and process.is_alive():
        process.kill()


def _rendezvous_alone() -> None:
    """A single process without a launcher would take port 6000, and so would the next one on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))


def _set_up(engine: Any, config: ServeConfig) -> None:
    """What the deployable's constructor does not take (`random_seed` it takes and drops); before the first request.

    Megatron reads these anew at every step; upstream's own main branch sets some of them in the same way.
    """
    context, controller = engine.engine.context, engine.controller
    settings: tuple[tuple[Any, str, Any], ...] = (
        (context.config, "logprobs_mode", "processed_logprobs"),  # else of temperature 1, unfiltered
        # else those of a whole prompt: 5 GB for 16384 tokens of GLM-4.5's vocabulary
        (context.config, "materialize_only_last_token_logits", True),
        (engine.engine, "materialize_only_last_token_logits", True),
        (context, "enable_chunked_prefill", True),  # else a prompt above 16384 tokens is refused
        (engine.engine, "enable_chunked_prefill", True),
    )
    for owner, name, value in settings:
        if not hasattr(owner, name):
            raise ConfigError(
                f"engine: this version of megatron-core has no {type(owner).__name__}.{name}; install "
                "requirements-gpu.txt, or serve with --engine megatron"
            )
        setattr(owner, name, value)
    replica = controller.sampling_rng.initial_seed() - controller.model_config.inference_sampling_seed
    controller.sampling_rng.manual_seed((config.seed * _REPLICAS + replica) % 2**63)
    config.check_cache((context.kv_block_allocator.total_count - 1) * context.block_size_tokens)  # a block is set aside
